//! The test against as much of an API server as it needs.

use std::sync::{Arc, Mutex};

use http::{Method, Request, Response};
use kube::client::Body;
use serde_json::{Value, json};

use super::super::matrix::{Outcome, Protocol, row};
use super::*;

#[derive(Debug, Default, Clone, Copy, PartialEq)]
enum Fault {
    #[default]
    None,
    /// Pods that probe fail.
    Probers,
    /// The pod of node2 that answers has no image, and nobody may list SkeinNodes.
    Absent,
    /// The log of one pod cannot be read.
    Log,
    /// The second pod's creation is not answered, and the pod comes when the others are removed.
    Late,
    /// Pods are not removed.
    Stay,
}

/// As much of an API server as the test needs: pods run as soon as they are made.
#[derive(Default)]
struct Fake {
    fault: Fault,
    pods: Vec<Value>,
    /// Comes into being when nobody waits for it any more.
    late: Option<Value>,
    targets: Vec<Target>,
    removed: usize,
}

fn list(kind: &str, items: &[Value]) -> Value {
    json!({ "kind": kind, "apiVersion": "v1", "metadata": {}, "items": items })
}

impl Fake {
    /// `None` is no answer.
    fn answer(&mut self, method: &Method, path: &str, body: &[u8]) -> Option<(u16, Vec<u8>)> {
        let node = |name: &str| json!({ "metadata": { "name": name } });
        let value = match (method, path) {
            (&Method::GET, path) if path.contains("/daemonsets/") => json!({
                "metadata": { "name": "skein" },
                "spec": { "selector": {}, "template": { "spec": { "containers": [{
                    "name": "agent", "image": "skein:test", "imagePullPolicy": "Never",
                }] } } },
            }),
            (&Method::GET, "/api/v1/nodes") => list("NodeList", &[node("node1"), node("node2")]),
            (&Method::GET, path) if path.ends_with("/skeinnodes") => match self.fault {
                Fault::Absent => return Some((403, b"{}".to_vec())),
                _ => list(
                    "SkeinNodeList",
                    &["1", "2"].map(|n| {
                        json!({
                            "apiVersion": "skein.network/v1alpha1", "kind": "SkeinNode",
                            "metadata": { "name": format!("node{n}") },
                            "spec": {
                                "publicKey": "x", "endpoints": [],
                                "podCIDRs": [format!("10.244.{n}.0/24")],
                            },
                        })
                    }),
                ),
            },
            (&Method::POST, path) if path.ends_with("/configmaps") => {
                let map: ConfigMap = serde_json::from_slice(body).unwrap();
                assert_eq!(map.metadata.owner_references.as_ref().unwrap()[0].uid, "uid-0");
                let packed = map.binary_data.as_ref().unwrap().values().next().unwrap();
                self.targets = pods::unpack(&packed.0[..]).unwrap();
                json!(map)
            }
            (&Method::POST, _) => {
                let pod = self.pod(serde_json::from_slice(body).unwrap());
                if self.fault == Fault::Late && self.pods.len() == 1 {
                    self.late = Some(pod);
                    return None;
                }
                self.pods.push(pod.clone());
                pod
            }
            (&Method::GET, path) if path.ends_with("/log") => return Some(self.log(path)),
            (&Method::DELETE, _) => {
                if self.fault != Fault::Stay {
                    self.removed += self.pods.len();
                    self.pods.clear();
                }
                list("PodList", &[])
            }
            (&Method::GET, _) => {
                let seen = list("PodList", &self.pods);
                if self.removed > 0 {
                    self.pods.extend(self.late.take());
                }
                seen
            }
            other => panic!("nobody asks that: {other:?}"),
        };
        Some((200, value.to_string().into_bytes()))
    }

    fn pod(&self, mut pod: Value) -> Value {
        let answers = pod["spec"]["containers"][0]["args"][1] == "--answer";
        let absent = self.fault == Fault::Absent && pod["spec"]["nodeName"] == "node2";
        let phase = match answers {
            true if absent => "Pending",
            true => "Running",
            false if self.fault == Fault::Probers => "Failed",
            false => "Succeeded",
        };
        let n = self.pods.len();
        pod["metadata"]["uid"] = json!(format!("uid-{n}"));
        let ip = format!("10.244.{}.9", n + 1);
        pod["status"] = json!({ "phase": phase, "podIPs": [{ "ip": ip }] });
        pod
    }

    /// What a pod says that probes as it was told.
    fn log(&self, path: &str) -> (u16, Vec<u8>) {
        let name = path.split('/').nth_back(1).unwrap();
        let pod = self.pods.iter().find(|pod| pod["metadata"]["name"] == name).unwrap();
        let (node, host) = (&pod["spec"]["nodeName"], pod["spec"]["hostNetwork"] == true);
        match self.fault {
            Fault::Probers => return (200, b"no such option\n".to_vec()),
            Fault::Log if node == "node1" && host => return (500, b"{}".to_vec()),
            _ => {}
        }
        let bad = |target: &Target| node == "node2" && !host && target.name == "node@node1";
        let row = row(self.targets.iter().map(|target| {
            let outcome = Outcome {
                address: target.address,
                protocol: Protocol::Icmp,
                bytes: 84,
                round_trip_us: Some(7),
                error: bad(target).then(|| "no answer".to_owned()),
            };
            (target.name.as_str(), outcome)
        }));
        let row = serde_json::to_string(&row).unwrap();
        (200, format!("a line before\n{row}\n").into_bytes())
    }
}

struct Ran {
    matrix: anyhow::Result<Matrix>,
    fake: Arc<Mutex<Fake>>,
    said: String,
    took: Duration,
}

async fn run(fault: Fault) -> Ran {
    let fake = Arc::new(Mutex::new(Fake { fault, ..Fake::default() }));
    let shared = Arc::clone(&fake);
    let service = tower::service_fn(move |request: Request<Body>| {
        let fake = Arc::clone(&shared);
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect_bytes().await?;
            let path = parts.uri.path().to_owned();
            let answer = fake.lock().unwrap().answer(&parts.method, &path, &body);
            let Some((status, text)) = answer else { std::future::pending().await };
            let mut response = Response::new(Body::from(text));
            *response.status_mut() = status.try_into().unwrap();
            Ok::<_, kube::Error>(response)
        }
    });
    let options = Options {
        kubeconfig: None,
        namespace: "default",
        agents_namespace: "kube-system",
        daemonset: "skein",
        timeout: Duration::from_secs(20),
    };
    let said = Mutex::new(String::new());
    let say = |text: &str| *said.lock().unwrap() += text;
    let start = Instant::now();
    let matrix = test_with(Client::new(service, "default"), &options, say).await;
    Ran { matrix, fake, said: said.into_inner().unwrap(), took: start.elapsed() }
}

#[tokio::test(start_paused = true)]
async fn every_node_and_a_pod_on_it_probe_all_and_nothing_is_left() {
    let Ran { matrix, fake, .. } = run(Fault::None).await;
    let matrix = matrix.unwrap();
    // Two nodes and two pods, each to two pods and two nodes.
    assert!(matrix.trouble().unwrap().contains("1 of 16 pairs"));
    let text = matrix.render();
    assert!(text.contains("pod@node2") && text.contains("FAIL"), "{text}");
    let fake = fake.lock().unwrap();
    assert!(fake.pods.is_empty());
    assert_eq!(fake.removed, 6);
}

#[tokio::test(start_paused = true)]
async fn pods_that_fail_are_rows_that_fail() {
    let Ran { matrix, fake, .. } = run(Fault::Probers).await;
    let matrix = matrix.unwrap();
    assert_eq!(matrix.trouble().unwrap(), "4 could not probe");
    assert!(matrix.render().contains("no such option"));
    assert!(fake.lock().unwrap().pods.is_empty());
}

#[tokio::test(start_paused = true)]
async fn who_does_not_answer_is_a_column_that_fails() {
    let matrix = run(Fault::Absent).await.matrix.unwrap();
    assert_eq!(matrix.trouble().unwrap(), "2 could not be probed");
    let text = matrix.render();
    for line in [
        "pod@node2 could not be probed: no answering pod: skein-connectivity-",
        "node@* could not be probed: cannot list SkeinNodes: ",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_log_that_cannot_be_read_is_one_row() {
    let matrix = run(Fault::Log).await.matrix.unwrap();
    let trouble = matrix.trouble().unwrap();
    assert!(trouble.contains("1 could not probe; 1 of 12 pairs fail"), "{trouble}");
    let text = matrix.render();
    assert!(text.contains("node@node1 could not probe: cannot read the log of "), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_comes_late_is_removed_and_the_time_is_kept() {
    let ran = run(Fault::Late).await;
    let error = format!("{:#}", ran.matrix.unwrap_err());
    assert!(error.contains("cannot create pods"), "{error}");
    assert!(error.contains("the 20 s of --timeout are over"), "{error}");
    assert!(ran.took < Duration::from_secs(23), "{:?}", ran.took);
    let fake = ran.fake.lock().unwrap();
    assert_eq!((fake.pods.len(), fake.removed), (0, 2));
    assert!(!ran.said.contains("left behind"), "{}", ran.said);
}

#[tokio::test(start_paused = true)]
async fn pods_that_cannot_be_removed_are_told() {
    let ran = run(Fault::Stay).await;
    assert!(ran.matrix.is_ok());
    let said = ran.said;
    assert!(said.contains("left behind: still there: skein-connectivity-"), "{said}");
    assert!(said.contains("and 5 more: kubectl delete pods -n default -l "), "{said}");
    assert!(ran.took < Duration::from_secs(20) + LAST, "{:?}", ran.took);
}
