//! The lock on the state directory, so that no two agents share one.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::identity::create_private_dir;
use crate::failure::Failure;

/// Held as long as the process lives; the kernel takes it back however the process ends.
#[derive(Debug)]
pub struct StateLock {
    file: File,
    path: PathBuf,
}

impl StateLock {
    /// Takes the lock of a state directory, which is made if need be.
    pub fn take(state_dir: &Path) -> Result<Self, Failure> {
        let shown = state_dir.display();
        let failed = |error| Failure::io(format!("cannot use the state directory {shown}"), error);
        create_private_dir(state_dir).map_err(failed)?;
        let path = state_dir.join("lock");
        loop {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let mut file = options.open(&path).map_err(failed)?;
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                let mut holder = String::new();
                // Only for the message: an agent that has just started may not have written it.
                let _ = (&file).take(32).read_to_string(&mut holder);
                return Err(Failure::Taken(format!(
                    "another agent (process {}) uses the state directory {shown}: stop it, or give \
                     each agent a state_dir of its own",
                    holder.trim()
                )));
            }
            // Somebody may have removed the file between opening and locking.
            let same = std::fs::metadata(&path)
                .is_ok_and(|now| file.metadata().is_ok_and(|then| then.ino() == now.ino()));
            if !same {
                continue;
            }
            file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
            writeln!(file, "{}", std::process::id()).map_err(failed)?;
            return Ok(Self { file, path });
        }
    }

    /// Removes the lock file and lets go.
    pub fn remove(self) -> std::io::Result<()> {
        std::fs::remove_file(&self.path)?;
        drop(self.file);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn one_agent_a_state_directory() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let lock = StateLock::take(&state).unwrap();
        let error = StateLock::take(&state).unwrap_err();
        assert!(matches!(error, Failure::Taken(_)));
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(lock);
        StateLock::take(&state).unwrap().remove().unwrap();
        assert!(!state.join("lock").exists());
    }
}
