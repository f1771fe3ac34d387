//! The latest wall-clock time that this node has known, kept on its disk. Handshakes carry the time and no
//! peer takes one twice, so a node whose clock was set back would be heard by none that remembers it. A clock
//! set back by less than the minute between two writings is let catch up.

use std::path::PathBuf;
use std::time::SystemTime;

use crate::files;

/// Its name in the state directory.
pub(super) const FILE: &str = "clock";
/// It is written this often, in seconds.
const WRITE_INTERVAL: u64 = 60;
/// A time that was used may be later than what was written last by this, in seconds.
const MARGIN: u64 = WRITE_INTERVAL + 10;

/// Seconds since 1970, by the wall clock.
pub(super) fn wall() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// All times in seconds since 1970.
#[derive(Debug)]
pub(super) struct WallClockFloor {
    file: PathBuf,
    latest: u64,
    written: u64,
    /// Whether it was said that it cannot be written.
    failure_logged: bool,
}

impl WallClockFloor {
    /// What was written in a life before, where there is that.
    pub(super) fn load(file: PathBuf) -> Self {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let written = text.trim().parse().unwrap_or(0);
        Self { file, latest: written, written, failure_logged: false }
    }

    /// To be called every few seconds.
    pub(super) fn update(&mut self, wall: u64) {
        self.latest = self.latest.max(wall);
        if self.latest >= self.written.saturating_add(WRITE_INTERVAL) {
            self.write();
        }
    }

    /// For a data process that begins: what its handshakes' times must exceed; 0 where the clock sees to that.
    /// Each one has a time of its own, so that none repeats those of the one before.
    pub(super) fn floor(&mut self, wall: u64) -> u64 {
        if wall >= self.latest {
            self.update(wall);
            return 0;
        }
        tracing::warn!(
            seconds = self.latest - wall,
            "the clock was set back: handshakes carry later times"
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
                tracing::warn!(%error, %file, "cannot keep the time");
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
    fn a_clock_set_back_is_known_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("clock");
        let load = || WallClockFloor::load(file.clone());
        let mut clock = load();
        assert_eq!(clock.floor(1_000_000), 0, "there was nothing before");
        clock.update(1_000_030);
        clock.update(1_000_059);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "1000000\n", "not every second");
        clock.update(1_000_065);
        // Up to 1,000,124 it may have said without writing it.
        let first = load().floor(500);
        assert!(first >= 1_000_125, "{first}");
        let second = load().floor(500);
        assert!(second > first, "what one may have said is not said again");
        let mut clock = load();
        assert!(clock.floor(500) > second && clock.floor(500) > second + 60);
        assert_eq!(load().floor(2_000_000), 0, "right again");
    }

    #[test]
    fn rubbish_and_a_full_disk_are_no_trouble() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("clock");
        std::fs::write(&file, "noon").unwrap();
        assert_eq!(WallClockFloor::load(file).floor(7), 0);
        let mut nowhere = WallClockFloor::load(directory.path().join("no/such/directory"));
        nowhere.update(100);
        assert!(nowhere.floor(50) > 100);
    }
}
