//! Connections of the HTTP listeners: limits in number and time, so that a client that holds or
//! repeats connections cannot block other clients.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use skein_ipc::log_limit::LogLimit;
use tokio::sync::Semaphore;

use crate::connection::serve_request;
use crate::listener::ACCEPT_RETRY_DELAY;

/// Limits of one listener.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionLimits {
    /// Maximum number of open connections. Further connections wait in the listener's queue.
    pub(crate) connections: usize,
    /// Maximum number of open connections from one address. Further connections are closed.
    pub(crate) per_source: usize,
    /// Timeout of the whole request header.
    pub(crate) header_timeout: Duration,
    /// Timeout of the request and its answer.
    pub(crate) timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 64,
            // A browser opens 6 connections for the status page.
            per_source: 8,
            header_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(10),
        }
    }
}

/// Number of open connections by client address.
#[derive(Debug, Clone, Default)]
struct Sources(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// Connection of one client address that is counted until this value is dropped.
#[derive(Debug)]
struct SourcePermit {
    sources: Sources,
    address: IpAddr,
}

impl Sources {
    /// Counts a connection from `address`, unless `limit` connections from there are open.
    fn try_acquire(&self, address: IpAddr, limit: usize) -> Option<SourcePermit> {
        let mut open = self.lock();
        let count = open.entry(address).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        drop(open);
        Some(SourcePermit { sources: self.clone(), address })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // No code that holds the lock can leave the map inconsistent, so a poisoned lock is valid.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SourcePermit {
    fn drop(&mut self) {
        let mut open = self.sources.lock();
        if let Some(count) = open.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.address);
            }
        }
    }
}

/// Serves one request per connection until the task is aborted.
pub(crate) async fn accept(
    listener: tokio::net::TcpListener,
    router: Router,
    limits: ConnectionLimits,
) {
    let permits = Arc::new(Semaphore::new(limits.connections));
    let sources = Sources::default();
    let (mut failed, mut refused) = (LogLimit::default(), LogLimit::default());
    loop {
        // The call fails only if the semaphore is closed, which no code does.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                if let Some(suppressed) = failed.count(Instant::now()) {
                    tracing::warn!(%error, suppressed, "cannot accept an HTTP connection");
                }
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                continue;
            }
        };
        // A dual-stack listener reports IPv4 clients with IPv4-mapped addresses.
        let source = client.ip().to_canonical();
        let Some(source_permit) = sources.try_acquire(source, limits.per_source) else {
            if let Some(suppressed) = refused.count(Instant::now()) {
                let open = limits.per_source;
                tracing::warn!(%source, open, suppressed, "HTTP connection refused: too many from one address");
            }
            continue;
        };
        let router = router.clone();
        tokio::spawn(async move {
            let _permits = (permit, source_permit);
            serve_request(stream, router, limits.header_timeout, limits.timeout, false).await;
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpSocket, TcpStream};

    use super::super::tests::{get, server};
    use super::*;

    /// Connects from another address of the loopback interface.
    async fn connect_from(source: [u8; 4], to: SocketAddr) -> std::io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((source, 0).into())?;
        socket.connect(to).await
    }

    /// Writes a part of a request, and waits until the server closes the connection.
    async fn hold(source: [u8; 4], to: SocketAddr) -> std::io::Result<()> {
        let mut stream = connect_from(source, to).await?;
        stream.write_all(b"GET /hea").await?;
        stream.read_to_end(&mut Vec::new()).await.map(drop)
    }

    #[tokio::test]
    async fn unfinished_header_ends_after_header_timeout() {
        let address = server(ConnectionLimits::default()).await;
        for first in [&b""[..], b"GET /hea", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"] {
            let start = Instant::now();
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(first).await.unwrap();
            let mut rest = Vec::new();
            let end = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut rest));
            // Closed, or reset with unread bytes.
            let _ = end.await.expect("the server must close the connection");
            let took = start.elapsed();
            assert!(took > Duration::from_millis(900), "closed too early, after {took:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn reconnecting_clients_do_not_block_other_sources() {
        let address = server(ConnectionLimits::default()).await;
        let ended = Arc::new(AtomicBool::new(false));
        let held = Arc::new(AtomicUsize::new(0));
        let attackers: Vec<_> = (0..400)
            .map(|_| {
                let (ended, held) = (Arc::clone(&ended), Arc::clone(&held));
                tokio::spawn(async move {
                    while !ended.load(Ordering::Relaxed) {
                        let _ = hold([127, 0, 0, 2], address).await;
                        held.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(500)).await;
        for _ in 0..6 {
            // Generous compared with the chart's liveness probe, because the test machine may be
            // slow.
            let answer = tokio::time::timeout(Duration::from_secs(30), get(address, "/healthz"));
            let answer = answer.await.expect("another source must be answered");
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        ended.store(true, Ordering::Relaxed);
        for attacker in attackers {
            attacker.await.unwrap();
        }
        let held = held.load(Ordering::Relaxed);
        assert!(held > 800, "the attackers must have come back, {held} connections");
    }

    #[tokio::test]
    async fn connections_over_the_source_limit_are_closed() {
        let limits = ConnectionLimits { per_source: 2, ..ConnectionLimits::default() };
        let address = server(limits).await;
        let mut first = connect_from([127, 0, 0, 2], address).await.unwrap();
        let _second = connect_from([127, 0, 0, 2], address).await.unwrap();
        let mut third = connect_from([127, 0, 0, 2], address).await.unwrap();
        let end = tokio::time::timeout(Duration::from_secs(30), third.read_u8()).await;
        assert!(end.expect("the third connection must be closed at once").is_err());
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        first.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        first.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "the first connection is served: {answer}");
        let mut next = connect_from([127, 0, 0, 2], address).await.unwrap();
        let end = tokio::time::timeout(Duration::from_millis(300), next.read_u8()).await;
        assert!(end.is_err(), "a connection that ends makes room for another one");
    }
}
