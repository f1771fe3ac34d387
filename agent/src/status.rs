//! Text output of `skein-agent status`: a summary and tables.

mod document;
mod node;
mod table;

use std::fmt::Write;
use std::time::Duration;

use skein_core::drop::Direction;
use skein_ipc::{
    CapabilityState, DirectionReport, LaneReport, PeerReport, PeerState, Report, Reported,
};
use skein_netlink::firewall::reconciler::FirewallStatus;

use crate::policy::PolicyStatus;

pub use self::document::{
    DataplaneStatus, Document, InterfaceStatus, Offer, PeerConflict, RegistryStatus,
    RejectedRecords, RotationStatus, Stage,
};
pub use self::node::{NodeState, NodeView};
pub(crate) use self::table::{Align, Field, Tone, paint, printable, table};

/// Formats a status as text. `before` is an earlier status and its age, from which rates are
/// computed.
pub fn render(now: &Document, before: Option<(&Document, Duration)>) -> String {
    let mut text = header(now);
    let Some(report) = &now.report else {
        text.push_str("\nThe data process is not available.\n");
        return text;
    };
    let earlier = before.and_then(|(document, ago)| Some((document.report.as_ref()?, ago)));
    // The counters of a new data process start at zero.
    let earlier = earlier.filter(|(earlier, _)| earlier.pid == report.pid);
    section(&mut text, "Offloads", offloads(report));
    section(&mut text, "Lanes", lanes(report, earlier));
    section(&mut text, "Peers", peers(report));
    section(&mut text, "Drops", drops(report));
    text
}

fn section(text: &mut String, title: &str, body: String) {
    // Writing to a String cannot fail.
    let _ = write!(text, "\n{title}\n{body}\n");
}

fn header(now: &Document) -> String {
    let list = |items: Vec<String>| match items.is_empty() {
        true => "-".to_owned(),
        false => items.join(" "),
    };
    let strings = |items: &[ipnet::IpNet]| items.iter().map(ToString::to_string).collect();
    let notes = now.notes.iter().map(|note| ("note", note.clone()));
    let interface = &now.interface;
    let addresses = interface.addresses.iter().map(ToString::to_string).collect();
    let mut lines = vec![
        ("node", format!("{} (skein-agent {})", now.node, now.version)),
        ("public key", now.public_key.to_string()),
        ("key", key(&now.key)),
        ("ready", if now.ready { "yes" } else { "no" }.to_owned()),
    ];
    lines.extend(now.reasons.iter().map(|reason| ("  because", reason.clone())));
    lines.extend(notes);
    lines.push((
        "interface",
        format!("{}, MTU {}, {}", interface.name, interface.mtu, list(addresses)),
    ));
    lines.extend(interface.mtu_problem.iter().map(|problem| ("  problem", problem.clone())));
    lines.push(("pod CIDRs", list(strings(&interface.local_cidrs))));
    lines.push(("routes", interface.routes.len().to_string()));
    let conflicts = interface.conflicts.iter();
    lines.extend(conflicts.map(|c| ("  conflict", format!("{}: {}", c.peer, c.problem))));
    if let Some(cni) = &now.cni {
        lines.push(("CNI versions", list(cni.versions.clone())));
        lines.extend(cni.limits.iter().map(|limit| ("  limited", limit.clone())));
    }
    let dataplane = &now.dataplane;
    let process = now.report.as_ref().map_or_else(
        || "not available".to_owned(),
        |report| {
            let uptime = age(report.uptime_seconds);
            format!("process {}, up {uptime}, revision {}", report.pid, report.revision)
        },
    );
    let restarts = match dataplane.restarts {
        1 => "1 restart".to_owned(),
        restarts => format!("{restarts} restarts"),
    };
    lines.push(("data plane", format!("{process}, {restarts}")));
    if let Some(report) = &now.report {
        let confinement: Vec<_> = report.confinement.iter().map(ToString::to_string).collect();
        lines.push((
            "confinement",
            match confinement.is_empty() {
                true => "unknown: the data process has an earlier version".to_owned(),
                false => confinement.join(", "),
            },
        ));
    }
    lines.extend(firewall(&now.firewall));
    lines.extend(now.policy.iter().flat_map(policy));
    let records = &now.records;
    lines.push(("node records", format!("{} from {}", records.accepted, records.source.display())));
    lines.extend(records.source_error.iter().map(|error| ("  unreadable", error.clone())));
    let rejected = records.rejected.iter();
    lines.extend(rejected.map(|r| ("  rejected", format!("{}: {}", r.origin.display(), r.error))));
    lines.iter().map(|(name, value)| format!("{name:<13} {value}\n")).collect()
}

/// Returns the lines about the nftables table and about chains of other programs that drop pods'
/// packets.
fn firewall(firewall: &FirewallStatus) -> Vec<(&'static str, String)> {
    let state = match (&firewall.error, firewall.active) {
        (Some(error), _) => format!("missing: {error}"),
        (None, true) => format!("nftables table inet {}", firewall.table),
        (None, false) => "off".to_owned(),
    };
    let mut lines = vec![("firewall", state)];
    lines.extend(firewall.closed.iter().map(|chain| ("  closed", chain.clone())));
    lines.extend(firewall.unknown.iter().map(|chain| ("  unknown", chain.clone())));
    lines
}

/// Returns the lines about network policies.
fn policy(policy: &PolicyStatus) -> Vec<(&'static str, String)> {
    let mode = policy.mode.as_str();
    let state = match (policy.active, policy.complete) {
        (false, _) => format!("{mode}, not enforced"),
        (true, false) => format!("{mode}, stored policies: the source has not answered yet"),
        (true, true) => mode.to_owned(),
    };
    let changed = policy
        .last_commit_age_seconds
        .map(|seconds| format!(", last change {} ago", age(seconds)))
        .unwrap_or_default();
    let (policies, pods) = (policy.policies, policy.interfaces);
    let mut lines = vec![(
        "policy",
        format!(
            "{state}, policies: {policies}, pods: {pods}, revision {}{changed}",
            policy.revision
        ),
    )];
    lines.extend(policy.quarantined.iter().map(|pod| ("  quarantine", pod.clone())));
    lines.extend(policy.errors.iter().map(|error| ("  error", error.clone())));
    lines
}

/// Describes the age of the key and the progress of a key rotation.
fn key(key: &RotationStatus) -> String {
    let age = age(key.age_seconds as f64);
    match (&key.waits_for, key.keys.second) {
        (Some(waits_for), Some(second)) => {
            format!(
                "{age} old; rotation {}, second key {second}; waiting for {waits_for}",
                key.stage.label()
            )
        }
        (waits_for, _) => {
            format!(
                "{age} old{}",
                waits_for.iter().map(|why| format!("; {why}")).collect::<String>()
            )
        }
    }
}

fn offloads(report: &Report) -> String {
    let rows = report.capabilities.iter().map(|capability| {
        let reason = capability.reason.clone().unwrap_or_default();
        let tone = match capability.state.known() {
            Some(CapabilityState::On) => Tone::Good,
            Some(CapabilityState::Degraded | CapabilityState::Unsupported) => Tone::Warn,
            Some(CapabilityState::ForcedOff) | None => Tone::Plain,
        };
        let state = Field::toned(capability.state.to_string(), tone);
        vec![capability.name.text().into(), state, reason.into()]
    });
    table(&[("OFFLOAD", Align::Left), ("STATE", Align::Left), ("REASON", Align::Left)], rows)
}

fn lanes(report: &Report, earlier: Option<(&Report, Duration)>) -> String {
    type Side = fn(&LaneReport) -> &DirectionReport;
    let directions: [(&str, Side); 2] =
        [("out", |lane| &lane.egress), ("in", |lane| &lane.ingress)];
    let mut rows = Vec::new();
    for lane in &report.lanes {
        for (name, side) in directions {
            let now = side(lane);
            let then = earlier.and_then(|(report, ago)| {
                let lane = report.lanes.iter().find(|other| other.lane == lane.lane)?;
                Some((side(lane), ago.as_secs_f64()))
            });
            let rate = |counter: fn(&DirectionReport) -> u64| match then {
                Some((then, seconds)) if seconds > 0.0 => {
                    count((counter(now).saturating_sub(counter(then)) as f64 / seconds) as u64)
                }
                _ => "-".to_owned(),
            };
            rows.push(vec![
                lane.lane.to_string(),
                name.to_owned(),
                rate(|side| side.inner_packets),
                rate(|side| side.outer_packets),
                rate(|side| side.tun_packets),
                rate(|side| side.calls),
                count(now.inner_packets),
                count(now.outer_packets),
                bytes(now.inner_bytes),
                ratio(now.outer_packets, now.calls),
                ratio(now.inner_packets, now.tun_packets),
            ]);
        }
    }
    table(
        &[
            ("LANE", Align::Right),
            ("DIR", Align::Left),
            ("INNER/S", Align::Right),
            ("OUTER/S", Align::Right),
            ("TUN/S", Align::Right),
            ("CALLS/S", Align::Right),
            ("INNER", Align::Right),
            ("OUTER", Align::Right),
            ("BYTES", Align::Right),
            ("PKTS/CALL", Align::Right),
            ("SEGS/TUN", Align::Right),
        ],
        rows,
    )
}

fn peers(report: &Report) -> String {
    let row = |peer: &PeerReport| -> Vec<Field> {
        let state = match &peer.reason {
            Some(reason) => format!("{}: {reason}", peer.state),
            None => peer.state.to_string(),
        };
        let dash = || "-".to_owned();
        vec![
            peer.name.as_str().into(),
            peer.endpoint.map_or_else(dash, |endpoint| endpoint.to_string()).into(),
            Field::toned(state, peer_tone(&peer.state)),
            peer.handshake_age_seconds.map_or_else(dash, age).into(),
            peer.rtt_us.map_or_else(dash, milliseconds).into(),
            peer.path_mtu.map_or_else(dash, |mtu| mtu.to_string()).into(),
            if peer.gso { "yes" } else { "no" }.into(),
            peer.cipher.as_ref().map_or_else(dash, ToString::to_string).into(),
            bytes(peer.tx_bytes).into(),
            bytes(peer.rx_bytes).into(),
        ]
    };
    table(
        &[
            ("PEER", Align::Left),
            ("ENDPOINT", Align::Left),
            ("STATE", Align::Left),
            ("HANDSHAKE", Align::Right),
            ("RTT", Align::Right),
            ("PATH MTU", Align::Right),
            ("GSO", Align::Left),
            ("CIPHER", Align::Left),
            ("TX", Align::Right),
            ("RX", Align::Right),
        ],
        report.peers.iter().map(row),
    )
}

/// Returns the tone in which a peer's state is shown.
pub(crate) fn peer_tone(state: &Reported<PeerState>) -> Tone {
    match state.known() {
        Some(PeerState::Established) => Tone::Good,
        Some(PeerState::Unreachable) => Tone::Bad,
        Some(PeerState::Connecting) => Tone::Warn,
        Some(PeerState::Idle) | None => Tone::Plain,
    }
}

fn drops(report: &Report) -> String {
    let row = |direction: &str, reason: &str, packets| {
        vec![direction.to_owned(), reason.to_owned(), count(packets)]
    };
    let mut rows: Vec<_> = report
        .drops
        .iter()
        .filter(|drop| drop.packets > 0)
        .map(|drop| row(drop.kind.direction(), drop.kind.reason(), drop.packets))
        .collect();
    let overflow: u64 = report.lanes.iter().map(|lane| lane.receive_queue_overflow).sum();
    if overflow > 0 {
        let reason = "receive_queue_overflow (by the kernel)";
        rows.push(row(Direction::Ingress.label(), reason, overflow));
    }
    if report.tun_queue_drops > 0 {
        let reason = "tun_queue_full (by the kernel)";
        rows.push(row(Direction::Egress.label(), reason, report.tun_queue_drops));
    }
    let columns = [("DIRECTION", Align::Left), ("REASON", Align::Left), ("PACKETS", Align::Right)];
    table(&columns, rows)
}

/// Formats a count: exact below 10,000, else with one decimal and a decimal prefix (k, M, G, …).
pub(crate) fn count(value: u64) -> String {
    scaled(value, 1000.0, &["", "k", "M", "G", "T", "P", "E"])
}

/// Formats microseconds as milliseconds with two decimals.
pub(crate) fn milliseconds(us: u64) -> String {
    format!("{:.2} ms", us as f64 / 1000.0)
}

/// Formats bytes with binary prefixes: exact below 10,240, else with one decimal.
pub(crate) fn bytes(value: u64) -> String {
    scaled(value, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"])
}

fn scaled(value: u64, base: f64, units: &[&str]) -> String {
    let mut scaled = value as f64;
    let mut unit = 0;
    // Short counts are exact.
    while scaled >= base * if unit == 0 { 10.0 } else { 1.0 } && unit + 1 < units.len() {
        scaled /= base;
        unit += 1;
    }
    match unit {
        0 => format!("{value}{}", units[0]),
        _ => format!("{scaled:.1}{}", units[unit]),
    }
}

fn ratio(a: u64, b: u64) -> String {
    if b == 0 { "-".to_owned() } else { format!("{:.1}", a as f64 / b as f64) }
}

/// Formats seconds with the two largest units.
pub(crate) fn age(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match (whole / 86_400, whole / 3600 % 24, whole / 60 % 60, whole % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, m, s) => format!("{m} min {s} s"),
        (0, h, m, _) => format!("{h} h {m} min"),
        (d, h, ..) => format!("{d} d {h} h"),
    }
}

#[cfg(test)]
pub(crate) mod tests;
