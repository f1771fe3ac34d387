//! The latest times of the peers' handshakes, kept on this node's disk. A recorded initiation is
//! told by its time, so a data process that starts without them would answer each recorded
//! initiation once more.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;

use crate::ipc::SeenHandshakes;

/// Name of the file in the state directory.
pub(super) const FILE: &str = "handshakes.json";
/// Greatest length of the file in bytes: 10,000 keys take about 700 KiB.
const MAX_FILE: u64 = 16 << 20;

/// The times, and where they are kept.
#[derive(Debug)]
pub(super) struct HandshakeTimes {
    file: PathBuf,
    seen: SeenHandshakes,
    /// Whether a failure to write was logged.
    complained: bool,
}

impl HandshakeTimes {
    /// Reads what an earlier process has kept. A file that cannot be used counts as empty and is
    /// logged.
    pub(super) fn load(file: PathBuf) -> Self {
        let seen = read(&file).unwrap_or_else(|error| {
            let file = file.display();
            tracing::warn!(%error, %file, "cannot read handshake times");
            SeenHandshakes::new()
        });
        Self { file, seen, complained: false }
    }

    /// The times to give to a data process that starts.
    pub(super) fn seen(&self) -> &SeenHandshakes {
        &self.seen
    }

    /// Keeps the times that the data process reports, if there are new ones.
    pub(super) fn update(&mut self, seen: SeenHandshakes) {
        if seen == self.seen {
            return;
        }
        self.seen = seen;
        match self.write() {
            Ok(()) => self.complained = false,
            Err(error) if !self.complained => {
                let file = self.file.display();
                tracing::warn!(%error, %file, "cannot keep handshake times");
                self.complained = true;
            }
            Err(_) => {}
        }
    }

    fn write(&self) -> io::Result<()> {
        let new = self.file.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(&self.seen)?)?;
        // Without this a power cut may leave an empty file in the place of the one before.
        file.sync_all()?;
        std::fs::rename(&new, &self.file)
    }
}

fn read(file: &std::path::Path) -> io::Result<SeenHandshakes> {
    let file = match File::open(file) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(SeenHandshakes::new()),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is too long"));
    }
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> io::Result<SeenHandshakes> {
    Ok(serde_json::from_slice(bytes)?)
}

/// Reads `data` as a file of times. What is read can be written and read again.
pub(crate) fn fuzz_kept(data: &[u8]) {
    let Ok(seen) = parse(data) else { return };
    let written = serde_json::to_vec(&seen).expect("plain values");
    assert!(parse(&written).is_ok_and(|again| again == seen));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::keys::PublicKey;

    #[test]
    fn handshake_times_are_known_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        let mut times = HandshakeTimes::load(file.clone());
        assert!(times.seen().is_empty());
        let seen = SeenHandshakes::from([(PublicKey([1; 32]), 7), (PublicKey([2; 32]), u64::MAX)]);
        times.update(seen.clone());
        assert_eq!(HandshakeTimes::load(file.clone()).seen(), &seen);
        // A key that no record holds any more is reported no more.
        let fewer = SeenHandshakes::from([(PublicKey([1; 32]), 9)]);
        times.update(fewer.clone());
        assert_eq!(HandshakeTimes::load(file).seen(), &fewer);
    }

    #[test]
    fn unusable_times_count_as_none() {
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
        nowhere.update(SeenHandshakes::from([(PublicKey([1; 32]), 7)]));
        assert_eq!(nowhere.seen().len(), 1, "Times that cannot be written are kept in memory.");
    }
}
