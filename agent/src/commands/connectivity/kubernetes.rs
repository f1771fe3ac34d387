//! `skein-agent connectivity-test` in a cluster: a pod on every node that answers, then one in the pod
//! network and one in the node's of every node that probe all of them. What they found is in their logs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use kube::{Api, Client, Config};
use serde_json::json;
use tokio::time::Instant;

use super::matrix::{Matrix, Outcome, Target};
use crate::control::desired::first_host;
use crate::control::kubernetes::resource::SkeinNode;
use crate::lifecycle::Signals;

/// How often the pods are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// What cleaning up may take, whatever the time that was given.
const LAST: Duration = Duration::from_secs(10);
/// Where the pods answer.
const PORT: u16 = 8080;
/// The label of all that this makes.
const LABEL: &str = "skein.network/connectivity-test";

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
    let pods: Api<Pod> = Api::namespaced(client.clone(), options.namespace);
    let run = format!("{:08x}", rand());
    let run = Run { client, options, pods, name: run, end: Instant::now() + options.timeout };
    let result = tokio::select! {
        result = run.test(&say) => result,
        () = signals.end() => Err(anyhow!("interrupted")),
    };
    say("removing the test's pods");
    let ours = ListParams::default().labels(&run.selector());
    let parameters = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    let removed = tokio::time::timeout(LAST, run.pods.delete_collection(&parameters, &ours)).await;
    let removed = removed.map_err(|_| anyhow!("the API server does not answer"));
    if let Err(error) = removed.and_then(|removed| Ok(removed?)) {
        say(&format!(
            "the test's pods stay behind: {error}: kubectl delete pods -n {} -l {}",
            options.namespace,
            run.selector()
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

impl Run<'_> {
    fn selector(&self) -> String {
        format!("{LABEL}={}", self.name)
    }

    async fn test(&self, say: &impl Fn(&str)) -> anyhow::Result<Matrix> {
        let image = self.image().await?;
        let nodes: Api<Node> = Api::all(self.client.clone());
        let nodes = nodes.list(&ListParams::default()).await.context("cannot list the nodes")?;
        let names: Vec<String> = nodes.items.into_iter().filter_map(|n| n.metadata.name).collect();
        if names.is_empty() {
            bail!("the cluster has no nodes");
        }
        say(&format!("starting a pod that answers on each of {} nodes", names.len()));
        for (index, node) in names.iter().enumerate() {
            let arguments = json!(["probe", "--answer", PORT.to_string()]);
            self.create(&format!("answer-{index}"), node, &image, arguments, false).await?;
        }
        let mut targets = self.answering(&names).await?;
        targets.extend(self.nodes().await);
        say(&format!("probing {} addresses from every node and a pod on it", targets.len()));
        let list = serde_json::to_string(&targets)?;
        let mut probers = Vec::new();
        for (index, node) in names.iter().enumerate() {
            for (kind, host) in [("pod", false), ("node", true)] {
                let row = format!("{kind}@{node}");
                // The rest is for its start and for its log.
                let time = self.end.duration_since(Instant::now()) * 3 / 4;
                let time = time.as_secs_f64().to_string();
                let arguments =
                    json!(["probe", "--from", row, "--targets", list, "--timeout", time]);
                let pod = format!("{kind}-{index}");
                let pod = self.create(&pod, node, &image, arguments, host).await?;
                probers.push(Prober { pod, row });
            }
        }
        self.results(probers).await
    }

    /// The agents' image, and whether it may be pulled.
    async fn image(&self) -> anyhow::Result<(String, Option<String>)> {
        let Options { agents_namespace, daemonset, .. } = self.options;
        let sets: Api<DaemonSet> = Api::namespaced(self.client.clone(), agents_namespace);
        let set = sets.get(daemonset).await.with_context(|| {
            format!(
                "cannot get DaemonSet {daemonset} in {agents_namespace}, whose image the test uses: \
                 name it with --daemonset and --agents-namespace"
            )
        })?;
        let template = set.spec.and_then(|spec| spec.template.spec);
        let container = template.and_then(|spec| spec.containers.into_iter().next());
        let container = container.context("the agents' DaemonSet has no container")?;
        let image = container.image.context("the agents' container has no image")?;
        Ok((image, container.image_pull_policy))
    }

    async fn create(
        &self,
        name: &str,
        node: &str,
        (image, pull): &(String, Option<String>),
        arguments: serde_json::Value,
        host: bool,
    ) -> anyhow::Result<String> {
        let name = format!("skein-connectivity-{}-{name}", self.name);
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": name, "labels": { LABEL: self.name } },
            "spec": {
                "nodeName": node,
                "hostNetwork": host,
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 0,
                "automountServiceAccountToken": false,
                // Should nobody be there to remove it.
                "activeDeadlineSeconds": self.options.timeout.as_secs() + 60,
                "tolerations": [{ "operator": "Exists" }],
                "containers": [{
                    "name": "probe",
                    "image": image,
                    "imagePullPolicy": pull,
                    "command": ["/usr/bin/skein-agent"],
                    "args": arguments,
                    "securityContext": {
                        "allowPrivilegeEscalation": false,
                        "readOnlyRootFilesystem": true,
                        "capabilities": { "drop": ["ALL"], "add": ["NET_RAW"] },
                    },
                }],
            },
        });
        let pod: Pod = serde_json::from_value(pod)?;
        let created = self.pods.create(&PostParams::default(), &pod).await;
        created.with_context(|| {
            format!("cannot create pods in namespace {}", self.options.namespace)
        })?;
        Ok(name)
    }

    async fn ours(&self) -> anyhow::Result<BTreeMap<String, Pod>> {
        let ours = ListParams::default().labels(&self.selector());
        let list = self.pods.list(&ours).await.context("cannot list the test's pods")?;
        Ok(list
            .items
            .into_iter()
            .filter_map(|pod| Some((pod.metadata.name.clone()?, pod)))
            .collect())
    }

    /// The addresses of the pods that answer, as far as they run when half of the time is over.
    async fn answering(&self, nodes: &[String]) -> anyhow::Result<Vec<Target>> {
        let end = Instant::now() + self.end.duration_since(Instant::now()) / 2;
        loop {
            let pods = self.ours().await?;
            let running: Vec<_> =
                pods.values().filter(|pod| phase(pod) == "Running").flat_map(targets).collect();
            let found = pods.values().filter(|pod| phase(pod) == "Running").count();
            if found == nodes.len() || (Instant::now() > end && !running.is_empty()) {
                return Ok(running);
            }
            if Instant::now() > end {
                let why: Vec<_> = pods.values().map(trouble).collect();
                bail!("no pod runs within the time: {}", why.join("; "));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The nodes' own addresses on the overlay.
    async fn nodes(&self) -> Vec<Target> {
        let all: Api<SkeinNode> = Api::all(self.client.clone());
        // Without them pods are tested still.
        let list =
            all.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default();
        list.iter()
            .flat_map(|node| {
                let name = node.metadata.name.clone().unwrap_or_default();
                let cidrs = node.spec.pod_cidrs.iter().filter_map(|cidr| cidr.parse().ok());
                let name = format!("node@{name}");
                cidrs
                    .map(move |cidr| Target {
                        name: name.clone(),
                        address: first_host(&cidr),
                        port: None,
                    })
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    /// What the probing pods found, as each of them ends.
    async fn results(&self, mut probers: Vec<Prober>) -> anyhow::Result<Matrix> {
        let mut outcomes: Vec<Outcome> = Vec::new();
        let mut silent = Vec::new();
        while !probers.is_empty() {
            let pods = self.ours().await?;
            let late = Instant::now() > self.end;
            let mut left = Vec::new();
            for prober in probers {
                let pod = pods.get(&prober.pod);
                match pod.map(phase).unwrap_or("Unknown") {
                    "Succeeded" => {
                        let log = self.pods.logs(&prober.pod, &LogParams::default()).await;
                        let log = log.with_context(|| format!("the log of {}", prober.pod))?;
                        let last = log.lines().last().unwrap_or_default();
                        match serde_json::from_str::<Vec<Outcome>>(last) {
                            Ok(found) => outcomes.extend(found),
                            Err(error) => silent.push((prober.row, error.to_string())),
                        }
                    }
                    "Failed" => {
                        let log = self.pods.logs(&prober.pod, &LogParams::default()).await;
                        let log = log.unwrap_or_default();
                        let last = log.lines().last().unwrap_or("it says nothing");
                        silent.push((prober.row, last.to_owned()));
                    }
                    _ if late => {
                        let why = pod.map_or_else(|| "it is gone".to_owned(), trouble);
                        silent.push((prober.row, why));
                    }
                    _ => left.push(prober),
                }
            }
            probers = left;
            if !probers.is_empty() {
                tokio::time::sleep(LOOK).await;
            }
        }
        let mut matrix = Matrix::new(outcomes);
        silent.into_iter().for_each(|(row, why)| matrix.silent(&row, why));
        Ok(matrix)
    }
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Unknown")
}

/// Why a pod does not run.
fn trouble(pod: &Pod) -> String {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let status = pod.status.as_ref();
    let containers = status.and_then(|status| status.container_statuses.as_ref());
    let waiting = containers.into_iter().flatten().find_map(|container| {
        let waiting = container.state.as_ref()?.waiting.as_ref()?;
        Some(waiting.message.clone().or_else(|| waiting.reason.clone()).unwrap_or_default())
    });
    let message = status.and_then(|status| status.message.clone());
    format!("{name} is {}: {}", phase(pod), waiting.or(message).unwrap_or_default())
}

fn targets(pod: &Pod) -> Vec<Target> {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
    let status = pod.status.as_ref();
    let ips = status.and_then(|status| status.pod_ips.as_ref()).into_iter().flatten();
    let target =
        |address: IpAddr| Target { name: format!("pod@{node}"), address, port: Some(PORT) };
    ips.filter_map(|ip| ip.ip.parse().ok()).map(target).collect()
}

fn rand() -> u32 {
    let mut bytes = [0; 4];
    // Only a name: two tests at once are to be told apart.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    u32::from_be_bytes(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http::{Method, Request, Response};
    use kube::client::Body;
    use serde_json::Value;

    use super::*;

    /// As much of an API server as the test needs: pods run as soon as they are made.
    #[derive(Default)]
    struct Fake {
        pods: Vec<Value>,
        removed: usize,
        /// Whether probing pods fail.
        broken: bool,
    }

    impl Fake {
        fn answer(&mut self, method: &Method, path: &str, body: &[u8]) -> Vec<u8> {
            let list = |kind: &str, items: Vec<Value>| json!({ "kind": kind, "apiVersion": "v1", "metadata": {}, "items": items });
            let node = |name: &str| json!({ "metadata": { "name": name } });
            let value = match (method, path) {
                (&Method::GET, path) if path.contains("/daemonsets/") => json!({
                    "metadata": { "name": "skein" },
                    "spec": { "selector": {}, "template": { "spec": { "containers": [{
                        "name": "agent", "image": "skein:test", "imagePullPolicy": "Never",
                    }] } } },
                }),
                (&Method::GET, "/api/v1/nodes") => {
                    list("NodeList", vec![node("node1"), node("node2")])
                }
                (&Method::GET, path) if path.ends_with("/skeinnodes") => {
                    let spec = json!({
                        "publicKey": "x", "endpoints": [], "podCIDRs": ["10.244.1.0/24"],
                    });
                    list(
                        "SkeinNodeList",
                        vec![json!({
                            "apiVersion": "skein.network/v1alpha1", "kind": "SkeinNode",
                            "metadata": { "name": "node1" }, "spec": spec,
                        })],
                    )
                }
                (&Method::POST, _) => {
                    let mut pod: Value = serde_json::from_slice(body).unwrap();
                    let answers = pod["spec"]["containers"][0]["args"][1] == "--answer";
                    let phase = match (answers, self.broken) {
                        (true, _) => "Running",
                        (false, true) => "Failed",
                        (false, false) => "Succeeded",
                    };
                    let ip = format!("10.244.{}.9", self.pods.len() + 1);
                    pod["status"] = json!({ "phase": phase, "podIPs": [{ "ip": ip }] });
                    self.pods.push(pod.clone());
                    pod
                }
                (&Method::GET, path) if path.ends_with("/log") => return self.log(path),
                (&Method::DELETE, _) => {
                    self.removed += self.pods.len();
                    self.pods.clear();
                    list("PodList", vec![])
                }
                (&Method::GET, _) => list("PodList", self.pods.clone()),
                other => panic!("nobody asks that: {other:?}"),
            };
            value.to_string().into_bytes()
        }

        /// What a pod says that probes as it was told.
        fn log(&self, path: &str) -> Vec<u8> {
            let name = path.split('/').nth_back(1).unwrap();
            let pod = self.pods.iter().find(|pod| pod["metadata"]["name"] == name).unwrap();
            if self.broken {
                return b"no such option\n".to_vec();
            }
            let arguments = &pod["spec"]["containers"][0]["args"];
            let from = arguments[2].as_str().unwrap();
            let targets: Vec<Target> =
                serde_json::from_str(arguments[4].as_str().unwrap()).unwrap();
            let outcomes = targets.iter().map(|target| Outcome {
                from: from.to_owned(),
                to: target.name.clone(),
                address: target.address,
                protocol: crate::commands::connectivity::matrix::Protocol::Icmp,
                bytes: 84,
                round_trip_us: Some(7),
                error: (from == "pod@node2" && target.name == "node@node1")
                    .then(|| "no answer".to_owned()),
            });
            let outcomes: Vec<_> = outcomes.collect();
            format!("a line before\n{}\n", serde_json::to_string(&outcomes).unwrap()).into_bytes()
        }
    }

    async fn run(broken: bool) -> (anyhow::Result<Matrix>, Arc<Mutex<Fake>>) {
        let fake = Arc::new(Mutex::new(Fake { broken, ..Fake::default() }));
        let shared = Arc::clone(&fake);
        let service = tower::service_fn(move |request: Request<Body>| {
            let fake = Arc::clone(&shared);
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect_bytes().await?;
                let path = parts.uri.path().to_owned();
                let text = fake.lock().unwrap().answer(&parts.method, &path, &body);
                Ok::<_, kube::Error>(Response::new(Body::from(text)))
            }
        });
        let options = Options {
            kubeconfig: None,
            namespace: "default",
            agents_namespace: "kube-system",
            daemonset: "skein",
            timeout: Duration::from_secs(20),
        };
        let matrix = test_with(Client::new(service, "default"), &options, |_| {}).await;
        (matrix, fake)
    }

    #[tokio::test]
    async fn every_node_and_a_pod_on_it_probe_all_and_nothing_is_left() {
        let (matrix, fake) = run(false).await;
        let matrix = matrix.unwrap();
        // Two nodes and two pods, each to two pods and the one node whose record is there.
        assert_eq!((matrix.total(), matrix.failed()), (12, 1));
        let text = matrix.render();
        assert!(text.contains("pod@node2") && text.contains("FAIL"), "{text}");
        let fake = fake.lock().unwrap();
        assert!(fake.pods.is_empty());
        assert_eq!(fake.removed, 6);
    }

    #[tokio::test]
    async fn pods_that_fail_are_rows_that_fail() {
        let (matrix, fake) = run(true).await;
        let matrix = matrix.unwrap();
        assert_eq!((matrix.total(), matrix.failed()), (4, 4));
        assert!(matrix.render().contains("no such option"));
        assert!(fake.lock().unwrap().pods.is_empty());
    }
}
