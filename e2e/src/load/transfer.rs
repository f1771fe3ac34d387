//! A transfer over TCP in which the receiver checks every byte.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::pattern::Pattern;
use crate::lab::{Netns, Task};

/// A chunk of writing, in bytes.
const CHUNK: usize = 64 << 10;

/// How long both sides wait for the other before they give up.
const PATIENCE: Duration = Duration::from_secs(30);

/// A transfer under way.
pub struct Transfer {
    sender: Task<()>,
    receiver: Task<Received>,
}

/// What the receiver got.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    /// Bytes, all of them right.
    pub bytes: u64,
    /// From the first byte to the last.
    pub seconds: f64,
    /// The longest time without a byte, in seconds.
    pub longest_pause: f64,
}

impl Transfer {
    /// Sends `bytes` bytes from `client` to `to` in `server`, at most `per_second` a second.
    pub fn start(
        client: &Netns,
        server: &Netns,
        to: SocketAddr,
        bytes: u64,
        per_second: Option<u64>,
    ) -> Result<Self> {
        let seed = bytes ^ u64::from(to.port());
        let listener = server.run(|| TcpListener::bind(to))?;
        let listener = listener.with_context(|| format!("binding {to}"))?;
        let receiver = server.spawn(move || receive(&listener, seed, bytes));
        let sender = client.spawn(move || send(to, seed, bytes, per_second));
        Ok(Self { sender, receiver })
    }

    /// Whether the receiver has all, or has failed.
    pub fn is_finished(&self) -> bool {
        self.receiver.is_finished()
    }

    /// Waits for both sides; an error where a byte was lost, added or changed.
    pub fn join(self) -> Result<Received> {
        let sent = self.sender.join().context("sending");
        let received = self.receiver.join().context("receiving");
        sent.and(received)
    }
}

fn send(to: SocketAddr, seed: u64, bytes: u64, per_second: Option<u64>) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))
        .with_context(|| format!("connecting to {to}"))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut pattern = Pattern::new(seed);
    let mut chunk = vec![0; CHUNK];
    let start = Instant::now();
    let mut sent = 0;
    while sent < bytes {
        let part = &mut chunk[..CHUNK.min((bytes - sent) as usize)];
        pattern.fill(part);
        stream.write_all(part).with_context(|| format!("after {sent} bytes"))?;
        sent += part.len() as u64;
        if let Some(rate) = per_second {
            let due = start + Duration::from_secs_f64(sent as f64 / rate as f64);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // The receiver's word that all is there, so that an early end is seen on this side too.
    let mut answer = [0; 2];
    stream.read_exact(&mut answer).context("waiting for the receiver's answer")?;
    if &answer != b"ok" {
        bail!("the receiver is not content");
    }
    Ok(())
}

fn receive(listener: &TcpListener, seed: u64, bytes: u64) -> Result<Received> {
    let mut stream = accept(listener)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut pattern = Pattern::new(seed);
    let mut buffer = vec![0; 4 * CHUNK];
    let mut got = 0;
    let start = Instant::now();
    let (mut last, mut longest_pause) = (start, 0.0_f64);
    loop {
        let n = stream.read(&mut buffer).with_context(|| format!("after {got} bytes"))?;
        if n == 0 {
            break;
        }
        longest_pause = longest_pause.max(last.elapsed().as_secs_f64());
        last = Instant::now();
        if let Some(at) = pattern.mismatch(&buffer[..n]) {
            bail!("byte {} is wrong", got + at as u64);
        }
        got += n as u64;
    }
    if got != bytes {
        bail!("{got} bytes came instead of {bytes}");
    }
    stream.write_all(b"ok")?;
    Ok(Received { bytes, seconds: (last - start).as_secs_f64(), longest_pause })
}

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let end = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if Instant::now() > end {
                    bail!("nobody connected");
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
