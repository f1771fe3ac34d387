//! State of the agent: the writable state of the control process, and read-only views.

use std::sync::Arc;

use skein_netlink::firewall::Firewall;
use tokio::sync::watch;

use super::dataplane::DataplaneState;
use crate::cni;
use crate::config::Config;
use crate::lifecycle::Readiness;
use crate::policy::PolicyService;
use crate::status::{NodeState, NodeView, RotationStatus};

/// State of the agent, which the control process writes and the views show.
#[derive(Debug)]
pub(super) struct Publication {
    /// State of the node records, the interface and the key.
    pub(super) node: NodeState,
    /// Readiness of the agent.
    pub(super) readiness: Readiness,
    /// State of the data process; the supervisor changes it.
    pub(super) dataplane: DataplaneState,
    /// The firewall; `None` until it is started.
    pub(super) firewall: watch::Sender<Option<Firewall>>,
    /// Service of network policies; `None` if the policies have no effect.
    pub(super) policy: watch::Sender<Option<PolicyService>>,
    /// State of the pods; `None` while the agent serves none.
    pub(super) pods: watch::Sender<Option<cni::View>>,
}

impl Publication {
    /// Returns the state of an agent that starts with this key.
    pub(super) fn new(key: RotationStatus, readiness: Readiness) -> Self {
        Self {
            node: NodeState::new(key),
            readiness,
            dataplane: DataplaneState::default(),
            firewall: watch::Sender::default(),
            policy: watch::Sender::default(),
            pods: watch::Sender::default(),
        }
    }

    /// Returns a view of the state.
    pub(super) fn view(&self, config: &Config) -> AgentView {
        AgentView {
            config: Arc::new(config.clone()),
            readiness: self.readiness.clone(),
            node: self.node.view(),
            dataplane: self.dataplane.clone(),
            firewall: self.firewall.subscribe(),
            policy: self.policy.subscribe(),
        }
    }
}

/// Current state of the agent. Cheap to clone.
#[derive(Debug, Clone)]
pub struct AgentView {
    /// Validated configuration of the agent.
    pub config: Arc<Config>,
    /// Readiness of the agent.
    pub readiness: Readiness,
    /// State of the node records, the interface and the key.
    pub node: NodeView,
    /// State of the data process, as the supervisor observes it.
    pub dataplane: DataplaneState,
    /// The firewall; `None` until it is started.
    pub firewall: watch::Receiver<Option<Firewall>>,
    /// Service of network policies; `None` if the policies have no effect.
    pub policy: watch::Receiver<Option<PolicyService>>,
}
