//! Lock of the state directory, which prevents two agents from sharing one.

use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use skein_sys::lock::FileLock;

use super::identity::create_private_dir;
use crate::failure::Failure;

/// Name of the lock file in the state directory.
pub const FILE: &str = "lock";

/// Lock of a state directory. The process that holds it has the agent's role on this node. The
/// kernel releases the lock however the process ends.
#[derive(Debug)]
pub struct StateLock {
    lock: FileLock,
    path: PathBuf,
}

impl StateLock {
    /// Acquires the lock of a state directory, which is created if it does not exist.
    ///
    /// # Errors
    /// [`Failure::InUse`] if another agent holds the lock; another [`Failure`] if the directory
    /// cannot be used.
    pub fn acquire(state_dir: &Path) -> Result<Self, Failure> {
        let shown = state_dir.display();
        let failed = |error| Failure::io(format!("cannot use the state directory {shown}"), error);
        create_private_dir(state_dir).map_err(failed)?;
        let path = state_dir.join(FILE);
        let Some(lock) = FileLock::try_acquire(&path).map_err(failed)? else {
            let mut holder = String::new();
            // The process id is only for the message. An agent that has just started may not have
            // written it.
            let _ = std::fs::File::open(&path)
                .and_then(|file| file.take(32).read_to_string(&mut holder));
            return Err(Failure::InUse(format!(
                "another agent (process {}) uses the state directory {shown}. Stop it, or give each \
                 agent its own state_dir.",
                holder.trim()
            )));
        };
        Self::of(lock, state_dir)
    }

    /// Returns the lock of a state directory that another process has taken and passed on to this
    /// one.
    ///
    /// # Errors
    /// [`Failure`] if the lock's file cannot be written.
    pub fn of(mut lock: FileLock, state_dir: &Path) -> Result<Self, Failure> {
        let shown = state_dir.display();
        let failed = |error| Failure::io(format!("cannot use the state directory {shown}"), error);
        let file = lock.file();
        file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { lock, path: state_dir.join(FILE) })
    }

    /// Releases the lock at once, although a child may have a copy of the descriptor for a moment.
    pub fn release(self) {
        self.lock.release();
    }

    /// Removes the lock file and releases the lock.
    ///
    /// # Errors
    /// An I/O error if the file cannot be removed.
    pub fn remove(self) -> std::io::Result<()> {
        std::fs::remove_file(&self.path)?;
        drop(self.lock);
        Ok(())
    }
}

impl From<StateLock> for OwnedFd {
    fn from(lock: StateLock) -> Self {
        lock.lock.into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn second_agent_with_same_state_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let lock = StateLock::acquire(&state).unwrap();
        let error = StateLock::acquire(&state).unwrap_err();
        assert!(matches!(error, Failure::InUse(_)));
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(lock);
        StateLock::acquire(&state).unwrap().remove().unwrap();
        assert!(!state.join("lock").exists());
    }
}
