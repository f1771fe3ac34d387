//! The directory of an instance. An instance is one agent with one data plane. A node can have
//! several instances.
//!
//! Two pods of one node share the node's network and `/run/skein`. Each pod has a directory of its
//! own for two sockets: the agent answers probes at one, and requests the data plane from its
//! keeper at the other.

use std::fs::{self, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};

/// Timeout of a probe for the agent's answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Answer of the agent while it is ready.
pub const READY: &str = "ready\n";

/// Function that connects to a unix socket. It must check that the user of the listener is trusted,
/// and fail otherwise; [`Instance::probe`] does not check the user.
pub type Connect = fn(&Path) -> io::Result<UnixStream>;

/// The directory of an instance.
#[derive(Debug, Clone)]
pub struct Instance(PathBuf);

impl Instance {
    /// Returns the instance whose directory is `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Returns the directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the path of the socket at which the agent answers [`READY`], or the reasons why it
    /// is not ready, one per line.
    pub fn agent_socket(&self) -> PathBuf {
        self.0.join("agent.sock")
    }

    /// Returns the path of the socket on which the keeper listens for its agent. The agent connects
    /// and writes one byte to request the data plane. The request lasts until the agent
    /// disconnects.
    pub fn dataplane_socket(&self) -> PathBuf {
        self.0.join("dataplane.sock")
    }

    /// Returns the path of the file that exists while the keeper has the data plane.
    pub fn dataplane_marker(&self) -> PathBuf {
        self.0.join("dataplane.active")
    }

    /// Sets the sticky bit on the parent of the instance's directory if every user can write to the
    /// parent, for example if the parent is an emptyDir volume of Kubernetes. Then no other user
    /// can replace the instance's directory.
    ///
    /// # Errors
    /// An I/O error if the mode of the parent cannot be changed.
    pub fn protect_directory(&self) -> io::Result<()> {
        let Some(parent) = self.0.parent() else { return Ok(()) };
        let mode = match fs::metadata(parent) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found?.permissions().mode(),
        };
        match mode & 0o1002 == 0o0002 {
            true => fs::set_permissions(parent, Permissions::from_mode(mode & 0o7777 | 0o1000)),
            false => Ok(()),
        }
    }

    /// Checks that the agent answers and, with `ready`, that it is ready.
    ///
    /// # Errors
    /// The connection fails, the agent does not answer within 3 s, or, with `ready`, the agent
    /// reports reasons why it is not ready.
    pub fn probe(&self, connect: Connect, ready: bool) -> anyhow::Result<()> {
        let socket = self.agent_socket();
        let request = || -> io::Result<String> {
            let mut stream = connect(&socket)?;
            stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer =
            request().with_context(|| format!("no agent answers on {}", socket.display()))?;
        if ready && answer != READY {
            bail!("not ready: {}", answer.trim_end().replace('\n', "; "));
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn probe_distinguishes_alive_from_ready() {
        let connect: Connect = |path| UnixStream::connect(path);
        let directory = tempfile::tempdir().unwrap();
        let instance = Instance::new(directory.path());
        assert!(instance.probe(connect, false).is_err(), "A probe without a listener fails.");
        let listener = UnixListener::bind(instance.agent_socket()).unwrap();
        let answering = std::thread::spawn(move || {
            for answer in [READY, READY, "one\ntwo\n", "one\ntwo\n"] {
                listener.accept().unwrap().0.write_all(answer.as_bytes()).unwrap();
            }
        });
        instance.probe(connect, false).unwrap();
        instance.probe(connect, true).unwrap();
        instance.probe(connect, false).unwrap();
        assert_eq!(instance.probe(connect, true).unwrap_err().to_string(), "not ready: one; two");
        answering.join().unwrap();
    }

    #[test]
    fn directory_in_world_writable_volume_is_protected() {
        let volume = tempfile::tempdir().unwrap();
        let open = |mode| fs::set_permissions(volume.path(), Permissions::from_mode(mode)).unwrap();
        let instance = Instance::new(volume.path().join("skein"));
        let mode = || fs::metadata(volume.path()).unwrap().permissions().mode() & 0o7777;
        open(0o777);
        instance.protect_directory().unwrap();
        assert_eq!(mode(), 0o1777);
        open(0o755);
        instance.protect_directory().unwrap();
        assert_eq!(mode(), 0o755, "The mode of a parent that only root can change stays.");
        Instance::new("/nonexistent/a/b").protect_directory().unwrap();
    }
}
