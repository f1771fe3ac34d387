//! Protocol of a measurement: lines of JSON over TCP. The client proves that it knows the token
//! with an HMAC of a challenge, because another program may listen on the port of the underlay.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Maximum length of a line in bytes.
const MAX_LINE: u64 = 1024;
/// Timeout of each read and write.
pub(super) const IO_TIMEOUT: Duration = Duration::from_secs(5);
/// Size of an echoed message and of a datagram's payload, bytes.
pub(super) const MESSAGE_BYTES: usize = 64;

/// Kind of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Work {
    /// The server sends each message of [`MESSAGE_BYTES`] bytes back.
    Echo,
    /// The client sends until it closes its direction of the connection.
    Upload,
    /// The server sends for `ms` milliseconds.
    Download { ms: u64 },
    /// The client sends datagrams to the same port, then a line after the last one.
    Datagrams,
}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    work: Work,
    /// HMAC-SHA256 of challenge and work with the token as the key, base64url.
    proof: String,
}

/// Packets and bytes that one end sent or received, and the duration in seconds.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct TrafficCount {
    pub(super) bytes: u64,
    pub(super) packets: u64,
    pub(super) seconds: f64,
}

/// Error of a measurement.
#[derive(Debug, Error)]
pub(super) enum RequestError {
    /// The server refuses the request, with its own text.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// TCP connection between client and server.
pub(super) struct Connection(pub(super) BufReader<TcpStream>);

impl Connection {
    pub(super) fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IO_TIMEOUT))?;
        stream.set_write_timeout(Some(IO_TIMEOUT))?;
        Ok(Self(BufReader::new(stream)))
    }

    pub(super) fn stream(&self) -> &TcpStream {
        self.0.get_ref()
    }

    /// Runs `work` and shuts the connection down after `time`. The timeout of a read is not
    /// sufficient, because it restarts with every byte.
    pub(super) fn within<T>(
        &mut self,
        time: Duration,
        work: impl FnOnce(&mut Self) -> io::Result<T>,
    ) -> io::Result<T> {
        let stream = self.stream().try_clone()?;
        let (done, ended) = channel::<()>();
        let watch = move || {
            let late = ended.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
            if late {
                let _ = stream.shutdown(Shutdown::Both);
            }
            late
        };
        thread::scope(|scope| {
            let name = "bench-deadline".to_owned();
            let watch = thread::Builder::new().name(name).spawn_scoped(scope, watch)?;
            let result = work(self);
            drop(done);
            match watch.join() {
                Ok(true) => Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "connection closed: time limit exceeded",
                )),
                _ => result,
            }
        })
    }

    /// Sends `value` as a line.
    pub(super) fn send(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(value)?;
        text.push(b'\n');
        self.0.get_mut().write_all(&text)
    }

    /// Receives a line and parses it as JSON.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        read_line(&mut self.0)
    }

    /// Requests a measurement and proves the knowledge of the token.
    pub(super) fn request(&mut self, token: &str, work: Work) -> Result<(), RequestError> {
        let challenge: String = self.receive()?;
        self.send(&Request { work, proof: BASE64.encode(sign(token, &challenge, work)?) })?;
        let answer: String = self.receive()?;
        match answer.as_str() {
            "ok" => Ok(()),
            other => Err(RequestError::Refused(other.to_owned())),
        }
    }

    /// Receives a request and answers it. Returns `None` if the client does not prove the token.
    pub(super) fn accept_request(&mut self, token: &str) -> io::Result<Option<Work>> {
        let challenge = random()?;
        self.send(&challenge)?;
        let request: Request = self.receive()?;
        let proof = BASE64.decode(&request.proof).unwrap_or_default();
        let right = sign(token, &challenge, request.work)?;
        match aws_lc_rs::constant_time::verify_slices_are_equal(&right, &proof) {
            Ok(()) => self.send(&"ok").map(|()| Some(request.work)),
            Err(_) => self.send(&"the token differs from that of bench --serve").map(|()| None),
        }
    }
}

fn read_line<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<T> {
    let mut text = String::new();
    from.take(MAX_LINE).read_line(&mut text)?;
    // The error of serde_json quotes the line, which an unauthenticated sender may have written.
    let wrong = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "the other end does not speak the protocol of bench",
        )
    };
    serde_json::from_str(&text).map_err(|_| wrong())
}

/// Parses a line as every type of the protocol, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_line(data: &[u8]) {
    let _ = read_line::<String>(&mut &data[..]);
    let _ = read_line::<TrafficCount>(&mut &data[..]);
    match read_line::<Request>(&mut &data[..]) {
        Ok(request) => assert!(sign("token", &request.proof, request.work).is_ok()),
        Err(error) => assert!(!error.to_string().contains(char::is_control)),
    }
}

fn sign(token: &str, challenge: &str, work: Work) -> io::Result<Vec<u8>> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, token.as_bytes());
    let text = format!("skein bench {challenge} {}", serde_json::to_string(&work)?);
    Ok(hmac::sign(&key, text.as_bytes()).as_ref().to_vec())
}

/// Returns 128 random bits as base64url.
pub(super) fn random() -> io::Result<String> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| io::Error::other("no random numbers"))?;
    Ok(BASE64.encode(bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::TcpListener;
    use std::time::Instant;

    use super::*;

    #[test]
    fn invalid_line_is_not_quoted_in_error() {
        let line = br#"{"work":"\u001b[2Jforged","proof":""}"#;
        let error = read_line::<Request>(&mut &line[..]).err().unwrap();
        assert_eq!(error.to_string(), "the other end does not speak the protocol of bench");
    }

    #[test]
    fn slow_sender_is_disconnected_at_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut connection = Connection::new(listener.accept().unwrap().0).unwrap();
        let trickle = thread::spawn(move || {
            while client.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let start = Instant::now();
        let request = connection
            .within(Duration::from_millis(200), |connection| connection.accept_request("token"));
        assert_eq!(request.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() < IO_TIMEOUT, "{:?}", start.elapsed());
        drop(connection);
        trickle.join().unwrap();
    }
}
