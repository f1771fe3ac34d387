//! `skein-agent uninstall`: takes Skein from every node of a cluster, for the chart's hook.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, Client};
use tokio::time::Instant;

use super::client::{self, Requests};
use super::resource::SkeinNode;

/// How often the cluster is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What to take away.
#[derive(Debug)]
pub struct Options<'a> {
    /// Where the agents run.
    pub namespace: &'a str,
    /// Their DaemonSet.
    pub daemonset: &'a str,
    /// File with the manifest of the DaemonSet that cleans a node up.
    pub cleanup: &'a Path,
    /// How long it all may take.
    pub timeout: Duration,
    /// Which cluster; that of this pod where it is absent.
    pub kubeconfig: Option<&'a Path>,
}

/// Stops the agents, cleans up every node, and removes the SkeinNodes. `say` is told each step.
pub async fn uninstall(options: &Options<'_>, say: impl Fn(&str)) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(options.cleanup)
        .with_context(|| format!("cannot read {}", options.cleanup.display()))?;
    let cleanup: DaemonSet = serde_saphyr::from_str(&text)
        .with_context(|| format!("{} is no DaemonSet", options.cleanup.display()))?;
    let client = client::connect(options.kubeconfig, &Requests::new()?).await?;
    let end = Instant::now() + options.timeout;
    let daemonsets: Api<DaemonSet> = Api::namespaced(client.clone(), options.namespace);

    say(&format!("stopping the agents (DaemonSet {})", options.daemonset));
    stop(&client, &daemonsets, options.namespace, options.daemonset, end).await?;

    let name = cleanup.metadata.name.clone().context("the cleanup DaemonSet has no name")?;
    say(&format!("cleaning up every node (DaemonSet {name})"));
    // One of an attempt that was interrupted.
    stop(&client, &daemonsets, options.namespace, &name, end).await?;
    daemonsets.create(&PostParams::default(), &cleanup).await.context("cannot create it")?;
    let cleaned = wait(end, || async {
        let now = daemonsets.get(&name).await?;
        let generation = now.metadata.generation;
        let status = now.status.unwrap_or_default();
        let seen = status.observed_generation == generation;
        let done = status.number_ready == status.desired_number_scheduled;
        Ok((seen && done).then_some(status.desired_number_scheduled).ok_or_else(|| {
            format!(
                "{} of {} nodes are clean",
                status.number_ready, status.desired_number_scheduled
            )
        }))
    });
    let nodes = cleaned.await.with_context(|| format!("see the pods of DaemonSet {name}"))?;
    stop(&client, &daemonsets, options.namespace, &name, end).await?;

    let skeinnodes: Api<SkeinNode> = Api::all(client.clone());
    skeinnodes
        .delete_collection(&DeleteParams::default(), &ListParams::default())
        .await
        .context("cannot remove the SkeinNodes")?;
    say(&format!("{nodes} nodes are clean"));
    Ok(())
}

/// Deletes a DaemonSet, which may be gone, and waits for its pods to end.
async fn stop(
    client: &Client,
    daemonsets: &Api<DaemonSet>,
    namespace: &str,
    name: &str,
    end: Instant,
) -> anyhow::Result<()> {
    let Some(found) = daemonsets.get_opt(name).await? else { return Ok(()) };
    let selector = found.spec.unwrap_or_default().selector.match_labels.unwrap_or_default();
    let selector: Vec<_> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
    match daemonsets.delete(name, &DeleteParams::background()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        other => drop(other.with_context(|| format!("cannot delete DaemonSet {name}"))?),
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let ours = ListParams::default().labels(&selector.join(","));
    let gone = wait(end, || async {
        let left = pods.list(&ours).await?.items;
        let names: Vec<_> = left.iter().filter_map(|pod| pod.metadata.name.as_deref()).collect();
        Ok(if names.is_empty() { Ok(()) } else { Err(format!("still there: {}", names.join(" "))) })
    });
    gone.await.with_context(|| format!("the pods of DaemonSet {name} do not end"))
}

/// Looks until `look` has found what it wants; its last word is in the error.
async fn wait<T, F>(end: Instant, look: impl Fn() -> F) -> anyhow::Result<T>
where
    F: Future<Output = kube::Result<Result<T, String>>>,
{
    loop {
        let word = match look().await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(word)) => word,
            Err(error) => error.to_string(),
        };
        if Instant::now() + LOOK > end {
            return Err(anyhow!("the time is over: {word}"));
        }
        tokio::time::sleep(LOOK).await;
    }
}
