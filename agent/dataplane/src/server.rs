//! The data process's unix socket: frames of [`crate::ipc`], one connection a thread.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use anyhow::{Context, bail};

use super::changes::Changes;
use super::manager::ToManager;
use super::queue::ToManagerQueue;
use super::tap::Tap;
use crate::ipc::watch::Watch;
use crate::ipc::{ErrorKind, HANDOVER_VERSION, Report, Request, Response, read_frame, write_frame};
use crate::sys::link;
use crate::sys::socket::{hung_up, is_trusted, make_directory, peer_credentials};

/// Connections served at once: the control process's, and those of people who look, two for each watch.
const CONNECTIONS: usize = 16;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;
/// A watcher is told something this often, so that one that is gone is noticed.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// How long a watcher may leave what it is told unread.
const UNREAD: Duration = Duration::from_secs(5);

/// Binds the socket for root's use only. A path that a dead process left is taken over.
pub(super) fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    match UnixStream::connect(path) {
        Ok(_) => bail!(
            "another data process listens on {}: stop it, or set dataplane.socket to another path",
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

/// Makes the socket this process's, whoever has bound it: whoever connects is told its process id. Those
/// that came meanwhile try again.
pub(super) fn own(listener: &UnixListener) -> io::Result<()> {
    rustix::net::listen(listener, BACKLOG)?;
    listener.set_nonblocking(true)?;
    while listener.accept().is_ok() {}
    listener.set_nonblocking(false)
}

/// Accepts connections until the process ends.
pub(super) fn serve(
    listener: UnixListener,
    manager: ToManagerQueue,
    tap: Arc<Tap>,
    changes: Arc<Changes>,
) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the control socket");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (manager, counted, tap) = (manager.clone(), Arc::clone(&open), Arc::clone(&tap));
        let changes = Arc::clone(&changes);
        let connection = move || {
            if let Err(error) = converse(stream, &manager, &tap, &changes) {
                tracing::warn!(%error, "control connection ended");
            }
            counted.fetch_sub(1, Ordering::Relaxed);
        };
        let thread = std::thread::Builder::new().name("control-socket".to_owned());
        if let Err(error) = thread.spawn(connection) {
            open.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%error, "cannot serve a control connection");
        }
    }
}

fn converse(
    mut stream: UnixStream,
    manager: &ToManagerQueue,
    tap: &Arc<Tap>,
    changes: &Changes,
) -> anyhow::Result<()> {
    let uid = peer_credentials(&stream)?.uid;
    if !is_trusted(uid) {
        bail!("user {uid} may not use the data plane");
    }
    loop {
        let request = match read_frame::<Request>(&mut stream) {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(error) => {
                let message = format!("cannot read the request: {error}");
                let response = Response::Error { kind: ErrorKind::Invalid, message };
                // The other side may be gone already; the error below says why.
                let _ = write_frame(&mut stream, &response);
                return Err(error).context("bad request");
            }
        };
        let (answer, response) = sync_channel(1);
        let message = match request {
            Request::Watch { watch } => return tell(stream, tap, watch),
            Request::Changes { known } => {
                let version = changes.wait(known, SIGN_OF_LIFE);
                write_frame(&mut stream, &Response::Changes { version })?;
                continue;
            }
            Request::TakeOver { version: HANDOVER_VERSION } => {
                ToManager::GiveAway { connection: stream.try_clone()?, answer }
            }
            request => ToManager::Request { request, answer },
        };
        manager.send(message).context("the manager has ended")?;
        let mut response = response.recv().context("the manager has ended")?;
        if let Response::Report { report } = &mut response {
            // This thread reads the counters, not the manager: the kernel's lock of all links may
            // be held for long.
            add_device_counters(report);
        }
        write_frame(&mut stream, &response)?;
    }
}

fn add_device_counters(report: &mut Report) {
    let link = report.tun.as_deref().map(link::find).transpose();
    match link {
        Ok(link) => report.tun_queue_drops = link.flatten().map_or(0, |link| link.tx_dropped),
        Err(error) => tracing::warn!(%error, "the counters of the TUN device cannot be read"),
    }
}

/// Tells a watcher what is seen until it closes the connection.
fn tell(mut stream: UnixStream, tap: &Arc<Tap>, watch: Watch) -> anyhow::Result<()> {
    stream.set_write_timeout(Some(UNREAD))?;
    let Some(mut watching) = tap.watch(watch) else {
        let message = "too many watch already: end another trace --drops or capture".to_owned();
        let response = Response::Error { kind: ErrorKind::Taken, message };
        return Ok(write_frame(&mut stream, &response)?);
    };
    loop {
        let (seen, missed) = watching.next(SIGN_OF_LIFE);
        match write_frame(&mut stream, &Response::Seen { seen, missed }) {
            Err(error) if hung_up(&error) => return Ok(()),
            written => written.context("a watcher does not read")?,
        }
    }
}
