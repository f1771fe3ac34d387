//! Client of the data process's socket.

use std::io;
use std::path::Path;
use std::time::Duration;

use skein_ipc::capture::{CaptureRequest, CapturedPacket};
use skein_ipc::{
    ErrorKind, NodeIdentity, PROTOCOL_VERSION, Report, Request, Response, SeenHandshakes,
    encode_frame, frame_length,
};
use skein_sys::socket::check_listener;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Timeout of most requests. The data process answers within milliseconds unless it hangs.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// Timeout of requests that change the state. Opening sockets and adding thousands of peers may
/// take seconds on a busy machine.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Failure of a request to the data process.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The connection failed: no process listens, or the data process has exited.
    #[error("data process: {0}")]
    Io(#[from] io::Error),
    /// The data process refused the request.
    #[error("{message}")]
    Refused {
        /// Kind of the failure, which determines the exit code.
        kind: ErrorKind,
        /// The failure and its remedy.
        message: String,
    },
    /// The answer is one to another request.
    #[error("the data process sent an answer that does not fit the request")]
    Protocol,
    /// The data process did not answer before the timeout.
    #[error("the data process does not answer")]
    Timeout,
}

/// Connection to the data process, after the exchange of hellos.
///
/// The data process answers requests in their order. [`Client::start_capture`] turns the connection
/// into a stream of captured packets; no other request may follow it.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    pid: Option<u32>,
    node: Option<NodeIdentity>,
    accepts_seen_handshakes: bool,
}

impl Client {
    /// Connects and exchanges hellos.
    ///
    /// # Errors
    /// [`ClientError`] if no process listens, if the listener belongs to another user than root or
    /// this process's own, or if the data process has another protocol version.
    pub async fn connect(socket: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket).await?;
        let peer = stream.peer_cred()?;
        // The listener receives the node's private key.
        check_listener(peer.uid())?;
        // The process id comes from the kernel. It is 0 if the data process is in another PID
        // namespace.
        let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok());
        let mut client = Self {
            stream,
            pid: pid.filter(|&pid| pid != 0),
            node: None,
            accepts_seen_handshakes: false,
        };
        match client.request(&Request::Hello { version: PROTOCOL_VERSION }).await? {
            Response::Hello {
                version: PROTOCOL_VERSION, node, accepts_seen_handshakes, ..
            } => {
                client.node = node;
                client.accepts_seen_handshakes = accepts_seen_handshakes;
                Ok(client)
            }
            _ => Err(ClientError::Protocol),
        }
    }

    /// Returns the process ID of the data process; `None` if it is in another PID namespace.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Returns the node that the data process works for; `None` before its first snapshot.
    pub fn node(&self) -> Option<&NodeIdentity> {
        self.node.as_ref()
    }

    /// Returns whether the data process accepts and reports the times of handshakes.
    pub fn accepts_seen_handshakes(&self) -> bool {
        self.accepts_seen_handshakes
    }

    /// Sends a request and returns the answer.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the data process refuses, [`ClientError::Timeout`] if it does
    /// not answer in time, [`ClientError::Io`] if the connection fails.
    pub async fn request(&mut self, request: &Request) -> Result<Response, ClientError> {
        let deadline = match request {
            Request::Apply { .. } | Request::Update { .. } => CHANGE_TIMEOUT,
            Request::Hello { .. }
            | Request::Report { .. }
            | Request::SeenHandshakes
            | Request::LogLevel { .. }
            | Request::Changes { .. }
            | Request::Capture { .. }
            | Request::Shutdown
            | Request::TakeOver { .. } => REQUEST_TIMEOUT,
        };
        let answer = tokio::time::timeout(deadline, self.exchange(request)).await;
        match answer.map_err(|_| ClientError::Timeout)?? {
            Response::Error { kind, message } => Err(ClientError::Refused { kind, message }),
            response => Ok(response),
        }
    }

    async fn exchange(&mut self, request: &Request) -> io::Result<Response> {
        let frame = encode_frame(request)?;
        self.stream.write_all(&frame).await?;
        self.answer().await
    }

    async fn answer(&mut self) -> io::Result<Response> {
        let mut prefix = [0; 4];
        self.stream.read_exact(&mut prefix).await?;
        let mut body = vec![0; frame_length(prefix)?];
        self.stream.read_exact(&mut body).await?;
        Ok(serde_json::from_slice(&body)?)
    }

    /// Sends a change of the state; returns the active revision.
    ///
    /// # Errors
    /// [`ClientError`] as for [`Client::request`].
    pub async fn apply(&mut self, request: &Request) -> Result<u64, ClientError> {
        match self.request(request).await? {
            Response::Applied { revision } => Ok(revision),
            _ => Err(ClientError::Protocol),
        }
    }

    /// Requests counters and states, with `peers` also those of each peer.
    ///
    /// # Errors
    /// [`ClientError`] as for [`Client::request`].
    pub async fn report(&mut self, peers: bool) -> Result<Report, ClientError> {
        match self.request(&Request::Report { peers }).await? {
            Response::Report { report } => Ok(*report),
            _ => Err(ClientError::Protocol),
        }
    }

    /// Requests the latest times of the peers' handshakes.
    ///
    /// # Errors
    /// [`ClientError`] if the data process is gone, hangs, or is of a release that does not know
    /// the request.
    pub async fn seen_handshakes(&mut self) -> Result<SeenHandshakes, ClientError> {
        match self.request(&Request::SeenHandshakes).await? {
            Response::SeenHandshakes { seen } => Ok(seen),
            _ => Err(ClientError::Protocol),
        }
    }

    /// Waits for a change since the version `known`, at most about a second; returns the version.
    ///
    /// # Errors
    /// [`ClientError`] if the data process is gone, or of a release without this request.
    pub async fn changes(&mut self, known: u64) -> Result<u64, ClientError> {
        match self.request(&Request::Changes { known }).await? {
            Response::Changes { version } => Ok(version),
            _ => Err(ClientError::Protocol),
        }
    }

    /// Starts a capture, whose packets [`Client::next_captured`] returns.
    ///
    /// # Errors
    /// [`ClientError::Io`] if the connection fails. A refusal is the error of the next
    /// [`Client::next_captured`].
    pub async fn start_capture(&mut self, watch: CaptureRequest) -> Result<(), ClientError> {
        let frame = encode_frame(&Request::Capture { capture: watch })?;
        Ok(self.stream.write_all(&frame).await?)
    }

    /// Returns the next captured packets and the number of packets that were missed. The future
    /// must not be dropped before it completes, because a part of a frame would be lost.
    ///
    /// # Errors
    /// [`ClientError`] if the data process refuses the capture, hangs, or is gone.
    pub async fn next_captured(&mut self) -> Result<(Vec<CapturedPacket>, u64), ClientError> {
        let answer = tokio::time::timeout(REQUEST_TIMEOUT, self.answer()).await;
        match answer.map_err(|_| ClientError::Timeout)?? {
            Response::Captured { packets, missed } => Ok((packets, missed)),
            Response::Error { kind, message } => Err(ClientError::Refused { kind, message }),
            _ => Err(ClientError::Protocol),
        }
    }

    /// Waits until the data process closes the connection. No request may be outstanding.
    pub async fn closed(&mut self) {
        let mut byte = [0];
        // Unexpected data also means that the connection is of no further use.
        let _ = self.stream.read(&mut byte).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    use rustix::process::Uid;

    use super::*;

    /// Returns a socket at `path` on which an unprivileged user listens.
    pub(crate) fn listener_of_another_user(path: &Path) -> UnixListener {
        let listener = UnixListener::bind(path).unwrap();
        // SO_PEERCRED reports the user who called listen(2). The user is a property of the thread.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let nobody = Uid::from_raw(65_534);
                let set = rustix::thread::set_thread_res_uid(nobody, nobody, nobody);
                set.expect("this test needs root");
                rustix::net::listen(&listener, 4).unwrap();
            });
        });
        listener
    }

    #[tokio::test]
    async fn listener_of_another_user_receives_no_request() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("dataplane.sock");
        let listener = listener_of_another_user(&path);
        let error = Client::connect(&path).await.unwrap_err();
        let refused = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        assert!(matches!(&error, ClientError::Io(error) if refused(error)), "{error}");
        let (mut stream, _) = listener.accept().unwrap();
        assert_eq!(
            stream.read_to_end(&mut Vec::new()).unwrap(),
            0,
            "the listener must receive no data"
        );
    }
}
