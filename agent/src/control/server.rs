//! The status socket: whoever connects gets one JSON document; another agent may ask this one to give way.

use std::io;
use std::os::unix::net as std_net;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use skein_sys::descriptors;
use skein_sys::lock::FileLock;
use skein_sys::socket::{
    check_listener, connect_trusted, is_disconnect, is_no_listener, is_trusted,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::rotation::{Ask, RotationRequest};
use super::shared::Shared;
use crate::failure::Failure;
use crate::listener::Listener;
use crate::status::RotationStatus;

/// How long a reader may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long a reader that says nothing may mean to say something.
const SILENCE: Duration = Duration::from_millis(100);
/// Request of an agent that takes this one's place. The answer is the lock of the state directory,
/// sent after all other descriptors are closed.
const HAND_OVER: &str = "hand over";
/// What asks for another key of this node …
const ROTATE_KEY: &str = "rotate key";
/// … and for an end of the old one at once.
const ROTATE_KEY_AT_ONCE: &str = "rotate key at once";
/// What sets the level of the log; the level follows, or nothing for the configured one.
const LOG_LEVEL: &str = "log level ";
/// The longest line of a request, in bytes.
const LINE: u64 = 1024;

/// Listens at the path of the status socket; see [`Listener::bind`].
///
/// # Errors
/// As [`Listener::bind`].
pub fn bind(path: &Path) -> Result<Listener, Failure> {
    Listener::bind("control.socket", path, None)
}

/// Who is told what is asked for.
#[derive(Debug, Clone)]
pub struct Asks {
    /// Connection to an agent that takes this one's place.
    pub hand_over: mpsc::Sender<std_net::UnixStream>,
    /// Somebody wants another key for this node.
    pub rotate: Ask,
}

/// Answers until it is aborted.
pub async fn serve(mut listener: Listener, shared: Shared, asks: Asks) {
    loop {
        match listener.accept().await {
            Ok(stream) => {
                let (shared, asks) = (shared.clone(), asks.clone());
                tokio::spawn(async move {
                    let answer = answer(stream, &shared, &asks);
                    if let Ok(Err(error)) = tokio::time::timeout(DEADLINE, answer).await {
                        tracing::debug!(%error, "status not delivered");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the control socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, shared: &Shared, asks: &Asks) -> io::Result<()> {
    if !is_trusted(stream.peer_cred()?.uid()) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let mut said = String::new();
    let mut lines = BufReader::new((&mut stream).take(LINE));
    // Whoever says nothing wants the status.
    let _ = tokio::time::timeout(SILENCE, lines.read_line(&mut said)).await;
    let answer = match said.strip_suffix('\n') {
        Some(HAND_OVER) => {
            let connection = stream.into_std()?;
            connection.set_nonblocking(false)?;
            let gone = |_| io::Error::from(io::ErrorKind::ConnectionAborted);
            return asks.hand_over.try_send(connection).map_err(gone);
        }
        Some(ROTATE_KEY) => serde_json::to_vec(&rotate(asks, false).await)?,
        Some(ROTATE_KEY_AT_ONCE) => serde_json::to_vec(&rotate(asks, true).await)?,
        Some(line) if line.starts_with(LOG_LEVEL) => {
            let level = Some(&line[LOG_LEVEL.len()..]).filter(|level| !level.is_empty());
            serde_json::to_vec(&shared.set_log_level(level).await)?
        }
        _ => serde_json::to_vec(&shared.document().await)?,
    };
    stream.write_all(&answer).await?;
    stream.shutdown().await
}

async fn rotate(asks: &Asks, at_once: bool) -> Result<RotationStatus, String> {
    let (answer, answered) = oneshot::channel();
    let asked = asks.rotate.send(RotationRequest { at_once, answer }).await;
    let gone = || "the agent is ending".to_owned();
    asked.map_err(|_| gone())?;
    answered.await.unwrap_or_else(|_| Err(gone()))
}

/// Requests the hand-over from the agent that listens on `path`; returns the lock of the state
/// directory. `None` if no agent listens, or if it ended meanwhile.
///
/// # Errors
/// An I/O error if the agent does not answer within five seconds, or if it is of a release with
/// another hand-over.
pub fn ask_to_hand_over(path: &Path) -> io::Result<Option<FileLock>> {
    let ask = || -> io::Result<FileLock> {
        let mut stream = connect_trusted(path)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        io::Write::write_all(&mut stream, format!("{HAND_OVER}\n").as_bytes())?;
        let mut received = descriptors::receive(&stream, 1)?;
        FileLock::from_received(received.remove(0))
    };
    match ask() {
        Ok(lock) => Ok(Some(lock)),
        Err(error) if is_no_listener(&error) || is_disconnect(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Fetches the status of the agent that listens on `path`.
pub async fn fetch<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    ask(path, "").await
}

/// Asks the agent that listens on `path` for another key of its node; the inner error is the agent's.
pub async fn ask_to_rotate(
    path: &Path,
    at_once: bool,
) -> io::Result<Result<RotationStatus, String>> {
    let request = if at_once { ROTATE_KEY_AT_ONCE } else { ROTATE_KEY };
    ask(path, &format!("{request}\n")).await
}

/// Sets what the agent that listens on `path` logs; the inner error is the agent's.
pub async fn ask_for_level(path: &Path, level: Option<&str>) -> io::Result<Result<(), String>> {
    ask(path, &format!("{LOG_LEVEL}{}\n", level.unwrap_or_default())).await
}

async fn ask<T: DeserializeOwned>(path: &Path, request: &str) -> io::Result<T> {
    let ask = async {
        let mut stream = UnixStream::connect(path).await?;
        check_listener(stream.peer_cred()?.uid())?;
        stream.write_all(request.as_bytes()).await?;
        stream.shutdown().await?;
        let mut text = Vec::new();
        stream.read_to_end(&mut text).await?;
        Ok(serde_json::from_slice(&text)?)
    };
    tokio::time::timeout(DEADLINE, ask).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::control::client::tests::listener_of_another_user;

    #[tokio::test]
    async fn listener_of_another_user_receives_no_request() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let listener = listener_of_another_user(&path);
        let asked = [
            fetch::<serde_json::Value>(&path).await.map(drop),
            ask_to_rotate(&path, true).await.map(drop),
            ask_for_level(&path, None).await.map(drop),
            ask_to_hand_over(&path).map(drop),
        ];
        for asked in asked {
            assert_eq!(asked.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            let (mut stream, _) = listener.accept().unwrap();
            assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0, "It received a request.");
        }
    }
}
