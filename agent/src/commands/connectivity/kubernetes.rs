//! `skein-agent connectivity-test` in a cluster: a pod on every node that answers, then one in the pod
//! network and one in the node's of every node that probe all of them. What they found is in their logs.

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
use super::pods::{self, LABEL, Template, ended, phase, trouble};
use super::rand;
use crate::control::kubernetes::resource::SkeinNode;
use crate::lifecycle::Signals;

/// From one look at the pods to the next: at least that, and so much for each pod, as they are much to list.
const LOOK: Duration = Duration::from_millis(500);
const LOOK_EACH: Duration = Duration::from_millis(1);
/// What a request may take, and one for a log, which hangs where the API server does not get through to a kubelet.
const REQUEST: Duration = Duration::from_secs(30);
const LOG: Duration = Duration::from_secs(10);
/// What is read of a log in bytes: what kubelet keeps of one.
const LONGEST_LOG: u64 = 10 << 20;
/// Requests at once.
const TOGETHER: usize = 16;
/// What cleaning up may take, whatever the time that was given, and so much more for each pod.
const LAST: Duration = Duration::from_secs(30);
const LAST_EACH: Duration = Duration::from_millis(20);
/// Where the pods answer.
const PORT: u16 = 8080;

/// What to test.
#[derive(Debug)]
pub(super) struct Options<'a> {
    /// Which cluster; what kubectl would use where it is absent, or that of this pod.
    pub(super) kubeconfig: Option<&'a Path>,
    /// Where the test's pods run.
    pub(super) namespace: &'a str,
    /// Where the agents run.
    pub(super) agents_namespace: &'a str,
    /// The agents' DaemonSet.
    pub(super) daemonset: &'a str,
    /// How long it may take.
    pub(super) timeout: Duration,
}

/// Tests, and removes whatever it has made, also where it fails or is interrupted.
pub(super) async fn test(options: &Options<'_>, say: impl Fn(&str)) -> anyhow::Result<Matrix> {
    test_with(connect(options.kubeconfig).await?, options, say).await
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
            "no cluster: name a kubeconfig with --kubeconfig, or run this where kubectl works",
        )?,
    };
    Client::try_from(config).context("cannot make a client of the cluster")
}

async fn test_with(
    client: Client,
    options: &Options<'_>,
    say: impl Fn(&str),
) -> anyhow::Result<Matrix> {
    let mut signals = Signals::take().context("cannot take signals")?;
    let run = Run::new(client, options);
    let result = tokio::select! {
        result = run.test(&say) => result,
        () = signals.end() => Err(anyhow!("interrupted")),
    };
    if run.pods_made.get() == 0 {
        return result;
    }
    say("removing the test's pods");
    let removed = tokio::select! {
        removed = run.remove() => removed,
        () = signals.end() => Err("interrupted".to_owned()),
    };
    if let Err(why) = removed {
        let (namespace, ours) = (options.namespace, run.selector());
        say(&format!(
            "the test's pods may be left behind: {why}: kubectl delete pods -n {namespace} -l {ours}"
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
    /// Pods that there may be: none that the API server has refused.
    pods_made: std::cell::Cell<u32>,
}

/// The test's pods, as they were seen last.
#[derive(Default)]
struct Seen {
    pods: BTreeMap<String, Pod>,
    /// Why they could not be seen since.
    trouble: Option<String>,
}

/// Whom to probe, and who is left out and why.
#[derive(Default)]
struct Found {
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

    /// What a request brings, where it does in that time and before the run has to end.
    async fn within<T>(
        &self,
        limit: Duration,
        cannot: String,
        request: impl Future<Output = kube::Result<T>>,
    ) -> anyhow::Result<T> {
        match timeout_at(self.end.min(Instant::now() + limit), request).await {
            Ok(result) => result.map_err(plain).context(cannot),
            Err(_) if Instant::now() >= self.end => bail!("{cannot}: {}", self.over()),
            Err(_) => bail!("{cannot}: no answer within {} s", limit.as_secs()),
        }
    }

    fn over(&self) -> String {
        format!("the {} s of --timeout are over", self.options.timeout.as_secs_f64())
    }

    async fn test(&self, say: &impl Fn(&str)) -> anyhow::Result<Matrix> {
        let template = self.template().await?;
        let nodes: Api<Node> = Api::all(self.client.clone());
        let all = ListParams::default();
        let nodes = self.within(REQUEST, "cannot list the nodes".to_owned(), nodes.list(&all));
        let nodes = nodes.await?.items.into_iter().filter_map(|node| node.metadata.name);
        let nodes: Vec<String> = nodes.collect();
        say(&format!("starting a pod that answers on each of {} nodes", nodes.len()));
        let pods = nodes
            .iter()
            .enumerate()
            .map(|(index, node)| (format!("pod@{node}"), template.answers(index, node, PORT)));
        let (answerers, absent) = self.create(pods).await;
        let Some((_, owner)) = answerers.first() else {
            let why = absent.into_values().next();
            bail!(why.unwrap_or_else(|| "the cluster has no nodes".to_owned()));
        };
        let seen = self.answering().await;
        let mut found = Found { absent, ..Found::default() };
        for (column, pod) in &answerers {
            let addresses = seen.pod(&pod.name_any()).and_then(pods::addresses);
            let addresses = addresses.map_err(|why| format!("no answering pod: {why}"));
            found.note(column.clone(), addresses, Some(PORT));
        }
        self.own_addresses(&nodes, &mut found).await;
        say(&format!("probing {} addresses from every node and a pod on it", found.targets.len()));
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), self.options.namespace);
        let map = template.targets(&found.targets, owner)?;
        let cannot = format!("cannot create ConfigMaps in namespace {}", self.options.namespace);
        self.within(REQUEST, cannot, maps.create(&PostParams::default(), &map)).await?;
        let kinds = nodes.iter().enumerate().flat_map(|node| [("pod", node), ("node", node)]);
        let pods = kinds.map(|(kind, (index, node))| {
            // The rest is for its start and for its log.
            let time = self.end.saturating_duration_since(Instant::now()) * 3 / 4;
            let name = template.name(kind, index);
            (format!("{kind}@{node}"), template.probes(&name, node, kind == "node", time))
        });
        let (probers, silent) = self.create(pods).await;
        let mut matrix = Matrix::new(&found.targets, found.absent);
        for (row, why) in silent {
            matrix.note(row, Err(why));
        }
        self.results(probers, &mut matrix).await;
        Ok(matrix)
    }

    /// Pods of the agents' image, which may be pulled as theirs may.
    async fn template(&self) -> anyhow::Result<Template> {
        let Options { agents_namespace, daemonset, timeout, .. } = self.options;
        let sets: Api<DaemonSet> = Api::namespaced(self.client.clone(), agents_namespace);
        let cannot = format!(
            "cannot get DaemonSet {daemonset} in {agents_namespace}, whose image the test uses: \
             name it with --daemonset and --agents-namespace"
        );
        let set = self.within(REQUEST, cannot, sets.get(daemonset)).await?;
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

    /// Creates pods, several at once. Those that were, and why the others were not, by their rows or columns.
    async fn create(
        &self,
        pods: impl Iterator<Item = (String, serde_json::Result<Pod>)>,
    ) -> (Vec<(String, Pod)>, BTreeMap<String, String>) {
        let create = async |(of, pod)| (of, self.create_one(pod).await);
        let mut results = pin!(stream::iter(pods).map(create).buffer_unordered(TOGETHER));
        let (mut made, mut not) = (Vec::new(), BTreeMap::new());
        while let Some((of, result)) = results.next().await {
            match result {
                Ok(pod) => made.push((of, pod)),
                Err(error) => drop(not.insert(of, format!("{error:#}"))),
            }
        }
        (made, not)
    }

    async fn create_one(&self, pod: serde_json::Result<Pod>) -> anyhow::Result<Pod> {
        let pod = pod?;
        let cannot = format!("cannot create pods in namespace {}", self.options.namespace);
        self.pods_made.update(|pods| pods + 1);
        let parameters = PostParams::default();
        let create = async {
            match self.pods.create(&parameters, &pod).await {
                // A try before, whose answer was lost, has made it: nobody else has this name.
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    let (ours, name) = (self.pods.list(&self.ours()).await?.items, pod.name_any());
                    let made = ours.into_iter().find(|pod| pod.name_any() == name);
                    made.ok_or(kube::Error::Api(status))
                }
                made => made,
            }
        };
        let made = self.within(REQUEST, cannot, create).await;
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

    async fn look(&self, seen: &mut Seen) {
        let ours = self.ours();
        let pods =
            self.within(REQUEST, "cannot list the test's pods".to_owned(), self.pods.list(&ours));
        match pods.await {
            Ok(list) => {
                let pods = list.items.into_iter().map(|pod| (pod.name_any(), pod)).collect();
                *seen = Seen { pods, trouble: None };
            }
            Err(error) => seen.trouble = Some(format!("{error:#}")),
        }
    }

    /// When to look at that many pods again.
    fn next_look(&self, pods: usize) -> Instant {
        self.end.min(Instant::now() + interval(pods))
    }

    /// The pods, when each of them runs or never will, or when half of the time is over.
    async fn answering(&self) -> Seen {
        let now = Instant::now();
        let half = now + self.end.saturating_duration_since(now) / 2;
        let mut seen = Seen::default();
        loop {
            self.look(&mut seen).await;
            let settled = |pod: &Pod| phase(pod) == "Running" || ended(pod);
            let all = seen.trouble.is_none() && seen.pods.values().all(settled);
            if all || Instant::now() >= half {
                return seen;
            }
            sleep_until(self.next_look(seen.pods.len())).await;
        }
    }

    /// The nodes' own addresses on the overlay.
    async fn own_addresses(&self, nodes: &[String], found: &mut Found) {
        let (all, cannot) = (Api::all(self.client.clone()), "cannot list SkeinNodes".to_owned());
        match self.within(REQUEST, cannot, all.list(&ListParams::default())).await {
            Ok(records) => {
                let named = |record: SkeinNode| Some((record.metadata.name.clone()?, record));
                let records: BTreeMap<_, _> = records.items.into_iter().filter_map(named).collect();
                for node in nodes.iter().chain(records.keys()).collect::<BTreeSet<_>>() {
                    let own = pods::own_addresses(records.get(node));
                    found.note(format!("node@{node}"), own, None);
                }
            }
            // Pods are tested still.
            Err(error) => found.note("node@*".to_owned(), Err(format!("{error:#}")), None),
        }
    }

    /// What the probing pods found, as each of them ends, or why they found nothing. Logs are read while others are
    /// waited for: one that hangs takes nobody's time.
    async fn results(&self, probers: Vec<(String, Pod)>, matrix: &mut Matrix) {
        let (tell, mut told) = unbounded_channel();
        let read = async |(row, pod): (String, Result<Pod, String>)| match pod {
            Ok(pod) => (row, self.outcome(&pod).await),
            Err(why) => (row, Err(why)),
        };
        let ended = stream::poll_fn(|context| told.poll_recv(context));
        let noted = ended.map(read).buffer_unordered(TOGETHER).for_each(|(row, result)| {
            matrix.note(row, result);
            ready(())
        });
        tokio::join!(self.watch(probers, tell), noted);
    }

    /// Tells of each of those pods when it has ended, or why it does not.
    async fn watch(
        &self,
        mut probers: Vec<(String, Pod)>,
        tell: UnboundedSender<(String, Result<Pod, String>)>,
    ) {
        let mut seen = Seen::default();
        loop {
            self.look(&mut seen).await;
            let late = Instant::now() >= self.end;
            probers.retain(|(row, pod)| {
                let result = match seen.pod(&pod.name_any()) {
                    Ok(pod) if ended(pod) => Ok(pod.clone()),
                    Ok(pod) if late => Err(format!("{}: {}", self.over(), trouble(pod))),
                    Err(why) if late || seen.trouble.is_none() => Err(why),
                    _ => return true,
                };
                // Whoever is told is there as long as this is.
                let _ = tell.send((row.clone(), result));
                false
            });
            if probers.is_empty() {
                return;
            }
            sleep_until(self.next_look(seen.pods.len())).await;
        }
    }

    /// What a pod that has ended found, by its log.
    async fn outcome(&self, pod: &Pod) -> Result<Vec<Cell>, String> {
        let name = pod.name_any();
        let request = self.log(&name);
        let log = self.within(LOG, format!("cannot read the log of {name}"), request).await;
        let log = log.map_err(|error| format!("{error:#}"));
        if phase(pod) != "Succeeded" {
            return Err(pods::last_words(pod, log));
        }
        let log = log?;
        let last = log.lines().last().unwrap_or_default();
        serde_json::from_str(last).map_err(|error| format!("the log of {name}: {error}"))
    }

    /// Of a node that is somebody else's a log may have no end.
    async fn log(&self, pod: &str) -> kube::Result<String> {
        let log = self.pods.log_stream(pod, &LogParams::default()).await?;
        let mut text = Vec::new();
        log.take(LONGEST_LOG).read_to_end(&mut text).await.map_err(kube::Error::ReadEvents)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Removes the pods, also one that a request made which was under way when the test ended: until there is none
    /// twice in a row. What else there is belongs to them.
    async fn remove(&self) -> Result<(), String> {
        let end = Instant::now() + LAST + LAST_EACH * self.pods_made.get();
        let mut why = "the API server does not answer".to_owned();
        let (mut none, mut pods) = (0, 0);
        loop {
            match timeout_at(end, self.sweep()).await {
                Err(_) => return Err(why),
                Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                    return Err(status.to_string());
                }
                Ok(Err(error)) => why = format!("{:#}", plain(error)),
                Ok(Ok(left)) => match left.first() {
                    None if none == 1 => return Ok(()),
                    None => (none, pods) = (1, 0),
                    Some(pod) => {
                        (none, pods) = (0, left.len());
                        why = format!("still there: {pod} and {} more", pods - 1);
                    }
                },
            }
            if Instant::now() >= end {
                return Err(why);
            }
            sleep(interval(pods)).await;
        }
    }

    /// Deletes the pods, and says which are there still.
    async fn sweep(&self) -> kube::Result<Vec<String>> {
        let ours = self.ours();
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        self.pods.delete_collection(&now, &ours).await?;
        let left = self.pods.list_metadata(&ours).await?.items;
        Ok(left.into_iter().filter_map(|pod| pod.metadata.name).collect())
    }
}

impl Seen {
    fn pod(&self, name: &str) -> Result<&Pod, String> {
        let why = || self.trouble.clone().unwrap_or_else(|| "its pod is gone".to_owned());
        self.pods.get(name).ok_or_else(why)
    }
}

impl Found {
    fn note(&mut self, name: String, addresses: Result<Vec<IpAddr>, String>, port: Option<u16>) {
        match addresses {
            Ok(addresses) => self.targets.extend(addresses.into_iter().map(|address| Target {
                name: name.clone(),
                address,
                port,
            })),
            Err(why) => drop(self.absent.insert(name, why)),
        }
    }
}

/// An error of the API server's says it once, without all that else is in its answer.
fn plain(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => (*status).into(),
        other => other.into(),
    }
}

fn interval(pods: usize) -> Duration {
    LOOK.max(LOOK_EACH * u32::try_from(pods).unwrap_or(u32::MAX))
}
