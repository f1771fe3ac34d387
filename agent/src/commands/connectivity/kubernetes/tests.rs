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
    /// Nobody may get the DaemonSet.
    NoDaemonSet,
    /// No pod may be created.
    NoPods,
    /// Pods in the node's network may not be created.
    NoHostPods,
    /// The first pod's creation fails.
    First,
    /// The first pod is there already when its creation is answered, as that was tried twice.
    Twice,
    /// Pods that probe fail.
    Probers,
    /// The pod of node2 that answers has no image, and nobody may list SkeinNodes.
    Absent,
    /// The pod of node2 that answers is refused by its kubelet.
    OutOfPods,
    /// Every other list of pods fails.
    Lists,
    /// The log of one pod cannot be read.
    Log,
    /// Nor is there an answer when it is asked for.
    LogHangs,
    /// The second pod's creation is not answered, and the pod comes when the others are removed.
    Late,
    /// Pods are not removed.
    Stay,
    /// Pods may not be removed.
    NoRemoval,
}

/// As much of an API server as the test needs: pods run as soon as they are made.
#[derive(Default)]
struct Fake {
    fault: Fault,
    pods: Vec<Value>,
    /// Comes into being when nobody waits for it any more.
    late: Option<Value>,
    targets: Vec<Target>,
    looks: usize,
    removals: usize,
    removed: usize,
}

type Answer = (u16, Vec<u8>);

/// As the API server fails.
fn failed(code: u16, message: &str) -> Option<Answer> {
    let status = json!({ "kind": "Status", "status": "Failure", "code": code, "message": message, "reason": "Test" });
    Some((code, status.to_string().into_bytes()))
}

fn list(kind: &str, items: &[Value]) -> Value {
    json!({ "kind": kind, "apiVersion": "v1", "metadata": {}, "items": items })
}

impl Fake {
    /// `None` is no answer.
    fn answer(&mut self, method: &Method, path: &str, body: &[u8]) -> Option<Answer> {
        let fault = self.fault;
        let node = |name: &str| json!({ "metadata": { "name": name } });
        let value = match (method, path) {
            (&Method::GET, path) if path.contains("/daemonsets/") => {
                if fault == Fault::NoDaemonSet {
                    return failed(403, "not yours");
                }
                json!({
                    "metadata": { "name": "skein" },
                    "spec": { "selector": {}, "template": { "spec": { "containers": [{
                        "name": "agent", "image": "skein:test", "imagePullPolicy": "Never",
                    }] } } },
                })
            }
            (&Method::GET, "/api/v1/nodes") => list("NodeList", &[node("node1"), node("node2")]),
            (&Method::GET, path) if path.ends_with("/skeinnodes") => match self.fault {
                Fault::Absent => return failed(403, "not yours"),
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
                let owner = &map.metadata.owner_references.as_ref().unwrap()[0].uid;
                assert!(self.pods.iter().any(|pod| pod["metadata"]["uid"] == **owner), "{owner}");
                let packed = map.binary_data.as_ref().unwrap().values().next().unwrap();
                self.targets = pods::unpack(&packed.0[..]).unwrap();
                json!(map)
            }
            (&Method::POST, _) => {
                let pod = self.pod(serde_json::from_slice(body).unwrap());
                match fault {
                    Fault::NoPods => return failed(403, "no pods of yours"),
                    Fault::NoHostPods if pod["spec"]["hostNetwork"] == true => {
                        return failed(403, "violates PodSecurity");
                    }
                    Fault::First if std::mem::take(&mut self.fault) == Fault::First => {
                        return failed(500, "etcd is busy");
                    }
                    Fault::Twice if self.pods.is_empty() => {
                        self.pods.push(pod);
                        return failed(409, "it exists");
                    }
                    Fault::Late if self.pods.len() == 1 && self.late.is_none() => {
                        self.late = Some(pod);
                        return None;
                    }
                    _ => self.pods.push(pod.clone()),
                }
                pod
            }
            (&Method::GET, path) if path.ends_with("/log") => return self.log(path),
            (&Method::DELETE, _) => {
                self.removals += 1;
                match fault {
                    Fault::NoRemoval => return failed(403, "hands off"),
                    Fault::Stay => {}
                    _ => {
                        self.removed += self.pods.len();
                        self.pods.clear();
                    }
                }
                list("PodList", &[])
            }
            (&Method::GET, _) => {
                self.looks += 1;
                if fault == Fault::Lists && self.looks.is_multiple_of(2) {
                    return failed(429, "too many requests");
                }
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
        let second = pod["spec"]["nodeName"] == "node2";
        let (phase, reason) = match (answers, self.fault) {
            (true, Fault::Absent) if second => ("Pending", None),
            (true, Fault::OutOfPods) if second => ("Failed", Some("OutOfpods")),
            (true, _) => ("Running", None),
            (false, Fault::Probers) => ("Failed", None),
            (false, _) => ("Succeeded", None),
        };
        let n = self.pods.len();
        pod["metadata"]["uid"] = json!(format!("uid-{n}"));
        let ip = format!("10.244.{}.9", n + 1);
        pod["status"] = json!({ "phase": phase, "reason": reason, "podIPs": [{ "ip": ip }] });
        pod
    }

    /// What a pod says that probes as it was told.
    fn log(&self, path: &str) -> Option<Answer> {
        let name = path.split('/').nth_back(1).unwrap();
        let pod = self.pods.iter().find(|pod| pod["metadata"]["name"] == name).unwrap();
        let (node, host) = (&pod["spec"]["nodeName"], pod["spec"]["hostNetwork"] == true);
        match self.fault {
            Fault::Probers => return Some((200, b"no such option\x1b[2J\n".to_vec())),
            Fault::Log if node == "node1" && host => return failed(500, "no such file"),
            Fault::LogHangs if node == "node1" && host => return None,
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
        Some((200, format!("a line before\n{row}\n").into_bytes()))
    }
}

struct Ran {
    matrix: anyhow::Result<Matrix>,
    fake: Arc<Mutex<Fake>>,
    said: String,
    took: Duration,
}

const TIMEOUT: Duration = Duration::from_secs(120);

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
        timeout: TIMEOUT,
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
    let text = matrix.render();
    assert!(text.contains("no such option\\u{1b}[2J"), "{text:?}");
    assert!(!text.contains('\x1b'), "a pod's words act on the terminal: {text:?}");
    assert!(fake.lock().unwrap().pods.is_empty());
}

#[tokio::test(start_paused = true)]
async fn where_no_pod_was_made_none_is_removed() {
    for (fault, why) in [(Fault::NoDaemonSet, "not yours"), (Fault::NoPods, "no pods of yours")] {
        let ran = run(fault).await;
        let error = format!("{:#}", ran.matrix.unwrap_err());
        assert!(error.contains(why), "{error}");
        assert_eq!(ran.fake.lock().unwrap().removals, 0);
        assert!(!ran.said.contains("remov"), "{}", ran.said);
        assert!(ran.took < Duration::from_secs(1), "{:?}", ran.took);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_probes_and_cannot_be_made_is_a_row() {
    let matrix = run(Fault::NoHostPods).await.matrix.unwrap();
    let trouble = matrix.trouble().unwrap();
    assert!(trouble.contains("2 could not probe; 1 of 8 pairs fail"), "{trouble}");
    let text = matrix.render();
    assert!(text.contains("node@node2 could not probe: cannot create pods in"), "{text}");
    assert!(text.contains("violates PodSecurity"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_answers_and_cannot_be_made_is_a_column() {
    let matrix = run(Fault::First).await.matrix.unwrap();
    let trouble = matrix.trouble().unwrap();
    assert!(trouble.contains("1 could not be probed; 1 of 12 pairs fail"), "{trouble}");
    let text = matrix.render();
    assert!(text.contains("pod@node1 could not be probed: cannot create pods in"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_list_that_fails_and_a_creation_that_is_repeated_lose_nothing() {
    for fault in [Fault::Lists, Fault::Twice] {
        let ran = run(fault).await;
        assert!(ran.matrix.unwrap().trouble().unwrap().contains("1 of 16 pairs"), "{fault:?}");
        assert!(!ran.said.contains("left behind"), "{}", ran.said);
    }
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
async fn a_pod_that_will_never_answer_is_not_waited_for() {
    let ran = run(Fault::OutOfPods).await;
    let text = ran.matrix.unwrap().render();
    assert!(text.contains("pod@node2 could not be probed: no answering pod: "), "{text}");
    assert!(text.contains("is Failed: OutOfpods"), "{text}");
    assert!(ran.took < TIMEOUT / 4, "{:?}", ran.took);
}

#[tokio::test(start_paused = true)]
async fn a_log_that_cannot_be_read_is_one_row() {
    for (fault, why) in [(Fault::Log, "no such file"), (Fault::LogHangs, "no answer within 10 s")] {
        let ran = run(fault).await;
        let matrix = ran.matrix.unwrap();
        let trouble = matrix.trouble().unwrap();
        assert!(trouble.contains("1 could not probe; 1 of 12 pairs fail"), "{trouble}");
        let text = matrix.render();
        assert!(text.contains("node@node1 could not probe: cannot read the log of "), "{text}");
        assert!(text.contains(why), "{text}");
        assert!(ran.took < LOG + Duration::from_secs(5), "{:?}", ran.took);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_comes_late_is_removed_and_a_column_that_fails() {
    let ran = run(Fault::Late).await;
    let text = ran.matrix.unwrap().render();
    assert!(text.contains("pod@node2 could not be probed: cannot create pods"), "{text}");
    assert!(text.contains("no answer within 30 s"), "{text}");
    assert!(ran.took < REQUEST + Duration::from_secs(5), "{:?}", ran.took);
    let fake = ran.fake.lock().unwrap();
    assert_eq!((fake.pods.len(), fake.removed), (0, 6));
    assert!(!ran.said.contains("left behind"), "{}", ran.said);
}

#[tokio::test(start_paused = true)]
async fn pods_that_cannot_be_removed_are_told() {
    let ran = run(Fault::Stay).await;
    assert!(ran.matrix.is_ok());
    let said = ran.said;
    assert!(said.contains("left behind: still there: skein-connectivity-"), "{said}");
    assert!(said.contains("and 5 more: kubectl delete pods -n default -l "), "{said}");
    let most = LAST + 6 * LAST_EACH;
    assert!(ran.took >= most && ran.took < most + Duration::from_secs(5), "{:?}", ran.took);
    let ran = run(Fault::NoRemoval).await;
    assert!(ran.said.contains("left behind: "), "{}", ran.said);
    assert!(ran.said.contains("hands off"), "{}", ran.said);
    assert!(ran.took < Duration::from_secs(5), "{:?}", ran.took);
}
