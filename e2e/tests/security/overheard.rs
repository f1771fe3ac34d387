//! Datagrams of a real session, recorded on the underlay, and datagrams derived from them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use skein_lab::agent::{Agent, Metrics, PORT};
use skein_lab::load::capture::Capture;
use skein_lab::load::pattern::Pattern;
use skein_lab::load::udp;
use skein_lab::{Family, Lab};

/// Message type of a handshake response, the first byte of the datagram.
pub(super) const RESPONSE: u8 = 2;

/// Message type of cookie replies.
pub(super) const COOKIE_REPLY: u8 = 3;

/// Message type of data.
pub(super) const DATA: u8 = 4;

/// Message type of control messages.
pub(super) const CONTROL: u8 = 5;

/// Maximum growth of the data process's memory during an attack, bytes.
pub(super) const MAX_MEMORY_GROWTH: u64 = 8 << 20;

pub(super) fn v4(address: IpAddr) -> Result<Ipv4Addr> {
    match address {
        IpAddr::V4(v4) => Ok(v4),
        IpAddr::V6(v6) => bail!("The address {v6} is not an IPv4 address."),
    }
}

/// Returns the underlay address and port on which a node listens.
pub(super) fn listens(lab: &Lab, node: usize) -> Result<SocketAddrV4> {
    Ok(SocketAddrV4::new(v4(lab.nodes[node].underlay(Family::V4))?, PORT))
}

/// Captured datagrams of the overlay, without duplicates.
pub(super) struct Overheard {
    pub(super) datagrams: Vec<Vec<u8>>,
    /// Source address of the last captured data datagram: the socket of a lane.
    pub(super) lane: SocketAddrV4,
}

/// Captures the overlay's datagrams to the address `to` while `work` runs.
pub(super) fn overheard(
    lab: &Lab,
    to: Ipv4Addr,
    work: impl FnOnce() -> Result<()>,
) -> Result<Overheard> {
    let capture = Capture::start(lab.switch()?)?;
    work()?;
    let frames = capture.stop()?;
    let (mut seen, mut lane) = (BTreeSet::new(), None);
    let mut datagrams = Vec::new();
    for frame in frames.iter().filter(|frame| frame.destination() == Some(to)) {
        let Some((PORT, payload)) = frame.udp() else { continue };
        if payload.first() == Some(&DATA) {
            lane = frame.source();
        }
        if seen.insert(payload.to_vec()) {
            datagrams.push(payload.to_vec());
        }
    }
    Ok(Overheard { datagrams, lane: lane.context("no data was captured")? })
}

/// Sends `count` datagrams of 1000 bytes from the first pod to the second, and captures them on the
/// switch. Returns the receiver, which still runs, the number sent, and the captured datagrams.
pub(super) fn recorded(lab: &Lab, count: u64) -> Result<(udp::Receiver, u64, Overheard)> {
    let (a, b) = (lab.pod(0), lab.pod(1));
    let at = SocketAddr::new(b.address(Family::V4), 7001);
    let receiver = udp::Receiver::start(&b.ns, at, 1000)?;
    let mut sent = 0;
    let captured = overheard(lab, *listens(lab, 1)?.ip(), || {
        let duration = Duration::from_millis(count);
        let load = udp::Load { payload: 1000, rate: Some(1000), duration };
        sent = a.ns.run(|| udp::send(&UdpSocket::bind("0.0.0.0:0")?, at, load))??.0;
        Ok(())
    })?;
    // A capture on a busy host may miss a few datagrams.
    let datagrams = captured.datagrams.len() as u64;
    ensure!(datagrams >= sent * 9 / 10, "Only {datagrams} of {sent} datagrams were captured.");
    Ok((receiver, sent, captured))
}

/// Datagrams that an unauthenticated sender derives from recorded ones by one method.
pub(super) struct Class {
    pub(super) name: &'static str,
    /// Drop reasons that may count these datagrams.
    pub(super) reasons: &'static [&'static str],
    pub(super) datagrams: Vec<Vec<u8>>,
}

pub(super) fn classes(real: &[Vec<u8>]) -> Vec<Class> {
    let mut random = Pattern::new(77);
    let mut number = |below: usize| {
        let mut bytes = [0; 8];
        random.fill(&mut bytes);
        (u64::from_be_bytes(bytes) % below.max(1) as u64) as usize
    };
    // The header is genuine, and the rest is random.
    let forged = real.iter().map(|real| {
        let mut forged = real.clone();
        Pattern::new(number(usize::MAX) as u64).fill(&mut forged[16..]);
        forged
    });
    let forged: Vec<_> = forged.collect();
    let control = forged.iter().map(|forged| {
        let mut control = forged.clone();
        (control[0], control[1], control[2]) = (CONTROL, 0, u8::MAX);
        control
    });
    let control = control.collect();
    let truncated = real.iter().map(|real| real[..number(real.len())].to_vec()).collect();
    let flipped = real.iter().map(|real| {
        let mut flipped = real.clone();
        flipped[number(real.len())] ^= 1 << number(8);
        flipped
    });
    let flipped = flipped.collect();
    let mut shuffled = real.to_vec();
    for at in (1..shuffled.len()).rev() {
        shuffled.swap(at, number(at + 1));
    }
    let class = |name, reasons, datagrams| Class { name, reasons, datagrams };
    vec![
        class("forged", &["auth_failed"], forged),
        class("forged control messages", &["auth_failed"], control),
        class("replayed", &["replayed", "replay_window"], real.to_vec()),
        class("truncated", &["auth_failed", "outer_header"], truncated),
        class(
            "bit-flipped",
            // A flipped bit of the header may change the type, the lane or the session.
            &[
                "auth_failed",
                "outer_header",
                "wrong_lane",
                "unknown_session",
                "handshake_invalid",
                "manager_queue",
            ],
            flipped,
        ),
        class("replayed and reordered", &["replayed", "replay_window"], shuffled),
    ]
}

/// Returns the metrics after a wait of 1.2 s, because the agent reads counters once per second.
pub(super) fn fresh(agent: &Agent) -> Result<Metrics> {
    thread::sleep(Duration::from_millis(1200));
    agent.metrics()
}
