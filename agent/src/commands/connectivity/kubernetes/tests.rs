//! Tests against a fake API server.

use std::sync::{Arc, Mutex};

use http::{Method, Request, Response};
use kube::client::Body;
use serde_json::{Value, json};

use super::super::matrix::{ProbeResult, Protocol, row};
use super::*;

#[derive(Debug, Default, Clone, Copy, PartialEq)]
enum Fault {
    #[default]
    None,
    /// Reading the DaemonSet is forbidden.
    NoDaemonSet,
    /// Creating pods is forbidden.
    NoPods,
    /// Creating pods in the node's network is forbidden.
    NoHostPods,
    /// The first pod's creation fails.
    First,
    /// The creation of the first pod is answered with 409, because the client repeated it.
    Twice,
    /// Probing pods fail.
    Probers,
    /// The answering pod of node2 has no image, and listing SkeinNodes is forbidden.
    Absent,
    /// kubelet refuses the answering pod of node2.
    OutOfPods,
    /// Every second list of pods fails.
    Lists,
    /// The log of one pod cannot be read.
    Log,
    /// A request for the log of one pod gets no answer.
    LogHangs,
    /// The creation of the second pod gets no answer, and the pod appears while the others are
    /// removed.
    Late,
    /// Pods are not removed.
    Stay,
    /// Removing pods is forbidden.
    NoRemoval,
}

/// Fake API server whose pods run as soon as they are created.
#[derive(Default)]
struct Fake {
    fault: Fault,
    pods: Vec<Value>,
    /// Pod that appears after its request has timed out.
    late: Option<Value>,
    targets: Vec<Target>,
    lists: usize,
    removals: usize,
    removed: usize,
}

type Answer = (u16, Vec<u8>);

/// Returns an error answer of the API server.
fn failed(code: u16, message: &str) -> Option<Answer> {
    let status = json!({ "kind": "Status", "status": "Failure", "code": code, "message": message, "reason": "Test" });
    Some((code, status.to_string().into_bytes()))
}

fn list(kind: &str, items: &[Value]) -> Value {
    json!({ "kind": kind, "apiVersion": "v1", "metadata": {}, "items": items })
}

impl Fake {
    /// Answers a request; `None` if there is no answer.
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
                self.lists += 1;
                if fault == Fault::Lists && self.lists.is_multiple_of(2) {
                    return failed(429, "too many requests");
                }
                let seen = list("PodList", &self.pods);
                if self.removed > 0 {
                    self.pods.extend(self.late.take());
                }
                seen
            }
            other => panic!("unexpected request: {other:?}"),
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

    /// Returns the log of a probing pod.
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
            let probe = ProbeResult {
                address: target.address,
                protocol: Protocol::Icmp,
                bytes: 84,
                round_trip_us: Some(7),
                error: bad(target).then(|| "no answer".to_owned()),
            };
            (target.name.as_str(), probe)
        }));
        let row = serde_json::to_string(&row).unwrap();
        Some((200, format!("a line before\n{row}\n").into_bytes()))
    }
}

/// Result of a test run.
struct TestRun {
    matrix: anyhow::Result<Matrix>,
    fake: Arc<Mutex<Fake>>,
    reported: String,
    took: Duration,
}

const TIMEOUT: Duration = Duration::from_secs(120);

async fn run(fault: Fault) -> TestRun {
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
    let reported = Mutex::new(String::new());
    let report = |text: &str| *reported.lock().unwrap() += text;
    let start = Instant::now();
    let matrix = test_with(Client::new(service, "default"), &options, report).await;
    TestRun { matrix, fake, reported: reported.into_inner().unwrap(), took: start.elapsed() }
}

#[tokio::test(start_paused = true)]
async fn all_pairs_are_probed_and_pods_removed() {
    let TestRun { matrix, fake, .. } = run(Fault::None).await;
    let matrix = matrix.unwrap();
    // Two nodes and two pods, each to two pods and two nodes.
    assert!(matrix.failure_summary().unwrap().contains("1 of 16 pairs"));
    let text = matrix.render();
    assert!(text.contains("pod@node2") && text.contains("FAIL"), "{text}");
    let fake = fake.lock().unwrap();
    assert!(fake.pods.is_empty());
    assert_eq!(fake.removed, 6);
}

#[tokio::test(start_paused = true)]
async fn failed_probing_pods_are_failed_rows() {
    let TestRun { matrix, fake, .. } = run(Fault::Probers).await;
    let matrix = matrix.unwrap();
    assert_eq!(matrix.failure_summary().unwrap(), "4 could not probe");
    let text = matrix.render();
    assert!(text.contains("no such option\\u{1b}[2J"), "{text:?}");
    assert!(
        !text.contains('\x1b'),
        "Control characters of a pod must not reach the terminal: {text:?}"
    );
    assert!(fake.lock().unwrap().pods.is_empty());
}

#[tokio::test(start_paused = true)]
async fn no_removal_if_no_pod_was_created() {
    for (fault, why) in [(Fault::NoDaemonSet, "not yours"), (Fault::NoPods, "no pods of yours")] {
        let ran = run(fault).await;
        let error = format!("{:#}", ran.matrix.unwrap_err());
        assert!(error.contains(why), "{error}");
        assert_eq!(ran.fake.lock().unwrap().removals, 0);
        assert!(!ran.reported.contains("remov"), "{}", ran.reported);
        assert!(ran.took < Duration::from_secs(1), "{:?}", ran.took);
    }
}

#[tokio::test(start_paused = true)]
async fn probing_pod_that_is_refused_is_a_failed_row() {
    let matrix = run(Fault::NoHostPods).await.matrix.unwrap();
    let summary = matrix.failure_summary().unwrap();
    assert!(summary.contains("2 could not probe; 1 of 8 pairs fail"), "{summary}");
    let text = matrix.render();
    assert!(text.contains("node@node2 could not probe: cannot create pods in"), "{text}");
    assert!(text.contains("violates PodSecurity"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn answering_pod_that_is_refused_is_a_failed_column() {
    let matrix = run(Fault::First).await.matrix.unwrap();
    let summary = matrix.failure_summary().unwrap();
    assert!(summary.contains("1 could not be probed; 1 of 12 pairs fail"), "{summary}");
    let text = matrix.render();
    assert!(text.contains("pod@node1 could not be probed: cannot create pods in"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn failed_lists_and_repeated_creation_lose_no_pod() {
    for fault in [Fault::Lists, Fault::Twice] {
        let ran = run(fault).await;
        assert!(
            ran.matrix.unwrap().failure_summary().unwrap().contains("1 of 16 pairs"),
            "{fault:?}"
        );
        assert!(!ran.reported.contains("left behind"), "{}", ran.reported);
    }
}

#[tokio::test(start_paused = true)]
async fn missing_targets_are_failed_columns() {
    let matrix = run(Fault::Absent).await.matrix.unwrap();
    assert_eq!(matrix.failure_summary().unwrap(), "2 could not be probed");
    let text = matrix.render();
    for line in [
        "pod@node2 could not be probed: no answering pod: skein-connectivity-",
        "node@* could not be probed: cannot list SkeinNodes: ",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn failed_answering_pod_does_not_delay_test() {
    let ran = run(Fault::OutOfPods).await;
    let text = ran.matrix.unwrap().render();
    assert!(text.contains("pod@node2 could not be probed: no answering pod: "), "{text}");
    assert!(text.contains("is Failed: OutOfpods"), "{text}");
    assert!(ran.took < TIMEOUT / 4, "{:?}", ran.took);
}

#[tokio::test(start_paused = true)]
async fn unreadable_log_is_one_failed_row() {
    for (fault, why) in [(Fault::Log, "no such file"), (Fault::LogHangs, "no answer within 10 s")] {
        let ran = run(fault).await;
        let matrix = ran.matrix.unwrap();
        let summary = matrix.failure_summary().unwrap();
        assert!(summary.contains("1 could not probe; 1 of 12 pairs fail"), "{summary}");
        let text = matrix.render();
        assert!(text.contains("node@node1 could not probe: cannot read the log of "), "{text}");
        assert!(text.contains(why), "{text}");
        assert!(ran.took < LOG_TIMEOUT + Duration::from_secs(5), "{:?}", ran.took);
    }
}

#[tokio::test(start_paused = true)]
async fn late_pod_is_removed_and_is_a_failed_column() {
    let ran = run(Fault::Late).await;
    let text = ran.matrix.unwrap().render();
    assert!(text.contains("pod@node2 could not be probed: cannot create pods"), "{text}");
    assert!(text.contains("no answer within 30 s"), "{text}");
    assert!(ran.took < REQUEST_TIMEOUT + Duration::from_secs(5), "{:?}", ran.took);
    let fake = ran.fake.lock().unwrap();
    assert_eq!((fake.pods.len(), fake.removed), (0, 6));
    assert!(!ran.reported.contains("left behind"), "{}", ran.reported);
}

#[tokio::test(start_paused = true)]
async fn pods_that_remain_are_reported() {
    let ran = run(Fault::Stay).await;
    assert!(ran.matrix.is_ok());
    let reported = ran.reported;
    assert!(reported.contains("left behind: skein-connectivity-"), "{reported}");
    assert!(
        reported.contains(
            "and 5 more still exist. Remove them with kubectl delete pods -n default -l "
        ),
        "{reported}"
    );
    let most = REMOVAL_TIMEOUT + 6 * REMOVAL_TIMEOUT_PER_POD;
    assert!(ran.took >= most && ran.took < most + Duration::from_secs(5), "{:?}", ran.took);
    let ran = run(Fault::NoRemoval).await;
    assert!(ran.reported.contains("left behind: "), "{}", ran.reported);
    assert!(ran.reported.contains("hands off"), "{}", ran.reported);
    assert!(ran.took < Duration::from_secs(5), "{:?}", ran.took);
}
