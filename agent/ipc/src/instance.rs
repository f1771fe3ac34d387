//! The directory of an instance: one agent and one data plane of possibly several on a node.
//!
//! Two pods of one node share the node's network and `/run/skein`. Each pod has a directory of its
//! own for two sockets: the agent answers probes at one, and requests the data plane from its
//! keeper at the other.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};

/// Timeout of a probe for the agent's answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Answer of the agent while it is ready.
pub const READY: &str = "ready\n";

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

    /// Returns the path of the keeper's socket. The keeper requests the data plane while an agent
    /// is connected that has written a byte.
    pub fn dataplane_socket(&self) -> PathBuf {
        self.0.join("dataplane.sock")
    }

    /// Returns the path of the file that exists while the keeper has the data plane.
    pub fn dataplane_marker(&self) -> PathBuf {
        self.0.join("dataplane.active")
    }

    /// Checks that the agent answers and, with `ready`, that it is ready.
    ///
    /// # Errors
    /// An error if the agent does not answer within three seconds, or, with `ready`, if it reports
    /// reasons why it is not ready.
    pub fn probe(&self, ready: bool) -> anyhow::Result<()> {
        let socket = self.agent_socket();
        let ask = || -> io::Result<String> {
            let mut stream = UnixStream::connect(&socket)?;
            stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = ask().with_context(|| format!("no agent answers on {}", socket.display()))?;
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
    fn probe_tells_alive_from_ready() {
        let directory = tempfile::tempdir().unwrap();
        let instance = Instance::new(directory.path());
        assert!(instance.probe(false).is_err(), "Nobody listens.");
        let listener = UnixListener::bind(instance.agent_socket()).unwrap();
        let answering = std::thread::spawn(move || {
            for answer in [READY, READY, "one\ntwo\n", "one\ntwo\n"] {
                listener.accept().unwrap().0.write_all(answer.as_bytes()).unwrap();
            }
        });
        instance.probe(false).unwrap();
        instance.probe(true).unwrap();
        instance.probe(false).unwrap();
        assert_eq!(instance.probe(true).unwrap_err().to_string(), "not ready: one; two");
        answering.join().unwrap();
    }
}
