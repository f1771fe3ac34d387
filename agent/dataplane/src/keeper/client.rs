//! Requests of a keeper to a data process over its socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use skein_ipc::{Request, Response, read_frame, write_frame};
use skein_sys::socket::{connect_trusted, is_disconnect, is_no_listener};

/// Timeout of each step of a hand-over.
pub(super) const HANDOVER_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects to a data process of a trusted user, with timeouts for reads and writes.
///
/// # Errors
/// The error of the connection.
pub(super) fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = connect_trusted(socket)?;
    stream.set_read_timeout(Some(HANDOVER_TIMEOUT))?;
    stream.set_write_timeout(Some(HANDOVER_TIMEOUT))?;
    Ok(stream)
}

/// Requests a data process to exit, and waits until it has closed the connection.
///
/// # Errors
/// The error of the connection.
pub(super) fn shut_down(socket: &Path) -> io::Result<()> {
    let mut stream = connect(socket)?;
    write_frame(&mut stream, &Request::Shutdown)?;
    while read_frame::<Response>(&mut stream)?.is_some() {}
    Ok(())
}

/// Stops a data process of a release without locks, which listens although the lock is free.
///
/// # Errors
/// An error if a data process listens and does not stop.
pub(super) fn shut_down_unlocked(socket: &Path) -> anyhow::Result<()> {
    match shut_down(socket) {
        Err(error) if !is_disconnect(&error) && !is_no_listener(&error) => Err(error)
            .with_context(|| format!("cannot stop the data process on {}", socket.display())),
        _ => Ok(()),
    }
}
