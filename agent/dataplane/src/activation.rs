//! Events of the keeper of an instance: requests of the instance's agent for the data plane, and
//! SIGTERM from kubelet. The agent writes one byte to the keeper's socket, and stays connected
//! while it has the agent's role. A connection without a byte requests nothing.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use skein_ipc::instance::Instance;
use skein_sys::files;
use skein_sys::socket::{is_trusted, peer_credentials};

use super::server;

/// State of the data plane, as the keeper reports it to its agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Activity {
    /// The data plane belongs to another keeper, or to none.
    Idle = 0,
    /// The data plane belongs to this keeper.
    Active = 1,
}

/// Keeper's end of an instance: its listening socket, the connected agent and SIGTERM.
#[derive(Debug)]
pub(super) struct Activation {
    instance: Instance,
    listener: UnixListener,
    agent: Option<UnixStream>,
    /// True if the connected agent has written its byte.
    requested: bool,
    activity: Activity,
    /// Read end of a socket pair; readable once SIGTERM has arrived.
    terminated: UnixStream,
}

impl Activation {
    /// Listens on the instance's socket, registers a handler for SIGTERM and removes the marker of
    /// an earlier keeper.
    ///
    /// # Errors
    /// An error if the instance's directory, the socket or the marker cannot be used.
    pub(super) fn bind(instance: &Instance) -> anyhow::Result<Self> {
        instance.protect_directory().context("cannot use the directory of --instance")?;
        let listener = server::bind(&instance.dataplane_socket())?;
        listener.set_nonblocking(true).context("cannot listen for the agent")?;
        let (terminated, write) = UnixStream::pair().context("cannot create a socket pair")?;
        signal_hook::low_level::pipe::register(signal_hook::consts::SIGTERM, write)
            .context("cannot register a handler for SIGTERM")?;
        let mut activation = Self {
            instance: instance.clone(),
            listener,
            agent: None,
            requested: false,
            activity: Activity::Idle,
            terminated,
        };
        // A keeper that was killed did not remove the marker.
        activation.set_activity(Activity::Idle).context("cannot use the instance's directory")?;
        Ok(activation)
    }

    /// Returns the descriptors to poll for input: the listening socket, and the descriptor that is
    /// readable after SIGTERM.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.listener.as_fd(), self.terminated.as_fd()]
    }

    /// Returns whether SIGTERM has arrived.
    pub(super) fn is_terminated(&self) -> bool {
        let mut fds = [PollFd::new(&self.terminated, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
    }

    /// Waits until an agent connects, the connected agent writes or disconnects, SIGTERM arrives,
    /// or `timeout` has passed. Accepts waiting connections.
    ///
    /// # Errors
    /// An error if poll(2) fails.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> anyhow::Result<()> {
        let timeout = timeout.map(Timespec::try_from).transpose().context("invalid timeout")?;
        let own = self.descriptors();
        let mut fds: Vec<_> = own.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        fds.extend(self.agent.as_ref().map(|agent| PollFd::new(agent, PollFlags::IN)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the agent"),
        }
        self.accept();
        Ok(())
    }

    /// Returns whether an agent is connected and has requested the data plane.
    pub(super) fn is_requested(&mut self) -> bool {
        while let Some(agent) = &mut self.agent {
            match agent.read(&mut [0; 8]) {
                Ok(1..) => self.requested = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return self.requested,
                Ok(0) | Err(_) => (self.agent, self.requested) = (None, false),
            }
        }
        false
    }

    /// Accepts all waiting connections of trusted users; the last one replaces the connected agent.
    pub(super) fn accept(&mut self) {
        while let Ok((agent, _)) = self.listener.accept() {
            let trusted = peer_credentials(&agent).is_ok_and(|peer| is_trusted(peer.uid));
            if trusted && agent.set_nonblocking(true).is_ok() {
                (self.agent, self.requested) = (Some(agent), false);
                self.notify_agent();
            }
        }
    }

    /// Creates or removes the marker of an active data plane, and notifies the connected agent.
    ///
    /// # Errors
    /// The error of the file operation; a marker that is already absent is not an error.
    pub(super) fn set_activity(&mut self, activity: Activity) -> io::Result<()> {
        let marker = self.instance.dataplane_marker();
        match activity {
            Activity::Active => drop(files::recreate(&marker, 0o600)?),
            Activity::Idle => match std::fs::remove_file(marker) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            },
        }
        if std::mem::replace(&mut self.activity, activity) != activity {
            self.notify_agent();
        }
        Ok(())
    }

    fn notify_agent(&mut self) {
        // `is_requested` notices a closed connection.
        let _ = self.agent.as_mut().map(|agent| agent.write_all(&[self.activity as u8]));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn keeper_listens_in_world_writable_volume() {
        use std::os::unix::fs::PermissionsExt;
        let volume = tempfile::tempdir().unwrap();
        // Mode of a Kubernetes emptyDir volume.
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(volume.path(), open).unwrap();
        let instance = Instance::new(volume.path().join("skein"));
        assert!(server::bind(&instance.dataplane_socket()).is_err());
        Activation::bind(&instance).unwrap();
    }

    #[test]
    fn request_lasts_as_long_as_the_connection() {
        let directory = tempfile::tempdir().unwrap();
        let instance = Instance::new(directory.path());
        std::fs::write(instance.dataplane_marker(), []).unwrap();
        let mut activation = Activation::bind(&instance).unwrap();
        assert!(!instance.dataplane_marker().exists(), "The marker of a killed keeper is removed.");
        activation.wait(Some(Duration::ZERO)).unwrap();
        assert!(!activation.is_requested());
        // The agent disconnects before its connection is accepted.
        drop(UnixStream::connect(instance.dataplane_socket()).unwrap());
        activation.wait(None).unwrap();
        assert!(!activation.is_requested());
        let mut agent = UnixStream::connect(instance.dataplane_socket()).unwrap();
        activation.wait(None).unwrap();
        assert!(!activation.is_requested(), "A connection without a byte requests nothing.");
        agent.write_all(&[1]).unwrap();
        activation.wait(None).unwrap();
        assert!(activation.is_requested());
        assert!(activation.is_requested(), "The request must last.");
        activation.set_activity(Activity::Active).unwrap();
        assert!(instance.dataplane_marker().exists());
        let mut told = [9; 2];
        agent.read_exact(&mut told).unwrap();
        assert_eq!(told, [Activity::Idle as u8, Activity::Active as u8]);
        // The next agent must be notified as soon as it is accepted.
        drop(agent);
        assert!(!activation.is_requested(), "The request ends with the connection.");
        let mut agent = UnixStream::connect(instance.dataplane_socket()).unwrap();
        agent.write_all(&[1]).unwrap();
        activation.accept();
        agent.read_exact(&mut told[..1]).unwrap();
        assert_eq!(told[0], Activity::Active as u8);
        assert!(activation.is_requested());
    }
}
