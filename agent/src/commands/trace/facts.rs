//! Input of a trace: status of the agent, routes and links of the kernel, forward chains.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;
use skein_core::address;
use skein_ipc::PeerReport;
use skein_netlink::firewall::forward;
use skein_netlink::link::Link;
use skein_netlink::lookup::RouteLookup;
use skein_netlink::{Netlink, NetlinkError};

use crate::failure::Failure;
use crate::status::Document;

/// State that decides the route of a packet.
pub(super) struct Facts {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) status: Document,
    /// Route to the sender, which shows the sender's location.
    pub(super) sender: RouteResult,
    /// Route of the packet.
    pub(super) route: RouteResult,
    /// Peer that owns the destination, and the route to its endpoint.
    pub(super) peer: Option<(PeerReport, Option<RouteResult>)>,
    /// The kernel forwards packets of this address family.
    pub(super) forwarding: bool,
    /// State of Skein's own nftables table, true if it is in place; `None` if no setting requires
    /// it.
    pub(super) table: Option<bool>,
    /// Forward chains of other programs whose policy drops packets of pods, or the error of reading
    /// the chains.
    pub(super) dropping_chains: Vec<String>,
}

/// Result of a route look-up and its outgoing interface.
#[derive(Debug)]
pub(super) struct RouteResult {
    pub(super) lookup: io::Result<RouteLookup>,
    pub(super) link: Option<Link>,
}

impl Facts {
    /// Collects the state for a packet from `from` to `to`.
    pub(super) async fn gather(
        from: IpAddr,
        to: IpAddr,
        status: Document,
    ) -> Result<Self, Failure> {
        let failed = |error: NetlinkError| Failure::io(&error.what, error.source);
        let netlink = Netlink::connect().map_err(failed)?;
        let links = netlink.links().await.map_err(failed)?;
        let look_up = async |to: IpAddr, incoming: Option<(IpAddr, u32)>| {
            let lookup = netlink.look_up(to, incoming).await.map_err(|error| error.source);
            let index = lookup.as_ref().ok().and_then(|found| found.interface);
            RouteResult {
                link: links.iter().find(|link| Some(link.index) == index).cloned(),
                lookup,
            }
        };
        let sender = look_up(from, None).await;
        // Packets of this machine itself have no incoming interface.
        let own = sender.lookup.as_ref().is_ok_and(|found| found.local);
        let incoming = sender.link.as_ref().filter(|_| !own).map(|link| (from, link.index));
        let peers = status.report.iter().flat_map(|report| &report.peers);
        let owner = longest_match(peers.flat_map(|p| p.pod_cidrs.iter().map(move |c| (c, p))), to);
        let peer = match owner.cloned() {
            Some(peer) => {
                let outer = match peer.endpoint {
                    Some(endpoint) => Some(look_up(endpoint.ip(), None).await),
                    None => None,
                };
                Some((peer, outer))
            }
            None => None,
        };
        let firewall = &status.firewall;
        let table = (firewall.active || firewall.error.is_some()).then_some(firewall.active);
        let pods = setting(&status, "/cni/enabled").as_bool() == Some(true);
        let dropping_chains = forward::ensure(&status.interface.name, pods, false).await.errors;
        let family = if to.is_ipv4() { "ipv4/ip_forward" } else { "ipv6/conf/all/forwarding" };
        let forwarding = std::fs::read_to_string(format!("/proc/sys/net/{family}"));
        Ok(Self {
            from,
            to,
            sender,
            route: look_up(to, incoming).await,
            peer,
            forwarding: forwarding.is_ok_and(|value| value.trim() != "0"),
            table,
            dropping_chains,
            status,
        })
    }

    /// Returns whether `address` is in a pod CIDR of this node.
    pub(super) fn is_here(&self, address: IpAddr) -> bool {
        self.status.interface.local_cidrs.iter().any(|cidr| cidr.contains(&address))
    }

    /// Returns the peer whose pod CIDRs contain `address`.
    pub(super) fn owner(&self, address: IpAddr) -> Option<&PeerReport> {
        let peers = self.status.report.iter().flat_map(|report| &report.peers);
        longest_match(peers.flat_map(|p| p.pod_cidrs.iter().map(move |c| (c, p))), address)
    }

    /// Returns the peer that owns the sender. Only that node can trace the packet.
    pub(super) fn remote_sender(&self) -> Option<&PeerReport> {
        let local = self.sender.lookup.as_ref().is_ok_and(|found| found.local);
        if local || self.is_here(self.from) {
            return None;
        }
        let mut peers = self.status.report.iter().flat_map(|report| &report.peers);
        let outer = |peer: &&PeerReport| peer.endpoint.is_some_and(|at| at.ip() == self.from);
        self.owner(self.from).or_else(|| peers.find(outer))
    }

    /// Returns an entry of the agent's configuration by its JSON pointer.
    pub(super) fn setting(&self, pointer: &str) -> &Value {
        setting(&self.status, pointer)
    }

    /// Returns a list of prefixes of the agent's configuration by its JSON pointer.
    pub(super) fn nets(&self, pointer: &str) -> Vec<IpNet> {
        let list = self.setting(pointer).as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter().filter_map(|net| address::parse(net.as_str()?).ok()).collect()
    }
}

fn setting<'a>(status: &'a Document, pointer: &str) -> &'a Value {
    status.config.pointer(pointer).unwrap_or(&Value::Null)
}

/// Returns the value of the longest prefix that contains `address`.
fn longest_match<'a, T>(all: impl Iterator<Item = (&'a IpNet, T)>, address: IpAddr) -> Option<T> {
    let holds = all.filter(|(cidr, _)| cidr.contains(&address));
    holds.max_by_key(|(cidr, _)| cidr.prefix_len()).map(|(_, what)| what)
}
