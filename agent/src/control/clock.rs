//! Stored lower bound of the wall clock. Handshakes carry a timestamp, and a peer refuses a
//! timestamp that is not later than the last one. A peer would therefore refuse the handshakes of a
//! node whose clock was set back. A data process that starts after a set-back uses timestamps after
//! the latest known time instead. This time is stored every 60 s, so that an agent that restarts
//! cannot detect a set-back to a time after the last write. Peers may then refuse handshakes until
//! the clock has passed the last timestamp.

use std::path::PathBuf;
use std::time::SystemTime;

use crate::files;

/// Name of the file in the state directory.
pub(super) const FILE: &str = "clock";
/// Interval between two writes of the file, seconds.
const WRITE_INTERVAL: u64 = 60;
/// Maximum difference between the latest time in use and the stored time, seconds.
const MARGIN: u64 = WRITE_INTERVAL + 10;

/// Returns the time of the wall clock, seconds since 1970.
pub(super) fn wall() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// The latest known wall-clock time, in memory and on disk. All times are seconds since 1970.
#[derive(Debug)]
pub(super) struct WallClockFloor {
    file: PathBuf,
    latest: u64,
    written: u64,
    /// True after a failure to write was logged.
    failure_logged: bool,
}

impl WallClockFloor {
    /// Reads the file of an earlier process; an unusable file counts as time 0.
    pub(super) fn load(file: PathBuf) -> Self {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let written = text.trim().parse().unwrap_or(0);
        Self { file, latest: written, written, failure_logged: false }
    }

    /// Updates the latest time, and writes it if 60 s have passed since the last write. The caller
    /// repeats the call every few seconds.
    pub(super) fn update(&mut self, wall: u64) {
        self.latest = self.latest.max(wall);
        if self.latest >= self.written.saturating_add(WRITE_INTERVAL) {
            self.write();
        }
    }

    /// Returns the time that the handshakes of a starting data process must exceed; 0 if the wall
    /// clock is not behind the latest known time. Each call returns a later time, so that no data
    /// process repeats the timestamps of an earlier one.
    pub(super) fn floor(&mut self, wall: u64) -> u64 {
        if wall >= self.latest {
            self.update(wall);
            return 0;
        }
        tracing::warn!(
            seconds = self.latest - wall,
            "wall clock was set back, handshakes use times after the latest known time"
        );
        self.latest = self.latest.saturating_add(MARGIN);
        self.write();
        self.latest
    }

    fn write(&mut self) {
        match files::replace(&self.file, format!("{}\n", self.latest).as_bytes()) {
            Ok(()) => (self.written, self.failure_logged) = (self.latest, false),
            Err(error) if !self.failure_logged => {
                let file = self.file.display();
                tracing::warn!(%error, %file, "cannot store the latest wall-clock time");
                self.failure_logged = true;
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn clock_set_back_is_detected_after_restart() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("clock");
        let load = || WallClockFloor::load(file.clone());
        let mut clock = load();
        assert_eq!(clock.floor(1_000_000), 0, "no earlier time is stored");
        clock.update(1_000_030);
        clock.update(1_000_059);
        assert_eq!(
            std::fs::read_to_string(&file).unwrap(),
            "1000000\n",
            "the file is not written every second"
        );
        clock.update(1_000_065);
        // Times up to 1,000,124 may have been used without a write.
        let first = load().floor(500);
        assert!(first >= 1_000_125, "{first}");
        let second = load().floor(500);
        assert!(second > first, "the second data process must not repeat times of the first");
        let mut clock = load();
        assert!(clock.floor(500) > second && clock.floor(500) > second + 60);
        assert_eq!(load().floor(2_000_000), 0, "the clock is ahead again");
    }

    #[test]
    fn invalid_file_and_failed_write_are_tolerated() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("clock");
        std::fs::write(&file, "noon").unwrap();
        assert_eq!(WallClockFloor::load(file).floor(7), 0);
        let mut nowhere = WallClockFloor::load(directory.path().join("no/such/directory"));
        nowhere.update(100);
        assert!(nowhere.floor(50) > 100);
    }
}
