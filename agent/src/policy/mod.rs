//! Network policies: sources of objects, and the service that enforces them for the pods of this
//! node.
//!
//! [`PolicyService`] owns the engine of `skein_policy` and the kernel's table. A source sends it
//! the cluster's objects ([`source`]), and the CNI service the pods of this node. Pods are
//! enforced before their links exist. A pod that is not known is in quarantine.

mod attachments;
mod describe;
mod directory;
pub mod lint;
pub(crate) mod metrics;
mod objects;
pub mod report;
mod service;
pub mod source;
mod status;
mod store;
mod table;

use std::time::Duration;

use anyhow::Context;
use skein_netlink::nftables::Monitor;
use skein_policy::render;

pub use self::attachments::Attachment;
use self::directory::Directory;
pub use self::metrics::{PolicyMetrics, PolicyPackets};
use self::service::Settings;
pub use self::service::{Attached, CommitError, PodNetworks, PolicyService};
pub use self::status::PolicyStatus;
use self::store::Store;
use self::table::KernelTable;
pub use self::table::TABLE;
use crate::config::{Config, PolicyMode};
use crate::failure::Failure;
use crate::lifecycle::Readiness;

/// Interval between attempts to remove the table of an earlier configuration.
const REMOVAL_INTERVAL: Duration = Duration::from_secs(10);

/// Starts the service of network policies, in static mode with the source of its objects.
/// `monitor` has the notifications of nftables. Returns
/// `None` if `policy.mode` is off; an agent with pods then removes the table of an earlier
/// configuration.
///
/// # Errors
/// [`Failure`] if the thread of the service cannot be created.
pub async fn start(
    config: &Config,
    readiness: &Readiness,
    monitor: Option<&Monitor>,
) -> Result<Option<PolicyService>, Failure> {
    let mode = config.policy.mode;
    let table_mode = match mode {
        PolicyMode::Off => {
            remove_earlier_until_done(config).await;
            return Ok(None);
        }
        PolicyMode::Audit => render::Mode::Audit,
        PolicyMode::Enforce => render::Mode::Enforce,
    };
    let source = match &config.policy.directory {
        Some(directory) => directory.display().to_string(),
        None => "kubernetes".to_owned(),
    };
    let settings = Settings {
        mode,
        is_static: config.policy.directory.is_some(),
        store: Store::new(&config.state_dir, source),
        readiness: readiness.clone(),
    };
    let service = PolicyService::start(settings, KernelTable::new(table_mode, monitor.cloned()))
        .context("cannot start the service of network policies")?;
    if let Some(directory) = &config.policy.directory {
        let follow = Directory::new(directory.clone()).follow(service.sink());
        // The task ends with the service.
        tokio::spawn(follow);
    }
    Ok(Some(service))
}

/// Removes what an earlier configuration has left. After a failure, a task tries again, because a
/// table that remains drops the traffic of new pods.
async fn remove_earlier_until_done(config: &Config) {
    if !config.cni.enabled || remove_earlier(config).await {
        return;
    }
    let config = config.clone();
    tokio::spawn(async move {
        tokio::time::sleep(REMOVAL_INTERVAL).await;
        while !remove_earlier(&config).await {
            tokio::time::sleep(REMOVAL_INTERVAL).await;
        }
    });
}

/// Removes what an earlier configuration has left. Returns false if something could not be removed.
async fn remove_earlier(config: &Config) -> bool {
    let mut is_complete = true;
    for (what, outcome) in remove(config).await {
        match outcome {
            Ok(true) => tracing::info!("{what} of an earlier configuration removed"),
            Ok(false) => {}
            Err(error) => {
                is_complete = false;
                tracing::error!(error, "{what} not removed, trying again");
            }
        }
    }
    is_complete
}

/// Removes the kernel's table and the stored objects. Returns, for each of them, its name and
/// whether it existed, or the error.
pub async fn remove(config: &Config) -> [(String, Result<bool, String>); 2] {
    let file = config.state_dir.join(store::FILE);
    let table = table::remove().await;
    let removed = store::remove(&file).map_err(|error| error.to_string());
    [(format!("nftables table inet {TABLE}"), table), (format!("file {}", file.display()), removed)]
}
