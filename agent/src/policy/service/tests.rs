//! Tests of the service with a table in memory.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use serde_json::{Value, json};
use skein_cni_protocol::Pod as PodName;
use skein_policy::enforce::Event;
use skein_policy::engine::Engine;
use skein_policy::model::PodId;
use skein_policy::program::{Difference, Program, Verdict};
use tokio::time::timeout;

use super::owner::{MAX_BATCH, POD_TIMEOUT};
use super::*;
use crate::policy::source::{ObjectId, PodScope, PolicyEvent, PolicyObject, Scope};

/// Interface of the pod under test.
const INTERFACE: &str = "skp00000000001";
/// Time in which the service must have done its work.
const SOON: Duration = Duration::from_secs(5);

/// The kernel's table: its program, and its failures.
#[derive(Debug, Default)]
struct Kernel {
    program: Option<Program>,
    error: Option<String>,
    installations: usize,
}

impl Kernel {
    fn verdict(&self) -> Option<Verdict> {
        self.program.as_ref()?.to.get(INTERFACE).cloned()
    }
}

#[derive(Debug, Clone, Default)]
struct FakeTable(Arc<Mutex<Kernel>>);

impl FakeTable {
    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.0.lock().unwrap()
    }

    /// Returns the verdict for packets to the interface under test; `None` without an entry.
    fn verdict(&self) -> Option<Verdict> {
        self.kernel().verdict()
    }

    /// Waits for a verdict for packets to the interface under test.
    async fn wait_for_verdict(&self, condition: impl Fn(Option<Verdict>) -> bool) {
        self.wait_for(|kernel| condition(kernel.verdict())).await;
    }

    async fn wait_for(&self, condition: impl Fn(&Kernel) -> bool) {
        let wait = async {
            while !condition(&self.kernel()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(SOON, wait).await.expect("the table must reach the state");
    }
}

impl Table for FakeTable {
    async fn install(&mut self, program: &Program) -> Result<bool, String> {
        let mut kernel = self.kernel();
        kernel.installations += 1;
        match kernel.error.clone() {
            Some(error) => Err(error),
            None => Ok(kernel.program.replace(program.clone()).is_some()),
        }
    }

    async fn apply(&mut self, difference: &Difference) -> Result<(), String> {
        let mut kernel = self.kernel();
        match kernel.error.clone() {
            Some(error) => Err(error),
            None => {
                kernel.program.as_mut().unwrap().apply(difference);
                Ok(())
            }
        }
    }

    async fn counters(&mut self) -> Result<BTreeMap<String, u64>, String> {
        Ok(BTreeMap::new())
    }

    async fn next_event(&mut self) -> Event {
        std::future::pending().await
    }

    async fn sweep(&mut self, _: &Engine) -> Result<(), String> {
        Ok(())
    }

    async fn exists(&mut self) -> Result<bool, String> {
        Ok(self.kernel().program.is_some())
    }
}

/// A running service with its table and its state directory.
struct Fixture {
    service: PolicyService,
    table: FakeTable,
    directory: Arc<tempfile::TempDir>,
    readiness: Readiness,
}

impl Fixture {
    fn start(is_static: bool) -> Self {
        let directory = Arc::new(tempfile::tempdir().unwrap());
        Self::restart(is_static, FakeTable::default(), directory)
    }

    /// Starts a service on a node that has no pods yet.
    async fn without_pods(is_static: bool) -> Self {
        let fixture = Self::start(is_static);
        fixture.service.set_attachments(Vec::new()).await;
        fixture
    }

    fn restart(is_static: bool, table: FakeTable, directory: Arc<tempfile::TempDir>) -> Self {
        let readiness = Readiness::default();
        let settings = Settings {
            mode: PolicyMode::Enforce,
            is_static,
            store: Store::new(directory.path(), "test".to_owned()),
            readiness: readiness.clone(),
        };
        let service = PolicyService::start(settings, table.clone()).unwrap();
        Self { service, table, directory, readiness }
    }

    async fn send(&self, event: PolicyEvent) {
        self.service.sink().send(event).await.unwrap();
    }

    /// Sends complete lists with these objects and waits until they are applied.
    async fn list(&self, objects: Vec<PolicyObject>) {
        let scopes = [
            Scope::Namespaces,
            Scope::NetworkPolicies,
            Scope::ClusterNetworkPolicies,
            Scope::Pods(PodScope::Local),
        ];
        for scope in &scopes {
            self.send(PolicyEvent::ListStarted(scope.clone())).await;
        }
        for object in objects {
            self.send(PolicyEvent::Upsert(object)).await;
        }
        for scope in scopes {
            self.send(PolicyEvent::ListComplete(scope)).await;
        }
        self.send(PolicyEvent::Complete).await;
        timeout(SOON, async {
            while !self.service.status().complete {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("the lists must be applied");
    }

    async fn attach(&self, uid: Option<&str>) -> Result<Attached, CommitError> {
        self.service.attach(attachment(uid)).await
    }
}

fn attachment(uid: Option<&str>) -> Attachment {
    let pod = PodName {
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
        uid: uid.map(str::to_owned),
    };
    let addresses = vec!["10.1.0.7".parse().unwrap()];
    Attachment { interface: INTERFACE.to_owned(), pod: Some(pod), addresses }
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Box<T> {
    Box::new(serde_json::from_value(value).unwrap())
}

fn namespace() -> PolicyObject {
    PolicyObject::Namespace(read(json!({ "metadata": { "name": "shop" } })))
}

/// Returns a policy that isolates the pods of the namespace `shop` with the label `app: web`.
fn policy() -> PolicyObject {
    PolicyObject::NetworkPolicy(read(json!({
        "metadata": { "namespace": "shop", "name": "isolate" },
        "spec": { "podSelector": { "matchLabels": { "app": "web" } }, "policyTypes": ["Ingress"] },
    })))
}

fn pod(uid: &str, app: &str) -> PolicyObject {
    let object = json!({
        "metadata": { "namespace": "shop", "name": "web", "uid": uid, "labels": { "app": app } },
    });
    PolicyObject::Pod(PodScope::Local, read(object))
}

fn is_isolated(verdict: Option<Verdict>) -> bool {
    matches!(verdict, Some(Verdict::Goto(_)))
}

#[tokio::test]
async fn known_pod_is_enforced_before_attach_returns() {
    let fixture = Fixture::without_pods(false).await;
    fixture.list(vec![namespace(), policy(), pod("1", "web")]).await;
    assert_eq!(fixture.attach(Some("1")).await, Ok(Attached::Enforced));
    assert!(is_isolated(fixture.table.verdict()), "The policy must apply.");
    assert!(fixture.readiness.reasons().is_empty());
    fixture.service.detach(INTERFACE).await.unwrap();
    assert_eq!(fixture.table.verdict(), None);
}

#[tokio::test]
async fn list_longer_than_a_batch_is_applied_wholly() {
    let fixture = Fixture::without_pods(false).await;
    let named = |number| {
        PolicyObject::NetworkPolicy(read(json!({
            "metadata": { "namespace": "shop", "name": format!("policy-{number}") },
            "spec": { "podSelector": {}, "policyTypes": ["Ingress"] },
        })))
    };
    let number = 2 * MAX_BATCH + 100;
    fixture.list((0..number).map(named).collect()).await;
    let applied = fixture.service.status().policies;
    assert_eq!(applied, number, "Every policy of the list must be applied.");
}

#[tokio::test]
async fn pod_in_namespace_without_policies_does_not_wait() {
    let fixture = Fixture::without_pods(false).await;
    fixture.list(vec![namespace()]).await;
    let start = std::time::Instant::now();
    assert_eq!(fixture.attach(Some("1")).await, Ok(Attached::Enforced));
    assert!(start.elapsed() < POD_TIMEOUT / 2, "The pod's object is not needed.");
    assert_eq!(fixture.table.verdict(), Some(Verdict::Accept));
    // A policy that may select the pod changes that.
    fixture.send(PolicyEvent::Upsert(policy())).await;
    fixture.table.wait_for_verdict(|verdict| verdict == Some(Verdict::Refuse)).await;
}

#[tokio::test]
async fn unknown_pod_is_quarantined_until_its_object_arrives() {
    let fixture = Fixture::without_pods(false).await;
    // The object is that of an earlier pod of the same name.
    fixture.list(vec![namespace(), policy(), pod("old", "other")]).await;
    assert_eq!(fixture.attach(Some("new")).await, Ok(Attached::Quarantined));
    assert_eq!(fixture.table.verdict(), Some(Verdict::Refuse));
    assert_eq!(fixture.service.status().quarantined, ["skp00000000001: shop/web"]);
    let id = PodId { namespace: "shop".to_owned(), name: "web".to_owned() };
    assert!(fixture.service.sink().needs().borrow().unknown_pods.contains(&id));
    fixture.send(PolicyEvent::Upsert(pod("new", "web"))).await;
    fixture.table.wait_for_verdict(is_isolated).await;
}

#[tokio::test]
async fn attach_waits_for_the_object_of_a_pod() {
    let fixture = Fixture::without_pods(false).await;
    fixture.list(vec![namespace(), policy()]).await;
    let sink = fixture.service.sink();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(50)).await;
        sink.send(PolicyEvent::Upsert(pod("1", "web"))).await.unwrap();
    });
    assert_eq!(fixture.attach(Some("1")).await, Ok(Attached::Enforced));
    assert!(is_isolated(fixture.table.verdict()));
}

#[tokio::test]
async fn refused_commit_fails_the_attachment() {
    let fixture = Fixture::without_pods(false).await;
    fixture.list(vec![namespace(), policy(), pod("1", "web")]).await;
    fixture.table.kernel().error = Some("no buffer space".to_owned());
    let error = fixture.attach(Some("1")).await.unwrap_err();
    assert!(error.to_string().contains("no buffer space"), "{error}");
    assert!(fixture.readiness.reasons()[0].contains("no buffer space"));
    fixture.table.kernel().error = None;
    // The whole program is installed again, without a further request.
    fixture
        .table
        .wait_for(|kernel| kernel.program.as_ref().unwrap().to.contains_key(INTERFACE))
        .await;
    assert!(fixture.table.kernel().installations >= 2);
}

#[tokio::test]
async fn half_a_list_removes_nothing() {
    let fixture = Fixture::without_pods(false).await;
    fixture.list(vec![namespace(), policy(), pod("1", "web")]).await;
    fixture.attach(Some("1")).await.unwrap();
    fixture.send(PolicyEvent::ListStarted(Scope::NetworkPolicies)).await;
    let count = fixture.service.inspect(|objects, _| objects.engine.inventory().policies().count());
    assert_eq!(count.await, Ok(1));
    fixture.send(PolicyEvent::ListComplete(Scope::NetworkPolicies)).await;
    fixture.table.wait_for_verdict(|verdict| verdict == Some(Verdict::Accept)).await;
}

#[tokio::test]
async fn pod_without_object_has_no_labels_in_static_mode() {
    let fixture = Fixture::without_pods(true).await;
    fixture.list(vec![policy()]).await;
    assert_eq!(fixture.attach(None).await, Ok(Attached::Enforced));
    assert_eq!(fixture.table.verdict(), Some(Verdict::Accept));
    fixture.send(PolicyEvent::Upsert(pod("", "web"))).await;
    fixture.table.wait_for_verdict(is_isolated).await;
    let id = PodId { namespace: "shop".to_owned(), name: "web".to_owned() };
    let known = id.clone();
    let addresses = fixture.service.inspect(move |objects, _| {
        objects.engine.inventory().pod(&known).unwrap().addresses.clone()
    });
    assert_eq!(
        addresses.await.unwrap(),
        attachment(None).addresses,
        "The lease gives the address."
    );
    fixture.send(PolicyEvent::Remove(ObjectId::Pod(PodScope::Local, id))).await;
    fixture.table.wait_for_verdict(|verdict| verdict == Some(Verdict::Accept)).await;
}

#[tokio::test]
async fn namespace_without_object_is_known_in_static_mode() {
    let fixture = Fixture::without_pods(true).await;
    fixture.list(vec![policy(), pod("", "web")]).await;
    assert_eq!(fixture.attach(None).await, Ok(Attached::Enforced));
    assert!(is_isolated(fixture.table.verdict()), "The policy must apply.");
    // A later list contains no namespace either.
    fixture.list(vec![policy(), pod("", "web")]).await;
    assert!(is_isolated(fixture.table.verdict()), "The policy must still apply.");
}

#[tokio::test]
async fn stored_objects_are_enforced_without_a_source() {
    let fixture = Fixture::without_pods(false).await;
    fixture.list(vec![namespace(), policy(), pod("1", "web")]).await;
    let file = fixture.directory.path().join(super::super::store::FILE);
    timeout(SOON, async {
        while !std::fs::read_to_string(&file).is_ok_and(|text| text.contains("isolate")) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the objects must be stored");
    let Fixture { service, table, directory, .. } = fixture;
    drop(service);
    let later = Fixture::restart(false, table, directory);
    later.service.set_attachments(Vec::new()).await;
    assert_eq!(later.attach(Some("1")).await, Ok(Attached::Enforced));
    assert!(is_isolated(later.table.verdict()));
    assert!(!later.service.status().complete);
}

#[tokio::test]
async fn damaged_store_leaves_the_kernel_table_unchanged() {
    let table = FakeTable::default();
    table.kernel().program = Some(Program::default());
    let directory = Arc::new(tempfile::tempdir().unwrap());
    std::fs::write(directory.path().join(super::super::store::FILE), "{\"format\":1,").unwrap();
    let fixture = Fixture::restart(false, table, directory);
    fixture.service.set_attachments(vec![attachment(Some("1"))]).await;
    assert_eq!(fixture.attach(Some("1")).await, Ok(Attached::Quarantined));
    assert_eq!(
        fixture.table.kernel().installations,
        0,
        "The table of the earlier agent must stay."
    );
    assert!(!fixture.readiness.reasons().is_empty());
    fixture.list(vec![namespace(), policy(), pod("1", "web")]).await;
    fixture.table.wait_for_verdict(is_isolated).await;
    assert!(fixture.readiness.reasons().is_empty());
}

#[tokio::test]
async fn pods_of_a_node_without_policies_pass_until_policies_are_known() {
    let fixture = Fixture::start(false);
    fixture.service.set_attachments(vec![attachment(Some("1"))]).await;
    fixture.table.wait_for(|kernel| kernel.program.is_some()).await;
    assert_eq!(fixture.table.verdict(), Some(Verdict::Accept));
    assert!(!fixture.readiness.reasons().is_empty());
    fixture.list(vec![namespace(), policy(), pod("1", "web")]).await;
    fixture.table.wait_for_verdict(is_isolated).await;
}
