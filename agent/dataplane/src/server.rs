//! Control socket of the data process: frames of [`skein_ipc`], one thread per connection.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use skein_ipc::capture::CaptureRequest;
use skein_ipc::log_limit::LogLimit;
use skein_ipc::{ErrorKind, HANDOVER_VERSION, Report, Request, Response, read_frame, write_frame};
use skein_sys::link;
use skein_sys::socket::{
    FileId, file_id, is_disconnect, is_trusted, make_directory, peer_credentials,
};

use super::changes::Changes;
use super::channel::KeeperChannel;
use super::queue::{ToManager, ToManagerQueue};
use super::tap::Tap;

/// Maximum number of connections: the control process, and two for each `capture` or `trace
/// --drops`.
const MAX_CONNECTIONS: usize = 16;
/// Maximum number of connections that wait for accept(2).
const BACKLOG: i32 = 16;
/// Interval of messages to a capture without packets, so that a closed connection is noticed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
/// Interval at which the socket's path is compared with the socket (one `lstat`).
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Timeout of writes to a capture.
const WATCHER_WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Binds the socket for the process's user only. Replaces a stale socket file of a process that has
/// exited.
///
/// # Errors
/// An error if another process listens on the path, or if the file or its directory cannot be used.
pub(super) fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    match UnixStream::connect(path) {
        Ok(_) => bail!(
            "another data process listens on {}. Stop it, or set dataplane.socket to another path.",
            path.display()
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
                .with_context(|| format!("cannot remove the stale socket {}", path.display()))?;
        }
        Err(error) => {
            return Err(error).with_context(|| format!("cannot use the socket {}", path.display()));
        }
    }
    make_directory(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    let listener = UnixListener::bind(path)
        .with_context(|| format!("cannot listen on the socket {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect the socket {}", path.display()))?;
    Ok(listener)
}

/// Listening control socket of this process. If another program deletes or replaces the socket's
/// file, the socket is created again within [`CHECK_INTERVAL`].
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Identity of the socket's file; `None` if the file was absent.
    file: Option<FileId>,
    /// The keeper, which creates the socket for a confined process.
    keeper: Option<Arc<KeeperChannel>>,
    next_check: Instant,
    /// Last error of the creation; `None` while the path leads to the socket.
    error: Option<String>,
}

impl Socket {
    /// Claims the socket for this process by listen(2), so that clients see this process's id.
    /// Closes connections that wait; their clients must connect again.
    ///
    /// # Errors
    /// The kernel's error, or `InvalidInput` if the socket has no path.
    pub(super) fn own(
        listener: UnixListener,
        keeper: Option<Arc<KeeperChannel>>,
    ) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let path = address.as_pathname().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        claim(&listener)?;
        let (file, next_check) = (file_id(&path), Instant::now() + CHECK_INTERVAL);
        Ok(Self { listener, path, file, keeper, next_check, error: None })
    }

    /// Returns the path of the socket's file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns a function that deletes the socket's file at the end of this process.
    pub(super) fn deleter(&self) -> impl FnOnce() + use<> {
        let (keeper, path) = (self.keeper.clone(), self.path.clone());
        move || {
            let deleted = match keeper {
                Some(keeper) => keeper.delete_socket(),
                None => std::fs::remove_file(path),
            };
            if let Err(error) = deleted {
                // The next start removes a stale file.
                tracing::debug!(%error, "control socket not deleted");
            }
        }
    }

    /// Waits for a connection. Without free descriptors, accept(2) fails even if no connection
    /// waits, so accept(2) is called only if a connection waits.
    ///
    /// # Errors
    /// The error of poll(2) or accept(2).
    fn accept(&mut self) -> io::Result<UnixStream> {
        loop {
            let timeout = self.next_check.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(timeout).ok();
            match poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], timeout.as_ref()) {
                // Connections of the present socket are accepted before the socket is replaced.
                Ok(0) => {
                    self.check();
                    self.next_check = Instant::now() + CHECK_INTERVAL;
                }
                Ok(_) => match self.listener.accept() {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    accepted => return accepted.map(|(stream, _)| stream),
                },
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Creates the socket again if its path does not lead to it.
    fn check(&mut self) {
        let path = self.path.display();
        if self.file.is_some() && file_id(&self.path) == self.file {
            return;
        }
        let created = match &self.keeper {
            Some(keeper) => keeper.listen().map_err(anyhow::Error::from),
            None => bind(&self.path),
        };
        match created.and_then(|listener| Ok(claim(&listener).map(|()| listener)?)) {
            Ok(listener) => {
                tracing::warn!(%path, "control socket was deleted by another program: created again");
                (self.listener, self.file, self.error) = (listener, file_id(&self.path), None);
            }
            Err(error) => {
                let error = Some(format!("{error:#}"));
                if self.error != error {
                    tracing::error!(%path, error, "control socket was deleted by another program");
                    self.error = error;
                }
            }
        }
    }
}

fn claim(listener: &UnixListener) -> io::Result<()> {
    rustix::net::listen(listener, BACKLOG)?;
    listener.set_nonblocking(true)?;
    while listener.accept().is_ok() {}
    Ok(())
}

/// Accepts connections until the process ends.
pub(super) fn serve(
    mut socket: Socket,
    manager: ToManagerQueue,
    tap: Arc<Tap>,
    changes: Arc<Changes>,
) {
    let open = Arc::new(AtomicUsize::new(0));
    let mut failures = LogLimit::default();
    loop {
        let stream = match socket.accept() {
            Ok(stream) => stream,
            Err(error) => {
                if let Some(suppressed) = failures.count(Instant::now()) {
                    tracing::warn!(%error, suppressed, "cannot accept on the control socket");
                }
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if open.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (manager, counted, tap) = (manager.clone(), Arc::clone(&open), Arc::clone(&tap));
        let changes = Arc::clone(&changes);
        let connection = move || {
            if let Err(error) = serve_connection(stream, &manager, &tap, &changes) {
                tracing::warn!(%error, "control connection ended");
            }
            counted.fetch_sub(1, Ordering::Relaxed);
        };
        let thread = std::thread::Builder::new().name("control-socket".to_owned());
        if let Err(error) = thread.spawn(connection) {
            open.fetch_sub(1, Ordering::Relaxed);
            if let Some(suppressed) = failures.count(Instant::now()) {
                tracing::warn!(%error, suppressed, "cannot serve a control connection");
            }
        }
    }
}

/// Serves the requests of one connection until the client closes it.
///
/// # Errors
/// An error if the client is not trusted, sends a malformed request, or if the manager has ended.
fn serve_connection(
    mut stream: UnixStream,
    manager: &ToManagerQueue,
    tap: &Arc<Tap>,
    changes: &Changes,
) -> anyhow::Result<()> {
    let uid = peer_credentials(&stream)?.uid;
    if !is_trusted(uid) {
        bail!(
            "user {uid} is not allowed to use the data plane socket. Run the command as root or as \
             the user of the data process."
        );
    }
    loop {
        let request = match read_frame::<Request>(&mut stream) {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(error) => {
                let message = format!("cannot read the request: {error}");
                let response = Response::Error { kind: ErrorKind::Invalid, message };
                // The client may have disconnected; the error is logged below.
                let _ = write_frame(&mut stream, &response);
                return Err(error).context("malformed request");
            }
        };
        let (answer, response) = sync_channel(1);
        let message = match request {
            Request::Capture { capture } => return stream_packets(stream, tap, capture),
            Request::Changes { known } => {
                let version = changes.wait(known, KEEPALIVE_INTERVAL);
                write_frame(&mut stream, &Response::Changes { version })?;
                continue;
            }
            Request::TakeOver { version: HANDOVER_VERSION } => {
                ToManager::HandOver { connection: stream.try_clone()?, answer }
            }
            request => ToManager::Request { request, answer },
        };
        manager.send(message).context("the session manager has ended")?;
        let mut response = response.recv().context("the session manager has ended")?;
        if let Response::Report { report } = &mut response {
            // This thread reads the counters instead of the manager, because the kernel may hold
            // its lock of all links for long.
            add_device_counters(report);
        }
        write_frame(&mut stream, &response)?;
    }
}

fn add_device_counters(report: &mut Report) {
    let link = report.tun.as_deref().map(link::find).transpose();
    match link {
        Ok(link) => report.tun_queue_drops = link.flatten().map_or(0, |link| link.tx_dropped),
        Err(error) => tracing::warn!(%error, "cannot read the counters of the TUN device"),
    }
}

/// Sends captured packets until the client closes the connection.
///
/// # Errors
/// An error if the client does not read within [`WATCHER_WRITE_TIMEOUT`], or if the connection
/// fails.
fn stream_packets(
    mut stream: UnixStream,
    tap: &Arc<Tap>,
    request: CaptureRequest,
) -> anyhow::Result<()> {
    stream.set_write_timeout(Some(WATCHER_WRITE_TIMEOUT))?;
    let Some(mut subscription) = tap.subscribe(request) else {
        let message =
            "too many captures are running. End another capture or trace --drops.".to_owned();
        let response = Response::Error { kind: ErrorKind::InUse, message };
        return Ok(write_frame(&mut stream, &response)?);
    };
    loop {
        let (packets, missed) = subscription.next_batch(KEEPALIVE_INTERVAL);
        match write_frame(&mut stream, &Response::Captured { packets, missed }) {
            Err(error) if is_disconnect(&error) => return Ok(()),
            written => written.context("the client of a capture does not read")?,
        }
    }
}
