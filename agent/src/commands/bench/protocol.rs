//! What the two ends of a measurement say to each other: lines over TCP. Who asks shows that it knows the
//! token without saying it, since beside the overlay anybody may listen.

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

/// The longest line in bytes.
const LINE: u64 = 1024;
/// How long the other end may say nothing.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a message that is echoed, and of a datagram.
pub(super) const SMALL: usize = 64;

/// What is to be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Work {
    /// Every message of [`SMALL`] bytes is sent back.
    Echo,
    /// The asker sends until it has enough.
    Upload,
    /// The asker receives for so many milliseconds.
    Download { ms: u64 },
    /// The asker sends datagrams to the same port, and says when it has sent the last.
    Datagrams,
}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    work: Work,
    /// Over the challenge and the work.
    proof: String,
}

/// What the other end has counted.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Counted {
    pub(super) bytes: u64,
    pub(super) packets: u64,
    pub(super) seconds: f64,
}

/// Why nothing was measured.
#[derive(Debug, Error)]
pub(super) enum AskError {
    /// The other end says no, in its own words.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A connection between the two.
pub(super) struct Line(pub(super) BufReader<TcpStream>);

impl Line {
    pub(super) fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    pub(super) fn stream(&self) -> &TcpStream {
        self.0.get_ref()
    }

    /// Does something with the connection, which is cut off after `time`: with every byte that trickles in, a
    /// read's own timeout begins anew.
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
                Ok(true) => {
                    Err(io::Error::new(io::ErrorKind::TimedOut, "cut off: its time is over"))
                }
                _ => result,
            }
        })
    }

    pub(super) fn say(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(value)?;
        text.push(b'\n');
        self.0.get_mut().write_all(&text)
    }

    pub(super) fn hear<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        heard(&mut self.0)
    }

    /// Asks for a measurement.
    pub(super) fn ask(&mut self, token: &str, work: Work) -> Result<(), AskError> {
        let challenge: String = self.hear()?;
        self.say(&Request { work, proof: BASE64.encode(sign(token, &challenge, work)?) })?;
        let answer: String = self.hear()?;
        match answer.as_str() {
            "ok" => Ok(()),
            other => Err(AskError::Refused(other.to_owned())),
        }
    }

    /// What somebody asks for who knows the token; `None` for whoever does not.
    pub(super) fn asked(&mut self, token: &str) -> io::Result<Option<Work>> {
        let challenge = random()?;
        self.say(&challenge)?;
        let request: Request = self.hear()?;
        let proof = BASE64.decode(&request.proof).unwrap_or_default();
        let right = sign(token, &challenge, request.work)?;
        match aws_lc_rs::constant_time::verify_slices_are_equal(&right, &proof) {
            Ok(()) => self.say(&"ok").map(|()| Some(request.work)),
            Err(_) => self.say(&"the token is not that of --serve").map(|()| None),
        }
    }
}

fn heard<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<T> {
    let mut text = String::new();
    from.take(LINE).read_line(&mut text)?;
    // What is wrong with it would quote it, and a stranger's words are nothing to print.
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "what it says is not bench's");
    serde_json::from_str(&text).map_err(|_| wrong())
}

/// For the fuzzer: everything that a line may be.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_line(data: &[u8]) {
    let _ = heard::<String>(&mut &data[..]);
    let _ = heard::<Counted>(&mut &data[..]);
    match heard::<Request>(&mut &data[..]) {
        Ok(request) => assert!(sign("token", &request.proof, request.work).is_ok()),
        Err(error) => assert!(!error.to_string().contains(char::is_control)),
    }
}

fn sign(token: &str, challenge: &str, work: Work) -> io::Result<Vec<u8>> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, token.as_bytes());
    let text = format!("skein bench {challenge} {}", serde_json::to_string(&work)?);
    Ok(hmac::sign(&key, text.as_bytes()).as_ref().to_vec())
}

/// 128 random bits as text.
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
    fn strangers_words_are_not_repeated() {
        let line = br#"{"work":"\u001b[2Jforged","proof":""}"#;
        let error = heard::<Request>(&mut &line[..]).err().unwrap();
        assert_eq!(error.to_string(), "what it says is not bench's");
    }

    #[test]
    fn whoever_trickles_is_cut_off() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stranger = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut line = Line::new(listener.accept().unwrap().0).unwrap();
        let trickle = thread::spawn(move || {
            while stranger.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let start = Instant::now();
        let asked = line.within(Duration::from_millis(200), |line| line.asked("token"));
        assert_eq!(asked.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
        drop(line);
        trickle.join().unwrap();
    }
}
