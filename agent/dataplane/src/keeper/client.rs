//! Requests of a keeper to a data process by its socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use skein_ipc::{Request, Response, read_frame, write_frame};
use skein_sys::socket::{connect_trusted, is_disconnect, is_no_listener};

/// How long the other side of a hand-over may take for each step.
pub(super) const HANDOVER_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = connect_trusted(socket)?;
    stream.set_read_timeout(Some(HANDOVER_TIMEOUT))?;
    stream.set_write_timeout(Some(HANDOVER_TIMEOUT))?;
    Ok(stream)
}

/// Asks a data process to end, and waits until it has.
pub(super) fn shut_down(socket: &Path) -> io::Result<()> {
    let mut stream = connect(socket)?;
    write_frame(&mut stream, &Request::Shutdown)?;
    while read_frame::<Response>(&mut stream)?.is_some() {}
    Ok(())
}

/// Ends a data process of a release without locks, which listens although the lock is free.
pub(super) fn shut_down_unlocked(socket: &Path) -> anyhow::Result<()> {
    match shut_down(socket) {
        Err(error) if !is_disconnect(&error) && !is_no_listener(&error) => Err(error)
            .with_context(|| format!("cannot end the data process on {}", socket.display())),
        _ => Ok(()),
    }
}
