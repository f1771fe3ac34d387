//! `skein-agent peers`: list of peers with their connection state.

use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use serde::Serialize;
use skein_ipc::{PeerReport, PeerState, Report, Reported};

use super::{Output, SampleArgs, json, print, report, runtime, seconds};
use crate::failure::Failure;
use crate::status::{Align, Field, age, bytes, count, milliseconds, peer_tone, table};

#[derive(Args)]
pub(crate) struct PeersArgs {
    /// Parts of names; only peers whose name contains one of them are listed
    names: Vec<String>,
    /// States to list, separated by commas [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    state: Vec<State>,
    #[command(flatten)]
    sample: SampleArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum State {
    Idle,
    Connecting,
    Established,
    Unreachable,
}

impl State {
    fn is(self, state: &Reported<PeerState>) -> bool {
        let own = match self {
            State::Idle => PeerState::Idle,
            State::Connecting => PeerState::Connecting,
            State::Established => PeerState::Established,
            State::Unreachable => PeerState::Unreachable,
        };
        *state == own
    }
}

/// Peer with its rates; `None` without an earlier sample of the same data process.
#[derive(Serialize)]
struct Peer {
    #[serde(flatten)]
    report: PeerReport,
    rates: Option<Rates>,
}

/// Rates of inner packets and their bits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Rates {
    pub(crate) tx_bits_per_second: f64,
    pub(crate) rx_bits_per_second: f64,
    pub(crate) tx_packets_per_second: f64,
    pub(crate) rx_packets_per_second: f64,
}

impl Rates {
    /// Computes the rates of a peer between two reports, `time` apart. Returns `None` if the
    /// earlier report does not contain the peer, or if `time` is zero.
    pub(crate) fn between(before: &Report, now: &PeerReport, time: Duration) -> Option<Self> {
        let then = before.peers.iter().find(|peer| peer.public_key == now.public_key)?;
        let seconds = time.as_secs_f64();
        let rate = |then: u64, now: u64| now.saturating_sub(then) as f64 / seconds;
        (seconds > 0.0).then(|| Self {
            tx_bits_per_second: 8.0 * rate(then.tx_bytes, now.tx_bytes),
            rx_bits_per_second: 8.0 * rate(then.rx_bytes, now.rx_bytes),
            tx_packets_per_second: rate(then.tx_packets, now.tx_packets),
            rx_packets_per_second: rate(then.rx_packets, now.rx_packets),
        })
    }
}

pub(crate) fn peers(arguments: &PeersArgs) -> Result<(), Failure> {
    let sample = &arguments.sample;
    let agent = sample.agent.agent()?;
    let interval = seconds("--interval", sample.interval)?;
    let (first, second, time) = runtime()?.block_on(async {
        let first = agent.status().await?;
        report(&first)?;
        let started = Instant::now();
        if interval.is_zero() {
            return Ok::<_, Failure>((None, first, Duration::ZERO));
        }
        tokio::time::sleep(interval).await;
        Ok((Some(first), agent.status().await?, started.elapsed()))
    })?;
    let now = report(&second)?;
    // The counters of a new data process start at zero.
    let before = first.as_ref().and_then(|first| first.report.as_ref());
    let before = before.filter(|before| before.pid == now.pid);
    let peers: Vec<Peer> = select(&now.peers, &arguments.names, &arguments.state)?
        .map(|peer| Peer {
            report: peer.clone(),
            rates: before.and_then(|before| Rates::between(before, peer, time)),
        })
        .collect();
    print(&match sample.output.output {
        Output::Json => json(&peers)?,
        Output::Table => render(&peers, now.peers.len()) + "\n",
    })?;
    let lost = peers.iter().filter(|peer| peer.report.state == PeerState::Unreachable).count();
    match lost {
        0 => Ok(()),
        _ => Err(Failure::Runtime(anyhow!(
            "{lost} of {} listed peers unreachable. See the column REASON, the peer's log, and the \
             firewall between the nodes.",
            peers.len()
        ))),
    }
}

/// Selects peers by parts of their names and by state. A name that no peer contains is an error.
fn select<'a>(
    all: &'a [PeerReport],
    names: &'a [String],
    states: &'a [State],
) -> Result<impl Iterator<Item = &'a PeerReport>, Failure> {
    if let Some(name) = names.iter().find(|name| !all.iter().any(|peer| peer.name.contains(*name)))
    {
        let known: Vec<_> = all.iter().take(10).map(|peer| peer.name.as_str()).collect();
        let more = if all.len() > known.len() { ", …" } else { "" };
        return Err(Failure::Usage(format!(
            "no peer name contains {name:?}. Number of peers: {} ({}{more}).",
            all.len(),
            known.join(", ")
        )));
    }
    Ok(all.iter().filter(move |peer| {
        (names.is_empty() || names.iter().any(|name| peer.name.contains(name)))
            && (states.is_empty() || states.iter().any(|state| state.is(&peer.state)))
    }))
}

/// Formats the selected peers as a table. `all` is the number of this node's peers.
fn render(peers: &[Peer], all: usize) -> String {
    match (peers.len(), all) {
        (0, 0) => return "no peers".to_owned(),
        (0, _) => return format!("no peer matches. Number of peers: {all}."),
        _ => {}
    }
    let dash = || "-".to_owned();
    let row = |peer: &Peer| -> Vec<Field> {
        let Peer { report: peer, rates } = peer;
        let rate = |of: fn(&Rates) -> f64| {
            Field::from(rates.as_ref().map_or_else(dash, |rates| count(of(rates) as u64)))
        };
        vec![
            peer.name.as_str().into(),
            Field::toned(peer.state.to_string(), peer_tone(&peer.state)),
            peer.endpoint.map_or_else(dash, |endpoint| endpoint.to_string()).into(),
            peer.rtt_us.map_or_else(dash, milliseconds).into(),
            rate(|rates| rates.tx_bits_per_second),
            rate(|rates| rates.rx_bits_per_second),
            rate(|rates| rates.tx_packets_per_second),
            rate(|rates| rates.rx_packets_per_second),
            bytes(peer.tx_bytes).into(),
            bytes(peer.rx_bytes).into(),
            peer.path_mtu.map_or_else(|| "full".to_owned(), |mtu| mtu.to_string()).into(),
            if peer.gso { "yes" } else { "no" }.into(),
            peer.last_received_seconds.map_or_else(dash, age).into(),
            peer.reason.as_ref().map_or_else(String::new, ToString::to_string).into(),
        ]
    };
    let columns = [
        ("PEER", Align::Left),
        ("STATE", Align::Left),
        ("ENDPOINT", Align::Left),
        ("RTT", Align::Right),
        ("TX BIT/S", Align::Right),
        ("RX BIT/S", Align::Right),
        ("TX PKT/S", Align::Right),
        ("RX PKT/S", Align::Right),
        ("TX", Align::Right),
        ("RX", Align::Right),
        ("PATH MTU", Align::Right),
        ("GSO", Align::Left),
        ("LAST RX", Align::Right),
        ("REASON", Align::Left),
    ];
    table(&columns, peers.iter().map(row))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::status::tests::peer;

    #[test]
    fn peers_are_selected_by_name_and_state() {
        let all = [
            peer("node-a", PeerState::Established),
            peer("node-b", PeerState::Unreachable),
            peer("edge-1", PeerState::Idle),
        ];
        let chosen = |names: &[&str], states: &[State]| -> Vec<String> {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            select(&all, &names, states).unwrap().map(|peer| peer.name.clone()).collect()
        };
        assert_eq!(chosen(&[], &[]).len(), 3);
        assert_eq!(chosen(&["node"], &[]), ["node-a", "node-b"]);
        assert_eq!(chosen(&["node"], &[State::Unreachable]), ["node-b"]);
        assert_eq!(chosen(&[], &[State::Idle, State::Established]), ["node-a", "edge-1"]);
        let error = select(&all, &["nobody".to_owned()], &[]).err().unwrap().to_string();
        assert!(error.contains("nobody") && error.contains("node-a"), "{error}");
    }

    #[test]
    fn rates_need_same_peer_in_both_reports() {
        let now = peer("node-b", PeerState::Established);
        let mut before = now.clone();
        before.tx_bytes -= 1000;
        before.rx_packets -= 10;
        let report = Report { peers: vec![before], ..Report::default() };
        let rates = Rates::between(&report, &now, Duration::from_secs(2)).unwrap();
        assert_eq!(rates.tx_bits_per_second, 4000.0);
        assert_eq!(rates.rx_packets_per_second, 5.0);
        let none = Report::default();
        assert_eq!(Rates::between(&none, &now, Duration::from_secs(2)), None);
    }

    #[test]
    fn empty_list_is_a_sentence() {
        assert_eq!(render(&[], 0), "no peers");
        assert_eq!(render(&[], 3), "no peer matches. Number of peers: 3.");
    }

    #[test]
    fn row_of_unreachable_peer_shows_reason() {
        let peer = Peer { report: peer("node-b", PeerState::Unreachable), rates: None };
        let text = render(&[peer], 1);
        let line = text.lines().nth(1).unwrap();
        assert!(
            line.contains("unreachable") && line.ends_with("handshakes get no answer"),
            "{text}"
        );
    }
}
