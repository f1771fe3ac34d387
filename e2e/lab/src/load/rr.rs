//! Round trips over one TCP connection: requests and responses of one byte, one at a time.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::{Latency, retry_bind};
use crate::Netns;

/// Result of a measurement.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Number of round trips, without the first tenth of the duration.
    pub count: usize,
    /// Duration of a round trip.
    pub latency: Latency,
}

/// Measures round trips between two namespaces for `duration`. `to` is an address of the server's
/// namespace.
///
/// # Errors
/// If the connection cannot be opened or fails, if a wrong byte comes back, or if no round trip was
/// measured.
pub fn run(client: &Netns, server: &Netns, to: SocketAddr, duration: Duration) -> Result<Outcome> {
    let listener = server
        .run(|| retry_bind(|| TcpListener::bind(to)))?
        .with_context(|| format!("bind {to}"))?;
    let echo = server.spawn(move || {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut byte = [0];
        while stream.read(&mut byte)? == 1 {
            stream.write_all(&byte)?;
        }
        Ok(())
    });
    let result = client.run(|| exchange(to, duration))?;
    if result.is_ok() {
        echo.join()?;
    }
    result
}

fn exchange(to: SocketAddr, duration: Duration) -> Result<Outcome> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(30))
        .with_context(|| format!("connecting to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut samples = Vec::with_capacity(1 << 18);
    let start = Instant::now();
    // The first tenth of the duration fills caches and is not counted.
    let warm = start + duration / 10;
    loop {
        let before = Instant::now();
        if before - start > duration {
            break;
        }
        let sent = [samples.len() as u8];
        stream.write_all(&sent)?;
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        if answer != sent {
            bail!("a wrong byte came back");
        }
        if before > warm {
            samples.push(before.elapsed().as_nanos() as u64);
        }
    }
    let latency = Latency::of_nanos(&mut samples).context("no round trip")?;
    Ok(Outcome { count: samples.len(), latency })
}
