//! Reports of the data process, for readers outside the supervisor.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use skein_ipc::Report;

use super::client::{Client, ClientError};

/// Maximum time that a scrape or a status waits for the data process.
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum age of a report for a scrape.
const MAX_AGE: Duration = Duration::from_secs(1);

/// Client for reports of the data process. Clones share the last report.
#[derive(Debug, Clone)]
pub struct Reports {
    socket: PathBuf,
    last: Arc<tokio::sync::Mutex<LastReport>>,
}

/// Time of the last request by [`Reports::recent`], and its answer.
type LastReport = Option<(Instant, Option<Report>)>;

impl Reports {
    /// Returns a client of the data process that listens on `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, last: Arc::default() }
    }

    /// Requests a report over a connection of its own, so that no caller waits for another one.
    ///
    /// # Errors
    /// [`ClientError`] if the data process is absent, refuses, or does not answer within a second.
    pub async fn request(&self) -> Result<Report, ClientError> {
        let report = async { Client::connect(&self.socket).await?.report(true).await };
        tokio::time::timeout(REPORT_TIMEOUT, report).await.unwrap_or(Err(ClientError::Timeout))
    }

    /// Returns a report that is at most a second old; `None` if the data process gave none.
    /// Requests at the same time share one report.
    pub async fn recent(&self) -> Option<Report> {
        let reports = self.clone();
        // The request runs in a task of its own. Otherwise a client that disconnects would cancel a
        // request that others wait for, and many such clients would cause a request each.
        tokio::spawn(async move { reports.request_or_reuse().await }).await.ok().flatten()
    }

    async fn request_or_reuse(&self) -> Option<Report> {
        let mut last = self.last.lock().await;
        match &*last {
            Some((at, report)) if at.elapsed() < MAX_AGE => report.clone(),
            _ => {
                let report = self.request().await.ok();
                *last = Some((Instant::now(), report.clone()));
                report
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use skein_ipc::{PROTOCOL_VERSION, Request, Response, read_frame, write_frame};

    /// Starts a fake data process that counts report requests and answers each after a delay.
    fn fake() -> (tempfile::TempDir, Reports, Arc<AtomicUsize>) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let reports = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&reports);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                while let Ok(Some(request)) = read_frame::<Request>(&mut stream) {
                    let answer = match request {
                        Request::Report { .. } => {
                            count.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(Duration::from_millis(300));
                            Response::Report { report: Box::default() }
                        }
                        _ => Response::Hello {
                            version: PROTOCOL_VERSION,
                            pid: 1,
                            node: None,
                            accepts_seen_handshakes: false,
                        },
                    };
                    // The client may have disconnected.
                    let _ = write_frame(&mut stream, &answer);
                }
            }
        });
        (directory, Reports::new(socket), reports)
    }

    #[tokio::test]
    async fn simultaneous_requests_share_one_report() {
        let (_directory, client, reports) = fake();
        let ask = || {
            let client = client.clone();
            tokio::spawn(async move { client.recent().await.is_some() })
        };
        for asked in (0..20).map(|_| ask()).collect::<Vec<_>>() {
            assert!(asked.await.unwrap());
        }
        assert_eq!(reports.load(Ordering::Relaxed), 1);
        tokio::time::sleep(MAX_AGE + Duration::from_millis(100)).await;
        assert!(ask().await.unwrap());
        assert_eq!(
            reports.load(Ordering::Relaxed),
            2,
            "a report older than a second is not returned"
        );
    }

    #[tokio::test]
    async fn disconnected_clients_cause_no_further_request() {
        let (_directory, client, reports) = fake();
        for _ in 0..5 {
            let patience = Duration::from_millis(20);
            assert!(tokio::time::timeout(patience, client.recent()).await.is_err());
        }
        assert!(client.recent().await.is_some());
        assert_eq!(reports.load(Ordering::Relaxed), 1);
    }
}
