//! Client of the control socket: requests of the commands, and of an agent that takes over from the
//! running one. The server, with the list of requests, is [`super::server`].

use std::io::{self, Read, Write};
use std::path::Path;

use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, StatusCode, header};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use skein_sys::descriptors;
use skein_sys::lock::FileLock;
use skein_sys::socket::{check_listener, connect_trusted, is_disconnect, is_no_listener};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::server::{
    ErrorBody, HAND_OVER_LINE, HAND_OVER_PROTOCOL, KeyRotationBody, LogLevelBody, REQUEST_TIMEOUT,
};
use crate::policy::report::{PodReport, PolicySummary};
use crate::status::RotationStatus;

/// Maximum length of an answer, bytes. The status of a node with 5000 peers has 4 MiB.
const MAX_ANSWER: usize = 64 << 20;
/// Maximum length of the header of an answer to `POST /hand-over`, bytes.
const MAX_HEADER: usize = 4096;

/// Failure of a request to the running agent.
#[derive(Debug, Error)]
pub enum AgentError {
    /// No agent listens, the listener is another user's, or the agent does not answer in time.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The answer is not HTTP. An agent of version 0.1.0 answers in another way.
    #[error(
        "the agent does not answer in HTTP, as an agent of version 0.1.0. Use the program of that \
         version."
    )]
    NotHttp,
    /// The agent closed the connection before the end of its answer.
    #[error("the answer of the agent is incomplete: {0}")]
    Incomplete(String),
    /// The body is not the expected document.
    #[error("the answer of the agent is not the expected document: {0}")]
    Body(#[from] serde_json::Error),
    /// The agent refused the request.
    #[error("{message}")]
    Refused {
        /// Status code of the HTTP answer.
        status: StatusCode,
        /// The failure and its remedy.
        message: String,
    },
}

/// Requests the status of the agent that listens on `path`.
///
/// # Errors
/// [`AgentError`] if no agent answers within [`REQUEST_TIMEOUT`], or if its answer is no status.
pub async fn status<T: DeserializeOwned>(path: &Path) -> Result<T, AgentError> {
    match request(path, Method::GET, "/status", &()).await {
        Err(AgentError::NotHttp) => in_time(status_of_0_1_0(path)).await,
        answer => Ok(serde_json::from_slice(&answer?)?),
    }
}

/// Requests another key for the node of the agent that listens on `path`. `at_once` invalidates the
/// old key immediately.
///
/// # Errors
/// [`AgentError`] if the agent does not answer within [`REQUEST_TIMEOUT`], or refuses.
pub async fn rotate_key(path: &Path, at_once: bool) -> Result<RotationStatus, AgentError> {
    let body = KeyRotationBody { at_once };
    Ok(serde_json::from_slice(&request(path, Method::POST, "/key/rotation", &body).await?)?)
}

/// Sets the log level of the agent that listens on `path`; `None` restores the configured one.
///
/// # Errors
/// [`AgentError`] if the agent does not answer within [`REQUEST_TIMEOUT`], or refuses.
pub async fn set_log_level(path: &Path, level: Option<&str>) -> Result<(), AgentError> {
    let body = LogLevelBody { level: level.map(str::to_owned) };
    request(path, Method::PUT, "/log/level", &body).await.map(drop)
}

/// Requests the policies that the agent that listens on `path` knows.
///
/// # Errors
/// [`AgentError`] if the agent does not answer within [`REQUEST_TIMEOUT`], or if its policies have
/// no effect.
pub async fn policies(path: &Path) -> Result<Vec<PolicySummary>, AgentError> {
    Ok(serde_json::from_slice(&request(path, Method::GET, "/policy", &()).await?)?)
}

/// Requests the policies of a pod of the agent's node. `pod` consists of letters, digits, `-`, `.`,
/// `_` and `/`.
///
/// # Errors
/// [`AgentError`] if the agent does not answer within [`REQUEST_TIMEOUT`], if its policies have no
/// effect, or if the node has no such pod.
pub async fn policies_of_pod(path: &Path, pod: &str) -> Result<Vec<PodReport>, AgentError> {
    let resource = format!("/policy/pod?name={pod}");
    Ok(serde_json::from_slice(&request(path, Method::GET, &resource, &()).await?)?)
}

/// Requests the hand-over from the agent that listens on `path`; returns the lock of the state
/// directory. `None` if no agent listens, or if it ended meanwhile.
///
/// # Errors
/// An I/O error if the agent refuses, does not answer within [`REQUEST_TIMEOUT`], or is of a
/// release with another hand-over.
pub fn request_hand_over(path: &Path) -> io::Result<Option<FileLock>> {
    let receive = |request: &str| -> io::Result<Option<FileLock>> {
        let mut stream = connect_trusted(path)?;
        stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
        stream.set_write_timeout(Some(REQUEST_TIMEOUT))?;
        stream.write_all(request.as_bytes())?;
        if request != HAND_OVER_LINE && !is_switching(&mut stream)? {
            return Ok(None);
        }
        let mut received = descriptors::receive(&stream, 1)?;
        FileLock::from_received(received.remove(0)).map(Some)
    };
    let http = format!(
        "POST /hand-over HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\n\
         Upgrade: {HAND_OVER_PROTOCOL}\r\nContent-Length: 0\r\n\r\n"
    );
    let received = match receive(&http) {
        Ok(None) => receive(HAND_OVER_LINE),
        result => result,
    };
    match received {
        Err(error) if is_no_listener(&error) || is_disconnect(&error) => Ok(None),
        result => result,
    }
}

/// Reads the header of the answer to `POST /hand-over`, byte by byte, because a longer read could
/// swallow the descriptor that follows. Returns false if the answer is not HTTP.
fn is_switching(stream: &mut impl Read) -> io::Result<bool> {
    let mut header = Vec::new();
    while !header.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        header.push(byte[0]);
        if !b"HTTP/1.1 ".starts_with(&header[..header.len().min(9)]) {
            return Ok(false);
        }
        if header.len() > MAX_HEADER {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the header of the answer is longer than 4096 bytes",
            ));
        }
    }
    if header.starts_with(b"HTTP/1.1 101 ") {
        return Ok(true);
    }
    let mut body = Vec::new();
    stream.take(MAX_HEADER as u64).read_to_end(&mut body)?;
    Err(io::Error::other(error_text(&body)))
}

/// Sends one request, with a JSON body unless the method is GET; returns the body of the answer.
async fn request(
    path: &Path,
    method: Method,
    resource: &str,
    body: &impl Serialize,
) -> Result<Vec<u8>, AgentError> {
    let body = match method {
        Method::GET => Body::empty(),
        _ => Body::from(serde_json::to_vec(body)?),
    };
    let request = Request::builder()
        .method(method)
        .uri(resource)
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/json")
        .body(body)
        .map_err(io::Error::other)?;
    in_time(exchange(path, request)).await
}

async fn exchange(path: &Path, request: Request<Body>) -> Result<Vec<u8>, AgentError> {
    let stream = UnixStream::connect(path).await?;
    check_listener(stream.peer_cred()?.uid())?;
    let failed = |error: hyper::Error| match error.is_parse() {
        true => AgentError::NotHttp,
        false => AgentError::Incomplete(error.to_string()),
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // The task ends with the connection, which ends with `sender` or with the answer.
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(failed)?;
    let status = response.status();
    let body = to_bytes(Body::new(response.into_body()), MAX_ANSWER).await;
    let body = body.map_err(|error| AgentError::Incomplete(error.to_string()))?;
    if !status.is_success() {
        return Err(AgentError::Refused { status, message: error_text(&body) });
    }
    Ok(body.into())
}

/// Returns the text of an [`ErrorBody`], or the body itself if it is another document.
fn error_text(body: &[u8]) -> String {
    match serde_json::from_slice::<ErrorBody>(body) {
        Ok(body) => body.error,
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    }
}

/// Requests the status of an agent of version 0.1.0, whose requests are lines of text: a client
/// that sends nothing receives the status.
async fn status_of_0_1_0<T: DeserializeOwned>(path: &Path) -> Result<T, AgentError> {
    let mut stream = UnixStream::connect(path).await?;
    check_listener(stream.peer_cred()?.uid())?;
    stream.shutdown().await?;
    let mut text = Vec::new();
    stream.take(MAX_ANSWER as u64).read_to_end(&mut text).await?;
    Ok(serde_json::from_slice(&text)?)
}

async fn in_time<T>(request: impl Future<Output = Result<T, AgentError>>) -> Result<T, AgentError> {
    let timeout = AgentError::Io(io::ErrorKind::TimedOut.into());
    tokio::time::timeout(REQUEST_TIMEOUT, request).await.unwrap_or(Err(timeout))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::BufRead;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::control::client::tests::listener_of_another_user;

    #[tokio::test]
    async fn listener_of_another_user_receives_no_request() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let listener = listener_of_another_user(&path);
        let io_error = |error: AgentError| match error {
            AgentError::Io(error) => error,
            error => panic!("{error:?}"),
        };
        let requests = [
            status::<serde_json::Value>(&path).await.map(drop).map_err(io_error),
            rotate_key(&path, true).await.map(drop).map_err(io_error),
            set_log_level(&path, None).await.map_err(io_error),
            request_hand_over(&path).map(drop),
        ];
        for request in requests {
            assert_eq!(request.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            let (mut stream, _) = listener.accept().unwrap();
            assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0, "It received a request.");
        }
    }

    /// Serves a control socket as version 0.1.0 does: every line but `hand over` gets the status.
    fn serve_as_0_1_0(listener: UnixListener, lock: OwnedFd) {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut line = String::new();
            io::BufReader::new(&stream).read_line(&mut line).unwrap();
            if line == "hand over\n" {
                return descriptors::send(&stream, &[lock.as_fd()]).unwrap();
            }
            stream.write_all(br#"{"node":"old"}"#).unwrap();
        }
    }

    #[tokio::test]
    async fn agent_of_0_1_0_reports_status_and_hands_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let lock = FileLock::try_acquire(&directory.path().join("lock")).unwrap().unwrap();
        std::thread::spawn(move || serve_as_0_1_0(listener, lock.into()));
        let status: serde_json::Value = status(&path).await.unwrap();
        assert_eq!(status["node"], "old");
        let error = rotate_key(&path, false).await.unwrap_err();
        assert!(matches!(error, AgentError::NotHttp), "{error:?}");
        let socket = path.clone();
        let lock = tokio::task::spawn_blocking(move || request_hand_over(&socket)).await.unwrap();
        assert!(lock.unwrap().is_some(), "The lock must arrive.");
    }
}
