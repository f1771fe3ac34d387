//! Removal of everything that the agent installed for pods.

use skein_netlink::Netlink;
use skein_netlink::firewall::forward;

use super::attach::Attacher;
use super::{install, others};
use crate::config::Config;

/// Outcome of the removal of one thing.
#[derive(Debug)]
pub struct Removal {
    /// Name of the thing, for messages.
    pub what: String,
    /// True if it was removed, false if it was absent.
    pub outcome: anyhow::Result<bool>,
}

/// Removes the network configuration, so that the runtime starts no more pods, then the plugin, the
/// pods' interfaces, and the accept rules for pods in chains of other programs. Continues after an
/// error.
pub async fn remove(config: &Config) -> Vec<Removal> {
    let cni = &config.cni;
    let removal = |what: &str, outcome| Removal { what: what.to_owned(), outcome };
    let configuration = install::remove_configuration(cni).map_err(Into::into);
    let mut removals = vec![removal("CNI configuration", configuration)];
    match others::restore_all(cni) {
        Err(error) => {
            removals.push(removal("configurations of other networks", Err(error.into())));
        }
        Ok(back) => {
            for name in back {
                tracing::info!(file = name, "configuration of another network restored");
            }
        }
    }
    removals.push(removal("CNI plugin", install::remove_plugin(cni).map_err(Into::into)));
    removals.extend(remove_interfaces(&config.name).await);
    removals.push(removal(
        "accept rules for pods in chains of other programs",
        forward::remove().await.map_err(Into::into),
    ));
    removals
}

async fn remove_interfaces(node: &str) -> Vec<Removal> {
    let failed = |error: anyhow::Error| {
        vec![Removal { what: "interfaces of containers".to_owned(), outcome: Err(error) }]
    };
    let attacher = Attacher::new(node);
    let netlink = match Netlink::connect() {
        Ok(netlink) => netlink,
        Err(error) => return failed(error.into()),
    };
    let kernel = match attacher.read_kernel(&netlink).await {
        Ok(kernel) => kernel,
        Err(error) => return failed(error.into()),
    };
    let mut removals = Vec::new();
    for pod in attacher.attachments(&kernel) {
        let what = format!("interface of container {}", pod.id.container_id);
        let deleted = attacher.detach(&netlink, &pod.id).await;
        removals.push(Removal { what, outcome: deleted.map(|()| true).map_err(Into::into) });
    }
    removals
}
