//! What there is to know of a packet's way, gathered from the agent, the kernel and the firewall.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;
use skein_core::address;
use skein_ipc::PeerReport;
use skein_netlink::firewall::forward;
use skein_netlink::link::Link;
use skein_netlink::lookup::Lookup;
use skein_netlink::{Netlink, NetlinkError};

use crate::failure::Failure;
use crate::status::Document;

pub(super) struct Facts {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) status: Document,
    /// Where the kernel would send what is for the sender, which shows where the sender is.
    pub(super) sender: Way,
    /// Where it would send the packet.
    pub(super) way: Way,
    /// The node that owns the destination, and the way to its endpoint.
    pub(super) peer: Option<(PeerReport, Option<Way>)>,
    /// Whether the kernel forwards packets of this family.
    pub(super) forwarding: bool,
    /// State of Skein's own nftables table, true if it is in place; `None` if no setting requires
    /// it.
    pub(super) table: Option<bool>,
    /// Others' chains that drop pods' packets, or why they are not known.
    pub(super) closed: Vec<String>,
}

/// A look-up, and the interface that it leads to.
#[derive(Debug, Clone)]
pub(super) struct Way {
    pub(super) lookup: Result<Lookup, String>,
    pub(super) link: Option<Link>,
}

impl Facts {
    pub(super) async fn gather(
        from: IpAddr,
        to: IpAddr,
        status: Document,
    ) -> Result<Self, Failure> {
        let failed = |error: NetlinkError| Failure::io(&error.what, error.source);
        let netlink = Netlink::connect().map_err(failed)?;
        let links = netlink.links().await.map_err(failed)?;
        let way = async |to: IpAddr, incoming: Option<(IpAddr, u32)>| {
            let lookup = netlink.look_up(to, incoming).await.map_err(|e| e.source.to_string());
            let index = lookup.as_ref().ok().and_then(|found| found.interface);
            Way { link: links.iter().find(|link| Some(link.index) == index).cloned(), lookup }
        };
        let sender = way(from, None).await;
        // What this machine sends itself comes in by no interface.
        let own = sender.lookup.as_ref().is_ok_and(|found| found.local);
        let incoming = sender.link.as_ref().filter(|_| !own).map(|link| (from, link.index));
        let peers = status.report.iter().flat_map(|report| &report.peers);
        let owner = longest(peers.flat_map(|p| p.pod_cidrs.iter().map(move |c| (c, p))), to);
        let peer = match owner.cloned() {
            Some(peer) => {
                let outer = match peer.endpoint {
                    Some(endpoint) => Some(way(endpoint.ip(), None).await),
                    None => None,
                };
                Some((peer, outer))
            }
            None => None,
        };
        let firewall = &status.firewall;
        let table = (firewall.active || firewall.error.is_some()).then_some(firewall.active);
        let pods = setting(&status, "/cni/enabled").as_bool() == Some(true);
        let closed = forward::ensure(&status.interface.name, pods, false).await.errors;
        let family = if to.is_ipv4() { "ipv4/ip_forward" } else { "ipv6/conf/all/forwarding" };
        let forwarding = std::fs::read_to_string(format!("/proc/sys/net/{family}"));
        Ok(Self {
            from,
            to,
            sender,
            way: way(to, incoming).await,
            peer,
            forwarding: forwarding.is_ok_and(|value| value.trim() != "0"),
            table,
            closed,
            status,
        })
    }

    /// Whether this node owns `address`.
    pub(super) fn is_here(&self, address: IpAddr) -> bool {
        self.status.interface.local_cidrs.iter().any(|cidr| cidr.contains(&address))
    }

    /// The peer whose pod CIDRs hold `address`.
    pub(super) fn owner(&self, address: IpAddr) -> Option<&PeerReport> {
        let peers = self.status.report.iter().flat_map(|report| &report.peers);
        longest(peers.flat_map(|p| p.pod_cidrs.iter().map(move |c| (c, p))), address)
    }

    /// The other node that sends, where it is one that does: what it does with its packets is known there.
    pub(super) fn foreign(&self) -> Option<&PeerReport> {
        let local = self.sender.lookup.as_ref().is_ok_and(|found| found.local);
        if local || self.is_here(self.from) {
            return None;
        }
        let mut peers = self.status.report.iter().flat_map(|report| &report.peers);
        let outer = |peer: &&PeerReport| peer.endpoint.is_some_and(|at| at.ip() == self.from);
        self.owner(self.from).or_else(|| peers.find(outer))
    }

    /// An entry of the agent's configuration.
    pub(super) fn setting(&self, pointer: &str) -> &Value {
        setting(&self.status, pointer)
    }

    /// A list of prefixes of the agent's configuration.
    pub(super) fn nets(&self, pointer: &str) -> Vec<IpNet> {
        let list = self.setting(pointer).as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter().filter_map(|net| address::parse(net.as_str()?).ok()).collect()
    }
}

fn setting<'a>(status: &'a Document, pointer: &str) -> &'a Value {
    status.config.pointer(pointer).unwrap_or(&Value::Null)
}

/// What the longest prefix around `address` stands for.
fn longest<'a, T>(all: impl Iterator<Item = (&'a IpNet, T)>, address: IpAddr) -> Option<T> {
    let holds = all.filter(|(cidr, _)| cidr.contains(&address));
    holds.max_by_key(|(cidr, _)| cidr.prefix_len()).map(|(_, what)| what)
}
