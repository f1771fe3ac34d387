//! A transfer over TCP in which the receiver checks every byte.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::pattern::{Pattern, WrongByte};
use super::progress::FlowProgress;
use crate::{Netns, Task};

/// A chunk of writing, in bytes.
const CHUNK: usize = 64 << 10;

/// How long both sides wait for the other before they give up.
const PATIENCE: Duration = Duration::from_secs(30);

/// A transfer under way.
pub struct Transfer {
    sender: Task<u64>,
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
        Self::start_with_progress(client, server, to, bytes, per_second, &Arc::default())
    }

    /// The same, told to `progress` as it goes on; ends early where the progress says so.
    pub fn start_with_progress(
        client: &Netns,
        server: &Netns,
        to: SocketAddr,
        bytes: u64,
        per_second: Option<u64>,
        progress: &Arc<FlowProgress>,
    ) -> Result<Self> {
        let seed = bytes ^ u64::from(to.port());
        let listener = server.run(|| bind(to))?.with_context(|| format!("binding {to}"))?;
        let (told, stops) = (progress.clone(), progress.clone());
        let receiver = server.spawn(move || receive(&listener, seed, &told));
        let sender = client.spawn(move || send(to, seed, bytes, per_second, &stops));
        Ok(Self { sender, receiver })
    }

    /// Whether the receiver has all, or has failed.
    pub fn is_finished(&self) -> bool {
        self.receiver.is_finished()
    }

    /// Waits for both sides; an error where a byte was lost, added or changed.
    pub fn join(self) -> Result<Received> {
        let sent = self.sender.join().context("sending");
        let received = self.receiver.join().context("receiving")?;
        let sent = sent?;
        ensure!(received.bytes == sent, "{} bytes came instead of {sent}", received.bytes);
        Ok(received)
    }
}

fn send(
    to: SocketAddr,
    seed: u64,
    bytes: u64,
    per_second: Option<u64>,
    progress: &FlowProgress,
) -> Result<u64> {
    let mut stream = connect(to).with_context(|| format!("connecting to {to}"))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut pattern = Pattern::new(seed);
    let mut chunk = vec![0; CHUNK];
    let start = Instant::now();
    let mut sent = 0;
    while sent < bytes && !progress.is_stopped() {
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
    Ok(sent)
}

/// Tries again where the address is taken: a process that is just being started by another thread has a copy
/// of the listener before for a moment, until its program begins.
pub fn bind(at: SocketAddr) -> std::io::Result<TcpListener> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match TcpListener::bind(at) {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
}

/// Tries again: there may be no way at the moment.
fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let end = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect_timeout(&to, Duration::from_secs(10)) {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(50)),
            done => return done,
        }
    }
}

fn receive(listener: &TcpListener, seed: u64, progress: &FlowProgress) -> Result<Received> {
    let mut stream = accept(listener, PATIENCE)?;
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
            bail!(WrongByte(got + at as u64));
        }
        got += n as u64;
        progress.add_received(n as u64);
    }
    stream.write_all(b"ok")?;
    Ok(Received { bytes: got, seconds: (last - start).as_secs_f64(), longest_pause })
}

/// The next connection within `limit`.
pub fn accept(listener: &TcpListener, limit: Duration) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let end = Instant::now() + limit;
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
