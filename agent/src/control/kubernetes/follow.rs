//! Watches of the API server: this node's Node, and all SkeinNodes.

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

use super::backoff::{RetryBackoff, random_fraction};
use super::client::{WATCH_RENEWAL_SECONDS, describe};
use super::own;
use super::resource::{SkeinNode, SkeinNodeSpec};
use crate::config::Config;
use crate::control::records::{ParsedRecords, RecordError};
use crate::status::RotationStatus;

/// Delay after a change, so that several changes are published together.
const COALESCE_DELAY: Duration = Duration::from_millis(100);
/// Time after which an error of a watch expires. A failed watch is repeated within 30 s and fails
/// again within 10 s, so that a watch without a further error works, even if it has no events.
const ERROR_LIFETIME: Duration = Duration::from_secs(45);
/// Interval at which the addresses of `kubernetes.endpoint_interface` are read and errors expire.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// Known state of the cluster.
#[derive(Debug, Clone, Default)]
pub(super) struct State {
    /// Node object of this node; `None` before it was received, and after its deletion.
    pub(super) node: Option<Arc<Node>>,
    /// SkeinNode of this node as the watch has reported it last.
    pub(super) published: Option<Arc<SkeinNode>>,
    /// UID of this node's SkeinNode whose deletion was observed last.
    pub(super) deleted: Option<String>,
    /// Desired spec of this node's SkeinNode; `None` before the Node was received. An error names
    /// the reason why there is no spec.
    pub(super) own: Option<Result<SkeinNodeSpec, RecordError>>,
    /// Reason why no spec follows from the current Node; the earlier spec stays.
    pub(super) problem: Option<RecordError>,
    /// Records of all nodes, this node's in its desired form; `None` before all were received.
    pub(super) records: Option<Arc<ParsedRecords>>,
    /// Error of a watch. The state may be outdated while there is one.
    pub(super) error: Option<String>,
}

/// Follows the API server and publishes the state to `sender`, until all receivers are dropped.
pub(super) async fn follow(
    config: Arc<Config>,
    mut key: watch::Receiver<RotationStatus>,
    client: Client,
    sender: watch::Sender<State>,
) {
    let (store, writer) = reflector::store::<SkeinNode>();
    // The nodes of a cluster renew their watches at different times.
    let renew =
        WATCH_RENEWAL_SECONDS + (f64::from(WATCH_RENEWAL_SECONDS / 2) * random_fraction()) as u32;
    let any = from_memory(renew);
    let all = watcher(Api::<SkeinNode>::all(client.clone()), any);
    let all = all.backoff(RetryBackoff::default()).modify(|node| {
        node.managed_fields_mut().clear();
        node.annotations_mut().clear();
        if node.name_any() != config.name {
            node.status = None;
        }
    });
    let mut all = std::pin::pin!(all.reflect(writer));
    let only =
        watcher::Config::default().timeout(renew).fields(&format!("metadata.name={}", config.name));
    let node =
        watcher(Api::<Node>::all(client), only).backoff(RetryBackoff::default()).modify(|node| {
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
    let mut poll = tokio::time::interval(POLL_INTERVAL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Time at which changes are published.
    let mut due: Option<Instant> = None;
    loop {
        let changed = tokio::select! {
            Some(event) = all.next() => follower.on_record_event(event),
            Some(event) = node.next() => follower.on_node_event(event),
            // `changed` fails only after the sender is dropped; the branch is disabled then.
            Ok(()) = key.changed() => {
                follower.keys = key.borrow_and_update().keys;
                true
            }
            _ = poll.tick() => {
                let well = follower.expire_errors();
                match &netlink {
                    Some(netlink) => follower.poll_addresses(netlink).await || well,
                    None => well,
                }
            }
            () = until(due) => {
                due = None;
                follower.publish_state(&sender);
                false
            }
            () = sender.closed() => return,
        };
        if changed && due.is_none() {
            due = Some(Instant::now() + COALESCE_DELAY);
        }
    }
}

/// Returns the configuration of a watch whose list comes from the API server's cache and not from
/// etcd, because all nodes request it at the same time after a restart of the server. The cache
/// serves only lists without pages.
fn from_memory(renew: u32) -> watcher::Config {
    let config = watcher::Config::default().timeout(renew).any_semantic();
    watcher::Config { page_size: None, ..config }
}

/// Waits until `due`; forever if it is `None`.
async fn until(due: Option<Instant>) {
    match due {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Follower of both watches.
struct Follower {
    config: Arc<Config>,
    keys: PublicKeys,
    store: reflector::Store<SkeinNode>,
    /// True after all SkeinNodes were received once.
    synced: bool,
    /// True if the list that is being received contains this node's Node.
    found: bool,
    addresses: Option<Vec<IpAddr>>,
    /// UID of the Node from which the own spec follows.
    uid: Option<String>,
    state: State,
    /// Last errors of the watch of SkeinNodes and of the watch of the Node, with their times.
    errors: [Option<(String, Instant)>; 2],
}

impl Follower {
    /// Handles an event of the watch of SkeinNodes, which the store contains already. Returns
    /// whether the state has changed.
    fn on_record_event(&mut self, event: watcher::Result<Event<SkeinNode>>) -> bool {
        let error = event.as_ref().err().map(|error| format!("SkeinNodes: {}", failure(error)));
        if let Ok(Event::Delete(node)) = &event
            && node.name_any() == self.config.name
        {
            self.state.deleted = node.uid();
        }
        match event {
            // An incomplete list is not used.
            Ok(Event::Init | Event::InitApply(_)) => return false,
            Ok(Event::InitDone) => self.synced = true,
            Ok(Event::Apply(_) | Event::Delete(_)) | Err(_) => {}
        }
        self.errors[0] = error.map(|error| (error, Instant::now()));
        true
    }

    /// Handles an event of the watch of the Node. Returns whether the state has changed.
    fn on_node_event(&mut self, event: watcher::Result<Event<Node>>) -> bool {
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
                    "cluster has no Node of this name, node record not written"
                );
                self.state.node = None;
            }
            Err(_) => {}
        }
        true
    }

    /// Removes errors older than [`ERROR_LIFETIME`]. Returns whether one was removed.
    fn expire_errors(&mut self) -> bool {
        let mut forgotten = false;
        for error in &mut self.errors {
            forgotten |= error.take_if(|(_, at)| at.elapsed() > ERROR_LIFETIME).is_some();
        }
        forgotten
    }

    /// Reads the addresses of `kubernetes.endpoint_interface`. Returns whether they have changed.
    async fn poll_addresses(&mut self, netlink: &Netlink) -> bool {
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

    /// Computes the state and sends it to the receivers.
    fn publish_state(&mut self, sender: &watch::Sender<State>) {
        let name = self.config.name.as_str();
        let interface = self.config.kubernetes.endpoint_interface.is_some();
        // The spec needs the addresses of the interface, which may not have been read yet.
        if let Some(node) = &self.state.node
            && interface == self.addresses.is_some()
        {
            let addresses = self.addresses.as_deref();
            let own = own::spec(&self.config, self.keys, node, addresses);
            self.state.problem = own.as_ref().err().cloned();
            // The earlier spec stays while it is that of the same Node.
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

/// Returns the cause of a watch's error, for messages.
fn failure(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => describe(error),
        watcher::Error::WatchError(status) => message_excerpt(&status.message).into_owned(),
        watcher::Error::NoResourceVersion => error.to_string(),
    }
}

/// Returns the records of all nodes, this node's from `own`.
fn files(name: &str, own: &SkeinNodeSpec, nodes: &[Arc<SkeinNode>]) -> ParsedRecords {
    let others = nodes.iter().filter(|node| node.name_any() != name);
    let mut files: ParsedRecords = others
        .map(|node| (path(&node.name_any()), node.record().map(|record| vec![record])))
        .collect();
    files.insert(path(name), own.record(name.to_owned()).map(|record| vec![record]));
    files
}

/// Returns the name of a SkeinNode in messages and in registry.json, in the form of a path.
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
    fn lists_come_from_the_cache_of_the_api_server() {
        let config = from_memory(WATCH_RENEWAL_SECONDS);
        let mut parameters = ListParams::default().match_any();
        parameters.limit = config.page_size;
        let request = Request::new("/apis").list(&parameters).unwrap();
        let query = request.uri().query().unwrap();
        assert!(query.contains("resourceVersion=0") && !query.contains("limit="), "{query}");
        assert_eq!(config.list_semantic, watcher::ListSemantic::Any);
    }
}
