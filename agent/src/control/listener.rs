//! A unix socket that stays reachable at its path.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::server::bind_socket;
use crate::failure::Failure;
use crate::lifecycle::{NotReady, Readiness};
use crate::sys::socket::{FileId, file_id};

/// Interval at which the path is compared with the socket: one `lstat`. A watch by inotify would
/// not see a directory that is replaced, and instances of inotify are scarce
/// (`fs.inotify.max_user_instances`).
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// A listening unix socket whose file is created again when another program deletes or replaces it.
///
/// The check runs in [`Listener::accept`], so the caller accepts in a loop. Connections that exist
/// are not disturbed.
#[derive(Debug)]
pub struct Listener {
    key: &'static str,
    path: PathBuf,
    socket: UnixListener,
    file: Option<FileId>,
    checks: Interval,
    readiness: Option<Readiness>,
    lost: Option<Lost>,
}

/// State while the path does not lead to the socket.
#[derive(Debug)]
struct Lost {
    error: String,
    _not_ready: Option<NotReady>,
}

impl Listener {
    /// Listens at `path`, which the configuration calls `key`, for its owner only. `readiness`: the
    /// agent is not ready while the socket cannot be created again.
    ///
    /// # Errors
    /// [`Failure::Taken`] if another process listens at `path` or if the file is not a socket,
    /// [`Failure`] if the socket cannot be created.
    pub fn bind(
        key: &'static str,
        path: &Path,
        readiness: Option<Readiness>,
    ) -> Result<Self, Failure> {
        let socket = bind_socket(key, path)?;
        let mut checks = interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let file = file_id(path);
        Ok(Self { key, path: path.to_owned(), socket, file, checks, readiness, lost: None })
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// The error of accept(2), for example EMFILE. The socket remains usable.
    pub async fn accept(&mut self) -> io::Result<UnixStream> {
        loop {
            tokio::select! {
                // Connections of a socket that is about to be replaced are accepted first.
                biased;
                accepted = self.socket.accept() => return accepted.map(|(stream, _)| stream),
                _ = self.checks.tick() => self.check(),
            }
        }
    }

    fn check(&mut self) {
        let (key, path) = (self.key, self.path.display());
        if self.file.is_some() && file_id(&self.path) == self.file {
            if self.lost.take().is_some() {
                tracing::info!(%path, "{key} is reachable again");
            }
            return;
        }
        match bind_socket(key, &self.path) {
            Ok(socket) => {
                tracing::warn!(%path, "{key} was deleted by another program: created again");
                (self.socket, self.file, self.lost) = (socket, file_id(&self.path), None);
            }
            Err(error) => {
                let error = error.to_string();
                if self.lost.as_ref().is_some_and(|lost| lost.error == error) {
                    return;
                }
                tracing::error!(%path, "{key} was deleted by another program: {error}");
                let reason = format!("{key} was deleted by another program: {error}");
                let not_ready = self.readiness.as_ref().map(|readiness| readiness.block(reason));
                self.lost = Some(Lost { error, _not_ready: not_ready });
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use super::*;

    /// Accepts connections until the test ends; returns the readiness of the listener.
    fn listen(path: &Path) -> Readiness {
        let readiness = Readiness::default();
        let mut listener = Listener::bind("cni.socket", path, Some(readiness.clone())).unwrap();
        tokio::spawn(async move {
            loop {
                let _ = listener.accept().await;
            }
        });
        readiness
    }

    async fn eventually(what: &str, condition: impl Fn() -> bool) {
        for _ in 0..600 {
            if condition() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}");
    }

    #[tokio::test]
    async fn deleted_socket_is_created_again() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = Arc::new(directory.path().join("run/cni.sock"));
        let readiness = listen(&path);
        let connects = || std::os::unix::net::UnixStream::connect(&**path).is_ok();
        assert!(connects());
        let renamed = directory.path().join("renamed");
        let damages: [&dyn Fn(); 4] = [
            &|| fs::remove_file(&**path).unwrap(),
            // Deletes the whole directory, as a careless cleanup of /run does.
            &|| fs::remove_dir_all(path.parent().unwrap()).unwrap(),
            &|| fs::rename(&**path, &renamed).unwrap(),
            // Leaves the stale socket of a process that has ended.
            &|| {
                fs::remove_file(&**path).unwrap();
                drop(std::os::unix::net::UnixListener::bind(&**path).unwrap());
            },
        ];
        for damage in damages {
            damage();
            eventually("the socket is created again", connects).await;
            let mode = fs::metadata(&**path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600);
            assert!(readiness.reasons().is_empty(), "{:?}", readiness.reasons());
        }
    }

    #[tokio::test]
    async fn socket_that_cannot_be_created_makes_not_ready() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        let readiness = listen(&path);
        let not_ready = |part: &str| {
            let reasons = readiness.reasons();
            reasons.len() == 1 && reasons[0].contains(part)
        };
        // Another process listens at the path: its socket stays.
        fs::remove_file(&path).unwrap();
        let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        eventually("another listener is reported", || not_ready("another agent listens")).await;
        drop(other);
        eventually("it is ready again", || readiness.reasons().is_empty()).await;
        fs::remove_file(&path).unwrap();
        fs::write(&path, "a file").unwrap();
        eventually("a foreign file is reported", || not_ready("is no socket")).await;
        fs::remove_file(&path).unwrap();
        eventually("it is ready again", || readiness.reasons().is_empty()).await;
    }
}
