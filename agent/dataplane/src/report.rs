//! Report of the data process: counters, capabilities and peers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;

use skein_core::drop::DropReason;
use skein_core::route::PeerId;
use skein_core::time::Time;
use skein_core::tunnel::{self, Engine, HandshakeResult, PeerView, UnreachableReason};
use skein_ipc::keys::PublicKey;
use skein_ipc::{
    Capability, CapabilityName, CapabilityState, HandshakeCount, Peer, PeerReport, PeerState,
    ReducedPath, Report, Reported, UnreachablePeer,
};

use super::setup::Running;
use super::stats::{DropStats, drop_report};
use super::totals::TrafficTotals;

/// Sources of a report, except the counters of the lanes' process.
pub(super) struct Sources<'a> {
    /// Protocol engine: sessions and handshakes.
    pub(super) engine: &'a Engine,
    /// Running lanes and their capabilities.
    pub(super) running: &'a Running,
    /// Drops of the engine.
    pub(super) drops: &'a DropStats,
    /// Traffic of each peer.
    pub(super) totals: &'a TrafficTotals,
}

/// Completes `report` with the state of an active data plane. The state of each peer is included
/// only if `each_peer` is set.
pub(super) fn fill<'a>(
    report: &mut Report,
    now: Time,
    sources: &Sources<'_>,
    peers: impl Iterator<Item = &'a (PeerId, Peer)> + Clone,
    each_peer: bool,
) {
    let lanes = &sources.running.lanes;
    report.lanes = (0..).zip(lanes).map(|(index, lane)| lane.stats.report(index)).collect();
    let gso_off: BTreeSet<SocketAddr> =
        lanes.iter().flat_map(|lane| lane.stats.gso_off()).collect();
    report.source_ports = sources.running.source_ports.clone();
    report.capabilities = sources.running.capabilities.clone();
    let refused = |tcp: bool| {
        lanes.iter().any(|lane| {
            let stats = &lane.stats;
            if tcp { &stats.tun_tcp_refused } else { &stats.tun_udp_refused }.load(Relaxed)
        })
    };
    let ecn_refused = lanes.iter().any(|lane| lane.stats.ecn_refused.load(Relaxed));
    let singly = "the kernel refused a superpacket: packets are written singly";
    let not_ect = "the kernel refused to set the field: datagrams leave as Not-ECT";
    for (name, is_refused, reason) in [
        (CapabilityName::TunTso, refused(true), singly),
        (CapabilityName::TunUso, refused(false), singly),
        (CapabilityName::UdpEcn, ecn_refused, not_ect),
    ] {
        let on = |c: &&mut Capability| c.name == name && c.state == CapabilityState::On;
        if let Some(refused) = report.capabilities.iter_mut().find(on).filter(|_| is_refused) {
            refused.state = CapabilityState::Degraded.into();
            refused.reason = Some(reason.to_owned());
        }
    }
    let gso = report.capabilities.iter_mut().find(|c| c.name == CapabilityName::UdpGso);
    let gso_on = gso.is_some_and(|gso| degrade(gso, &gso_off));
    let mut drops: Vec<_> = lanes.iter().map(|lane| &lane.stats.drops).collect();
    drops.push(sources.drops);
    report.drops = drop_report(&drops);
    // The lanes refuse invalid messages before the engine sees them.
    let refused = lanes.iter().map(|lane| lane.stats.drops.get(DropReason::HandshakeInvalid)).sum();
    report.handshakes = handshake_report(sources.engine.handshakes(), refused);
    report.second_key_peers = sources.engine.peers_on_second_identity();
    let reduced_path = |public_key, mtu: Option<u16>| Some(ReducedPath { public_key, mtu: mtu? });
    let views = sources.engine.tables().map(|(_, view)| view);
    report.reduced_paths = views
        .filter_map(|view| reduced_path(PublicKey(view.public_key.to_bytes()), view.path_mtu))
        .collect();
    let views = sources.engine.tables();
    let unreachable: BTreeMap<PeerId, &PeerView> =
        views.filter(|(_, view)| view.state == tunnel::PeerState::Unreachable).collect();
    if !unreachable.is_empty() {
        let named = peers.clone().filter_map(|(id, peer)| {
            // The engine sets a reason with the state.
            let reason = unreachable.get(id)?.reason.unwrap_or(UnreachableReason::NoAnswer);
            Some(UnreachablePeer { name: peer.name.clone(), reason: reason.into() })
        });
        report.unreachable = named.collect();
        report.unreachable.sort_by(|a, b| a.name.cmp(&b.name));
    }
    report.peers = peers
        .filter(|_| each_peer)
        .filter_map(|(id, peer)| {
            let mut report = peer_report(now, sources, *id, peer)?;
            report.gso = gso_on && !report.endpoint.is_some_and(|e| gso_off.contains(&e));
            Some(report)
        })
        .collect();
    report.peers.sort_by(|a, b| a.name.cmp(&b.name));
}

/// Marks the capability as degraded if GSO is off for some destinations. Returns whether GSO is in
/// use.
fn degrade(gso: &mut Capability, off: &BTreeSet<SocketAddr>) -> bool {
    if gso.state != CapabilityState::On {
        return false;
    }
    if !off.is_empty() {
        let names: Vec<_> = off.iter().map(ToString::to_string).collect();
        gso.state = CapabilityState::Degraded.into();
        gso.reason = Some(format!("refused for {}", names.join(", ")));
    }
    true
}

/// Returns the number of handshakes by result. `refused` is the number of invalid messages that the
/// engine has not seen.
fn handshake_report(
    counts: impl Iterator<Item = (HandshakeResult, u64)>,
    refused: u64,
) -> Vec<HandshakeCount> {
    counts
        .map(|(result, count)| HandshakeCount {
            result: result.into(),
            count: if result == HandshakeResult::Invalid { count + refused } else { count },
        })
        .collect()
}

fn peer_report(now: Time, sources: &Sources<'_>, id: PeerId, peer: &Peer) -> Option<PeerReport> {
    let view = sources.engine.peer(id)?;
    let session = view.current.as_ref();
    let totals = sources.totals.of(id);
    Some(PeerReport {
        name: peer.name.clone(),
        public_key: peer.public_key,
        endpoint: view.endpoint,
        pod_cidrs: peer.pod_cidrs.clone(),
        state: Reported::Known(match view.state {
            tunnel::PeerState::Idle => PeerState::Idle,
            tunnel::PeerState::Connecting => PeerState::Connecting,
            tunnel::PeerState::Established => PeerState::Established,
            tunnel::PeerState::Unreachable => PeerState::Unreachable,
        }),
        reason: view.reason.map(Reported::Known),
        cipher: session.map(|session| session.cipher.into()),
        lanes: session.map(|session| session.remote_lanes),
        handshake_age_seconds: session.map(|s| now.since(s.established).as_secs_f64()),
        last_received_seconds: view
            .last_received
            .map(|at| now.mono.saturating_sub(at).as_secs_f64()),
        rtt_us: view.round_trip.map(|rtt| rtt.as_micros().try_into().unwrap_or(u64::MAX)),
        path_mtu: view.path_mtu,
        gso: false,
        tx_packets: totals.tx_packets,
        tx_bytes: totals.tx_bytes,
        rx_packets: totals.rx_packets,
        rx_bytes: totals.rx_bytes,
    })
}
