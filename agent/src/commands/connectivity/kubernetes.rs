//! `skein-agent connectivity-test` in a cluster: a pod on every node that answers, then one in the pod
//! network and one in the node's of every node that probe all of them. What they found is in their logs.

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use kube::{Api, Client, Config};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::matrix::{Cell, Matrix, Target};
use super::pods::{self, LABEL, Template, phase, trouble};
use super::rand;
use crate::control::kubernetes::resource::SkeinNode;
use crate::lifecycle::Signals;

/// How often the pods are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// What cleaning up may take, whatever the time that was given.
const LAST: Duration = Duration::from_secs(30);
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
}

/// A pod that probes.
struct Prober {
    pod: String,
    /// Its row of the matrix.
    row: String,
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
        Self { client, options, pods, name, end: Instant::now() + options.timeout }
    }

    fn selector(&self) -> String {
        format!("{LABEL}={}", self.name)
    }

    /// What a request brings, where it does before the run has to end.
    async fn within<T>(
        &self,
        cannot: String,
        request: impl Future<Output = kube::Result<T>>,
    ) -> anyhow::Result<T> {
        match timeout_at(self.end, request).await {
            Ok(result) => result.context(cannot),
            Err(_) => bail!("{cannot}: {}", self.over()),
        }
    }

    fn over(&self) -> String {
        format!("the {} s of --timeout are over", self.options.timeout.as_secs_f64())
    }

    async fn look_again(&self) {
        sleep_until(self.end.min(Instant::now() + LOOK)).await;
    }

    async fn test(&self, say: &impl Fn(&str)) -> anyhow::Result<Matrix> {
        let template = self.template().await?;
        let nodes: Api<Node> = Api::all(self.client.clone());
        let all = ListParams::default();
        let nodes = self.within("cannot list the nodes".to_owned(), nodes.list(&all)).await?;
        let nodes: Vec<String> = nodes.items.into_iter().filter_map(|n| n.metadata.name).collect();
        say(&format!("starting a pod that answers on each of {} nodes", nodes.len()));
        let mut owner = None;
        for (index, node) in nodes.iter().enumerate() {
            let pod = self.create(&template.answers(index, node, PORT)?).await?;
            owner.get_or_insert(pod);
        }
        let owner = owner.context("the cluster has no nodes")?;
        let pods = self.answering(nodes.len()).await?;
        let found = self.targets(&template, &nodes, &pods).await;
        say(&format!("probing {} addresses from every node and a pod on it", found.targets.len()));
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), self.options.namespace);
        let map = template.targets(&found.targets, &owner)?;
        let cannot = format!("cannot create ConfigMaps in namespace {}", self.options.namespace);
        self.within(cannot, maps.create(&PostParams::default(), &map)).await?;
        let mut probers = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            for (kind, host) in [("pod", false), ("node", true)] {
                let (pod, row) = (template.name(kind, index), format!("{kind}@{node}"));
                // The rest is for its start and for its log.
                let time = self.end.duration_since(Instant::now()) * 3 / 4;
                self.create(&template.probes(&pod, node, host, time)?).await?;
                probers.push(Prober { pod, row });
            }
        }
        let mut matrix = Matrix::new(&found.targets, found.absent);
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
        let set = self.within(cannot, sets.get(daemonset)).await?;
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

    async fn create(&self, pod: &Pod) -> anyhow::Result<Pod> {
        let cannot = format!("cannot create pods in namespace {}", self.options.namespace);
        self.within(cannot, self.pods.create(&PostParams::default(), pod)).await
    }

    async fn ours(&self) -> anyhow::Result<BTreeMap<String, Pod>> {
        let ours = ListParams::default().labels(&self.selector());
        let list = self.within("cannot list the test's pods".to_owned(), self.pods.list(&ours));
        let named = |pod: Pod| Some((pod.metadata.name.clone()?, pod));
        Ok(list.await?.items.into_iter().filter_map(named).collect())
    }

    /// The pods, when as many run as there are nodes, or when half of the time is over.
    async fn answering(&self, nodes: usize) -> anyhow::Result<BTreeMap<String, Pod>> {
        let now = Instant::now();
        let half = now + self.end.duration_since(now) / 2;
        loop {
            let pods = self.ours().await?;
            let running = pods.values().filter(|pod| phase(pod) == "Running").count();
            if running == nodes || Instant::now() >= half {
                return Ok(pods);
            }
            self.look_again().await;
        }
    }

    /// The pods that answer, and the nodes' own addresses on the overlay.
    async fn targets(
        &self,
        template: &Template,
        nodes: &[String],
        pods: &BTreeMap<String, Pod>,
    ) -> Found {
        let mut found = Found::default();
        for (index, node) in nodes.iter().enumerate() {
            let pod = pods.get(&template.name("answer", index));
            let addresses = pod.ok_or_else(|| "it is gone".to_owned()).and_then(pods::addresses);
            let addresses = addresses.map_err(|why| format!("no answering pod: {why}"));
            found.note(format!("pod@{node}"), addresses, Some(PORT));
        }
        let (all, cannot) = (Api::all(self.client.clone()), "cannot list SkeinNodes".to_owned());
        match self.within(cannot, all.list(&ListParams::default())).await {
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
        found
    }

    /// What the probing pods found, as each of them ends, or why they found nothing.
    async fn results(&self, mut probers: Vec<Prober>, matrix: &mut Matrix) {
        let mut pods = BTreeMap::new();
        while !probers.is_empty() {
            let listed = self.ours().await.map(|ours| pods = ours);
            let late = Instant::now() >= self.end;
            let mut left = Vec::new();
            for prober in probers {
                let pod = pods.get(&prober.pod);
                let result = match (pod, &listed) {
                    (Some(pod), _) if phase(pod) == "Succeeded" => self.outcomes(&prober.pod).await,
                    (Some(pod), _) if phase(pod) == "Failed" => {
                        Err(pods::last_words(pod, self.log(&prober.pod).await))
                    }
                    _ if !late => {
                        left.push(prober);
                        continue;
                    }
                    (None, Err(error)) => Err(format!("{error:#}")),
                    _ => {
                        let why = pod.map_or_else(|| "its pod is gone".to_owned(), trouble);
                        Err(format!("{}: {why}", self.over()))
                    }
                };
                matrix.note(prober.row, result);
            }
            probers = left;
            if !probers.is_empty() {
                self.look_again().await;
            }
        }
    }

    async fn outcomes(&self, pod: &str) -> Result<Vec<Cell>, String> {
        let log = self.log(pod).await?;
        let last = log.lines().last().unwrap_or_default();
        serde_json::from_str(last).map_err(|error| format!("the log of {pod}: {error}"))
    }

    async fn log(&self, pod: &str) -> Result<String, String> {
        let parameters = LogParams::default();
        let cannot = format!("cannot read the log of {pod}");
        let log = self.within(cannot, self.pods.logs(pod, &parameters)).await;
        log.map_err(|error| format!("{error:#}"))
    }

    /// Removes the pods, also one that a request made which was under way when the test ended: until there is none
    /// twice in a row. What else there is belongs to them.
    async fn remove(&self) -> Result<(), String> {
        let end = Instant::now() + LAST;
        let mut why = "the API server does not answer".to_owned();
        let mut none = 0;
        loop {
            match timeout_at(end, self.sweep()).await {
                Err(_) => return Err(why),
                Ok(Err(error)) => (none, why) = (0, error.to_string()),
                Ok(Ok(left)) => match left.first() {
                    None if none == 1 => return Ok(()),
                    None => none = 1,
                    Some(pod) => {
                        (none, why) =
                            (0, format!("still there: {pod} and {} more", left.len() - 1));
                    }
                },
            }
            if Instant::now() >= end {
                return Err(why);
            }
            sleep(LOOK).await;
        }
    }

    /// Deletes the pods, and says which are there still.
    async fn sweep(&self) -> kube::Result<Vec<String>> {
        let ours = ListParams::default().labels(&self.selector());
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        self.pods.delete_collection(&now, &ours).await?;
        let left = self.pods.list(&ours).await?.items;
        Ok(left.into_iter().filter_map(|pod| pod.metadata.name).collect())
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
