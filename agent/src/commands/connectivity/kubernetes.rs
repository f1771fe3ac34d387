//! `skein-agent connectivity-test` in a cluster. On every node, one pod answers probes; then two
//! pods, one in the pod network and one in the node's network, probe all targets. Their logs
//! contain the results.

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::future::ready;
use std::net::IpAddr;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use futures_util::{AsyncReadExt, StreamExt, stream};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use kube::core::Status;
use kube::{Api, Client, Config, ResourceExt};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::matrix::{Cell, Matrix, Target};
use super::pods::{self, LABEL, Template, failure_reason, has_ended, phase};
use super::rand;
use crate::control::kubernetes::resource::SkeinNode;
use crate::lifecycle::Signals;

/// Minimum interval between two lists of the pods.
const MIN_LIST_INTERVAL: Duration = Duration::from_millis(500);
/// Interval between two lists of the pods, per pod, because long lists load the API server.
const LIST_INTERVAL_PER_POD: Duration = Duration::from_millis(1);
/// Timeout of a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout of a request for a log, which hangs if the API server does not reach the kubelet.
const LOG_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of bytes read of a log, as much as kubelet keeps.
const MAX_LOG_BYTES: u64 = 10 << 20;
/// Number of requests that run in parallel.
const PARALLEL_REQUESTS: usize = 16;
/// Timeout of the removal of the pods, in addition to the timeout of the test.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(30);
/// Further time for the removal, per pod.
const REMOVAL_TIMEOUT_PER_POD: Duration = Duration::from_millis(20);
/// TCP and UDP port of the answering pods.
const PORT: u16 = 8080;

/// Parameters of the test.
#[derive(Debug)]
pub(super) struct Options<'a> {
    /// Kubeconfig file of the cluster. `None` means the default of kubectl, or the cluster of this
    /// pod.
    pub(super) kubeconfig: Option<&'a Path>,
    /// Namespace of the test's pods.
    pub(super) namespace: &'a str,
    /// Namespace of the agents.
    pub(super) agents_namespace: &'a str,
    /// Name of the agents' DaemonSet.
    pub(super) daemonset: &'a str,
    /// Timeout of the test without the removal of its pods.
    pub(super) timeout: Duration,
}

/// Runs the test and removes its pods, also after a failure or an interruption. `report` receives
/// the progress.
///
/// # Errors
/// The cluster is not reachable, the DaemonSet or the nodes cannot be read, no answering pod or no
/// ConfigMap can be created, or a signal interrupts the test. Failures of single pods are part of
/// the matrix.
pub(super) async fn test(options: &Options<'_>, report: impl Fn(&str)) -> anyhow::Result<Matrix> {
    test_with(connect(options.kubeconfig).await?, options, report).await
}

async fn connect(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let config = match kubeconfig {
        Some(path) => {
            let shown = path.display();
            let file = kube::config::Kubeconfig::read_from(path)
                .with_context(|| format!("cannot read --kubeconfig {shown}"))?;
            Config::from_custom_kubeconfig(file, &Default::default()).await?
        }
        None => Config::infer().await.context(
            "no cluster is configured. Set --kubeconfig, or run the command where kubectl works.",
        )?,
    };
    Client::try_from(config).context("cannot create a Kubernetes client")
}

async fn test_with(
    client: Client,
    options: &Options<'_>,
    report: impl Fn(&str),
) -> anyhow::Result<Matrix> {
    let mut signals = Signals::install().context("cannot install signal handlers")?;
    let run = Run::new(client, options);
    let result = tokio::select! {
        result = run.test(&report) => result,
        () = signals.terminated() => Err(anyhow!("interrupted")),
    };
    if run.pods_made.get() == 0 {
        return result;
    }
    report("removing the test's pods");
    let removed = tokio::select! {
        removed = run.remove() => removed,
        () = signals.terminated() => Err(anyhow!("interrupted")),
    };
    if let Err(error) = removed {
        let (namespace, ours) = (options.namespace, run.selector());
        report(&format!(
            "pods of the test may be left behind: {error:#}. Remove them with kubectl delete pods \
             -n {namespace} -l {ours}"
        ));
    }
    result
}

struct Run<'a> {
    client: Client,
    options: &'a Options<'a>,
    pods: Api<Pod>,
    name: String,
    end: Instant,
    /// Number of pods that may exist: created, or with an unknown result of the creation.
    pods_made: std::cell::Cell<u32>,
}

/// Last list of the test's pods.
#[derive(Default)]
struct ListedPods {
    pods: BTreeMap<String, Pod>,
    /// Error of the last request, if it failed.
    error: Option<String>,
}

/// Targets of the test, and the columns without a target, with the reason.
#[derive(Default)]
struct FoundTargets {
    targets: Vec<Target>,
    absent: BTreeMap<String, String>,
}

impl<'a> Run<'a> {
    fn new(client: Client, options: &'a Options<'a>) -> Self {
        let pods = Api::namespaced(client.clone(), options.namespace);
        let name = format!("{:08x}", rand());
        let end = Instant::now() + options.timeout;
        Self { client, options, pods, name, end, pods_made: Default::default() }
    }

    fn selector(&self) -> String {
        format!("{LABEL}={}", self.name)
    }

    /// Waits for a request until `limit` or the end of the test. `cannot` is the context of an
    /// error.
    async fn within<T>(
        &self,
        limit: Duration,
        cannot: String,
        request: impl Future<Output = kube::Result<T>>,
    ) -> anyhow::Result<T> {
        match timeout_at(self.end.min(Instant::now() + limit), request).await {
            Ok(result) => result.map_err(plain).context(cannot),
            Err(_) if Instant::now() >= self.end => bail!("{cannot}: {}", self.timeout_message()),
            Err(_) => bail!("{cannot}: no answer within {} s", limit.as_secs()),
        }
    }

    fn timeout_message(&self) -> String {
        format!("the timeout of {} s (--timeout) expired", self.options.timeout.as_secs_f64())
    }

    async fn test(&self, report: &impl Fn(&str)) -> anyhow::Result<Matrix> {
        let template = self.template().await?;
        let nodes: Api<Node> = Api::all(self.client.clone());
        let all = ListParams::default();
        let nodes =
            self.within(REQUEST_TIMEOUT, "cannot list the nodes".to_owned(), nodes.list(&all));
        let nodes = nodes.await?.items.into_iter().filter_map(|node| node.metadata.name);
        let nodes: Vec<String> = nodes.collect();
        report(&format!("starting answering pods, one per node: {}", nodes.len()));
        let pods = nodes.iter().enumerate().map(|(index, node)| {
            (format!("pod@{node}"), template.answering_pod(index, node, PORT))
        });
        let (answerers, absent) = self.create(pods).await;
        let Some((_, owner)) = answerers.first() else {
            let why = absent.into_values().next();
            bail!(why.unwrap_or_else(|| "the cluster has no nodes".to_owned()));
        };
        let seen = self.answering().await;
        let mut found = FoundTargets { absent, ..FoundTargets::default() };
        for (column, pod) in &answerers {
            let addresses = seen.pod(&pod.name_any()).and_then(pods::addresses);
            found.add(column.clone(), addresses.context("no answering pod"), Some(PORT));
        }
        self.own_addresses(&nodes, &mut found).await;
        report(&format!(
            "probing from every node and from a pod on it; addresses: {}",
            found.targets.len()
        ));
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), self.options.namespace);
        let map = template.targets(&found.targets, owner)?;
        let cannot = format!("cannot create ConfigMaps in namespace {}", self.options.namespace);
        self.within(REQUEST_TIMEOUT, cannot, maps.create(&PostParams::default(), &map)).await?;
        let kinds = nodes.iter().enumerate().flat_map(|node| [("pod", node), ("node", node)]);
        let pods = kinds.map(|(kind, (index, node))| {
            // The rest of the time is for the start of the pod and for reading its log.
            let time = self.end.saturating_duration_since(Instant::now()) * 3 / 4;
            let name = template.name(kind, index);
            (format!("{kind}@{node}"), template.probing_pod(&name, node, kind == "node", time))
        });
        let (probers, silent) = self.create(pods).await;
        let mut matrix = Matrix::new(&found.targets, found.absent);
        for (row, why) in silent {
            matrix.add_row(row, Err(anyhow!(why)));
        }
        self.results(probers, &mut matrix).await;
        Ok(matrix)
    }

    /// Returns the template of the test's pods, with image and pull policy of the agents.
    async fn template(&self) -> anyhow::Result<Template> {
        let Options { agents_namespace, daemonset, timeout, .. } = self.options;
        let sets: Api<DaemonSet> = Api::namespaced(self.client.clone(), agents_namespace);
        let cannot = format!(
            "cannot get DaemonSet {daemonset} in {agents_namespace}, whose image the test uses. \
             Set --daemonset and --agents-namespace"
        );
        let set = self.within(REQUEST_TIMEOUT, cannot, sets.get(daemonset)).await?;
        let spec = set.spec.and_then(|spec| spec.template.spec);
        let container = spec.and_then(|spec| spec.containers.into_iter().next());
        let container = container.context("the agents' DaemonSet has no container")?;
        Ok(Template {
            run: self.name.clone(),
            image: container.image.context("the agents' container has no image")?,
            pull: container.image_pull_policy,
            lifetime: *timeout + Duration::from_secs(60),
        })
    }

    /// Creates pods in parallel. Returns the created pods and the errors of the others, by row or
    /// column.
    async fn create(
        &self,
        pods: impl Iterator<Item = (String, serde_json::Result<Pod>)>,
    ) -> (Vec<(String, Pod)>, BTreeMap<String, String>) {
        let create = async |(name, pod)| (name, self.create_one(pod).await);
        let mut results = pin!(stream::iter(pods).map(create).buffer_unordered(PARALLEL_REQUESTS));
        let (mut created, mut failed) = (Vec::new(), BTreeMap::new());
        while let Some((name, result)) = results.next().await {
            match result {
                Ok(pod) => created.push((name, pod)),
                Err(error) => drop(failed.insert(name, format!("{error:#}"))),
            }
        }
        (created, failed)
    }

    async fn create_one(&self, pod: serde_json::Result<Pod>) -> anyhow::Result<Pod> {
        let pod = pod?;
        let cannot = format!("cannot create pods in namespace {}", self.options.namespace);
        self.pods_made.update(|pods| pods + 1);
        let parameters = PostParams::default();
        let create = async {
            match self.pods.create(&parameters, &pod).await {
                // The client repeated the request after a lost answer, so the pod exists. The name
                // is unique to this test.
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    let (ours, name) = (self.pods.list(&self.ours()).await?.items, pod.name_any());
                    let made = ours.into_iter().find(|pod| pod.name_any() == name);
                    made.ok_or(kube::Error::Api(status))
                }
                made => made,
            }
        };
        let made = self.within(REQUEST_TIMEOUT, cannot, create).await;
        if let Err(error) = &made
            && let Some(status) = error.downcast_ref::<Status>()
            && (400..500).contains(&status.code)
        {
            self.pods_made.update(|pods| pods - 1);
        }
        made
    }

    fn ours(&self) -> ListParams {
        ListParams::default().labels(&self.selector())
    }

    /// Lists the pods again. After an error the last list is kept.
    async fn refresh(&self, seen: &mut ListedPods) {
        let ours = self.ours();
        let pods = self.within(
            REQUEST_TIMEOUT,
            "cannot list the test's pods".to_owned(),
            self.pods.list(&ours),
        );
        match pods.await {
            Ok(list) => {
                let pods = list.items.into_iter().map(|pod| (pod.name_any(), pod)).collect();
                *seen = ListedPods { pods, error: None };
            }
            Err(error) => seen.error = Some(format!("{error:#}")),
        }
    }

    /// Returns the time of the next list of `pods` pods.
    fn next_refresh(&self, pods: usize) -> Instant {
        self.end.min(Instant::now() + interval(pods))
    }

    /// Returns the answering pods once each of them runs or has ended, or after half of the time.
    async fn answering(&self) -> ListedPods {
        let now = Instant::now();
        let half = now + self.end.saturating_duration_since(now) / 2;
        let mut seen = ListedPods::default();
        loop {
            self.refresh(&mut seen).await;
            let settled = |pod: &Pod| phase(pod) == "Running" || has_ended(pod);
            let all = seen.error.is_none() && seen.pods.values().all(settled);
            if all || Instant::now() >= half {
                return seen;
            }
            sleep_until(self.next_refresh(seen.pods.len())).await;
        }
    }

    /// Adds the overlay addresses of the nodes.
    async fn own_addresses(&self, nodes: &[String], found: &mut FoundTargets) {
        let (all, cannot) = (Api::all(self.client.clone()), "cannot list SkeinNodes".to_owned());
        match self.within(REQUEST_TIMEOUT, cannot, all.list(&ListParams::default())).await {
            Ok(records) => {
                let named = |record: SkeinNode| Some((record.metadata.name.clone()?, record));
                let records: BTreeMap<_, _> = records.items.into_iter().filter_map(named).collect();
                for node in nodes.iter().chain(records.keys()).collect::<BTreeSet<_>>() {
                    let own = pods::own_addresses(records.get(node));
                    found.add(format!("node@{node}"), own, None);
                }
            }
            // The pods are still tested.
            Err(error) => found.add("node@*".to_owned(), Err(error), None),
        }
    }

    /// Adds the results of the probing pods to the matrix as each pod ends. Logs are read in
    /// parallel, so that a log that hangs does not delay the others.
    async fn results(&self, probers: Vec<(String, Pod)>, matrix: &mut Matrix) {
        let (sender, mut receiver) = unbounded_channel();
        let read = async |(row, pod): (String, anyhow::Result<Pod>)| match pod {
            Ok(pod) => (row, self.read_row(&pod).await),
            Err(error) => (row, Err(error)),
        };
        let ended = stream::poll_fn(|context| receiver.poll_recv(context));
        let added =
            ended.map(read).buffer_unordered(PARALLEL_REQUESTS).for_each(|(row, result)| {
                matrix.add_row(row, result);
                ready(())
            });
        tokio::join!(self.watch(probers, sender), added);
    }

    /// Sends each pod once it has ended, or the reason that it does not end.
    async fn watch(
        &self,
        mut probers: Vec<(String, Pod)>,
        sender: UnboundedSender<(String, anyhow::Result<Pod>)>,
    ) {
        let mut seen = ListedPods::default();
        loop {
            self.refresh(&mut seen).await;
            let late = Instant::now() >= self.end;
            probers.retain(|(row, pod)| {
                let result = match seen.pod(&pod.name_any()) {
                    Ok(pod) if has_ended(pod) => Ok(pod.clone()),
                    Ok(pod) if late => {
                        Err(anyhow!("{}: {}", self.timeout_message(), failure_reason(pod)))
                    }
                    Err(error) if late || seen.error.is_none() => Err(error),
                    _ => return true,
                };
                // The receiver lives as long as this future.
                let _ = sender.send((row.clone(), result));
                false
            });
            if probers.is_empty() {
                return;
            }
            sleep_until(self.next_refresh(seen.pods.len())).await;
        }
    }

    /// Reads the row of a pod that has ended from its log.
    async fn read_row(&self, pod: &Pod) -> anyhow::Result<Vec<Cell>> {
        let name = pod.name_any();
        let request = self.log(&name);
        let log = self.within(LOG_TIMEOUT, format!("cannot read the log of {name}"), request).await;
        if phase(pod) != "Succeeded" {
            bail!(pods::failure_with_log(pod, log));
        }
        let log = log?;
        let last = log.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("the log of {name}"))
    }

    /// Reads the log of a pod, at most [`MAX_LOG_BYTES`], because a compromised node can send a log
    /// without end.
    async fn log(&self, pod: &str) -> kube::Result<String> {
        let log = self.pods.log_stream(pod, &LogParams::default()).await?;
        let mut text = Vec::new();
        log.take(MAX_LOG_BYTES).read_to_end(&mut text).await.map_err(kube::Error::ReadEvents)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Removes the pods until two lists in a row are empty, because a request that was in progress
    /// when the test ended may create another pod. Kubernetes removes the ConfigMap with its owner.
    async fn remove(&self) -> anyhow::Result<()> {
        let end = Instant::now() + REMOVAL_TIMEOUT + REMOVAL_TIMEOUT_PER_POD * self.pods_made.get();
        let mut why = "no answer from the API server".to_owned();
        let (mut empty_lists, mut pods) = (0, 0);
        loop {
            match timeout_at(end, self.delete_pods()).await {
                Err(_) => bail!(why),
                Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                    bail!(status);
                }
                Ok(Err(error)) => why = format!("{:#}", plain(error)),
                Ok(Ok(left)) => match left.first() {
                    None if empty_lists == 1 => return Ok(()),
                    None => (empty_lists, pods) = (1, 0),
                    Some(pod) => {
                        (empty_lists, pods) = (0, left.len());
                        why = match pods - 1 {
                            0 => format!("{pod} still exists"),
                            more => format!("{pod} and {more} more still exist"),
                        };
                    }
                },
            }
            if Instant::now() >= end {
                bail!(why);
            }
            sleep(interval(pods)).await;
        }
    }

    /// Deletes all pods of the test and returns the names of those that still exist.
    async fn delete_pods(&self) -> kube::Result<Vec<String>> {
        let ours = self.ours();
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        self.pods.delete_collection(&now, &ours).await?;
        let left = self.pods.list_metadata(&ours).await?.items;
        Ok(left.into_iter().filter_map(|pod| pod.metadata.name).collect())
    }
}

impl ListedPods {
    fn pod(&self, name: &str) -> anyhow::Result<&Pod> {
        let why = || self.error.clone().unwrap_or_else(|| "the pod does not exist".to_owned());
        self.pods.get(name).ok_or_else(|| anyhow!(why()))
    }
}

impl FoundTargets {
    fn add(&mut self, name: String, addresses: anyhow::Result<Vec<IpAddr>>, port: Option<u16>) {
        match addresses {
            Ok(addresses) => self.targets.extend(addresses.into_iter().map(|address| Target {
                name: name.clone(),
                address,
                port,
            })),
            Err(error) => drop(self.absent.insert(name, format!("{error:#}"))),
        }
    }
}

/// Reduces an error of the API server to its status, whose message contains everything relevant.
fn plain(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => (*status).into(),
        other => other.into(),
    }
}

/// Returns the interval between two lists of `pods` pods.
fn interval(pods: usize) -> Duration {
    MIN_LIST_INTERVAL.max(LIST_INTERVAL_PER_POD * u32::try_from(pods).unwrap_or(u32::MAX))
}
