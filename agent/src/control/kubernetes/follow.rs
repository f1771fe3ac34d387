//! What the API server tells: this node's Node, and every SkeinNode.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, reflector};
use kube::{Api, Client, ResourceExt};
use skein_cni_protocol::excerpt::message_excerpt;
use skein_ipc::keys::PublicKeys;
use skein_netlink::Netlink;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use super::backoff::{Waits, fraction};
use super::client::{RENEW, describe};
use super::own;
use super::resource::{SkeinNode, SkeinNodeSpec};
use crate::config::Config;
use crate::control::records::ParsedRecords;
use crate::status::RotationStatus;

/// Changes that come together are taken together.
const QUIET: Duration = Duration::from_millis(100);
/// A watch that fails is tried again within half a minute, and fails again within ten seconds: after this
/// long without another error it is well, though it may have nothing to tell.
const WELL: Duration = Duration::from_secs(45);
/// The addresses of `kubernetes.endpoint_interface` are looked at this often.
const LOOK: Duration = Duration::from_secs(5);

/// What is known of the cluster.
#[derive(Debug, Clone, Default)]
pub(super) struct State {
    /// This node's Node; `None` before it was seen, and once it is deleted.
    pub(super) node: Option<Arc<Node>>,
    /// This node's SkeinNode as the API server has it.
    pub(super) published: Option<Arc<SkeinNode>>,
    /// UID of this node's SkeinNode whose deletion was observed last.
    pub(super) deleted: Option<String>,
    /// What this node's record is to be; `None` as long as no Node was seen.
    pub(super) own: Option<Result<SkeinNodeSpec, String>>,
    /// Why nothing can be said of this node now; what was said before stays in force.
    pub(super) problem: Option<String>,
    /// Every node's record, this node's as it is to be; `None` before all were seen.
    pub(super) records: Option<Arc<ParsedRecords>>,
    /// Why nothing new is known.
    pub(super) error: Option<String>,
}

/// Follows the API server, for as long as somebody listens.
pub(super) async fn follow(
    config: Arc<Config>,
    mut key: watch::Receiver<RotationStatus>,
    client: Client,
    sender: watch::Sender<State>,
) {
    let (store, writer) = reflector::store::<SkeinNode>();
    // Thousands of nodes are to ask at different times.
    let renew = RENEW + (f64::from(RENEW / 2) * fraction()) as u32;
    let any = from_memory(renew);
    let all = watcher(Api::<SkeinNode>::all(client.clone()), any);
    let all = all.backoff(Waits::default()).modify(|node| {
        node.managed_fields_mut().clear();
        node.annotations_mut().clear();
        if node.name_any() != config.name {
            node.status = None;
        }
    });
    let mut all = std::pin::pin!(all.reflect(writer));
    let only =
        watcher::Config::default().timeout(renew).fields(&format!("metadata.name={}", config.name));
    let node = watcher(Api::<Node>::all(client), only).backoff(Waits::default()).modify(|node| {
        node.managed_fields_mut().clear();
        if let Some(status) = &mut node.status {
            status.images = None;
        }
    });
    let mut node = std::pin::pin!(node);
    let mut follower = Follower {
        config: Arc::clone(&config),
        keys: key.borrow_and_update().keys,
        store,
        synced: false,
        found: false,
        addresses: None,
        uid: None,
        state: State::default(),
        errors: [None, None],
    };
    let netlink = config.kubernetes.endpoint_interface.as_ref().and(Netlink::connect().ok());
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // When what has changed is told.
    let mut due: Option<Instant> = None;
    loop {
        let changed = tokio::select! {
            Some(event) = all.next() => follower.take_record(event),
            Some(event) = node.next() => follower.take_node(event),
            // It fails only where nobody listens any more.
            Ok(()) = key.changed() => {
                follower.keys = key.borrow_and_update().keys;
                true
            }
            _ = look.tick() => {
                let well = follower.forget();
                match &netlink {
                    Some(netlink) => follower.take_addresses(netlink).await || well,
                    None => well,
                }
            }
            () = until(due) => {
                due = None;
                follower.tell(&sender);
                false
            }
            () = sender.closed() => return,
        };
        if changed && due.is_none() {
            due = Some(Instant::now() + QUIET);
        }
    }
}

/// From the API server's memory, not its database: after its restart all nodes ask at once. It does so only
/// for lists that come as a whole.
fn from_memory(renew: u32) -> watcher::Config {
    let config = watcher::Config::default().timeout(renew).any_semantic();
    watcher::Config { page_size: None, ..config }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

struct Follower {
    config: Arc<Config>,
    keys: PublicKeys,
    store: reflector::Store<SkeinNode>,
    /// Whether every SkeinNode was seen once.
    synced: bool,
    /// Whether the list that is coming in has this node's Node.
    found: bool,
    addresses: Option<Vec<IpAddr>>,
    /// Of the Node that the own record is about.
    uid: Option<String>,
    state: State,
    /// Of the watch of SkeinNodes, and of that of the Node.
    errors: [Option<(String, Instant)>; 2],
}

impl Follower {
    /// The store has taken the event already. Says whether something has changed.
    fn take_record(&mut self, event: watcher::Result<Event<SkeinNode>>) -> bool {
        let error = event.as_ref().err().map(|error| format!("SkeinNodes: {}", failure(error)));
        if let Ok(Event::Delete(node)) = &event
            && node.name_any() == self.config.name
        {
            self.state.deleted = node.uid();
        }
        match event {
            // Half a list is none.
            Ok(Event::Init | Event::InitApply(_)) => return false,
            Ok(Event::InitDone) => self.synced = true,
            Ok(Event::Apply(_) | Event::Delete(_)) | Err(_) => {}
        }
        self.errors[0] = error.map(|error| (error, Instant::now()));
        true
    }

    fn take_node(&mut self, event: watcher::Result<Event<Node>>) -> bool {
        let error = event.as_ref().err().map(|error| format!("Node: {}", failure(error)));
        self.errors[1] = error.map(|error| (error, Instant::now()));
        match event {
            Ok(Event::Init) => {
                self.found = false;
                return false;
            }
            Ok(Event::InitApply(node)) => {
                self.found = true;
                self.state.node = Some(Arc::new(node));
            }
            Ok(Event::Apply(node)) => self.state.node = Some(Arc::new(node)),
            Ok(Event::InitDone) if self.found => return false,
            Ok(Event::InitDone | Event::Delete(_)) => {
                tracing::warn!(
                    node = self.config.name,
                    "the cluster has no such Node: its record waits"
                );
                self.state.node = None;
            }
            Err(_) => {}
        }
        true
    }

    /// Forgets errors that did not come again.
    fn forget(&mut self) -> bool {
        let mut forgotten = false;
        for error in &mut self.errors {
            forgotten |= error.take_if(|(_, at)| at.elapsed() > WELL).is_some();
        }
        forgotten
    }

    async fn take_addresses(&mut self, netlink: &Netlink) -> bool {
        let Some(name) = &self.config.kubernetes.endpoint_interface else { return false };
        let addresses = match netlink.link(name).await {
            Ok(Some(link)) => netlink.addresses(Some(link.index)).await.unwrap_or_default(),
            _ => Vec::new(),
        };
        let usable = |ip: &IpAddr| match ip {
            IpAddr::V4(v4) => !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        };
        let ips = addresses.iter().map(|address| address.net.addr());
        let addresses = Some(ips.filter(usable).collect());
        let differs = self.addresses != addresses;
        self.addresses = addresses;
        differs
    }

    fn tell(&mut self, sender: &watch::Sender<State>) {
        let name = self.config.name.as_str();
        let interface = self.config.kubernetes.endpoint_interface.is_some();
        // Of an interface that was not looked at yet nothing is known.
        if let Some(node) = &self.state.node
            && interface == self.addresses.is_some()
        {
            let addresses = self.addresses.as_deref();
            let own = own::spec(&self.config, self.keys, node, addresses);
            self.state.problem = own.as_ref().err().cloned();
            // What was said before stays in force, as long as it is the same Node.
            let same = self.uid == node.metadata.uid;
            if own.is_ok() || !same || !matches!(self.state.own, Some(Ok(_))) {
                self.uid.clone_from(&node.metadata.uid);
                self.state.own = Some(own);
            }
        }
        let nodes = self.store.state();
        self.state.published = nodes.iter().find(|node| node.name_any() == name).cloned();
        self.state.error = self.errors.iter().flatten().next().map(|(error, _)| error.clone());
        self.state.records = match &self.state.own {
            Some(Ok(own)) if self.synced => Some(Arc::new(files(name, own, &nodes))),
            _ => None,
        };
        sender.send_replace(self.state.clone());
    }
}

fn failure(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => describe(error),
        watcher::Error::WatchError(status) => message_excerpt(&status.message).into_owned(),
        watcher::Error::NoResourceVersion => error.to_string(),
    }
}

/// Every node's record, this node's as it is to be.
fn files(name: &str, own: &SkeinNodeSpec, nodes: &[Arc<SkeinNode>]) -> ParsedRecords {
    let others = nodes.iter().filter(|node| node.name_any() != name);
    let mut files: ParsedRecords = others
        .map(|node| (path(&node.name_any()), node.record().map(|record| vec![record])))
        .collect();
    files.insert(path(name), own.record(name.to_owned()).map(|record| vec![record]));
    files
}

/// Under which name a record is shown where others have a file's.
pub(in crate::control) fn path(name: &str) -> PathBuf {
    PathBuf::from("skeinnodes").join(name)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kube::api::ListParams;
    use kube::core::Request;

    use super::*;

    #[test]
    fn lists_come_from_the_api_servers_memory() {
        let config = from_memory(RENEW);
        let mut parameters = ListParams::default().match_any();
        parameters.limit = config.page_size;
        let request = Request::new("/apis").list(&parameters).unwrap();
        let query = request.uri().query().unwrap();
        assert!(query.contains("resourceVersion=0") && !query.contains("limit="), "{query}");
        assert_eq!(config.list_semantic, watcher::ListSemantic::Any);
    }
}
