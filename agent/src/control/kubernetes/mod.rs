//! The node registry from Kubernetes: every node's record is a SkeinNode, which its own agent writes
//! and all others watch.

mod backoff;
mod client;
mod follow;
mod own;
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
use super::records::ParsedRecords;
use super::view::AgentView;
use crate::config::Config;
use crate::failure::Failure;
use crate::status::RotationStatus;

/// How long a start waits for the API server where the last good records would do.
const PATIENCE: Duration = Duration::from_secs(5);

/// Follows the API server, and keeps this node's record there, until it is dropped.
#[derive(Debug)]
pub struct Kubernetes {
    state: watch::Receiver<State>,
    ranges: Ranges,
    tasks: JoinSet<()>,
}

/// The records as the API server has them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Records(watch::Receiver<State>);

impl Kubernetes {
    /// Begins; whether the API server answers shows later.
    pub async fn start(agent: &AgentView, requests: Requests) -> Result<Self, Failure> {
        let (config, key) = (Arc::clone(&agent.config), agent.node.follow_key());
        let (mut kubernetes, client) = Self::connect(config, key, requests).await?;
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

    /// Waits until all records are known; not for long where there are `last_good` ones.
    async fn first(&mut self, last_good: bool, waits: impl Fn(&str)) {
        let end = tokio::time::Instant::now() + PATIENCE;
        let mut told = String::new();
        loop {
            let reason = {
                let state = self.state.borrow_and_update();
                if state.records.is_some() {
                    return;
                }
                state.waits_for()
            };
            if reason != told {
                waits(&reason);
                told = reason;
            }
            let changed = self.state.changed();
            if !last_good {
                // Its task ends with this value only.
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
            self.first(last_good, waits).await;
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

    /// What can be read at any time.
    pub fn records(&self) -> Records {
        Records(self.state.clone())
    }
}

impl Records {
    /// All of them; an error where not all are known.
    pub fn read(&self) -> Result<ParsedRecords, String> {
        let state = self.0.borrow();
        state.records.as_deref().cloned().ok_or_else(|| state.waits_for())
    }

    /// The keys of this node as the API server has them; `None` where it has none.
    pub fn published_keys(&self) -> Option<PublicKeys> {
        let published = self.0.borrow().published.clone()?;
        published.record().ok().map(|record| record.keys())
    }

    /// Why nothing new is known, where that is so.
    pub fn error(&self) -> Option<String> {
        self.0.borrow().error.clone()
    }
}

impl State {
    /// What keeps all records from being known.
    fn waits_for(&self) -> String {
        match (&self.error, &self.own) {
            (Some(error), _) => error.clone(),
            (None, Some(Err(error))) => error.clone(),
            (None, Some(Ok(_))) => "the SkeinNodes have not come in yet".to_owned(),
            (None, None) => "this node's Node has not been seen yet".to_owned(),
        }
    }
}
