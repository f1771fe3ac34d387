//! What the status socket and the HTTP server know of the control process.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use skein_ipc::{Report, Request};
use skein_netlink::firewall::Firewall;
use thiserror::Error;
use tokio::sync::watch;

use super::client::{Client, ClientError};
use super::kubernetes;
use super::supervisor::DataplaneState;
use crate::cni;
use crate::config::Config;
use crate::lifecycle::Readiness;
use crate::logging;
use crate::status::{Document, InterfaceStatus, RegistryStatus, RotationStatus};

/// How long a scrape or a status waits for the data process.
const REPORT_DEADLINE: Duration = Duration::from_secs(1);
/// How old a report may be for a scrape.
const RECENT: Duration = Duration::from_secs(1);

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shared {
    /// The configuration.
    pub config: Arc<Config>,
    /// Whether the agent is ready.
    pub readiness: Readiness,
    /// The data process.
    pub dataplane: DataplaneState,
    key: Arc<watch::Sender<RotationStatus>>,
    view: Arc<Mutex<View>>,
    last_report: Arc<tokio::sync::Mutex<LastReport>>,
    pods: Arc<OnceLock<cni::View>>,
    firewall: Arc<OnceLock<Firewall>>,
    requests: Arc<OnceLock<kubernetes::Requests>>,
}

/// When the data process was last asked for those who scrape, and its answer.
type LastReport = Option<(Instant, Option<Report>)>;

#[derive(Debug, Default)]
struct View {
    registry: RegistryStatus,
    interface: InterfaceStatus,
}

/// Failure to set the log level.
#[derive(Debug, Error)]
pub enum LogLevelError {
    /// The level is not a level or a filter, or the process has no log.
    #[error("{0}")]
    Agent(String),
    /// This process has the level, the data process does not.
    #[error("set for the agent alone: {0}")]
    DataProcess(#[from] ClientError),
}

impl Shared {
    /// For a control process that has just started.
    pub fn new(config: Config, key: RotationStatus) -> Self {
        Self {
            config: Arc::new(config),
            key: Arc::new(watch::Sender::new(key)),
            readiness: Readiness::default(),
            dataplane: DataplaneState::default(),
            view: Arc::default(),
            last_report: Arc::default(),
            pods: Arc::default(),
            firewall: Arc::default(),
            requests: Arc::default(),
        }
    }

    /// Notes the state of this node's key.
    pub fn set_key(&self, key: RotationStatus) {
        self.key.send_if_modified(|known| {
            let changed = known.keys != key.keys;
            *known = key;
            changed
        });
    }

    /// The state of this node's key.
    pub fn key(&self) -> RotationStatus {
        self.key.borrow().clone()
    }

    /// The same, for whoever waits for other keys.
    pub fn follow_key(&self) -> watch::Receiver<RotationStatus> {
        self.key.subscribe()
    }

    /// Notes the state of the registry.
    pub fn set_registry(&self, registry: RegistryStatus) {
        self.lock().registry = registry;
    }

    /// Notes what the interface is to be.
    pub fn set_interface(&self, interface: InterfaceStatus) {
        self.lock().interface = interface;
    }

    /// Notes that pods are served.
    pub fn set_pods(&self, pods: cni::View) {
        // Set once, by the one control process.
        let _ = self.pods.set(pods);
    }

    /// Stores the firewall's handle.
    pub fn set_firewall(&self, firewall: Firewall) {
        // As above.
        let _ = self.firewall.set(firewall);
    }

    /// Handle of the firewall; `None` until it was started.
    pub fn firewall(&self) -> Option<&Firewall> {
        self.firewall.get()
    }

    /// Notes what counts the requests to the API server.
    pub fn set_requests(&self, requests: kubernetes::Requests) {
        // As above.
        let _ = self.requests.set(requests);
    }

    /// Requests to the API server, where there is one.
    pub fn requests(&self) -> Option<&kubernetes::Requests> {
        self.requests.get()
    }

    /// Pods, where they are served.
    pub fn pods(&self) -> Option<&cni::View> {
        self.pods.get()
    }

    /// What the interface is to be.
    pub fn interface(&self) -> InterfaceStatus {
        self.lock().interface.clone()
    }

    /// The state of the registry.
    pub fn registry(&self) -> RegistryStatus {
        self.lock().registry.clone()
    }

    /// Sets the log level of this process and of the data process; `None` restores the configured one.
    ///
    /// # Errors
    /// [`LogLevelError`] if the level is invalid, or if only this process has it.
    pub async fn set_log_level(&self, level: Option<&str>) -> Result<(), LogLevelError> {
        logging::set_level(level).map_err(LogLevelError::Agent)?;
        let request = Request::LogLevel { level: level.map(str::to_owned) };
        let ask = async {
            Client::connect(&self.config.dataplane.socket).await?.request(&request).await.map(drop)
        };
        Ok(ask.await?)
    }

    /// Asks the data process, over a connection of its own so that nobody waits for anybody.
    pub async fn report(&self) -> Result<Report, ClientError> {
        let ask =
            async { Client::connect(&self.config.dataplane.socket).await?.report(true).await };
        tokio::time::timeout(REPORT_DEADLINE, ask).await.unwrap_or(Err(ClientError::Timeout))
    }

    /// What the data process said within the last second, or says now. However many ask at once, it
    /// is asked once.
    pub async fn recent_report(&self) -> Option<Report> {
        let shared = self.clone();
        // A task of its own: a client that goes away would take back a question that others wait
        // for, and many such clients would have the data process asked over and over.
        tokio::spawn(async move { shared.ask_or_recall().await }).await.ok().flatten()
    }

    async fn ask_or_recall(&self) -> Option<Report> {
        let mut last = self.last_report.lock().await;
        match &*last {
            Some((at, report)) if at.elapsed() < RECENT => report.clone(),
            _ => {
                let report = self.report().await.ok();
                *last = Some((Instant::now(), report.clone()));
                report
            }
        }
    }

    /// The status.
    pub async fn document(&self) -> Document {
        let report = self.report().await.ok();
        let reasons = self.readiness.reasons();
        let key = self.key();
        let view = self.lock();
        Document {
            node: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            public_key: key.keys.first,
            key,
            ready: reasons.is_empty(),
            reasons,
            notes: self.config.notes.clone(),
            interface: view.interface.clone(),
            records: view.registry.clone(),
            firewall: self.firewall().map(Firewall::status).unwrap_or_default(),
            dataplane: self.dataplane.get(),
            report,
            cni: self.pods().map(cni::View::offer),
            config: serde_json::to_value(&*self.config).unwrap_or_default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, View> {
        // Nothing under the lock can panic half way.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use skein_ipc::keys::PublicKey;
    use skein_ipc::{PROTOCOL_VERSION, Response, read_frame, write_frame};

    /// A data process that counts the reports it is asked for, and takes a while for each.
    fn fake() -> (tempfile::TempDir, Shared, Arc<AtomicUsize>) {
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
                    // Whoever asked may have gone.
                    let _ = write_frame(&mut stream, &answer);
                }
            }
        });
        let config = format!("name = 'node-a'\n[dataplane]\nsocket = {socket:?}");
        let shared =
            Shared::new(Config::parse(&config).unwrap(), RotationStatus::of(PublicKey([1; 32])));
        (directory, shared, reports)
    }

    #[tokio::test]
    async fn those_who_ask_together_share_one_report() {
        let (_directory, shared, reports) = fake();
        let ask = || {
            let shared = shared.clone();
            tokio::spawn(async move { shared.recent_report().await.is_some() })
        };
        for asked in (0..20).map(|_| ask()).collect::<Vec<_>>() {
            assert!(asked.await.unwrap());
        }
        assert_eq!(reports.load(Ordering::Relaxed), 1);
        tokio::time::sleep(RECENT + Duration::from_millis(100)).await;
        assert!(ask().await.unwrap());
        assert_eq!(reports.load(Ordering::Relaxed), 2, "an old report is not given out");
    }

    #[tokio::test]
    async fn clients_that_go_away_do_not_have_it_asked_again() {
        let (_directory, shared, reports) = fake();
        for _ in 0..5 {
            let patience = Duration::from_millis(20);
            assert!(tokio::time::timeout(patience, shared.recent_report()).await.is_err());
        }
        assert!(shared.recent_report().await.is_some());
        assert_eq!(reports.load(Ordering::Relaxed), 1);
    }
}
