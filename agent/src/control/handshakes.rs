//! Latest timestamps of the peers' handshakes, kept on this node's disk. A recorded initiation is
//! recognised by its timestamp. A data process that starts without these timestamps would answer
//! each recorded initiation once more.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::PathBuf;

use super::identity;
use crate::ipc::SeenHandshakes;

/// Name of the file in the state directory.
pub(super) const FILE: &str = "handshakes.json";
/// Maximum length of the file in bytes; 10,000 keys take about 700 KiB.
const MAX_FILE: u64 = 16 << 20;

/// The timestamps and the file that holds them.
#[derive(Debug)]
pub(super) struct HandshakeTimes {
    file: PathBuf,
    seen: SeenHandshakes,
    /// True after a failure to write was logged.
    complained: bool,
}

impl HandshakeTimes {
    /// Reads the file of an earlier process. An unusable file is logged and counts as empty.
    pub(super) fn load(file: PathBuf) -> Self {
        let seen = read(&file).unwrap_or_else(|error| {
            let file = file.display();
            tracing::warn!(%error, %file, "cannot read handshake times");
            SeenHandshakes::new()
        });
        Self { file, seen, complained: false }
    }

    /// Returns the timestamps for a data process that starts.
    pub(super) fn seen(&self) -> &SeenHandshakes {
        &self.seen
    }

    /// Stores the timestamps that the data process reports, if they have changed.
    pub(super) fn update(&mut self, seen: SeenHandshakes) {
        if seen == self.seen {
            return;
        }
        self.seen = seen;
        match self.write() {
            Ok(()) => self.complained = false,
            Err(error) if !self.complained => {
                let file = self.file.display();
                tracing::warn!(%error, %file, "cannot write handshake times");
                self.complained = true;
            }
            Err(_) => {}
        }
    }

    fn write(&self) -> io::Result<()> {
        identity::replace(&self.file, &serde_json::to_vec_pretty(&self.seen)?)
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

/// Parses `data` as a file of timestamps. A file that is accepted can be written and read again.
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
        // A key that no record holds is no longer reported.
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
