//! Attacks at the rate of one core during a transfer. The tests print the measured rates.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use skein_core::time::Time;
use skein_core::tunnel::message::{COOKIE_REPLY_LEN, MIN_RESPONSE_LEN};
use skein_core::tunnel::{Ciphers, Engine, EngineConfig, PeerConfig};
use skein_core::wire::header::HEADER_LEN;
use skein_core::{PrivateKey, PublicKey};
use skein_lab::agent::{Agent, Cluster, Metrics, PORT};
use skein_lab::load::flood::{FloodSender, FloodStats, spoofed_source};
use skein_lab::load::pattern::Pattern;
use skein_lab::load::progress::FlowProgress;
use skein_lab::load::retry_bind;
use skein_lab::load::transfer::Transfer;
use skein_lab::process::{resident_bytes, thread_cpu_seconds};
use skein_lab::{Family, Lab, Netns, Offloads, Plan, checks};

use crate::overheard::{
    CONTROL, COOKIE_REPLY, DATA, MAX_MEMORY_GROWTH, Overheard, RESPONSE, classes, fresh, listens,
    overheard, recorded,
};

/// Minimum speed of a transfer during an attack that uses one of two cores, relative to its speed
/// without an attack.
const MIN_SPEED_RATIO: f64 = 0.1;

/// Maximum number of datagrams that are sent of each class.
const MAX_DATAGRAMS_PER_CLASS: u64 = 50_000;

/// Maximum time in which the datagrams of a class are sent.
const MAX_SEND_TIME: Duration = Duration::from_secs(8);

fn drops(metrics: &Metrics, reasons: &[&str]) -> f64 {
    let of = |reason: &&str| metrics.sum("skein_drops_total", &[&format!("reason=\"{reason}\"")]);
    reasons.iter().map(of).sum()
}

fn all_drops(metrics: &Metrics) -> f64 {
    metrics.sum("skein_drops_total", &["direction=\"ingress\""])
}

/// A TCP transfer at full speed that starts before the attacks.
pub(crate) struct Established {
    transfer: Transfer,
    progress: Arc<FlowProgress>,
}

/// Progress of the transfer in a period.
#[derive(Default)]
pub(crate) struct TransferSample {
    megabytes: f64,
    seconds: f64,
    /// The longest interruption.
    stall: Duration,
}

impl TransferSample {
    /// Speed in megabytes per second.
    pub(crate) fn speed(&self) -> f64 {
        self.megabytes / self.seconds
    }

    /// Adds the progress of another period.
    fn add(&mut self, more: &Self) {
        self.megabytes += more.megabytes;
        self.seconds += more.seconds;
        self.stall = self.stall.max(more.stall);
    }

    /// Compares the speed with `alone`, the speed without an attack, and describes both.
    ///
    /// # Errors
    ///
    /// Returns an error if the speed is below `MIN_SPEED_RATIO`, or if an interruption took 10 s.
    fn compare(&self, alone: f64) -> Result<String> {
        let (speed, stall) = (self.speed(), self.stall.as_secs_f64() * 1e3);
        let ratio = speed / alone;
        ensure!(
            ratio > MIN_SPEED_RATIO,
            "The speed fell from {alone:.1} MB/s to {speed:.1} MB/s during the attack."
        );
        ensure!(stall < 10e3, "The transfer was interrupted for {stall:.0} ms.");
        Ok(format!(
            "transfer: {alone:.0} MB/s without attack, {speed:.0} MB/s during the attack, ratio \
             {ratio:.2}, longest interruption {stall:.0} ms"
        ))
    }
}

impl Established {
    pub(crate) fn begin(lab: &Lab) -> Result<Self> {
        let (a, b, progress) = (lab.pod(0), lab.pod(1), Arc::default());
        let to = SocketAddr::new(b.address(Family::V4), 7000);
        let transfer = Transfer::start_with_progress(&a.ns, &b.ns, to, u64::MAX, None, &progress)?;
        let begun = || Ok(progress.bytes() > 0);
        checks::eventually("the transfer begins", Duration::from_secs(10), begun)?;
        Ok(Self { transfer, progress })
    }

    /// Measures the transfer while `work` runs.
    pub(crate) fn during<T>(
        &self,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(TransferSample, T)> {
        self.progress.take_longest_pause();
        let (before, start) = (self.progress.bytes(), Instant::now());
        let done = work()?;
        let megabytes = (self.progress.bytes() - before) as f64 / 1e6;
        let seconds = start.elapsed().as_secs_f64();
        let lasting = self.progress.last_received().map_or(start.elapsed(), |last| last.elapsed());
        let stall = self.progress.take_longest_pause().max(lasting);
        Ok((TransferSample { megabytes, seconds, stall }, done))
    }

    /// Measures the speed without an attack for `duration`.
    pub(crate) fn alone(&self, duration: Duration) -> Result<f64> {
        let wait = || {
            thread::sleep(duration);
            Ok(())
        };
        Ok(self.during(wait)?.0.speed())
    }

    /// Ends the transfer, and checks that every byte arrived unchanged.
    pub(crate) fn end(self) -> Result<()> {
        self.progress.stop();
        self.transfer.join().map(drop)
    }
}

fn memory(agent: &Agent) -> Result<u64> {
    agent.dataplane_pids().into_iter().map(resident_bytes).sum()
}

#[test]
fn mutated_datagrams_change_no_byte_and_are_counted() -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let cluster = Cluster::up(&plan, Family::V4)?;
    let (lab, victim) = (&cluster.lab, &cluster.agents[1]);
    checks::all_reach_all(lab)?;
    let (receiver, sent, Overheard { datagrams: mut real, lane }) = recorded(lab, 1000)?;
    real.retain(|datagram| datagram[0] == DATA);
    let established = Established::begin(lab)?;
    let alone = established.alone(Duration::from_secs(3))?;

    let stranger = lab.attach("stranger", 200)?;
    let sender = FloodSender::new(&stranger, listens(lab, 1)?)?;
    // Spoofed sources: the listening port of the node that owns the session, and the port of the
    // lane, whose genuine datagrams GRO merges with the spoofed ones.
    let sources = [listens(lab, 0)?, lane];
    let before_all = memory(victim)?;
    let (mut sample, mut total) = (TransferSample::default(), FloodStats::default());
    for class in classes(&real) {
        let before = fresh(victim)?;
        let source = |number| sources[number as usize % sources.len()];
        let (most, time) = (MAX_DATAGRAMS_PER_CLASS, MAX_SEND_TIME);
        // Only the time of the attack counts, not the time until the metrics are fresh.
        let attack = || sender.send(&class.datagrams, most, time, source);
        let (progress, sent) = established.during(attack)?;
        sample.add(&progress);
        let after = fresh(victim)?;
        let counted = drops(&after, class.reasons) - drops(&before, class.reasons);
        let all = all_drops(&after) - all_drops(&before);
        let overflow = |m: &Metrics| m.sum("skein_receive_queue_overflow_total", &[]);
        println!(
            "{}: {} sent, {:.0} per second; {counted} counted, {} overflowed the sockets",
            class.name,
            sent.datagrams,
            sent.rate(),
            overflow(&after) - overflow(&before),
        );
        let (name, datagrams) = (class.name, sent.datagrams);
        ensure!(datagrams > 10_000, "{name}: Only {datagrams} datagrams were sent.");
        ensure!(
            counted > datagrams as f64 / 2.0,
            "{name}: Only {counted} of {datagrams} datagrams are counted as dropped."
        );
        ensure!(
            all == counted,
            "{name}: {all} drops are counted, but only {counted} with an expected reason."
        );
        total.add(sent);
    }
    println!(
        "received {:.0} datagrams per second for {:.1} s; {}",
        total.rate(),
        total.seconds,
        sample.compare(alone)?
    );
    established.end()?;
    let grown = memory(victim)?.saturating_sub(before_all);
    ensure!(grown < MAX_MEMORY_GROWTH, "The memory has grown by {grown} bytes.");
    let outcome = receiver.stop()?;
    let is_complete = outcome.received == sent && outcome.corrupt == 0;
    ensure!(is_complete, "Of {sent} datagrams sent, the receiver got: {outcome:?}");
    checks::mixed_traffic(lab, 1 << 20)
}

/// An attacker on the path delays datagrams and forwards them in reverse order, three times.
#[test]
fn datagrams_held_back_and_reordered_arrive_once() -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let cluster = Cluster::up(&plan, Family::V4)?;
    let lab = &cluster.lab;
    checks::all_reach_all(lab)?;
    let switch = lab.switch()?;
    let to = listens(lab, 1)?;
    switch.nft(&format!(
        "add table bridge held\nadd chain bridge held f {{ type filter hook forward priority 0 ; }}\n\
         add rule bridge held f ip daddr {} udp dport {PORT} drop\n",
        to.ip()
    ))?;
    let (receiver, _, Overheard { datagrams: mut held, .. }) = recorded(lab, 500)?;
    switch.sh("nft delete table bridge held")?;
    // 1000 bytes of payload, 28 bytes of inner headers, 32 bytes of overlay header and tag.
    held.retain(|datagram| datagram[0] == DATA && datagram.len() == 1060);
    held.reverse();
    let stranger = lab.attach("stranger", 200)?;
    let sender = FloodSender::new(&stranger, to)?;
    let from = listens(lab, 0)?;
    let count = held.len() as u64;
    let replays = ["replayed", "replay_window"];
    for round in 0..3 {
        let before = drops(&fresh(&cluster.agents[1])?, &replays);
        // The rate is low, so that no datagram is lost.
        for part in held.chunks(50) {
            let all = part.len() as u64;
            sender.send(part, all, Duration::from_secs(1), |_| from)?;
            thread::sleep(Duration::from_millis(10));
        }
        let after = drops(&fresh(&cluster.agents[1])?, &replays);
        let expected = if round == 0 { 0 } else { count };
        let counted = after - before;
        ensure!(
            counted == expected as f64,
            "Round {round}: {counted} replays are counted instead of {expected}."
        );
    }
    let outcome = receiver.stop()?;
    let is_complete = outcome.received == count && outcome.corrupt == 0;
    ensure!(is_complete, "Of {count} datagrams forwarded, the receiver got: {outcome:?}");
    ensure!(outcome.reordered + 1 == count, "The datagrams were not reordered: {outcome:?}");
    checks::all_reach_all(lab)
}

/// Creates initiations with a valid mac1 to the owner of the public key `to`, by nodes that have no
/// record.
pub(crate) fn initiations(to: &str, count: u16) -> Result<Vec<Vec<u8>>> {
    use base64::Engine as _;
    let key = base64::engine::general_purpose::STANDARD.decode(to)?;
    let key: [u8; 32] = key.try_into().ok().context("no public key")?;
    let public_key = PublicKey::new(key);
    let one = |number: u16| {
        let mut random = Pattern::new(number.into());
        let mut private_key = [0; 32];
        random.fill(&mut private_key);
        let config = EngineConfig {
            private_key: PrivateKey::new(&private_key),
            cluster_id: "laboratory".to_owned(),
            listen_port: PORT,
            lanes: 2,
            ciphers: Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: true },
            mtu: 1440,
            ecn: false,
        };
        let mut engine = Engine::new(config, Box::new(move |bytes| random.fill(bytes)))?;
        let now = Time { mono: Duration::from_secs(1), wall: Duration::from_secs(1 << 31) };
        let endpoints = vec![SocketAddr::from(([192, 0, 2, 2], PORT))];
        let peer = engine.upsert_peer(now, PeerConfig { public_key, second_key: None, endpoints });
        engine.request_session(now, peer);
        Ok(engine.poll_transmit().context("no initiation")?.payload)
    };
    (0..count).map(one).collect()
}

/// Returns the initiations as from a sender that does not know the node's public key.
pub(crate) fn with_wrong_mac1(initiations: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let change = |real: &Vec<u8>| {
        let mut changed = real.clone();
        changed[40] ^= 1;
        changed
    };
    initiations.iter().map(change).collect()
}

/// Creates a machine that sends from and receives at the addresses of [`spoofed_source`]. Returns
/// it and its socket for the answers of the second node.
pub(crate) fn stranger_of_many_addresses(lab: &Lab) -> Result<(Netns, UdpSocket)> {
    let stranger = lab.attach("stranger", 200)?;
    stranger.ip("route add local 198.18.0.0/16 dev lo")?;
    lab.nodes[1].ns.ip("route add 198.18.0.0/16 via 192.0.2.200")?;
    // Answers go to the port that an initiation names; the socket prevents ICMP errors.
    let sink = stranger.run(|| retry_bind(|| UdpSocket::bind(("0.0.0.0", PORT))))??;
    Ok((stranger, sink))
}

/// Creates forged responses, cookie replies, and control messages with the receiver index
/// `session`: messages that a sender can create without an initiation.
pub(crate) fn other_messages(session: &[u8]) -> Vec<Vec<u8>> {
    let mut random = Pattern::new(5);
    let mut one = |kind, length| {
        let mut message = vec![0; length];
        random.fill(&mut message[4..8]);
        random.fill(&mut message[HEADER_LEN..]);
        (message[0], message[2]) = (kind, u8::MAX);
        if kind == CONTROL {
            message[4..8].copy_from_slice(session);
        }
        message
    };
    let lengths = [
        (RESPONSE, MIN_RESPONSE_LEN),
        (COOKIE_REPLY, COOKIE_REPLY_LEN),
        (CONTROL, HEADER_LEN + 37),
    ];
    (0..700).flat_map(|_| lengths).map(|(kind, length)| one(kind, length)).collect()
}

/// Returns the number of bytes that a machine has sent and received on its interface.
fn traffic(machine: &Netns) -> Result<(f64, f64)> {
    let text = machine.ip("-s -j link show eth0")?;
    let links: serde_json::Value = serde_json::from_str(&text)?;
    let bytes = |way: &str| links[0]["stats64"][way]["bytes"].as_f64().context("no statistics");
    Ok((bytes("tx")?, bytes("rx")?))
}

/// The flood has 65536 source addresses and varying ports; all answers reach the flooding machine.
#[test]
fn handshake_floods_stop_neither_transfers_nor_new_nodes() -> Result<()> {
    let cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    let (lab, victim) = (&cluster.lab, &cluster.agents[1]);
    let (a, b, c) = (lab.pod(0), lab.pod(1), lab.pod(2));
    let heard = overheard(lab, *listens(lab, 1)?.ip(), || checks::reaches(a, b, Family::V4))?;
    let heard = heard.datagrams.iter().rfind(|datagram| datagram[0] == DATA);
    let others = other_messages(&heard.context("no data was captured")?[4..8]);
    checks::reaches(a, c, Family::V4)?;
    let (stranger, sink) = stranger_of_many_addresses(lab)?;
    let sender = FloodSender::new(&stranger, listens(lab, 1)?)?;
    let known = initiations(&victim.record.public_key, 2000)?;
    let unknown = with_wrong_mac1(&known);
    let pid = victim.dataplane_pids()[0];
    let established = Established::begin(lab)?;
    let alone = established.alone(Duration::from_secs(3))?;
    let before_all = memory(victim)?;
    for (what, datagrams) in [
        ("of initiations without the node's key", &unknown),
        ("of initiations with the node's key", &known),
        ("of responses, cookie replies and control messages", &others),
    ] {
        let before = (traffic(&stranger)?, thread_cpu_seconds(pid)?, fresh(victim)?);
        let (sample, flood) = established.during(|| {
            let mut flood = FloodStats::default();
            while flood.seconds < 6.0 {
                let part = Duration::from_millis(200);
                let source = |number| spoofed_source([198, 18], flood.datagrams + number);
                let more = sender.send(datagrams, u64::MAX, part, source)?;
                flood.add(more);
            }
            Ok(flood)
        })?;
        let after = (traffic(&stranger)?, thread_cpu_seconds(pid)?, fresh(victim)?);
        let (asked, answered) = (after.0.0 - before.0.0, after.0.1 - before.0.1);
        let cpu = |name: &str| {
            let of = |threads: &std::collections::BTreeMap<String, f64>| {
                threads.iter().filter(|(n, _)| n.starts_with(name)).map(|(_, s)| s).sum::<f64>()
            };
            of(&after.1) - of(&before.1)
        };
        let counted = |reason: &str| drops(&after.2, &[reason]) - drops(&before.2, &[reason]);
        println!(
            "a flood {what}: {:.0} messages per second for {:.1} s; CPU time of the manager {:.2} s, \
             of the lanes {:.2} s; {} invalid, {} of unknown peers, {} without cookie, {} not \
             authentic, {} over the queue's bound; {:.0} MB sent, {:.0} MB answered; {}",
            flood.rate(),
            flood.seconds,
            cpu("manager"),
            cpu("lane-"),
            counted("handshake_invalid"),
            counted("handshake_unknown_peer"),
            counted("handshake_cookie_required"),
            counted("auth_failed"),
            counted("manager_queue"),
            asked / 1e6,
            answered / 1e6,
            sample.compare(alone)?
        );
        ensure!(answered < asked, "{asked} bytes caused answers of {answered} bytes.");
        if datagrams == &others {
            let invalid = counted("handshake_invalid");
            ensure!(invalid > 1000.0, "Only {invalid} responses and cookies are counted.");
            let failed = counted("auth_failed");
            ensure!(failed > 1000.0, "Only {failed} control messages are counted.");
        } else if datagrams == &known {
            let required = counted("handshake_cookie_required");
            ensure!(required > 1000.0, "Only {required} cookies were required.");
            // The limit is 64 per second; tokens of about three seconds had accumulated.
            let most = 64.0 * (flood.seconds + 3.0);
            let done = counted("handshake_unknown_peer");
            ensure!(done < most, "{done} public-key operations were done, more than {most}.");
        } else {
            let invalid = counted("handshake_invalid");
            ensure!(invalid > 1000.0, "Only {invalid} invalid initiations are counted.");
            let required = counted("handshake_cookie_required");
            ensure!(required == 0.0, "{required} senders without the key received a cookie.");
        }
    }

    established.end()?;

    // A handshake of two nodes without a session, during a flood of all message types.
    let all = [known, others].concat();
    let stop = AtomicBool::new(false);
    let joined = thread::scope(|scope| -> Result<_> {
        let flood = scope.spawn(|| -> Result<_> {
            let mut flood = FloodStats::default();
            while !stop.load(Ordering::Relaxed) && flood.seconds < 40.0 {
                let source = |number| spoofed_source([198, 18], flood.datagrams + number);
                let more = sender.send(&all, u64::MAX, Duration::from_millis(100), source)?;
                flood.add(more);
            }
            Ok(flood)
        });
        thread::sleep(Duration::from_millis(500));
        let joined = checks::wait_until_reached(c, b, Family::V4, Duration::from_secs(30));
        stop.store(true, Ordering::Relaxed);
        flood.join().ok().context("the flood panicked")??;
        joined
    })?;
    let cookies = fresh(&cluster.agents[2])?;
    let cookies = cookies.sum("skein_handshakes_total", &["result=\"cookie_received\""]);
    println!(
        "a new node joined after {:.1} s of the flood, with {cookies} cookies",
        joined.as_secs_f64()
    );
    ensure!(cookies > 0.0, "The node joined without a cookie, so the flood had no effect.");
    drop(sink);
    let grown = memory(victim)?.saturating_sub(before_all);
    ensure!(grown < MAX_MEMORY_GROWTH, "The memory has grown by {grown} bytes.");
    checks::all_reach_all(lab)
}
