//! A transfer over TCP in which the receiver checks every byte.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::pattern::{Pattern, WrongByte};
use super::progress::FlowProgress;
use super::retry_bind;
use crate::{Netns, Task};

/// Size of one write, bytes.
const CHUNK: usize = 64 << 10;

/// Maximum time that a side waits for the other: for the connection, and for each read or write.
const IO_TIMEOUT: Duration = Duration::from_secs(30);

/// A running transfer: a sender and a receiver, each on its own thread.
pub struct Transfer {
    sender: Task<u64>,
    receiver: Task<Received>,
}

/// Result of a transfer.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    /// Number of received bytes; all are right.
    pub bytes: u64,
    /// Time from the accepted connection to the last byte, seconds.
    pub seconds: f64,
    /// Longest time without a received byte, seconds.
    pub longest_pause: f64,
}

impl Transfer {
    /// Starts to send `bytes` bytes from the namespace `client` to the address `to` of the
    /// namespace `server`, at most `per_second` bytes per second.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub fn start(
        client: &Netns,
        server: &Netns,
        to: SocketAddr,
        bytes: u64,
        per_second: Option<u64>,
    ) -> Result<Self> {
        Self::start_with_progress(client, server, to, bytes, per_second, &Arc::default())
    }

    /// Starts a transfer as [`Transfer::start`] does. Received bytes are added to `progress`;
    /// [`FlowProgress::stop`] ends the transfer early.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub fn start_with_progress(
        client: &Netns,
        server: &Netns,
        to: SocketAddr,
        bytes: u64,
        per_second: Option<u64>,
        progress: &Arc<FlowProgress>,
    ) -> Result<Self> {
        let seed = bytes ^ u64::from(to.port());
        let listener = server
            .run(|| retry_bind(|| TcpListener::bind(to)))?
            .with_context(|| format!("binding {to}"))?;
        let (receives, sends) = (progress.clone(), progress.clone());
        let receiver = server.spawn(move || receive(&listener, seed, &receives));
        let sender = client.spawn(move || send(to, seed, bytes, per_second, &sends));
        Ok(Self { sender, receiver })
    }

    /// Returns whether the receiver has received everything or has failed.
    pub fn is_finished(&self) -> bool {
        self.receiver.is_finished()
    }

    /// Waits until both sides end.
    ///
    /// # Errors
    /// If a byte was lost, added or changed, or if a side failed or waited for more than 30 s.
    pub fn join(self) -> Result<Received> {
        let sent = self.sender.join().context("sending");
        let received = self.receiver.join().context("receiving")?;
        let sent = sent?;
        ensure!(received.bytes == sent, "{} bytes received, {sent} sent", received.bytes);
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
    stream.set_write_timeout(Some(IO_TIMEOUT))?;
    stream.set_read_timeout(Some(IO_TIMEOUT))?;
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
    // The receiver confirms the transfer, so that the sender also notices an early end.
    let mut answer = [0; 2];
    stream.read_exact(&mut answer).context("waiting for the receiver's answer")?;
    if &answer != b"ok" {
        bail!("the receiver did not confirm the transfer");
    }
    Ok(sent)
}

/// Connects. Tries again for 30 s, because the path may be interrupted.
fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let end = Instant::now() + IO_TIMEOUT;
    loop {
        match TcpStream::connect_timeout(&to, Duration::from_secs(10)) {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(50)),
            done => return done,
        }
    }
}

fn receive(listener: &TcpListener, seed: u64, progress: &FlowProgress) -> Result<Received> {
    let mut stream = accept(listener, IO_TIMEOUT)?;
    stream.set_read_timeout(Some(IO_TIMEOUT))?;
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

/// Accepts the next connection and sets the listener to nonblocking mode.
///
/// # Errors
/// If no connection arrives within `limit`.
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
                    bail!("no connection arrived within {} s", limit.as_secs_f64());
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
