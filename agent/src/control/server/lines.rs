//! Requests of skein-agent 0.1.0, which are lines of text. An agent of 0.1.0 takes over from this
//! one when an upgrade is rolled back, and its commands work during an upgrade. Version 0.3.0
//! removes this module.

use std::io;

use rustix::net::RecvFlags;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;

use super::Service;

/// Maximum length of a request, bytes.
const MAX_LINE: u64 = 1024;
/// Requests the hand-over. The answer is one byte, with the descriptor of the lock as ancillary
/// data (SCM_RIGHTS), as after `POST /hand-over`.
pub(in crate::control) const HAND_OVER: &str = "hand over\n";

/// Waits for the first byte, which stays in the socket. Returns whether it begins a line request:
/// the methods of HTTP are upper-case. A client that sends nothing and shuts its side down requests
/// the status.
///
/// # Errors
/// An I/O error if the connection fails.
pub(super) async fn is_line_request(stream: &UnixStream) -> io::Result<bool> {
    let mut first = [0];
    let peek = || Ok(rustix::net::recv(stream, &mut first, RecvFlags::PEEK)?.1);
    let length = stream.async_io(Interest::READABLE, peek).await?;
    Ok(length == 0 || !first[0].is_ascii_uppercase())
}

/// Answers one request: a JSON document, in which an error is `{"Err": TEXT}`.
///
/// # Errors
/// An I/O error if the connection fails, if the request is unknown, or if another agent is already
/// taking over.
pub(super) async fn answer(mut stream: UnixStream, service: &Service) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new((&mut stream).take(MAX_LINE)).read_line(&mut line).await?;
    let answer = match line.as_str() {
        HAND_OVER => {
            let connection = stream.into_std()?;
            connection.set_nonblocking(false)?;
            let gone = |_| io::Error::from(io::ErrorKind::ConnectionAborted);
            return service.senders.hand_over.try_send(connection).map_err(gone);
        }
        "" => serde_json::to_vec(&service.status.document().await)?,
        "rotate key\n" => serde_json::to_vec(&text(service.rotate(false).await))?,
        "rotate key at once\n" => serde_json::to_vec(&text(service.rotate(true).await))?,
        line => {
            let level = line.strip_prefix("log level ").and_then(|rest| rest.strip_suffix('\n'));
            let level = level.ok_or(io::ErrorKind::InvalidData)?;
            let level = Some(level).filter(|level| !level.is_empty());
            serde_json::to_vec(&text(service.senders.log_levels.set(level).await))?
        }
    };
    stream.write_all(&answer).await?;
    stream.shutdown().await
}

fn text<T>(result: Result<T, impl std::fmt::Display>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}
