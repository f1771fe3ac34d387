//! The source with a fake API server.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use skein_policy::model::PolicyId;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::fake::FakeApi;
use super::*;
use crate::policy::source::tests::sink;

const PODS: &str = "/api/v1/pods";
const NAMESPACES: &str = "/api/v1/namespaces";
const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";
const CLUSTER_POLICIES: &str = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies";

/// Maximum time until an expected event.
const EVENT_TIMEOUT: Duration = Duration::from_secs(20);

/// A source that follows a fake API server.
struct Scene {
    api: FakeApi,
    events: mpsc::Receiver<PolicyEvent>,
    needs: watch::Sender<Needs>,
    task: JoinHandle<()>,
}

impl Scene {
    async fn start(api: FakeApi) -> Self {
        let (sink, events, needs) = sink();
        let task = tokio::spawn(follow(api.client(), "node-a".to_owned(), sink));
        Self { api, events, needs, task }
    }

    /// Returns the events up to the first one that `is_last` accepts.
    async fn until(&mut self, is_last: impl Fn(&PolicyEvent) -> bool) -> Vec<PolicyEvent> {
        let mut received = Vec::new();
        let wait = async {
            while let Some(event) = self.events.recv().await {
                received.push(event);
                if received.last().is_some_and(&is_last) {
                    return true;
                }
            }
            false
        };
        let is_found = tokio::time::timeout(EVENT_TIMEOUT, wait).await == Ok(true);
        assert!(is_found, "The expected event is missing: {received:#?}");
        received
    }

    async fn until_complete(&mut self) -> Vec<PolicyEvent> {
        self.until(|event| matches!(event, PolicyEvent::Complete)).await
    }

    /// Waits until the source is available.
    async fn until_available(&mut self) -> Vec<PolicyEvent> {
        self.until(|event| matches!(event, PolicyEvent::Unavailable(None))).await
    }

    fn need(&self, pods: impl IntoIterator<Item = PodScope>) {
        let pods = pods.into_iter().collect();
        self.needs.send_replace(Needs { pods, ..Needs::default() });
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn pod(node: &str, labels: Value, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "labels": labels, "uid": "u", "managedFields": [{ "manager": "kubelet" }] },
        "spec": {
            "nodeName": node,
            "containers": [{ "name": "a", "ports": [{ "name": "http", "containerPort": 80 }] }],
            "initContainers": [{ "name": "b", "restartPolicy": "Always" }],
        },
        "status": { "phase": "Running", "podIPs": [{ "ip": ip }], "startTime": "2026-01-01T00:00:00Z" },
    })
}

fn policy() -> Value {
    json!({ "spec": { "podSelector": {}, "policyTypes": ["Ingress"] } })
}

/// Returns the names of pods that events add or remove in a scope, in their order.
fn pods(events: &[PolicyEvent], of: &PodScope) -> Vec<String> {
    let names = events.iter().filter_map(|event| match event {
        PolicyEvent::Upsert(PolicyObject::Pod(scope, pod)) if scope == of => {
            Some(format!("+{}", pod.metadata.name))
        }
        PolicyEvent::Remove(ObjectId::Pod(scope, id)) if scope == of => {
            Some(format!("-{}", id.name))
        }
        _ => None,
    });
    names.collect()
}

fn is_listed(of: Scope) -> impl Fn(&PolicyEvent) -> bool {
    move |event| matches!(event, PolicyEvent::ListComplete(scope) if *scope == of)
}

fn is_removed(name: &'static str) -> impl Fn(&PolicyEvent) -> bool {
    move |event| match event {
        PolicyEvent::Remove(ObjectId::Pod(_, id)) => id.name == name,
        _ => false,
    }
}

fn is_added(name: &'static str) -> impl Fn(&PolicyEvent) -> bool {
    move |event| match event {
        PolicyEvent::Upsert(PolicyObject::Pod(_, pod)) => pod.metadata.name == name,
        _ => false,
    }
}

async fn api() -> FakeApi {
    let api = FakeApi::start().await;
    for name in ["shop", "web"] {
        api.apply(NAMESPACES, "", name, json!({ "metadata": { "labels": { "team": "a" } } }));
    }
    api.apply(PODS, "shop", "mine", pod("node-a", json!({ "app": "x" }), "10.1.0.2"));
    api.apply(PODS, "web", "other", pod("node-b", json!({ "app": "y" }), "10.2.0.2"));
    api.apply(POLICIES, "shop", "deny", policy());
    api
}

#[tokio::test]
async fn first_lists_have_own_pods_policies_and_namespaces() {
    let mut scene = Scene::start(api().await).await;
    let events = scene.until_complete().await;
    assert_eq!(pods(&events, &PodScope::Local), ["+mine"], "Pods of other nodes are not needed.");
    let object = |event: &PolicyEvent| match event {
        PolicyEvent::Upsert(PolicyObject::NetworkPolicy(policy)) => {
            Some(format!("policy {}/{}", policy.metadata.namespace, policy.metadata.name))
        }
        PolicyEvent::Upsert(PolicyObject::Namespace(namespace)) => {
            let team = &namespace.metadata.labels["team"];
            Some(format!("namespace {} {team}", namespace.metadata.name))
        }
        _ => None,
    };
    let objects: BTreeSet<_> = events.iter().filter_map(object).collect();
    let expected = ["namespace shop a", "namespace web a", "policy shop/deny"];
    assert_eq!(objects, expected.map(str::to_owned).into());
    scene.until_available().await;
    let pod = events.iter().find_map(|event| match event {
        PolicyEvent::Upsert(PolicyObject::Pod(_, pod)) => Some(pod),
        _ => None,
    });
    let pod = pod.unwrap();
    assert_eq!(pod.metadata.uid, "u");
    assert_eq!(pod.ports().map(|port| port.container_port).collect::<Vec<_>>(), [80]);
}

#[tokio::test]
async fn changes_follow_the_first_lists() {
    let mut scene = Scene::start(api().await).await;
    scene.until_available().await;
    scene.api.apply(PODS, "shop", "second", pod("node-a", json!({}), "10.1.0.3"));
    scene.until(is_added("second")).await;
    scene.api.delete(PODS, "shop", "second");
    scene.until(is_removed("second")).await;
    scene.api.delete(POLICIES, "shop", "deny");
    let id = PolicyId::NetworkPolicy { namespace: "shop".into(), name: "deny".into() };
    let is_gone = |event: &PolicyEvent| matches!(event, PolicyEvent::Remove(ObjectId::Policy(policy)) if *policy == id);
    scene.until(is_gone).await;
}

#[tokio::test]
async fn pods_of_other_nodes_are_watched_by_need() {
    let mut scene = Scene::start(api().await).await;
    scene.until_available().await;
    let web = PodScope::Namespace("web".to_owned());
    let labelled = PodScope::Labelled("app=y".to_owned());
    scene.need([web.clone(), labelled.clone()]);
    let mut events = scene.until(is_listed(Scope::Pods(web.clone()))).await;
    if !events.iter().any(is_listed(Scope::Pods(labelled.clone()))) {
        events.extend(scene.until(is_listed(Scope::Pods(labelled.clone()))).await);
    }
    assert_eq!(pods(&events, &web), ["+other"]);
    assert_eq!(pods(&events, &labelled), ["+other"]);
    scene.until_available().await;
    // The labels select the pod no more, the namespace does.
    scene.api.apply(PODS, "web", "other", pod("node-b", json!({ "app": "z" }), "10.2.0.2"));
    let events = scene.until(is_removed("other")).await;
    assert_eq!(pods(&events, &labelled), ["-other"]);
    assert_eq!(scene.api.watches(&["/namespaces/web/pods"]), 1);
    assert_eq!(scene.api.watches(&[PODS, "app=y"]), 1);
}

#[tokio::test]
async fn many_namespaces_become_one_watch_of_all_pods() {
    let mut scene = Scene::start(api().await).await;
    scene.until_available().await;
    let many = (0..=MAX_NAMESPACES).map(|n| PodScope::Namespace(format!("n{n}")));
    scene.need(many);
    let events = scene.until(is_listed(Scope::Pods(PodScope::All))).await;
    let names: BTreeSet<_> = pods(&events, &PodScope::All).into_iter().collect();
    assert_eq!(names, ["+mine", "+other"].map(str::to_owned).into());
    assert_eq!(scene.api.watches(&["/namespaces/n"]), 0);
}

#[tokio::test]
async fn long_list_arrives_in_pages() {
    let api = api().await;
    for n in 0..1201 {
        api.apply(PODS, "web", &format!("p{n}"), pod("node-b", json!({}), "10.2.0.9"));
    }
    let mut scene = Scene::start(api).await;
    scene.need([PodScope::All]);
    let events = scene.until(is_listed(Scope::Pods(PodScope::All))).await;
    assert_eq!(pods(&events, &PodScope::All).len(), 1203);
    let cluster = scene.api.cluster();
    let pages = cluster.requests.iter().filter(|(_, one)| one.contains_key("limit"));
    assert_eq!(pages.count(), 3);
}

#[tokio::test]
async fn half_a_list_does_not_complete() {
    let api = api().await;
    api.cluster().half_lists = true;
    let mut scene = Scene::start(api).await;
    let is_failed = |event: &PolicyEvent| match event {
        PolicyEvent::Unavailable(Some(reason)) => !reason.contains("no complete list"),
        _ => false,
    };
    let events = scene.until(is_failed).await;
    let is_complete = |event: &&PolicyEvent| {
        matches!(event, PolicyEvent::ListComplete(_) | PolicyEvent::Complete)
    };
    let complete: Vec<_> = events.iter().filter(is_complete).collect();
    // The cluster has no ClusterNetworkPolicies: also half of an empty list is no list.
    assert!(complete.is_empty(), "{complete:?}");
    scene.api.cluster().half_lists = false;
    scene.until_complete().await;
}

#[tokio::test]
async fn expired_version_leads_to_a_list_with_missing_objects() {
    let mut scene = Scene::start(api().await).await;
    scene.until_available().await;
    // The deletion is forgotten before the watch can report it.
    scene.api.forget(PODS, "shop", "mine");
    let events = scene.until(is_listed(Scope::Pods(PodScope::Local))).await;
    assert_eq!(pods(&events, &PodScope::Local), [""; 0], "The list has no pod of this node.");
    let cluster = scene.api.cluster();
    let mut local = cluster.requests.iter().filter(|(path, parameters)| {
        path == PODS
            && !parameters.contains_key("watch")
            && parameters.contains_key("fieldSelector")
    });
    let last = local.next_back().unwrap().1.clone();
    assert_eq!(last["resourceVersionMatch"], "NotOlderThan");
    assert_ne!(last["resourceVersion"], "0", "The list must not be older than the watch.");
}

#[tokio::test]
async fn lost_api_server_is_reported_and_removes_nothing() {
    let mut scene = Scene::start(api().await).await;
    scene.until_available().await;
    scene.api.cluster().broken = true;
    scene.api.cut();
    let events = scene.until(|event| matches!(event, PolicyEvent::Unavailable(Some(_)))).await;
    let reason = format!("{:?}", events.last());
    assert!(reason.contains("etcd is away"), "{reason}");
    let removes = |event: &PolicyEvent| {
        matches!(event, PolicyEvent::Remove(_) | PolicyEvent::ListComplete(_))
    };
    assert!(!events.iter().any(removes), "{events:?}");
    scene.api.apply(PODS, "shop", "late", pod("node-a", json!({}), "10.1.0.4"));
    scene.api.cluster().broken = false;
    // The change during the outage arrives by the watch, without a list.
    let events = scene.until(is_added("late")).await;
    assert!(!events.iter().any(removes), "{events:?}");
    scene.until_available().await;
}

#[tokio::test]
async fn slow_stream_delivers_whole_events() {
    let api = api().await;
    api.cluster().slowness = Duration::from_millis(10);
    let mut scene = Scene::start(api).await;
    scene.until_available().await;
    scene.api.apply(PODS, "shop", "slow", pod("node-a", json!({}), "10.1.0.5"));
    let events = scene.until(is_added("slow")).await;
    assert_eq!(pods(&events, &PodScope::Local), ["+slow"]);
}

#[tokio::test]
async fn cluster_without_cluster_policies_is_complete() {
    let api = api().await;
    api.cluster().absent.insert(CLUSTER_POLICIES.to_owned());
    let mut scene = Scene::start(api).await;
    let events = scene.until_complete().await;
    assert!(events.iter().any(is_listed(Scope::ClusterNetworkPolicies)), "{events:?}");
    scene.until_available().await;
    let requests = || {
        let cluster = scene.api.cluster();
        cluster.requests.iter().filter(|(path, _)| path == CLUSTER_POLICIES).count()
    };
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(requests(), 1, "An absent resource is requested at a slow interval.");
}

#[tokio::test]
async fn unreadable_object_is_reported_and_others_are_read() {
    let api = api().await;
    let bad = json!({ "metadata": { "labels": "none" }, "spec": { "nodeName": "node-a" } });
    api.apply(PODS, "shop", "bad", bad.clone());
    let mut scene = Scene::start(api).await;
    let events = scene.until_complete().await;
    assert_eq!(pods(&events, &PodScope::Local), ["+mine"]);
    let is_reported = |event: &PolicyEvent| match event {
        PolicyEvent::Unreadable(part, Some(_)) => part.contains("shop/bad"),
        _ => false,
    };
    assert!(events.iter().any(is_reported), "{events:?}");
    scene.until_available().await;
    scene.api.apply(PODS, "shop", "bad", bad);
    scene.until(is_reported).await;
    scene.api.apply(PODS, "shop", "good", pod("node-a", json!({}), "10.1.0.6"));
    scene.until(is_added("good")).await;
}

#[tokio::test(start_paused = true)]
async fn unused_watch_ends_after_five_minutes() {
    let (sink, mut events, _needs) = sink();
    let (health, _reports) = mpsc::unbounded_channel();
    let client =
        Client::try_from(kube::Config::new("http://127.0.0.1:9".parse().unwrap())).unwrap();
    let mut watches = Watches::new(client, "node-a".to_owned(), sink, health);
    let web = Scope::Pods(PodScope::Namespace("web".to_owned()));
    // The watch fails and starts again all the time: its events must not fill the queue.
    let ended = Scope::clone(&web);
    let ended = tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            if matches!(&event, PolicyEvent::ScopeEnded(scope) if *scope == ended) {
                return true;
            }
        }
        false
    });
    watches.want(&[web.clone()].into());
    watches.want(&BTreeSet::new());
    tokio::time::sleep(UNUSED_TIMEOUT / 2).await;
    watches.want(&[web.clone()].into());
    watches.want(&BTreeSet::new());
    tokio::time::sleep(UNUSED_TIMEOUT * 3 / 4).await;
    watches.sweep(Instant::now()).await.unwrap();
    assert!(watches.running.contains_key(&web), "A new use restarts the time.");
    tokio::time::sleep(UNUSED_TIMEOUT / 4).await;
    watches.sweep(Instant::now()).await.unwrap();
    assert!(!watches.running.contains_key(&web));
    assert!(ended.await.unwrap(), "The end of the scope must be reported.");
}
