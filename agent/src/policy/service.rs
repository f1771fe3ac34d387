//! The policy service: a thread that owns the engine and the kernel's table.
//!
//! The thread applies events of the source and requests of the CNI service, and commits each change
//! to the kernel. A change after a pause is committed at once; changes under load are collected for
//! up to [`owner::COLLECT_INTERVAL`]. Requests of the CNI service are never delayed.

mod owner;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use skein_policy::compile::Families;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::time::Instant;

use self::owner::Owner;
use super::attachments::{Attachment, Attachments};
use super::metrics::{Commits, PolicyMetrics, PolicyPackets};
use super::objects::Objects;
use super::source::{Needs, PolicySink, ServiceEnded};
use super::status::PolicyStatus;
use super::store::Store;
use super::table::Table;
use crate::config::PolicyMode;
use crate::lifecycle::Readiness;
use crate::watched_value::send_if_changed;

/// Number of queued events or requests beyond which their senders wait.
const QUEUE_LENGTH: usize = 1024;
/// Maximum age of packets that are served to another scrape.
const PACKETS_MAX_AGE: Duration = Duration::from_secs(1);

/// Request to the thread.
#[derive(Debug)]
enum Request {
    /// A new pod.
    Attach(Attachment, oneshot::Sender<Result<Attached, CommitError>>),
    /// A pod whose link is gone.
    Detach(String, oneshot::Sender<Result<(), CommitError>>),
    /// The pods of this node at the start of the agent.
    Attachments(Vec<Attachment>),
    /// A request for the packets of the policies; `None` if the counters cannot be read.
    Packets(oneshot::Sender<Option<Vec<PolicyPackets>>>),
    /// A request for a view of the state.
    Inspect(Inspection),
}

/// Work with a view of the thread's state.
struct Inspection(Box<Inspect>);

/// Function that reads the thread's state.
type Inspect = dyn FnOnce(&Objects, &Attachments) + Send;

impl std::fmt::Debug for Inspection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Inspection")
    }
}

/// Outcome of an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// The policies of the pod are enforced.
    Enforced,
    /// The pod is not known. All its forwarded traffic is refused until the pod is known.
    Quarantined,
}

/// The kernel refused a change of its table, or the service has ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("network policies of the pod not enforced: {0}")]
pub struct CommitError(String);

/// Pod CIDRs of the cluster, and addresses in them that are not pods'.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodNetworks {
    /// Pod CIDRs of all nodes.
    pub networks: Vec<IpNet>,
    /// Overlay addresses of nodes.
    pub excluded: Vec<IpAddr>,
}

/// Settings of the service.
#[derive(Debug)]
pub(super) struct Settings {
    /// Effect of the policies.
    pub(super) mode: PolicyMode,
    /// True if the objects come from files.
    pub(super) is_static: bool,
    /// Storage of the objects.
    pub(super) store: Store,
    /// Readiness of the agent.
    pub(super) readiness: Readiness,
}

/// Handle of the policy service. Clones share the thread, which ends with the last handle and sink.
#[derive(Debug, Clone)]
pub struct PolicyService {
    requests: mpsc::Sender<Request>,
    sink: PolicySink,
    networks: Arc<watch::Sender<PodNetworks>>,
    state: watch::Receiver<State>,
    commits: Commits,
    /// Last packets, with the time of their reading.
    packets: Arc<Mutex<Option<LastPackets>>>,
}

/// Time of the last reading of the packets, and its result.
type LastPackets = (Instant, Option<Vec<PolicyPackets>>);

/// State of the thread, for the status.
#[derive(Debug, Clone, Default)]
struct State {
    status: PolicyStatus,
    last_commit: Option<Instant>,
}

impl PolicyService {
    /// Starts the thread.
    ///
    /// # Errors
    /// An I/O error if the thread or its runtime cannot be created.
    pub(super) fn start<T: Table>(settings: Settings, table: T) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (events_sender, events) = mpsc::channel(QUEUE_LENGTH);
        let (requests_sender, requests) = mpsc::channel(QUEUE_LENGTH);
        let (needs_sender, needs) = watch::channel(Needs::default());
        let (networks, networks_receiver) = watch::channel(PodNetworks::default());
        let (state_sender, state) = watch::channel(State::default());
        let mut objects = Objects::new(Families::BOTH);
        let commits = Commits::new().map_err(io::Error::other)?;
        let store = settings.store;
        store.restore(&mut objects);
        if !settings.is_static {
            objects.await_scopes();
        }
        let attachments = Attachments::new(settings.is_static);
        let owner = Owner {
            mode: settings.mode,
            table,
            objects,
            attachments,
            store,
            events,
            requests,
            networks: networks_receiver,
            needs: needs_sender,
            state: state_sender,
            are_attachments_known: false,
            is_installed: false,
            is_sweep_due: false,
            error: None,
            retry_at: None,
            not_ready: Some(settings.readiness.block("network policies are not enforced yet")),
            readiness: settings.readiness,
            last_commit: None,
            revision: 0,
            needed_scopes: BTreeSet::new(),
            are_needs_stale: true,
            commits: commits.clone(),
            waiting: Vec::new(),
            detached: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("policy".to_owned());
        thread.spawn(move || runtime.block_on(owner.run()))?;
        let sink = PolicySink { events: events_sender, needs };
        Ok(Self {
            requests: requests_sender,
            sink,
            networks: Arc::new(networks),
            state,
            commits,
            packets: Arc::default(),
        })
    }

    /// Returns the sender of the source's events.
    pub fn sink(&self) -> PolicySink {
        self.sink.clone()
    }

    /// Sets the pod CIDRs of the cluster.
    pub fn set_networks(&self, networks: PodNetworks) {
        send_if_changed(&self.networks, networks);
    }

    /// Adds the pods that this node has at the start of the agent. The table is installed after
    /// this call.
    pub async fn set_attachments(&self, attachments: Vec<Attachment>) {
        // A service that has ended is reported by the next ADD.
        let _ = self.requests.send(Request::Attachments(attachments)).await;
    }

    /// Enforces the policies of a pod whose link does not exist yet. Waits for the pod's object, up
    /// to [`owner::POD_TIMEOUT`], if a policy can apply to the pod.
    ///
    /// # Errors
    /// [`CommitError`] if the kernel refuses the change. The caller then attaches no link, and
    /// calls [`PolicyService::detach`].
    pub async fn attach(&self, attachment: Attachment) -> Result<Attached, CommitError> {
        self.request(|answer| Request::Attach(attachment, answer)).await
    }

    /// Removes the interface of a pod whose link is gone.
    ///
    /// # Errors
    /// [`CommitError`] if the kernel refuses the change, which is repeated.
    pub async fn detach(&self, interface: &str) -> Result<(), CommitError> {
        self.request(|answer| Request::Detach(interface.to_owned(), answer)).await
    }

    /// Runs `work` on a view of the service's state and returns its result.
    ///
    /// # Errors
    /// [`ServiceEnded`] if the service has ended.
    pub(super) async fn inspect<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Objects, &Attachments) -> T + Send + 'static,
    ) -> Result<T, ServiceEnded> {
        let (answer, answered) = oneshot::channel();
        let work = move |objects: &Objects, attachments: &Attachments| {
            // The requester may have gone.
            let _ = answer.send(work(objects, attachments));
        };
        let request = Request::Inspect(Inspection(Box::new(work)));
        self.requests.send(request).await.map_err(|_| ServiceEnded)?;
        answered.await.map_err(|_| ServiceEnded)
    }

    /// Returns the state of the service.
    pub fn status(&self) -> PolicyStatus {
        let State { status, last_commit } = self.state.borrow().clone();
        let age = last_commit.map(|at| at.elapsed().as_secs_f64());
        PolicyStatus { last_commit_age_seconds: age, ..status }
    }

    /// Returns the values for a scrape. The kernel's counters are read at most once per second.
    pub async fn metrics(&self) -> PolicyMetrics {
        let mut last = self.packets.lock().await;
        let packets = match &*last {
            Some((at, packets)) if at.elapsed() < PACKETS_MAX_AGE => packets.clone(),
            _ => {
                let (answer, answered) = oneshot::channel();
                // A service that has ended has no packets.
                let _ = self.requests.send(Request::Packets(answer)).await;
                let packets = answered.await.unwrap_or_default();
                *last = Some((Instant::now(), packets.clone()));
                packets
            }
        };
        PolicyMetrics { status: self.status(), commits: self.commits.families(), packets }
    }

    async fn request<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, CommitError>>) -> Request,
    ) -> Result<T, CommitError> {
        let ended = || CommitError(ServiceEnded.to_string());
        let (answer, answered) = oneshot::channel();
        self.requests.send(request(answer)).await.map_err(|_| ended())?;
        answered.await.unwrap_or_else(|_| Err(ended()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
