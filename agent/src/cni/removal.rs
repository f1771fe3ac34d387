//! Removal of everything that the agent installed for pods.

use skein_netlink::Netlink;
use skein_netlink::firewall::forward;

use super::attach::Attacher;
use super::files::InstallError;
use super::{install, others};
use crate::config::Config;

/// Outcome of the removal of one thing.
#[derive(Debug)]
pub struct Removal {
    /// Name of the thing, for messages.
    pub what: String,
    /// True if it was removed, false if it was absent. An error is a message with the cause.
    pub outcome: Result<bool, String>,
}

/// Removes the network configuration, so that the runtime starts no more pods, then the plugin, the
/// pods' interfaces, and the accept rules for pods in chains of other programs. Continues after an
/// error.
pub async fn remove(config: &Config) -> Vec<Removal> {
    let cni = &config.cni;
    let text = |result: Result<bool, InstallError>| result.map_err(|error| error.to_string());
    let removal = |what: &str, outcome| Removal { what: what.to_owned(), outcome };
    let mut removals = vec![removal("CNI configuration", text(install::remove_configuration(cni)))];
    match others::restore_all(cni) {
        Err(error) => {
            removals.push(removal("configurations of other networks", Err(error.to_string())));
        }
        Ok(back) => {
            for name in back {
                tracing::info!(file = name, "configuration of another network restored");
            }
        }
    }
    removals.push(removal("CNI plugin", text(install::remove_plugin(cni))));
    removals.extend(remove_interfaces(&config.name).await);
    removals.push(removal(
        "accept rules for pods in chains of other programs",
        forward::remove().await,
    ));
    removals
}

async fn remove_interfaces(node: &str) -> Vec<Removal> {
    let failed = |error: String| {
        vec![Removal { what: "interfaces of containers".to_owned(), outcome: Err(error) }]
    };
    let attacher = Attacher::new(node);
    let netlink = match Netlink::connect() {
        Ok(netlink) => netlink,
        Err(error) => return failed(error.to_string()),
    };
    let kernel = match attacher.read_kernel(&netlink).await {
        Ok(kernel) => kernel,
        Err(error) => return failed(error.to_string()),
    };
    let mut removals = Vec::new();
    for pod in attacher.attachments(&kernel) {
        let what = format!("interface of container {}", pod.id.container_id);
        let deleted = attacher.detach(&netlink, &pod.id).await;
        let outcome = deleted.map(|()| true).map_err(|error| error.to_string());
        removals.push(Removal { what, outcome });
    }
    removals
}
