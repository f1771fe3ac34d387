//! Sources of the status document, the metrics and the status page.

use skein_netlink::firewall::Firewall;
use tokio::sync::watch;

use super::kubernetes::Requests;
use super::reports::Reports;
use super::view::AgentView;
use crate::cni;
use crate::policy::PolicyService;
use crate::status::Document;

/// Source of the status document. Cheap to clone.
#[derive(Debug, Clone)]
pub struct StatusSource {
    /// State of the agent.
    pub agent: AgentView,
    /// Client for reports of the data process.
    pub reports: Reports,
    /// State of the pods; `None` while the agent serves none.
    pub pods: watch::Receiver<Option<cni::View>>,
}

/// Source of the metrics and the status page. Cheap to clone.
#[derive(Debug, Clone)]
pub struct HttpSource {
    /// State of the agent.
    pub agent: AgentView,
    /// Client for reports of the data process.
    pub reports: Reports,
    /// State of the pods; `None` while the agent serves none.
    pub pods: watch::Receiver<Option<cni::View>>,
    /// Counters of the requests to the API server; `None` without Kubernetes.
    pub requests: Option<Requests>,
}

impl StatusSource {
    /// Returns the status document, with a fresh report of the data process.
    pub async fn document(&self) -> Document {
        let report = self.reports.request().await.ok();
        let AgentView { config, readiness, node, dataplane, firewall, policy } = &self.agent;
        let (reasons, key) = (readiness.reasons(), node.key());
        Document {
            node: config.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            public_key: key.keys.first,
            key,
            ready: reasons.is_empty(),
            reasons,
            notes: config.notes.clone(),
            interface: node.interface(),
            records: node.registry(),
            firewall: firewall.borrow().as_ref().map(Firewall::status).unwrap_or_default(),
            policy: policy.borrow().as_ref().map(PolicyService::status),
            dataplane: dataplane.status(),
            report,
            cni: self.pods.borrow().as_ref().map(cni::View::offer),
            config: serde_json::to_value(&**config).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use skein_ipc::keys::PublicKey;

    use super::*;
    use crate::config::Config;
    use crate::control::view::Publication;
    use crate::lifecycle::Readiness;
    use crate::status::RotationStatus;

    /// Returns the source of an agent that has just started, without a data process.
    pub(crate) fn http_source(config: &str) -> HttpSource {
        let config = Config::parse(config).unwrap();
        let key = RotationStatus::of(PublicKey([1; 32]));
        let published = Publication::new(key, Readiness::default());
        HttpSource {
            agent: published.view(&config),
            reports: Reports::new(config.dataplane.socket.clone()),
            pods: published.pods.subscribe(),
            requests: None,
        }
    }

    /// Returns the source of an agent that has just started, without a data process.
    pub(crate) fn status_source(config: &str) -> StatusSource {
        let HttpSource { agent, reports, pods, .. } = http_source(config);
        StatusSource { agent, reports, pods }
    }
}
