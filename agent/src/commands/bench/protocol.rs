//! What the two ends of a measurement say to each other: lines over TCP. Who asks shows that it knows the
//! token without saying it, since beside the overlay anybody may listen.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

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

    pub(super) fn say(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(value)?;
        text.push(b'\n');
        self.0.get_mut().write_all(&text)
    }

    pub(super) fn hear<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let mut text = String::new();
        (&mut self.0).take(LINE).read_line(&mut text)?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Asks for a measurement.
    pub(super) fn ask(&mut self, token: &str, work: Work) -> io::Result<()> {
        let challenge: String = self.hear()?;
        self.say(&Request { work, proof: BASE64.encode(sign(token, &challenge, work)?) })?;
        let answer: String = self.hear()?;
        match answer.as_str() {
            "ok" => Ok(()),
            other => Err(io::Error::new(io::ErrorKind::PermissionDenied, other.to_owned())),
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
