//! Node records in Kubernetes: the record of each node is a SkeinNode, which its agent writes and
//! all other agents watch.

mod backoff;
mod client;
mod follow;
mod own;
mod policy;
mod publish;
mod ranges;
pub mod resource;
mod status;
pub mod uninstall;

use std::sync::Arc;
use std::time::Duration;

use skein_ipc::keys::PublicKeys;
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use self::client::Requests;
use self::follow::State;
pub(super) use self::follow::path;
use self::ranges::Ranges;
use super::records::{ParsedRecords, SourceError};
use super::view::AgentView;
use crate::config::Config;
use crate::failure::Failure;
use crate::status::RotationStatus;

/// Maximum wait of a start for the API server if last good records exist.
const FIRST_RECORDS_TIMEOUT: Duration = Duration::from_secs(5);

/// Connection to the API server, until the value is dropped: follows all SkeinNodes and, after
/// [`Kubernetes::start`], writes this node's one.
#[derive(Debug)]
pub struct Kubernetes {
    state: watch::Receiver<State>,
    ranges: Ranges,
    tasks: JoinSet<()>,
}

/// Node records of the API server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Records(watch::Receiver<State>);

impl Kubernetes {
    /// Follows the API server and writes this node's SkeinNode, Node and Events. The API server
    /// need not respond yet.
    ///
    /// # Errors
    /// [`Failure`] if the connection to the API server is misconfigured.
    pub async fn start(agent: &AgentView, requests: Requests) -> Result<Self, Failure> {
        let (config, key) = (Arc::clone(&agent.config), agent.node.follow_key());
        let (mut kubernetes, client) = Self::connect(config, key, requests).await?;
        let name = agent.config.name.clone();
        kubernetes.tasks.spawn(policy::serve(client.clone(), name, agent.policy.clone()));
        let publish = publish::publish(agent.clone(), client, kubernetes.state.clone());
        kubernetes.tasks.spawn(publish);
        Ok(kubernetes)
    }

    /// Follows the API server without writing to it.
    ///
    /// # Errors
    /// [`Failure`] if the connection to the API server is misconfigured.
    pub async fn follow(
        config: Arc<Config>,
        key: watch::Receiver<RotationStatus>,
        requests: Requests,
    ) -> Result<Self, Failure> {
        Ok(Self::connect(config, key, requests).await?.0)
    }

    async fn connect(
        config: Arc<Config>,
        key: watch::Receiver<RotationStatus>,
        requests: Requests,
    ) -> Result<(Self, kube::Client), Failure> {
        let kubeconfig = config.kubernetes.kubeconfig.as_deref();
        let client = client::connect(kubeconfig, &requests).await;
        let (client, server) = client.map_err(|error| Failure::Usage(format!("{error:#}")))?;
        let ranges = Ranges::new(client.clone(), server);
        let (sender, state) = watch::channel(State::default());
        let follow = follow::follow(config, key, client.clone(), sender);
        let mut tasks = JoinSet::new();
        tasks.spawn(follow);
        Ok((Self { state, ranges, tasks }, client))
    }

    /// Waits until all records are known, at most [`FIRST_RECORDS_TIMEOUT`] if there are
    /// `last_good` ones. Calls `waits` with each new reason for the wait.
    async fn wait_for_records(&mut self, last_good: bool, waits: impl Fn(&str)) {
        let end = tokio::time::Instant::now() + FIRST_RECORDS_TIMEOUT;
        let mut logged = String::new();
        loop {
            let reason = {
                let state = self.state.borrow_and_update();
                if state.records.is_some() {
                    return;
                }
                state.waits_for()
            };
            if reason != logged {
                waits(&reason);
                logged = reason;
            }
            let changed = self.state.changed();
            if !last_good {
                // The sender's task ends only with this value.
                let _ = changed.await;
            } else if tokio::time::timeout_at(end, changed).await.is_err() {
                return;
            }
        }
    }

    /// Waits until all records are known, only for a short time if `last_good` records exist.
    /// Meanwhile, compares `cluster_cidrs` with the cluster's addresses.
    ///
    /// # Errors
    ///
    /// [`Failure::Usage`] if `cluster_cidrs` contain the API server or Services.
    pub async fn start_with(
        &mut self,
        config: &Config,
        last_good: bool,
        waits: impl Fn(&str),
    ) -> Result<(), Failure> {
        let ranges = self.ranges.clone();
        let first = async {
            self.wait_for_records(last_good, waits).await;
            Ok(())
        };
        tokio::try_join!(first, ranges.check(config)).map(drop)
    }

    /// Waits until the records should be read again.
    pub async fn due(&mut self) {
        if self.state.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Returns a reader of the records.
    pub fn records(&self) -> Records {
        Records(self.state.clone())
    }
}

impl Records {
    /// Returns all records.
    ///
    /// # Errors
    /// [`SourceError::Incomplete`] if not all records are known yet.
    pub fn read(&self) -> Result<ParsedRecords, SourceError> {
        let state = self.0.borrow();
        let records = state.records.as_deref().cloned();
        records.ok_or_else(|| SourceError::Incomplete(state.waits_for()))
    }

    /// Returns the keys of this node's SkeinNode; `None` if it does not exist or is invalid.
    pub fn published_keys(&self) -> Option<PublicKeys> {
        let published = self.0.borrow().published.clone()?;
        published.record().ok().map(|record| record.keys())
    }

    /// Returns the error of a watch. The records may be outdated while there is one.
    pub fn error(&self) -> Option<String> {
        self.0.borrow().error.clone()
    }
}

impl State {
    /// Returns the reason why not all records are known.
    fn waits_for(&self) -> String {
        match (&self.error, &self.own) {
            (Some(error), _) => error.clone(),
            (None, Some(Err(error))) => error.to_string(),
            (None, Some(Ok(_))) => "the SkeinNodes have not been received yet".to_owned(),
            (None, None) => "this node's Node has not been received yet".to_owned(),
        }
    }
}
