//! Helpers of many tests: checks of the traffic between pods, and functions that wait until an
//! expected event has occurred.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::load::ping::{Loss, Ping, Pings, ping};
use crate::load::transfer::{Received, Transfer};
use crate::load::udp::{self, Load, Outcome};
use crate::{Family, Lab, Pod};

/// Limit of the wait for an event that must occur. The value is generous: a wait reaches it only if
/// the event does not occur, so that no test depends on the speed of the machine.
pub const EVENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum interruption, in seconds, of a TCP transfer that continues after an event. Tests print
/// the measured interruption. Measured values are in docs/faults.md and docs/performance.md.
const MAX_INTERRUPTION: f64 = 10.0;

/// Interval of the timer by which an agent compares the kernel's state with the desired state.
const AGENT_INTERVAL: Duration = Duration::from_secs(10);

/// Interval of the pings during an event, short in relation to any interruption.
const PING_INTERVAL: Duration = Duration::from_millis(5);

/// TCP and UDP port of the checks' receivers.
const PORT: u16 = 7000;

/// Pings from the first node's pod to the second's every 5 ms while `work` runs, and returns the
/// losses.
///
/// # Errors
/// The error of `work`, or of `ping` ([`Pings`]).
pub fn pinged_while(lab: &Lab, work: impl FnOnce() -> Result<()>) -> Result<Loss> {
    let (from, to) = (lab.pod(0), lab.pod(1));
    let log = tempfile::NamedTempFile::new()?;
    let pings = Pings::start(&from.ns, to.address(Family::V4), PING_INTERVAL, log.path())?;
    std::thread::sleep(Duration::from_millis(200));
    work()?;
    pings.end()
}

/// Checks that a TCP transfer was interrupted for less than 10 s.
///
/// # Errors
/// If the interruption was longer; the error contains its duration.
pub fn interruption_is_bounded(received: &Received) -> Result<()> {
    ensure!(
        received.longest_pause < MAX_INTERRUPTION,
        "The transfer was interrupted for {} s.",
        received.longest_pause
    );
    Ok(())
}

/// Checks that the first pod of every node reaches the first pod of every other node, in both
/// families.
///
/// # Errors
/// If a pod does not reach another ([`reaches`]).
pub fn all_reach_all(lab: &Lab) -> Result<()> {
    for family in Family::BOTH {
        for from in &lab.nodes {
            for to in lab.nodes.iter().filter(|node| node.index != from.index) {
                let what = || format!("{} to {} over {family}", from.name, to.name);
                reaches(&from.pods[0], &to.pods[0], family).with_context(what)?;
            }
        }
    }
    Ok(())
}

/// Waits up to [`EVENT_TIMEOUT`] (30 s) until `to` answers a ping, and checks that `to` answers
/// three more pings. Use [`wait_until_reached`] to measure the time.
///
/// # Errors
/// If no ping is answered within [`EVENT_TIMEOUT`], or if one of the three is lost.
pub fn reaches(from: &Pod, to: &Pod, family: Family) -> Result<()> {
    wait_until_reached(from, to, family, EVENT_TIMEOUT)?;
    let answers = ping(&from.ns, to.address(family), Ping::default())?;
    ensure!(answers.complete(), "{}", answers.text);
    Ok(())
}

/// Waits until a ping is answered and returns the time that this took.
///
/// # Errors
/// If no ping is answered within `limit`.
pub fn wait_until_reached(
    from: &Pod,
    to: &Pod,
    family: Family,
    limit: Duration,
) -> Result<Duration> {
    let start = Instant::now();
    loop {
        let once = Ping { count: 1, ..Ping::default() };
        let answers = ping(&from.ns, to.address(family), once)?;
        if answers.complete() {
            return Ok(start.elapsed());
        }
        if start.elapsed() > limit {
            bail!("no answer within {} s: {}", limit.as_secs_f64(), answers.text);
        }
    }
}

/// Checks that two pings are not answered.
///
/// # Errors
/// If a ping is answered.
pub fn does_not_reach(from: &Pod, to: &Pod, family: Family) -> Result<()> {
    let answers = ping(&from.ns, to.address(family), Ping { count: 2, ..Ping::default() })?;
    ensure!(answers.received == 0, "pings were answered: {}", answers.text);
    Ok(())
}

/// Transfers `bytes` bytes over TCP and checks every byte.
///
/// # Errors
/// If the transfer fails, or if a byte is wrong.
pub fn transfer(from: &Pod, to: &Pod, family: Family, bytes: u64) -> Result<Received> {
    start_transfer(from, to, family, bytes, None)?.join()
}

/// Starts a transfer over TCP with at most `rate` bytes per second.
///
/// # Errors
/// If the receiver cannot bind its port.
pub fn start_transfer(
    from: &Pod,
    to: &Pod,
    family: Family,
    bytes: u64,
    rate: Option<u64>,
) -> Result<Transfer> {
    Transfer::start(&from.ns, &to.ns, SocketAddr::new(to.address(family), PORT), bytes, rate)
}

/// Sends datagrams of `payload` bytes at `rate` datagrams per second. Counts the datagrams that
/// were sent and those that were received.
///
/// # Errors
/// If a socket cannot be bound, or if sending or receiving fails. Lost datagrams are not an error.
pub fn datagrams(
    from: &Pod,
    to: &Pod,
    family: Family,
    payload: usize,
    rate: u64,
    duration: Duration,
) -> Result<Outcome> {
    let to_address = SocketAddr::new(to.address(family), PORT);
    udp::run(&from.ns, &to.ns, to_address, Load { payload, rate: Some(rate), duration })
}

/// Sends 10 to 30 datagrams of one size at a low rate and checks that each arrives unchanged and in
/// order.
///
/// # Errors
/// If a datagram is lost, changed or reordered.
pub fn datagrams_arrive(from: &Pod, to: &Pod, family: Family, payload: usize) -> Result<()> {
    // A sender that was delayed sends all due datagrams at once. A datagram of 10,000 bytes or
    // more consists of up to dozens of fragments. The number of these datagrams is so low that all
    // fragments fit the queue of the TUN device.
    let (rate, time) = match payload {
        ..10_000 => (500, Duration::from_millis(60)),
        _ => (40, Duration::from_millis(250)),
    };
    let outcome = datagrams(from, to, family, payload, rate, time)?;
    let right = outcome.sent > 0
        && outcome.received == outcome.sent
        && outcome.corrupt == 0
        && outcome.reordered == 0;
    ensure!(right, "UDP of {payload} bytes over {family}: {outcome:?}");
    Ok(())
}

/// Checks the traffic that every combination of offloads must carry, in both directions and
/// families: TCP transfers of `bytes` bytes, and datagrams of 1 to 9000 bytes.
///
/// # Errors
/// If traffic is lost, changed or reordered.
pub fn mixed_traffic(lab: &Lab, bytes: u64) -> Result<()> {
    all_reach_all(lab)?;
    for family in Family::BOTH {
        for (from, to) in [(0, 1), (1, 0)] {
            let (from, to) = (lab.pod(from), lab.pod(to));
            transfer(from, to, family, bytes).with_context(|| format!("TCP over {family}"))?;
            for payload in [1, 64, 1000, 1372, 9000] {
                datagrams_arrive(from, to, family, payload)?;
            }
        }
    }
    Ok(())
}

/// Checks that notifications of the kernel caused at least one of the repairs. The agent made
/// `repairs` repairs one after another within `elapsed`. The agent's timer can cause at most one
/// repair every 10 s, so that more repairs prove a notification.
///
/// # Errors
///
/// Returns an error if the timer can have caused every repair.
pub fn not_by_timer(repairs: u64, elapsed: Duration) -> Result<()> {
    let by_timer = elapsed.as_secs() / AGENT_INTERVAL.as_secs() + 1;
    ensure!(repairs > by_timer, "The agent's timer may explain {repairs} repairs in {elapsed:?}.");
    Ok(())
}

/// Damages something eight times, waits for each repair, and checks that notifications caused the
/// repairs ([`not_by_timer`]).
///
/// # Errors
///
/// Returns an error if `damage` fails, if a repair does not occur within [`EVENT_TIMEOUT`], or if
/// the agent's timer can have caused the repairs.
pub fn repaired_at_once(
    what: &str,
    mut damage: impl FnMut() -> Result<()>,
    mut is_repaired: impl FnMut() -> Result<bool>,
) -> Result<()> {
    const ROUNDS: u64 = 8;
    let start = Instant::now();
    for _ in 0..ROUNDS {
        damage()?;
        let time = eventually(what, EVENT_TIMEOUT, &mut is_repaired)?;
        println!("{what} after {} ms", time.as_millis());
    }
    not_by_timer(ROUNDS, start.elapsed()).with_context(|| what.to_owned())
}

/// Waits until `has_occurred` returns true, and returns the duration of the wait. Calls
/// `has_occurred` every 20 ms. An error of `has_occurred` before the limit counts as false.
///
/// # Errors
/// If `has_occurred` has not returned true within `limit`. The error contains `what`, a text that
/// names the expected event, and the last error of `has_occurred`.
pub fn eventually(
    what: &str,
    limit: Duration,
    mut has_occurred: impl FnMut() -> Result<bool>,
) -> Result<Duration> {
    let start = Instant::now();
    loop {
        let now = has_occurred();
        if matches!(now, Ok(true)) {
            return Ok(start.elapsed());
        }
        if start.elapsed() > limit {
            now.with_context(|| what.to_owned())?;
            bail!("did not occur within {} s: {what}", limit.as_secs_f64());
        }
        thread::sleep(Duration::from_millis(20));
    }
}
