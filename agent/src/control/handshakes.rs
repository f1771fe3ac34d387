//! Latest timestamps of the peers' handshakes, kept on this node's disk. A recorded initiation is
//! recognised by its timestamp. A data process that starts without these timestamps would answer
//! each recorded initiation once more.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use skein_ipc::SeenHandshakes;
use skein_ipc::keys::PublicKey;
use tokio::task::JoinHandle;

use crate::files;

/// Name of the file in the state directory.
pub(super) const FILE: &str = "handshakes.json";
/// Maximum length of the file in bytes; 10,000 keys take about 700 KiB.
const MAX_FILE: u64 = 16 << 20;
/// Maximum number of keys that are kept although the data process does not report them.
const MAX_UNREPORTED: usize = 4096;

/// The timestamps and the file that holds them.
#[derive(Debug)]
pub(super) struct HandshakeTimes {
    file: PathBuf,
    seen: SeenHandshakes,
    /// Number of the last report that had the key; absent for keys that no report to this process
    /// had.
    last_reports: BTreeMap<PublicKey, u64>,
    /// Number of reports that this process has received.
    reports: u64,
    /// Pending write on a blocking thread.
    writing: Option<JoinHandle<io::Result<()>>>,
    /// True after a failure to write was logged.
    failure_logged: bool,
}

impl HandshakeTimes {
    /// Reads the file of an earlier process. An unusable file is logged and counts as empty.
    pub(super) fn load(file: PathBuf) -> Self {
        let seen = read(&file).unwrap_or_else(|error| {
            let file = file.display();
            tracing::warn!(%error, %file, "cannot read handshake times");
            SeenHandshakes::new()
        });
        Self {
            file,
            seen,
            last_reports: BTreeMap::new(),
            reports: 0,
            writing: None,
            failure_logged: false,
        }
    }

    /// Returns the timestamps for a data process that starts.
    pub(super) fn seen(&self) -> &SeenHandshakes {
        &self.seen
    }

    /// Stores the timestamps that the data process reports, if they have changed. Returns when the
    /// write is complete; dropping the future does not stop the write.
    pub(super) async fn update(&mut self, reported: SeenHandshakes) {
        self.reports += 1;
        self.last_reports.extend(reported.keys().map(|key| (*key, self.reports)));
        let seen = merge(&self.seen, reported, &self.last_reports);
        self.last_reports.retain(|key, _| seen.contains_key(key));
        if seen != self.seen {
            self.seen = seen;
            // Two writes at a time would use the same temporary file.
            self.finish_write().await;
            let (file, seen) = (self.file.clone(), self.seen.clone());
            // A sync may take seconds, and the agent has one thread for all its tasks.
            self.writing = Some(tokio::task::spawn_blocking(move || write(&file, &seen)));
        }
        self.finish_write().await;
    }

    async fn finish_write(&mut self) {
        let Some(writing) = &mut self.writing else { return };
        let result = writing.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        self.writing = None;
        match result {
            Ok(()) => self.failure_logged = false,
            Err(error) if !self.failure_logged => {
                let file = self.file.display();
                tracing::warn!(%error, %file, "cannot write handshake times");
                self.failure_logged = true;
            }
            Err(_) => {}
        }
    }
}

/// Merges the reported timestamps into the known ones; a key that has both keeps the later one. A
/// data process reports the keys of its present peers only, and a node whose record was removed may
/// return with the same key. Up to [`MAX_UNREPORTED`] keys that are not reported are kept, those
/// with the highest numbers in `last_reports`. The timestamps do not count, because a peer chooses
/// its own, and may have many keys, one after the other.
fn merge(
    known: &SeenHandshakes,
    reported: SeenHandshakes,
    last_reports: &BTreeMap<PublicKey, u64>,
) -> SeenHandshakes {
    let mut unreported: Vec<_> =
        known.iter().filter(|(key, _)| !reported.contains_key(key)).collect();
    unreported.sort_by_key(|(key, _)| std::cmp::Reverse(last_reports.get(key)));
    let later = |(key, at): (PublicKey, u64)| {
        let before = known.get(&key).copied().unwrap_or(0);
        (key, at.max(before))
    };
    let mut seen: SeenHandshakes = reported.into_iter().map(later).collect();
    seen.extend(unreported.into_iter().take(MAX_UNREPORTED).map(|(key, at)| (*key, *at)));
    seen
}

fn write(to: &Path, seen: &SeenHandshakes) -> io::Result<()> {
    files::replace(to, &serde_json::to_vec_pretty(seen)?)
}

fn read(file: &Path) -> io::Result<SeenHandshakes> {
    let file = match File::open(file) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(SeenHandshakes::new()),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is longer than 16 MiB"));
    }
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> io::Result<SeenHandshakes> {
    Ok(serde_json::from_slice(bytes)?)
}

/// Parses `data` as a file of timestamps. A file that is accepted can be written and read again.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_kept(data: &[u8]) {
    let Ok(seen) = parse(data) else { return };
    let written = serde_json::to_vec(&seen).expect("plain values");
    assert!(parse(&written).is_ok_and(|again| again == seen));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn handshake_times_are_known_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        let mut times = HandshakeTimes::load(file.clone());
        assert!(times.seen().is_empty());
        let seen = SeenHandshakes::from([(PublicKey([1; 32]), 7), (PublicKey([2; 32]), u64::MAX)]);
        times.update(seen.clone()).await;
        assert_eq!(HandshakeTimes::load(file.clone()).seen(), &seen);
        // The data process does not know the other peer yet.
        times.update(SeenHandshakes::from([(PublicKey([1; 32]), 9)])).await;
        let seen = SeenHandshakes::from([(PublicKey([1; 32]), 9), (PublicKey([2; 32]), u64::MAX)]);
        assert_eq!(HandshakeTimes::load(file).seen(), &seen);
    }

    #[test]
    fn unreported_keys_are_bounded_by_last_report() {
        let key = |number: u64| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_be_bytes());
            PublicKey(key)
        };
        let extra = 10;
        let all = 0..MAX_UNREPORTED as u64 + extra;
        // A node with many keys chooses timestamps later than those of the others.
        let known: SeenHandshakes = all.clone().map(|number| (key(number), 1 << 40)).collect();
        let known = SeenHandshakes::from_iter(known.into_iter().chain([(key(9), 9), (key(20), 7)]));
        let mut last_reports: BTreeMap<_, _> = all.map(|number| (key(number), 1)).collect();
        last_reports.insert(key(20), 2);
        last_reports.remove(&key(1));
        let seen = merge(&known, SeenHandshakes::from([(key(0), 7), (key(9), 8)]), &last_reports);
        assert_eq!(seen.get(&key(9)), Some(&9), "The later time stays.");
        assert_eq!(seen.len(), 2 + MAX_UNREPORTED, "The unreported keys are bounded.");
        assert_eq!(seen.get(&key(0)), Some(&(1 << 40)), "The later time stays.");
        assert!(!seen.contains_key(&key(1)), "The key that was reported longest ago is forgotten.");
        assert_eq!(seen.get(&key(20)), Some(&7), "The key that was reported last is kept.");
    }

    #[tokio::test]
    async fn chosen_timestamps_do_not_evict_later_reported_peer() {
        let directory = tempfile::tempdir().unwrap();
        let mut times = HandshakeTimes::load(directory.path().join(FILE));
        let key = |number: u16| {
            let mut key = [9; 32];
            key[..2].copy_from_slice(&number.to_be_bytes());
            PublicKey(key)
        };
        let many = MAX_UNREPORTED as u16;
        times.update((0..many).map(|number| (key(number), u64::MAX)).collect()).await;
        let honest = PublicKey([1; 32]);
        times.update(SeenHandshakes::from([(honest, 7)])).await;
        times.update(SeenHandshakes::from([(key(many), u64::MAX)])).await;
        assert_eq!(times.seen().get(&honest), Some(&7), "The peer's time is forgotten.");
        assert_eq!(times.seen().len(), MAX_UNREPORTED + 1, "The times are bounded.");
    }

    #[tokio::test]
    async fn update_given_up_midway_leaves_the_last_times() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        let mut times = HandshakeTimes::load(file.clone());
        for at in 1..50 {
            let seen = SeenHandshakes::from([(PublicKey([1; 32]), at)]);
            let _ = tokio::time::timeout(std::time::Duration::ZERO, times.update(seen)).await;
        }
        let last = SeenHandshakes::from([(PublicKey([1; 32]), 50)]);
        times.update(last.clone()).await;
        assert_eq!(HandshakeTimes::load(file).seen(), &last, "No earlier write comes later.");
    }

    #[tokio::test]
    async fn unusable_times_count_as_none() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        for text in ["", "[]", "{\"?\": 1}", "{\"AAAA\": -1}", "null"] {
            std::fs::write(&file, text).unwrap();
            assert!(HandshakeTimes::load(file.clone()).seen().is_empty(), "{text}");
        }
        std::fs::remove_file(&file).unwrap();
        File::create(&file).unwrap().set_len(MAX_FILE + 1).unwrap();
        assert!(HandshakeTimes::load(file).seen().is_empty());
        let mut nowhere = HandshakeTimes::load(directory.path().join("no/such/directory"));
        nowhere.update(SeenHandshakes::from([(PublicKey([1; 32]), 7)])).await;
        assert_eq!(nowhere.seen().len(), 1, "Times that cannot be written are kept in memory.");
    }
}
