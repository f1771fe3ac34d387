//! Throughput of a connection during each kind of flood, compared with its throughput during the
//! same flood to receivers that discard it. The difference is Skein's share of the cost.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_core::wire::header::HEADER_LEN;
use skein_lab::agent::{Cluster, PORT};
use skein_lab::load::flood::{FloodSender, FloodStats, spoofed_source};
use skein_lab::load::pattern::Pattern;
use skein_lab::load::sink::{self, Sink};
use skein_lab::process::thread_cpu_seconds;
use skein_lab::{Family, Plan, checks};

use crate::floods::{
    Established, initiations, other_messages, stranger_of_many_addresses, with_wrong_mac1,
};
use crate::overheard::{DATA, listens, overheard};

/// Number of rounds of all floods. The figures are medians over the rounds.
const ROUNDS: usize = 3;
/// Duration of each flood.
const FLOOD_DURATION: Duration = Duration::from_secs(2);
/// Duration of the measurement without a flood before each flood.
const BASELINE_DURATION: Duration = Duration::from_millis(1000);
/// Port of the socket without a reader.
const UNREAD_PORT: u16 = PORT + 1;
/// Port of the receiver that reads and discards datagrams.
const SINK_PORT: u16 = PORT + 2;
/// Destination for which the attacker's own kernel drops all datagrams.
const NOWHERE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 1), PORT);
/// Minimum throughput during a flood of the overlay's port, as a share of the throughput during the
/// same flood to a receiver that discards it. The documented figures are higher; the bound allows
/// for a busy machine.
const MIN_SHARE_OF_SINK: f64 = 0.4;

/// A flood, and its measurements of each round.
struct Flood<'a> {
    name: &'static str,
    to: &'a FloodSender,
    datagrams: &'a [Vec<u8>],
    /// Throughput during the flood as a share of the throughput without it.
    ratios: Vec<f64>,
    /// Rate of the flood, datagrams per second.
    rates: Vec<f64>,
    /// CPU time of the data process's lanes, seconds per second.
    lanes: Vec<f64>,
    /// CPU time of the data process's session manager, seconds per second.
    manager: Vec<f64>,
}

impl<'a> Flood<'a> {
    fn new(name: &'static str, to: &'a FloodSender, datagrams: &'a [Vec<u8>]) -> Self {
        let [ratios, rates, lanes, manager] = [const { Vec::new() }; 4];
        Self { name, to, datagrams, ratios, rates, lanes, manager }
    }

    /// Measures the connection without the flood, then sends the flood and measures both. Returns
    /// the throughput without the flood, megabytes per second.
    fn measure(&mut self, established: &Established, pid: i32) -> Result<f64> {
        let alone = established.alone(BASELINE_DURATION)?;
        let cpu = || -> Result<[f64; 2]> {
            let threads = thread_cpu_seconds(pid)?;
            let of = |name| {
                let named = threads.iter().filter(|(thread, _)| thread.starts_with(name));
                named.map(|(_, seconds)| seconds).sum()
            };
            Ok([of("lane-"), of("manager")])
        };
        let before = cpu()?;
        let (beside, sent) = established.during(|| {
            let mut sent = FloodStats::default();
            while sent.seconds < FLOOD_DURATION.as_secs_f64() {
                let source = |number| spoofed_source([198, 18], sent.datagrams + number);
                let part = Duration::from_millis(200);
                let more = self.to.send(self.datagrams, u64::MAX, part, source)?;
                sent.add(more);
            }
            Ok(sent)
        })?;
        let after = cpu()?;
        self.ratios.push(beside.speed() / alone);
        self.rates.push(sent.rate());
        self.lanes.push((after[0] - before[0]) / sent.seconds);
        self.manager.push((after[1] - before[1]) / sent.seconds);
        // The pause lets the queues drain.
        thread::sleep(Duration::from_millis(200));
        Ok(alone)
    }

    fn ratio(&self) -> f64 {
        median(&self.ratios)
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Creates data datagrams with the receiver index `session` that do not decrypt. `length` is their
/// size in bytes.
fn forged_data(session: &[u8], length: usize) -> Vec<Vec<u8>> {
    let mut random = Pattern::new(6);
    let one = |_| {
        let mut datagram = vec![0; length];
        random.fill(&mut datagram[HEADER_LEN..]);
        datagram[0] = DATA;
        datagram[4..8].copy_from_slice(session);
        datagram
    };
    (0..2000).map(one).collect()
}

#[test]
fn floods_cost_little_more_than_a_receiver_that_discards() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    let (lab, victim) = (&cluster.lab, &cluster.agents[1]);
    checks::all_reach_all(lab)?;
    let to = *listens(lab, 1)?.ip();
    let heard = overheard(lab, to, || checks::reaches(lab.pod(0), lab.pod(1), Family::V4))?;
    let data = heard.datagrams.iter().rfind(|datagram| datagram[0] == DATA);
    let session = data.context("no data was captured")?[4..8].to_vec();
    let known = initiations(&victim.record.public_key, 2000)?;
    let unknown = with_wrong_mac1(&known);
    let others = other_messages(&session);
    let forged = forged_data(&session, known[0].len());

    let (stranger, _sink) = stranger_of_many_addresses(lab)?;
    stranger.ip("link add nowhere type veth peer name nobody")?;
    stranger.ip("link set nowhere up")?;
    stranger.ip("link set nobody up")?;
    stranger.ip(&format!("route add {}/32 dev nowhere", NOWHERE.ip()))?;
    // The other end drops frames to a hardware address that it does not have.
    stranger.ip(&format!("neigh add {} lladdr 02:00:00:00:00:01 dev nowhere", NOWHERE.ip()))?;
    let node = &lab.nodes[1].ns;
    // The agent exempts the overlay's port from connection tracking in the same way.
    node.nft(&format!(
        "add table inet discarded\n\
         add chain inet discarded in {{ type filter hook prerouting priority raw ; }}\n\
         add rule inet discarded in udp dport {{ {UNREAD_PORT}, {SINK_PORT} }} notrack\n"
    ))?;
    let _unread = sink::unread(node, SocketAddr::from((to, UNREAD_PORT)))?;
    let sink = Sink::start(node, SocketAddr::from((to, SINK_PORT)))?;
    let sender = |port| FloodSender::new(&stranger, SocketAddrV4::new(to, port));
    let nowhere = FloodSender::new(&stranger, NOWHERE)?;
    let (unread, discarding, overlay) = (sender(UNREAD_PORT)?, sender(SINK_PORT)?, sender(PORT)?);
    let mut floods = [
        Flood::new("initiations that the attacker's kernel drops", &nowhere, &known),
        Flood::new("initiations to a socket without a reader", &unread, &known),
        Flood::new("initiations to a receiver that discards them", &discarding, &known),
        Flood::new("forged data", &overlay, &forged),
        Flood::new("initiations with a wrong mac1", &overlay, &unknown),
        Flood::new("initiations with a right mac1", &overlay, &known),
        Flood::new("responses, cookie replies, control messages", &overlay, &others),
    ];

    let established = Established::begin(lab)?;
    let pid = victim.dataplane_pids()[0];
    let mut alone = Vec::new();
    for _ in 0..ROUNDS {
        for flood in &mut floods {
            alone.push(flood.measure(&established, pid)?);
        }
    }
    established.end()?;
    let discarded = sink.stop()?;
    ensure!(discarded > 10_000, "The discarding receiver received only {discarded} messages.");

    let sink_ratio = floods[2].ratio();
    println!("alone: {:.0} MB/s", median(&alone));
    for flood in &floods {
        println!(
            "{}: {:.0} datagrams/s, ratio {:.2} {:.2?}, of the discarding receiver's {:.2}, lanes \
             {:.2} s/s, manager {:.2} s/s",
            flood.name,
            median(&flood.rates),
            flood.ratio(),
            flood.ratios,
            flood.ratio() / sink_ratio,
            median(&flood.lanes),
            median(&flood.manager),
        );
    }
    for flood in &floods[3..] {
        let share = flood.ratio() / sink_ratio;
        ensure!(
            share >= MIN_SHARE_OF_SINK,
            "{}: The throughput is only {share:.2} of that with the discarding receiver.",
            flood.name
        );
    }
    Ok(())
}
