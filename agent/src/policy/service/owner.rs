//! The thread of the policy service.

use std::collections::BTreeSet;
use std::time::Duration;

use skein_policy::enforce::Event;
use skein_policy::model::PodId;
use skein_policy::program::SetKey;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::{Attached, CommitError, Inspection, PodNetworks, Request, State};
use crate::config::PolicyMode;
use crate::lifecycle::{NotReady, Readiness};
use crate::policy::attachments::{Attachment, Attachments};
use crate::policy::metrics::{self, Commits, PolicyPackets};
use crate::policy::objects::Objects;
use crate::policy::source::{Needs, PodScope, PolicyEvent};
use crate::policy::status::PolicyStatus;
use crate::policy::store::Store;
use crate::policy::table::Table;
use crate::watched_value::send_if_changed;

/// Minimum interval between two commits under load.
pub(super) const COLLECT_INTERVAL: Duration = Duration::from_millis(20);
/// Maximum number of inputs of one commit.
pub(super) const MAX_BATCH: usize = 4096;
/// Interval between attempts to write the kernel's table after an error.
pub(super) const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time that an ADD waits for the object of its pod.
pub(super) const POD_TIMEOUT: Duration = Duration::from_secs(2);

/// An ADD that waits for its commit, or for the object of its pod.
pub(super) struct WaitingAdd {
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
pub(super) struct Owner<T> {
    pub(super) mode: PolicyMode,
    pub(super) table: T,
    pub(super) objects: Objects,
    pub(super) attachments: Attachments,
    pub(super) store: Store,
    pub(super) events: mpsc::Receiver<PolicyEvent>,
    pub(super) requests: mpsc::Receiver<Request>,
    pub(super) networks: watch::Receiver<PodNetworks>,
    pub(super) needs: watch::Sender<Needs>,
    pub(super) state: watch::Sender<State>,
    /// True after the CNI service has sent the pods of this node.
    pub(super) are_attachments_known: bool,
    /// True if the kernel's table has the last program.
    pub(super) is_installed: bool,
    /// True if open connections are to be compared with the policies after the next commit.
    pub(super) is_sweep_due: bool,
    /// Error of the last commit.
    pub(super) error: Option<String>,
    pub(super) retry_at: Option<Instant>,
    /// Blocks readiness until policies that are known are enforced.
    pub(super) not_ready: Option<NotReady>,
    pub(super) readiness: Readiness,
    pub(super) last_commit: Option<Instant>,
    pub(super) revision: u64,
    /// Scopes of pods that the program refers to.
    pub(super) needed_scopes: BTreeSet<PodScope>,
    /// True if the needs may differ from the published ones.
    pub(super) are_needs_stale: bool,
    pub(super) commits: Commits,
    pub(super) waiting: Vec<WaitingAdd>,
    pub(super) detached: Vec<oneshot::Sender<Result<(), CommitError>>>,
}

impl<T: Table> Owner<T> {
    pub(super) async fn run(mut self) {
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
        let Some(input) = self.next(None).await else { return false };
        let mut is_urgent = self.on_input(input).await;
        for _ in 1..MAX_BATCH {
            let earliest = self.last_commit.map(|at| at + COLLECT_INTERVAL);
            let until = earliest.filter(|_| !is_urgent).unwrap_or_else(Instant::now);
            match self.next(Some(until)).await {
                None => return false,
                Some(Input::Deadline) => break,
                Some(input) => is_urgent |= self.on_input(input).await,
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
    async fn on_input(&mut self, input: Input) -> bool {
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
            Input::Request(request) => self.on_request(request).await,
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

    async fn on_request(&mut self, request: Request) -> bool {
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
            send_if_changed(&self.needs, needs);
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
