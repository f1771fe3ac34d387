//! The policy service: a thread that owns the engine and the kernel's table.
//!
//! The thread applies events of the source and requests of the CNI service, and commits each change
//! to the kernel. A change after a pause is committed at once; changes under load are collected for
//! up to [`COLLECT_INTERVAL`]. Requests of the CNI service are never delayed.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use skein_policy::compile::Families;
use skein_policy::enforce::Event;
use skein_policy::model::PodId;
use skein_policy::program::SetKey;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::time::Instant;

use super::attachments::{Attachment, Attachments};
use super::metrics::{self, Commits, PolicyMetrics, PolicyPackets};
use super::objects::Objects;
use super::source::{Needs, PodScope, PolicyEvent, PolicySink, ServiceEnded};
use super::status::PolicyStatus;
use super::store::Store;
use super::table::Table;
use crate::config::PolicyMode;
use crate::lifecycle::{NotReady, Readiness};

/// Minimum interval between two commits under load.
const COLLECT_INTERVAL: Duration = Duration::from_millis(20);
/// Maximum number of inputs of one commit.
const MAX_BATCH: usize = 4096;
/// Number of queued events or requests beyond which their senders wait.
const QUEUE_LENGTH: usize = 1024;
/// Interval between attempts to write the kernel's table after an error.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum age of packets that are served to another scrape.
const PACKETS_MAX_AGE: Duration = Duration::from_secs(1);
/// Maximum time that an ADD waits for the object of its pod.
const POD_TIMEOUT: Duration = Duration::from_secs(2);

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
        self.networks.send_if_modified(|present| {
            let differs = *present != networks;
            *present = networks;
            differs
        });
    }

    /// Adds the pods that this node has at the start of the agent. The table is installed after
    /// this call.
    pub async fn set_attachments(&self, attachments: Vec<Attachment>) {
        // A service that has ended is reported by the next ADD.
        let _ = self.requests.send(Request::Attachments(attachments)).await;
    }

    /// Enforces the policies of a pod whose link does not exist yet. Waits up to [`POD_TIMEOUT`]
    /// for the pod's object if a policy can apply to the pod.
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

/// An ADD that waits for its commit, or for the object of its pod.
struct WaitingAdd {
    interface: String,
    /// Latest time of the answer.
    deadline: Instant,
    answer: oneshot::Sender<Result<Attached, CommitError>>,
}

/// Input of the thread.
enum Input {
    Event(PolicyEvent),
    Request(Request),
    /// The pod CIDRs have changed.
    Networks,
    /// An event of the kernel's table.
    Table(Event),
    Deadline,
}

/// State of the thread.
struct Owner<T> {
    mode: PolicyMode,
    table: T,
    objects: Objects,
    attachments: Attachments,
    store: Store,
    events: mpsc::Receiver<PolicyEvent>,
    requests: mpsc::Receiver<Request>,
    networks: watch::Receiver<PodNetworks>,
    needs: watch::Sender<Needs>,
    state: watch::Sender<State>,
    /// True after the CNI service has sent the pods of this node.
    are_attachments_known: bool,
    /// True if the kernel's table has the last program.
    is_installed: bool,
    /// True if open connections are to be compared with the policies after the next commit.
    is_sweep_due: bool,
    /// Error of the last commit.
    error: Option<String>,
    retry_at: Option<Instant>,
    /// Blocks readiness until policies that are known are enforced.
    not_ready: Option<NotReady>,
    readiness: Readiness,
    last_commit: Option<Instant>,
    revision: u64,
    /// Scopes of pods that the program refers to.
    needed_scopes: BTreeSet<PodScope>,
    /// True if the needs may differ from the published ones.
    are_needs_stale: bool,
    commits: Commits,
    waiting: Vec<WaitingAdd>,
    detached: Vec<oneshot::Sender<Result<(), CommitError>>>,
}

impl<T: Table> Owner<T> {
    async fn run(mut self) {
        self.publish();
        while self.collect().await {
            self.commit().await;
            self.sweep().await;
            self.answer();
            self.publish();
            self.store.save(&self.objects);
        }
        self.store.finish(&self.objects);
    }

    /// Applies the input of the next commit. Returns false if all handles were dropped.
    async fn collect(&mut self) -> bool {
        let mut is_urgent = false;
        let Some(mut input) = self.next(None).await else { return false };
        for number in 1.. {
            is_urgent |= self.take(input).await;
            // A received input must be applied, so that the bound is checked before the next one.
            if number == MAX_BATCH {
                break;
            }
            let earliest = self.last_commit.map(|at| at + COLLECT_INTERVAL);
            let until = earliest.filter(|_| !is_urgent).unwrap_or_else(Instant::now);
            match self.next(Some(until)).await {
                None => return false,
                Some(Input::Deadline) => break,
                Some(next) => input = next,
            }
        }
        true
    }

    /// Waits for an input until a deadline, by default the earliest one at which the thread has
    /// work. Inputs that are queued take precedence over the deadline. Returns `None` if all
    /// handles were dropped.
    async fn next(&mut self, until: Option<Instant>) -> Option<Input> {
        let adds = self.waiting.iter().map(|add| add.deadline);
        let own = || adds.chain(self.retry_at).chain(self.store.due()).min();
        let deadline = until.or_else(own);
        let deadline = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            request = self.requests.recv() => request.map(Input::Request),
            Some(event) = self.events.recv() => Some(Input::Event(event)),
            Ok(()) = self.networks.changed() => Some(Input::Networks),
            event = self.table.next_event(), if self.is_installed => Some(Input::Table(event)),
            () = deadline => Some(Input::Deadline),
        }
    }

    /// Applies an input to the model; returns whether its commit must not be delayed.
    async fn take(&mut self, input: Input) -> bool {
        let is_urgent = match input {
            Input::Event(event) => {
                self.store.mark_changed();
                self.objects.apply(event);
                false
            }
            Input::Networks => {
                let networks = self.networks.borrow_and_update().clone();
                self.objects.engine.set_pod_networks(&networks.networks, &networks.excluded);
                false
            }
            Input::Table(Event::Changed) => {
                self.is_installed = false;
                true
            }
            Input::Table(Event::SweepDue) => {
                self.is_sweep_due = true;
                false
            }
            Input::Deadline => true,
            Input::Request(request) => self.take_request(request).await,
        };
        let changed = self.objects.take_changed();
        self.are_needs_stale |= is_urgent || changed.policies || !changed.pods.is_empty();
        self.attachments.update(&changed, &mut self.objects);
        if let Some(demand) = self.objects.engine.take_demand() {
            self.needed_scopes = demand.into_iter().map(PodScope::from).collect();
            self.are_needs_stale = true;
        }
        if self.are_attachments_known && self.objects.complete {
            self.objects.end_stored(&self.needed_scopes);
        }
        is_urgent
    }

    async fn take_request(&mut self, request: Request) -> bool {
        match request {
            Request::Attach(attachment, answer) => {
                let interface = attachment.interface.clone();
                self.attachments.insert(attachment, &mut self.objects);
                let deadline = Instant::now() + POD_TIMEOUT;
                self.waiting.push(WaitingAdd { interface, deadline, answer });
            }
            Request::Detach(interface, answer) => {
                self.attachments.remove(&interface, &mut self.objects);
                self.detached.push(answer);
            }
            Request::Attachments(attachments) => self.set_attachments(attachments).await,
            Request::Packets(answer) => {
                let packets = self.packets().await;
                // The requester may have gone.
                let _ = answer.send(packets);
                return false;
            }
            Request::Inspect(Inspection(work)) => {
                work(&self.objects, &self.attachments);
                return false;
            }
        }
        true
    }

    async fn packets(&mut self) -> Option<Vec<PolicyPackets>> {
        if !self.is_installed {
            return None;
        }
        let counters = self.table.counters().await;
        let counters = counters
            .inspect_err(|error| tracing::debug!(error, "counters of network policies not read"))
            .ok()?;
        Some(metrics::packets(self.objects.engine.program(), &counters))
    }

    async fn set_attachments(&mut self, attachments: Vec<Attachment>) {
        if !self.are_attachments_known {
            // Without a table, the policies were not enforced until now.
            if !self.objects.restored && self.table.exists().await == Ok(false) {
                let interfaces = attachments.iter().map(|one| one.interface.clone());
                self.attachments.earlier = interfaces.collect();
            }
            self.are_attachments_known = true;
        }
        for attachment in attachments {
            self.attachments.insert(attachment, &mut self.objects);
        }
    }

    /// Writes the changes since the last commit to the kernel.
    async fn commit(&mut self) {
        if self.is_waiting_for_policies().await {
            self.retry_at = self.retry_at.map(|_| Instant::now() + RETRY_INTERVAL);
            return;
        }
        let difference = self.objects.engine.take_difference();
        if self.is_installed && difference.is_empty() {
            return;
        }
        // A request of the CNI service does not wait for the next attempt.
        let is_requested = !self.waiting.is_empty() || !self.detached.is_empty();
        if self.retry_at.is_some_and(|at| at > Instant::now()) && !is_requested {
            return;
        }
        let start = Instant::now();
        let result = match self.is_installed {
            true => self.table.apply(&difference).await,
            false => match self.table.install(self.objects.engine.program()).await {
                Ok(is_repaired) => {
                    if is_repaired && self.last_commit.is_some() {
                        tracing::warn!("table of the network policies was changed: restored");
                    }
                    Ok(())
                }
                Err(error) => Err(error),
            },
        };
        self.commits.count(result.is_ok(), start.elapsed());
        self.is_installed = result.is_ok();
        self.retry_at = result.is_err().then(|| Instant::now() + RETRY_INTERVAL);
        match result {
            Ok(()) => {
                self.revision += 1;
                self.last_commit = Some(Instant::now());
                if self.error.take().is_some() {
                    tracing::info!("network policies are enforced again");
                }
            }
            Err(error) => {
                if self.error.as_ref() != Some(&error) {
                    tracing::error!(error, "network policies not enforced");
                }
                self.error = Some(error);
            }
        }
    }

    /// Returns whether the table of an earlier agent must stay as it is, because neither stored nor
    /// complete objects are known. In that table, the interface of a new pod has no entry: its
    /// traffic is dropped.
    async fn is_waiting_for_policies(&mut self) -> bool {
        if !self.are_attachments_known {
            return true;
        }
        !self.is_installed
            && !self.objects.are_policies_known()
            && self.attachments.earlier.is_empty()
            && self.table.exists().await != Ok(false)
    }

    /// Compares open connections with the policies if this is due and the kernel's table has the
    /// engine's program.
    async fn sweep(&mut self) {
        if !self.is_sweep_due || !self.is_installed {
            return;
        }
        self.is_sweep_due = false;
        if let Err(error) = self.table.sweep(&self.objects.engine).await {
            tracing::warn!(error, "open connections not compared with the policies");
        }
    }

    /// Answers the requests that the last commit has completed.
    fn answer(&mut self) {
        let outcome = match &self.error {
            Some(error) => Err(CommitError(error.clone())),
            None => Ok(()),
        };
        for answer in self.detached.drain(..) {
            // The requester may have gone.
            let _ = answer.send(outcome.clone());
        }
        let now = Instant::now();
        for add in std::mem::take(&mut self.waiting) {
            // Without a table of this agent, the interface has no entry: its traffic is dropped.
            let is_unknown = !self.is_installed || self.attachments.is_unknown(&add.interface);
            let outcome = match (&outcome, is_unknown) {
                (Err(error), _) => Err(error.clone()),
                (Ok(()), true) if add.deadline > now => {
                    self.waiting.push(add);
                    continue;
                }
                (Ok(()), true) => {
                    let interface = &add.interface;
                    tracing::warn!(interface, "pod not known: its traffic is refused until it is");
                    Ok(Attached::Quarantined)
                }
                (Ok(()), false) => Ok(Attached::Enforced),
            };
            let _ = add.answer.send(outcome);
        }
    }

    fn publish(&mut self) {
        self.not_ready = match (&self.error, self.is_installed && self.objects.are_policies_known())
        {
            (None, true) => None,
            (error, _) => {
                let reasons = error.iter().chain(&self.objects.unavailable);
                let reasons: Vec<_> =
                    reasons.chain(self.objects.unreadable.values()).cloned().collect();
                let reason = match reasons.is_empty() {
                    true => "network policies are not enforced yet".to_owned(),
                    false => format!("network policies: {}", reasons.join("; ")),
                };
                match self.not_ready.take() {
                    Some(guard) => {
                        guard.because(reason);
                        Some(guard)
                    }
                    None => Some(self.readiness.block(reason)),
                }
            }
        };
        if std::mem::take(&mut self.are_needs_stale) {
            let needs = self.current_needs();
            self.needs.send_if_modified(|present| {
                let differs = *present != needs;
                *present = needs;
                differs
            });
        }
        let inventory = self.objects.engine.inventory();
        let program = self.objects.engine.program();
        let quarantined = self.attachments.unknown().map(|attachment| {
            let pod = attachment.pod.as_ref();
            let pod = pod
                .map_or("unknown pod".to_owned(), |pod| format!("{}/{}", pod.namespace, pod.name));
            format!("{}: {pod}", attachment.interface)
        });
        let unreadable =
            self.objects.unreadable.iter().map(|(part, error)| format!("{part}: {error}"));
        let defects = self.objects.defects.values().flatten().map(ToString::to_string);
        let errors = self.error.iter().chain(&self.objects.unavailable).chain(&self.store.error);
        let status = PolicyStatus {
            mode: self.mode,
            active: self.is_installed,
            revision: self.revision,
            last_commit_age_seconds: None,
            complete: self.objects.complete,
            source_up: self.objects.complete && self.objects.unavailable.is_none(),
            chains: program.chains.len(),
            sets: program.sets.len(),
            elements: program.elements.values().map(BTreeSet::len).sum(),
            unenforceable: self.objects.unreadable.len()
                + self.objects.defects.values().map(Vec::len).sum::<usize>(),
            policies: inventory.policies().count(),
            interfaces: self.attachments.interfaces().count(),
            quarantined: quarantined.collect(),
            errors: errors.cloned().chain(unreadable).chain(defects).collect(),
        };
        self.state.send_replace(State { status, last_commit: self.last_commit });
    }

    /// Returns the objects that the program refers to.
    fn current_needs(&self) -> Needs {
        let sets = self.objects.engine.program().sets.values();
        let nodes = sets.into_iter().any(|set| matches!(set.key, SetKey::Nodes(_)));
        let unknown = self.attachments.unknown().filter_map(|one| one.pod.as_ref());
        let unknown_pods = unknown
            .map(|pod| PodId { namespace: pod.namespace.clone(), name: pod.name.clone() })
            .collect();
        Needs { pods: self.needed_scopes.clone(), nodes, unknown_pods }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
