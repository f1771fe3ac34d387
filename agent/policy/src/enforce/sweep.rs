//! Open connections that a changed policy refuses.
//!
//! The table judges every packet in the original direction of a connection, but not replies. A
//! sweep reads the connections from connection tracking, judges them by the program, and adds the
//! refused ones to the sets `cut4` and `cut6`, in both directions. The kernel drops packets of
//! connections in these sets. Entries of connection tracking are never deleted, because they record
//! the direction of a connection.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use skein_netlink::conntrack::Entry;
use skein_netlink::nftables::{Change, Connection, Element};
use tokio::time::Instant;

use crate::engine::Engine;
use crate::interpret::{Packet, judge_forwarded};
use crate::model::Direction;
use crate::program::Program;
use crate::render::Mode;

use super::encode;
use super::{EnforceError, Enforcer, Installed};

/// Time after which the kernel removes an entry of the sets.
const CUT_TIMEOUT: Duration = Duration::from_secs(600);
/// Interval between renewals of the entries of connections that still exist.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(300);
/// Delay of the second sweep after a change, for connections that the kernel has confirmed while it
/// judged their first packet by the old rules.
const SECOND_SWEEP_DELAY: Duration = Duration::from_millis(100);
/// Minimum pause between two sweeps, as a multiple of the time of the first one.
const PAUSE_FACTOR: u32 = 10;
/// Minimum delay of the sweep after one that failed.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Age at which a sweep renews an entry. A sweep comes at the latest every [`RENEWAL_INTERVAL`], so
/// that each entry is renewed before its timeout.
const RENEWAL_AGE: Duration = Duration::from_secs(150);

/// Set and key of one direction of a connection.
type CutKey = (&'static str, Vec<u8>);

/// Directions of connections that are cut, and the time of the next sweep.
#[derive(Debug, Default)]
pub(super) struct Sweeps {
    /// Entries of the sets with the time of their addition; `None` while the content of the sets
    /// is not known.
    cuts: Option<HashMap<CutKey, Option<Instant>>>,
    /// Time of the next sweep.
    due: Option<Instant>,
    /// True if the next sweep is the first after a change.
    is_first: bool,
    /// Earliest time of the next sweep.
    not_before: Option<Instant>,
}

impl Sweeps {
    /// Requests a sweep after a change of the program in the kernel.
    pub(super) fn request(&mut self) {
        self.is_first = true;
        self.due = Some(self.not_before.unwrap_or_else(Instant::now));
    }

    /// Requests a sweep if an installation has changed the table. A new table has empty sets.
    pub(super) fn on_installed(&mut self, installed: Installed) {
        match installed {
            Installed::Unchanged => return,
            Installed::Created | Installed::Repaired => self.cuts = None,
        }
        self.request();
    }

    /// Waits until a sweep is due.
    pub(super) async fn wait(&self) {
        match self.due {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    /// Takes the request for a sweep back: the caller has been told of it.
    pub(super) fn on_reported(&mut self) {
        self.due = None;
    }

    /// Schedules the next sweep after one that began at `start`.
    fn schedule(&mut self, start: Instant) {
        let now = Instant::now();
        let earliest = now + (now - start) * PAUSE_FACTOR;
        self.not_before = Some(earliest);
        let is_empty = self.cuts.as_ref().is_none_or(HashMap::is_empty);
        self.due = match (self.is_first, is_empty) {
            (true, _) => Some(earliest.max(now + SECOND_SWEEP_DELAY)),
            (false, false) => Some(now + RENEWAL_INTERVAL),
            (false, true) => None,
        };
        self.is_first = false;
    }

    /// Returns the changes of the sets, and records them: keys of refused connections are added, or
    /// renewed; keys that are not wanted any more are removed.
    fn changes(&mut self, wanted: &HashSet<CutKey>) -> Vec<Vec<Change>> {
        let now = Instant::now();
        let cuts = self.cuts.get_or_insert_default();
        let mut changes = Vec::new();
        cuts.retain(|key, _| {
            let keep = wanted.contains(key);
            if !keep {
                // The key may have expired in the kernel. The addition makes the removal possible.
                changes.push([true, false].map(|added| change(key, added)).to_vec());
            }
            keep
        });
        for key in wanted {
            let added = cuts.get(key).copied().flatten();
            if added.is_some_and(|added| now - added < RENEWAL_AGE) {
                continue;
            }
            // Before Linux 6.12, the addition of a present element does not renew its timeout.
            changes.push([true, false, true].map(|added| change(key, added)).to_vec());
            cuts.insert(key.clone(), Some(now));
        }
        changes
    }
}

fn change((set, key): &CutKey, added: bool) -> Change {
    Change {
        set: (*set).to_owned(),
        element: Element::key(key.clone()),
        added,
        timeout: Some(CUT_TIMEOUT),
    }
}

impl Enforcer {
    /// Reads the open connections of this node's pods and cuts those that the engine's program
    /// refuses; lets those pass again that the program allows. In the mode `Audit`, no connection
    /// is cut. Returns the number of refused connections.
    ///
    /// The engine's program must be the one that was installed or applied last. The caller sweeps
    /// after each [`Event::SweepDue`](super::Event::SweepDue).
    ///
    /// # Errors
    /// `Netlink` or `Timeout` if the connections cannot be read or the sets cannot be changed.
    pub async fn sweep(&mut self, engine: &Engine) -> Result<usize, EnforceError> {
        let start = Instant::now();
        let result = self.try_sweep(engine).await;
        self.sweeps.schedule(start);
        if result.is_err() {
            // The content of the sets is not known, and forbidden connections may be open.
            self.sweeps.cuts = None;
            self.sweeps.is_first = true;
            self.sweeps.due = self.sweeps.not_before.max(Some(Instant::now() + RETRY_DELAY));
        }
        result
    }

    /// Reads the sets of connections that are cut.
    async fn present_cuts(&mut self) -> Result<HashMap<CutKey, Option<Instant>>, EnforceError> {
        let table = self.table.name.clone();
        let read = move |connection: &mut Connection| {
            let mut cuts = HashMap::new();
            for set in ["cut4", "cut6"] {
                let elements = connection.elements(&table, set)?.unwrap_or_default();
                cuts.extend(elements.into_iter().map(|element| ((set, element.key), None)));
            }
            Ok(cuts)
        };
        self.kernel.with(read).await
    }

    async fn try_sweep(&mut self, engine: &Engine) -> Result<usize, EnforceError> {
        let entries = self.kernel.with(|connection| connection.conntrack_entries()).await?;
        let local = engine.inventory().local_addresses();
        let refused = |entry: &&Entry| {
            self.table.mode == Mode::Enforce && is_refused(engine.program(), &local, entry)
        };
        let refused: Vec<&Entry> = entries.iter().filter(refused).collect();
        if self.sweeps.cuts.is_none() {
            self.sweeps.cuts = Some(self.present_cuts().await?);
        }
        let wanted = refused.iter().flat_map(|entry| keys(entry)).collect();
        let changes = self.sweeps.changes(&wanted);
        let before = self.kernel.begin().await?;
        let own = self.kernel.commit_groups(changes).await?;
        let alone = self.kernel.end(before, own).await?;
        self.stale |= before.foreign || !alone;
        Ok(refused.len())
    }
}

/// Returns whether the program refuses a connection of one of this node's pods.
fn is_refused(program: &Program, local: &HashMap<IpAddr, &str>, entry: &Entry) -> bool {
    // The forward hook is behind the translation of destinations and before that of sources.
    let (source, destination) = (entry.original.source, entry.reply.source);
    let interface = |address| local.get(&address).map(|name| (*name).to_owned());
    let (input, output) = (interface(source), interface(destination));
    let Some(protocol) = encode::protocol(entry.original.protocol) else { return false };
    if input.is_none() && output.is_none() {
        return false;
    }
    let transport = Some((protocol, entry.reply.source_port));
    let packet = Packet { input, output, source, destination, transport };
    [Direction::Egress, Direction::Ingress]
        .iter()
        .any(|direction| !judge_forwarded(program, *direction, &packet).accepted)
}

/// Returns the keys of both directions, as the forward hook sees the packets.
fn keys(entry: &Entry) -> [CutKey; 2] {
    let set = if entry.original.source.is_ipv4() { "cut4" } else { "cut6" };
    let client = (entry.original.source, entry.original.source_port);
    let server = (entry.reply.source, entry.reply.source_port);
    let key = |from, to| (set, encode::flow(entry.original.protocol, from, to));
    [key(client, server), key(server, client)]
}
