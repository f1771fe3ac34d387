//! `skein-agent uninstall`: takes Skein from every node of a cluster, for the chart's hook.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use tokio::time::Instant;

use super::client::{self, Requests};
use super::resource::SkeinNode;

/// How often the cluster is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// What ending the cleanup may take beyond the time that was given.
const LAST: Duration = Duration::from_secs(20);

/// What to take away.
#[derive(Debug)]
pub struct Options<'a> {
    /// Where the agents run.
    pub namespace: &'a str,
    /// Their DaemonSet.
    pub daemonset: &'a str,
    /// What selects its pods, which may be there without it.
    pub selector: &'a str,
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

    let pods: Api<Pod> = Api::namespaced(client.clone(), options.namespace);
    let stop = async |end: Instant, name: &str, selector: &str| {
        let parameters = DeleteParams::background();
        let deleted = daemonsets.delete(name, &parameters);
        match within(end, deleted).await? {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => drop(other.with_context(|| format!("cannot delete DaemonSet {name}"))?),
        }
        let ours = ListParams::default().labels(selector);
        let gone = wait(end, async || {
            let left = pods.list(&ours).await?.items;
            let names: Vec<_> =
                left.iter().filter_map(|pod| pod.metadata.name.as_deref()).collect();
            let left = names.join(" ");
            Ok(if left.is_empty() { Ok(()) } else { Err(format!("still there: {left}")) })
        });
        gone.await.with_context(|| format!("the pods of DaemonSet {name} do not end"))
    };

    say(&format!("stopping the agents (DaemonSet {})", options.daemonset));
    stop(end, options.daemonset, options.selector).await?;

    let name = cleanup.metadata.name.clone().context("the cleanup DaemonSet has no name")?;
    say(&format!("cleaning up every node (DaemonSet {name})"));
    let labels = cleanup.spec.as_ref().and_then(|spec| spec.selector.match_labels.as_ref());
    let labels = labels.into_iter().flatten().map(|(key, value)| format!("{key}={value}"));
    let selector = labels.collect::<Vec<_>>().join(",");
    // An empty one selects every pod of the namespace.
    ensure!(!selector.is_empty(), "the cleanup DaemonSet selects no pods by labels");
    // One of an attempt that was interrupted.
    stop(end, &name, &selector).await?;
    let parameters = PostParams::default();
    let created = within(end, daemonsets.create(&parameters, &cleanup));
    created.await?.context("cannot create it")?;
    let cleaned = wait(end, async || {
        let now = daemonsets.get(&name).await?;
        let generation = now.metadata.generation;
        let status = now.status.unwrap_or_default();
        let seen = status.observed_generation == generation;
        let done = status.number_ready == status.desired_number_scheduled;
        if seen && done {
            return Ok(Ok(status.desired_number_scheduled));
        }
        let left = pods.list(&ListParams::default().labels(&selector)).await?.items;
        let left: Vec<_> = left.iter().filter(|pod| !is_ready(pod)).filter_map(node).collect();
        Ok(Err(format!("not clean yet: {}", left.join(" "))))
    });
    let cleaned = cleaned.await;
    // Also where it has failed: it would clean a node that comes back much later, when another
    // installation may be there.
    let end = end.max(Instant::now() + LAST);
    let stopped = stop(end, &name, &selector).await;
    let nodes = cleaned?;
    stopped?;

    let skeinnodes: Api<SkeinNode> = Api::all(client.clone());
    let (parameters, all) = (DeleteParams::default(), ListParams::default());
    let deleted = within(end, skeinnodes.delete_collection(&parameters, &all));
    deleted.await?.context("cannot remove the SkeinNodes")?;
    say(&format!("{nodes} nodes are clean"));
    Ok(())
}

fn node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| &status.conditions).flatten();
    conditions.filter(|condition| condition.type_ == "Ready").any(|ready| ready.status == "True")
}

/// One request: an API server that says nothing is given up at the end.
async fn within<T>(
    end: Instant,
    request: impl Future<Output = kube::Result<T>>,
) -> anyhow::Result<kube::Result<T>> {
    let answer = tokio::time::timeout_at(end, request).await;
    answer.context("the time is over: the API server does not answer")
}

/// Looks until `look` has found what it wants; its last word is in the error.
async fn wait<T>(
    end: Instant,
    look: impl AsyncFn() -> kube::Result<Result<T, String>>,
) -> anyhow::Result<T> {
    loop {
        let word = match within(end, look()).await? {
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
