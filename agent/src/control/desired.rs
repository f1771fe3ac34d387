//! Desired state of the node, as a pure function of the configuration and the node records, and the
//! difference between two snapshots for the data process.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use skein_core::wire::ip::{MAX_MTU, MIN_IPV4_MTU, MIN_IPV6_MTU};
use skein_ipc::keys::PublicKey;
use skein_ipc::{NodeSettings, Peer, ReducedPath, Request, Snapshot, TunSettings, Update};
use skein_netlink::interface::{InterfaceSpec, RouteConflict};

use super::endpoint::Endpoint;
use super::records::{NodeRecord, first_host};
use super::registry::Registry;
use super::rotation::NodeKeys;
use crate::cni::PodNetworkConfig;
use crate::config::Config;
use crate::policy::PodNetworks;
use crate::status::PeerConflict;

/// Bytes that Skein adds to an inner packet over IPv4: IP (20), UDP (8), header (16), tag (16).
const OVERHEAD_IPV4: u32 = 60;
/// Bytes that Skein adds to an inner packet over IPv6: IP (40), UDP (8), header (16), tag (16).
const OVERHEAD_IPV6: u32 = 80;

/// Desired state of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Inner MTU in bytes, at least the minimum of the IP versions in use.
    pub mtu: u16,
    /// Problem and remedy if the underlay or the configuration leaves less than that minimum.
    pub mtu_problem: Option<String>,
    /// Pod CIDRs of this node.
    pub local_cidrs: Vec<IpNet>,
    /// All other nodes, sorted by name.
    pub peers: Vec<Peer>,
    /// Addresses of this node on the interface.
    pub addresses: Vec<IpAddr>,
    /// Overlay addresses of all other nodes.
    pub peer_addresses: Vec<IpAddr>,
    /// Prefixes that only the overlay carries: pod CIDRs of this node, of the cluster, and of
    /// present and former peers.
    pub overlay: BTreeSet<IpNet>,
    /// Prefixes of unreachable routes: [`Desired::overlay`], or none if
    /// `interface.unreachable_routes` is off.
    pub unreachable: BTreeSet<IpNet>,
    /// Messages about endpoints of peers that are left out because their interface does not exist.
    pub unresolved: Vec<String>,
}

impl Desired {
    /// Computes the desired state. `underlay_mtu` is in bytes.
    pub fn new(config: &Config, registry: &Registry, underlay_mtu: u32) -> Self {
        let local_cidrs = registry.local_cidrs().to_vec();
        let ResolvedPeers { peers, unresolved } = peers(registry);
        let addresses = match &config.interface.addresses {
            Some(addresses) => addresses.clone(),
            None => local_cidrs.iter().map(first_host).collect(),
        };
        let mtu = config.interface.mtu.unwrap_or_else(|| {
            let overhead = if over_ipv6(config, registry) { OVERHEAD_IPV6 } else { OVERHEAD_IPV4 };
            underlay_mtu.saturating_sub(overhead).min(MAX_MTU.into()) as u16
        });
        let cidrs = peers.iter().flat_map(|peer| &peer.pod_cidrs).chain(&local_cidrs);
        let UsableMtu { mtu, problem: mtu_problem } = usable_mtu(mtu, cidrs);
        let overlay = registry.overlay_prefixes(config);
        let routed = config.interface.unreachable_routes;
        let unreachable = if routed { overlay.clone() } else { BTreeSet::new() };
        Self {
            mtu,
            mtu_problem,
            local_cidrs,
            peers,
            addresses,
            peer_addresses: registry.peers().flat_map(NodeRecord::overlay_addresses).collect(),
            overlay,
            unreachable,
            unresolved,
        }
    }

    /// Resolves the interfaces of link-local endpoints again. Returns whether the peers have
    /// changed.
    pub fn resolve_endpoints(&mut self, registry: &Registry) -> bool {
        let mut endpoints = registry.peers().flat_map(|record| &record.endpoints);
        if !endpoints.any(Endpoint::has_interface) {
            return false;
        }
        let ResolvedPeers { peers, unresolved } = peers(registry);
        self.unresolved = unresolved;
        let before = std::mem::replace(&mut self.peers, peers);
        before != self.peers
    }

    /// Returns the properties of the node that its pods depend on.
    pub fn network(&self, config: &Config) -> PodNetworkConfig {
        let peers = || self.peers.iter().flat_map(|peer| peer.pod_cidrs.clone()).collect();
        let cluster = Some(config.cluster_cidrs.clone()).filter(|cidrs| !cidrs.is_empty());
        PodNetworkConfig {
            mtu: self.mtu,
            local: self.local_cidrs.clone(),
            reserved: self.addresses.clone(),
            others: cluster.unwrap_or_else(peers),
        }
    }

    /// Returns the addresses that are pods'. The overlay addresses of nodes are not pods': for this
    /// node the configured ones, for peers those in their records or the default ones.
    pub fn pod_networks(&self) -> PodNetworks {
        PodNetworks {
            networks: self.overlay.iter().copied().collect(),
            excluded: self.addresses.iter().chain(&self.peer_addresses).copied().collect(),
        }
    }

    /// Returns the problem and the remedy if the configured addresses contradict this node's pod
    /// CIDRs.
    pub fn address_problem(&self) -> Option<String> {
        let local = |ip: &&IpAddr| self.local_cidrs.iter().any(|cidr| cidr.contains(*ip));
        let stray = self.addresses.iter().find(|ip| !local(ip))?;
        Some(format!(
            "interface.addresses: {stray} is not in this node's pod CIDRs, so that other nodes would \
             drop its packets. Choose an address in a pod CIDR, or remove this one."
        ))
    }

    /// Returns the interface with its addresses and routes. `narrow` are the paths whose MTU is
    /// less than that of the overlay.
    pub fn interface(&self, config: &Config, narrow: &[ReducedPath]) -> InterfaceSpec {
        let narrow: BTreeMap<_, _> =
            narrow.iter().map(|path| (path.public_key, path.mtu)).collect();
        let mtus = self.peers.iter().filter_map(|peer| {
            // During a key rotation the path MTU may be known under the other key.
            let keys = [Some(peer.public_key), peer.second_public_key];
            let found = keys.into_iter().flatten().find_map(|key| narrow.get(&key));
            let mtu = *found.filter(|mtu| **mtu < self.mtu)?;
            Some(peer.pod_cidrs.iter().map(move |cidr| (*cidr, mtu)))
        });
        InterfaceSpec {
            name: config.interface.name.clone(),
            alias: config.alias(),
            mtu: self.mtu.into(),
            txqueuelen: config.interface.txqueuelen,
            addresses: self.addresses.clone(),
            routes: self.peers.iter().flat_map(|peer| peer.pod_cidrs.clone()).collect(),
            mtus: mtus.flatten().collect(),
            forwarding: config.interface.forwarding,
            forwarding_ipv6: self.local_cidrs.iter().any(|cidr| cidr.addr().is_ipv6()),
        }
    }

    /// Returns the differences between two lists of paths with a reduced MTU, one text per peer.
    pub fn changed_paths(&self, before: &[ReducedPath], now: &[ReducedPath]) -> Vec<String> {
        let name = |key: PublicKey| {
            let has =
                |peer: &&Peer| [Some(peer.public_key), peer.second_public_key].contains(&Some(key));
            self.peers.iter().find(has).map_or_else(|| key.to_string(), |peer| peer.name.clone())
        };
        let reduced = now.iter().filter(|path| !before.contains(path));
        let reduced = reduced.map(|path| format!("{}: {} bytes", name(path.public_key), path.mtu));
        let is_gone = |path: &&ReducedPath| now.iter().all(|at| at.public_key != path.public_key);
        let whole = before.iter().filter(is_gone);
        reduced.chain(whole.map(|path| format!("{}: not reduced", name(path.public_key)))).collect()
    }

    /// Returns the conflicts in `found` with the name of the peer that owns the prefix.
    pub fn conflicts(&self, found: Vec<RouteConflict>) -> Vec<PeerConflict> {
        let named = |RouteConflict { prefix, problem }| {
            let owner = self.peers.iter().find(|peer| peer.pod_cidrs.contains(&prefix))?;
            Some(PeerConflict { peer: owner.name.clone(), prefix, problem })
        };
        found.into_iter().filter_map(named).collect()
    }

    /// Returns the part of the desired state that the data process applies.
    pub fn snapshot(
        &self,
        config: &Config,
        keys: NodeKeys<'_>,
        ifindex: u32,
        revision: u64,
    ) -> Snapshot {
        Snapshot {
            revision,
            not_before: 0,
            seen_handshakes: Default::default(),
            node: NodeSettings {
                name: config.name.clone(),
                cluster_id: config.cluster_id.clone(),
                private_key: keys.current.clone(),
                second_private_key: keys.second.cloned(),
                tun: TunSettings { name: config.interface.name.clone(), ifindex, mtu: self.mtu },
                underlay: config.underlay.clone(),
                lanes: config.dataplane.lanes,
                cipher: config.dataplane.cipher,
                bundling: config.dataplane.bundling,
                busy_poll_us: config.dataplane.busy_poll_us,
                offload: config.offload,
            },
            local_cidrs: self.local_cidrs.clone(),
            peers: self.peers.clone(),
        }
    }
}

/// Inner MTU of the overlay.
struct UsableMtu {
    /// Usable MTU in bytes, at least the minimum of the IP versions in use.
    mtu: u16,
    /// Problem and remedy if the underlay or the configuration leaves less.
    problem: Option<String>,
}

/// Returns the MTU in bytes of an overlay that carries `cidrs`: `mtu`, or the minimum if `mtu` is
/// less, with the problem and the remedy. The agent starts nevertheless, because one record with an
/// endpoint behind a narrow device must not keep other nodes from starting. The kernel removes IPv6
/// from an interface with an MTU below 1280 bytes. Path MTU discovery finds the size that passes.
fn usable_mtu<'a>(mtu: u16, cidrs: impl IntoIterator<Item = &'a IpNet>) -> UsableMtu {
    let v6 = cidrs.into_iter().find(|cidr| cidr.addr().is_ipv6());
    let minimum = if v6.is_some() { MIN_IPV6_MTU } else { MIN_IPV4_MTU };
    if mtu >= minimum {
        return UsableMtu { mtu, problem: None };
    }
    let reason = v6.map_or_else(String::new, |v6| format!(" for IPv6 pod CIDRs ({v6})"));
    let problem = format!(
        "the inner MTU of {mtu} bytes is too small{reason}, the minimum of {minimum} bytes is used. \
         Raise the MTU of the underlay, or interface.mtu if it is set."
    );
    UsableMtu { mtu: minimum, problem: Some(problem) }
}

/// Peers whose endpoints are resolved on this host.
struct ResolvedPeers {
    /// The peers, sorted by name.
    peers: Vec<Peer>,
    /// Messages about endpoints whose interface does not exist.
    unresolved: Vec<String>,
}

/// Returns all other nodes, sorted by name, and messages about the endpoints that are left out.
fn peers(registry: &Registry) -> ResolvedPeers {
    let mut unresolved = Vec::new();
    let mut peers: Vec<_> = registry.peers().map(|record| peer(record, &mut unresolved)).collect();
    peers.sort_by(|a, b| a.name.cmp(&b.name));
    ResolvedPeers { peers, unresolved }
}

fn peer(record: &NodeRecord, unresolved: &mut Vec<String>) -> Peer {
    let mut endpoints = Vec::with_capacity(record.endpoints.len());
    for endpoint in &record.endpoints {
        match endpoint.on_this_host() {
            Ok(address) => endpoints.push(address),
            Err(error) => unresolved.push(format!("node {}: {error}", record.name)),
        }
    }
    Peer {
        name: record.name.clone(),
        public_key: record.public_key,
        second_public_key: record.second_public_key,
        endpoints,
        pod_cidrs: record.pod_cidrs.clone(),
    }
}

/// Returns whether datagrams of this node may leave over IPv6.
fn over_ipv6(config: &Config, registry: &Registry) -> bool {
    let listens = |v4: bool| config.underlay.addresses.iter().any(|ip| ip.is_ipv4() == v4);
    let endpoints = registry.peers().chain(registry.own()).flat_map(|record| &record.endpoints);
    listens(false) && (!listens(true) || endpoints.into_iter().any(|e| e.is_ipv6()))
}

/// Returns the request that brings a data process from the state `old` to `new`: an update if only
/// peers differ, otherwise the whole snapshot. `None` if the states are equal.
pub fn difference(old: &Snapshot, new: &Snapshot) -> Option<Request> {
    if old.node != new.node || old.local_cidrs != new.local_cidrs {
        return Some(Request::Apply { snapshot: Box::new(new.clone()) });
    }
    let index = |snapshot: &Snapshot| -> BTreeMap<PublicKey, Peer> {
        snapshot.peers.iter().map(|peer| (peer.public_key, peer.clone())).collect()
    };
    let (before, after) = (index(old), index(new));
    let remove: Vec<_> = before.keys().filter(|key| !after.contains_key(key)).copied().collect();
    let upsert: Vec<_> = after
        .into_iter()
        .filter(|(key, peer)| before.get(key) != Some(peer))
        .map(|(_, p)| p)
        .collect();
    if upsert.is_empty() && remove.is_empty() {
        return None;
    }
    Some(Request::Update { update: Update { revision: new.revision, upsert, remove } })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::records::tests::text;
    use super::*;
    use crate::control::source::RecordSource;

    fn desired(config: &str, records: &[String], underlay_mtu: u32) -> (Config, Desired) {
        let directory = tempfile::tempdir().unwrap();
        let nodes = directory.path().join("nodes");
        std::fs::create_dir(&nodes).unwrap();
        for (n, record) in records.iter().enumerate() {
            std::fs::write(nodes.join(format!("{n}.toml")), record).unwrap();
        }
        let head =
            format!("name = 'node-1'\nnodes = {nodes:?}\nstate_dir = {:?}\n", directory.path());
        let config = Config::parse(&(head + config)).unwrap();
        let registry = Registry::open(
            &config,
            PublicKey([1; 32]).into(),
            RecordSource::Path(config.nodes.clone()),
            None,
        )
        .unwrap();
        let desired = Desired::new(&config, &registry, underlay_mtu);
        (config, desired)
    }

    fn own() -> String {
        text(1, &["10.1.0.0/24", "fd00:1::/64"])
    }

    fn snapshot(records: &[String], revision: u64) -> Snapshot {
        let (config, desired) = desired("", records, 1500);
        let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=".parse().unwrap();
        desired.snapshot(&config, NodeKeys { current: &key, second: None }, 7, revision)
    }

    #[test]
    fn addresses_are_the_first_host_of_each_pod_cidr() {
        let (_, desired) = desired("", &[own()], 1500);
        let expected: [IpAddr; 2] = ["10.1.0.1".parse().unwrap(), "fd00:1::1".parse().unwrap()];
        assert_eq!(desired.addresses, expected);
        for (cidr, first) in
            [("10.1.0.7/32", "10.1.0.7"), ("10.1.0.6/31", "10.1.0.6"), ("fd00::8/125", "fd00::9")]
        {
            assert_eq!(first_host(&cidr.parse().unwrap()), first.parse::<IpAddr>().unwrap());
        }
    }

    #[test]
    fn changed_paths_are_named_without_unchanged_ones() {
        let (_, desired) = desired("", &[own(), text(2, &["10.2.0.0/24"])], 1500);
        let peer = desired.peers[0].public_key;
        let path = |public_key, mtu| ReducedPath { public_key, mtu };
        let (same, other) = (path(PublicKey([9; 32]), 1300), path(peer, 1280));
        let changed = |before: &[_], now: &[_]| desired.changed_paths(before, now);
        assert_eq!(changed(&[same], &[same, other]), ["node-2: 1280 bytes"]);
        assert_eq!(changed(&[same, other], &[path(peer, 1000), same]), ["node-2: 1000 bytes"]);
        assert_eq!(changed(&[same, other], &[same]), ["node-2: not reduced"]);
        assert_eq!(changed(&[same], &[same]), [""; 0]);
    }

    #[test]
    fn mtu_leaves_room_for_overhead() {
        let v6_peer = text(2, &["10.2.0.0/24"]).replace("192.0.2.2", "[2001:db8::2]");
        let mtu = |config: &str, records: &[String]| desired(config, records, 1500).1.mtu;
        let both = "[underlay]\naddresses = ['0.0.0.0', '::']";
        let v4 = "[underlay]\naddresses = ['192.0.2.1']";
        let v6 = "[underlay]\naddresses = ['2001:db8::1']";
        assert_eq!(mtu(both, &[own(), text(2, &["10.2.0.0/24"])]), 1440);
        assert_eq!(mtu(both, &[own(), v6_peer.clone()]), 1420);
        assert_eq!(
            mtu(v4, &[own(), v6_peer.clone()]),
            1440,
            "the peer cannot be reached over IPv6"
        );
        assert_eq!(mtu(v6, &[own()]), 1420);
        assert_eq!(mtu("[interface]\nmtu = 1300", &[own(), v6_peer]), 1300);
    }

    #[test]
    fn address_outside_pod_cidrs_is_refused() {
        let addresses = |ip: &str| format!("[interface]\naddresses = ['{ip}']");
        let problem = |ip: &str| desired(&addresses(ip), &[own()], 1500).1.address_problem();
        assert_eq!(problem("10.1.0.200"), None);
        let problem = problem("10.2.0.1").unwrap();
        assert!(problem.contains("interface.addresses") && problem.contains("10.2.0.1"));
    }

    #[test]
    fn mtu_too_small_for_ipv6_is_raised_and_reported() {
        let mtu = |records: &[String], underlay| {
            let desired = desired("", records, underlay).1;
            (desired.mtu, desired.mtu_problem)
        };
        assert_eq!(mtu(&[own()], 1360), (1300, None));
        let (bytes, problem) = mtu(&[own()], 1330);
        let problem = problem.unwrap();
        assert_eq!(bytes, 1280);
        assert!(problem.contains("1270") && problem.contains("fd00:1::/64"), "{problem}");
        let v4 = text(1, &["10.1.0.0/24"]);
        assert_eq!(mtu(std::slice::from_ref(&v4), 1330), (1270, None));
        let (bytes, problem) = mtu(&[v4, text(2, &["fd00:2::/64"])], 1330);
        assert_eq!(bytes, 1280, "The kernel takes no route to the peer below 1280 bytes.");
        assert!(problem.is_some());
    }

    #[test]
    fn mtu_too_small_for_ipv4_is_raised_and_reported() {
        let v4 = text(1, &["10.1.0.0/24"]);
        let desired = |mtu| desired("", std::slice::from_ref(&v4), mtu).1;
        assert_eq!(desired(636).mtu_problem, None, "576 bytes are left");
        assert_eq!(desired(635).mtu, 576);
        let problem = desired(635).mtu_problem.unwrap();
        assert!(problem.contains("575") && problem.contains("576"), "{problem}");
    }

    #[test]
    fn route_conflict_names_the_peer() {
        let (_, desired) = desired("", &[own(), text(2, &["10.2.0.0/24", "fd00:2::/64"])], 1500);
        let conflict = |prefix: &str| RouteConflict {
            prefix: prefix.parse().unwrap(),
            problem: "taken".to_owned(),
        };
        let named = desired.conflicts(vec![conflict("fd00:2::/64"), conflict("10.9.0.0/24")]);
        assert_eq!(named.len(), 1, "No peer owns the other prefix: {named:?}");
        assert_eq!((named[0].peer.as_str(), &*named[0].problem), ("node-2", "taken"));
    }

    #[test]
    fn changed_peers_give_an_update() {
        let a = snapshot(&[own(), text(2, &["10.2.0.0/24"]), text(3, &["10.3.0.0/24"])], 1);
        let b = snapshot(&[own(), text(2, &["10.22.0.0/24"]), text(4, &["10.4.0.0/24"])], 2);
        assert!(difference(&a, &Snapshot { revision: 9, ..a.clone() }).is_none());
        let Some(Request::Update { update }) = difference(&a, &b) else { panic!("no update") };
        assert_eq!(update.revision, 2);
        assert_eq!(update.remove, [PublicKey([3; 32])]);
        let upserted: Vec<_> = update.upsert.iter().map(|peer| peer.name.as_str()).collect();
        assert_eq!(upserted, ["node-2", "node-4"]);
    }

    #[test]
    fn other_changes_give_a_whole_snapshot() {
        let a = snapshot(&[own()], 1);
        let b = snapshot(&[text(1, &["10.9.0.0/24"])], 2);
        assert!(matches!(difference(&a, &b), Some(Request::Apply { .. })));
        let mut c = a.clone();
        c.node.tun.ifindex += 1;
        assert!(matches!(difference(&a, &c), Some(Request::Apply { .. })));
    }
}
