//! `skein-agent uninstall`: removes Skein from every node of a cluster, for the chart's hook.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::Api;
use kube::api::{DeleteParams, ListParams, ObjectMeta, PostParams};
use tokio::time::Instant;

use super::client::{self, Requests};
use super::resource::SkeinNode;
use crate::failure::Failure;

/// Annotation that Helm 3.2 and later sets on every object of a release, hooks excepted.
const HELM_RELEASE: &str = "meta.helm.sh/release-name";
/// Field managers of kubectl that write a whole object. Others that begin with `kubectl-` write a
/// part of it (`kubectl-rollout`, `kubectl-annotate`).
const KUBECTL_WRITERS: [&str; 3] =
    ["kubectl-client-side-apply", "kubectl-create", "kubectl-replace"];
/// Effect on the pods that are still running, for the log of the Job.
const PODS_WARNING: &str = "warning: pods that still run lose their network and stay Terminating when \
    deleted, until another network's CNI configuration is on their node";

/// Interval at which the state of the cluster is requested.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Time for stopping the cleanup DaemonSet after the timeout has expired.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Objects and limits of an [`uninstall`].
#[derive(Debug)]
pub struct Options<'a> {
    /// Namespace of the agents.
    pub namespace: &'a str,
    /// Name of the agents' DaemonSet.
    pub daemonset: &'a str,
    /// ConfigMap of the same release. Its annotations name the release after an earlier attempt has
    /// deleted the DaemonSet.
    pub configmap: Option<&'a str>,
    /// Uninstalls also if no Helm release owns the DaemonSet.
    pub without_helm: bool,
    /// Label selector of the DaemonSet's pods, which may exist without the DaemonSet.
    pub selector: &'a str,
    /// Path of the manifest (YAML) of the DaemonSet that removes Skein from the nodes.
    pub cleanup: &'a Path,
    /// Timeout of the whole removal.
    pub timeout: Duration,
    /// Kubeconfig of the cluster; `None` for the cluster of this pod.
    pub kubeconfig: Option<&'a Path>,
}

/// Stops the agents, cleans up every node, and removes the SkeinNodes. Calls `say` with each step.
///
/// # Errors
///
/// [`Failure::Usage`] if no Helm release owns the DaemonSet and `without_helm` is not set; in that
/// case nothing is changed. [`Failure::Runtime`] if a request is refused, or if a node is not clean
/// when `timeout` expires.
pub async fn uninstall(options: &Options<'_>, say: impl Fn(&str)) -> Result<(), Failure> {
    let (client, _) =
        client::connect(options.kubeconfig, &Requests::new().context("metrics")?).await?;
    let end = Instant::now() + options.timeout;
    if !options.without_helm {
        check_release(options, &client, end).await?;
    }
    Ok(remove(options, &client, end, say).await?)
}

/// Refuses to uninstall a DaemonSet that no Helm release owns: a rendered pre-delete hook that is
/// applied like any other object would start this command right after the installation.
async fn check_release(
    options: &Options<'_>,
    client: &kube::Client,
    end: Instant,
) -> Result<(), Failure> {
    let (namespace, name) = (options.namespace, options.daemonset);
    let daemonsets: Api<DaemonSet> = Api::namespaced(client.clone(), namespace);
    let found = within(end, daemonsets.get_opt(name)).await?;
    let found = found.with_context(|| format!("cannot read DaemonSet {name}"))?;
    let mut metadata = found.map(|daemonset| daemonset.metadata);
    if let (None, Some(name)) = (&metadata, options.configmap) {
        let configmaps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
        let found = within(end, configmaps.get_opt(name)).await?;
        let found = found.with_context(|| format!("cannot read ConfigMap {name}"))?;
        metadata = found.map(|configmap| configmap.metadata);
    }
    let reason = match metadata {
        None => "does not exist".to_owned(),
        Some(metadata) if !annotated(&metadata, HELM_RELEASE) => {
            format!("belongs to no Helm release (annotation {HELM_RELEASE})")
        }
        Some(metadata) => match last_writer(&metadata) {
            Some(manager) if !is_helm(manager) => {
                format!("was last written by {manager}, not by Helm (metadata.managedFields)")
            }
            _ => return Ok(()),
        },
    };
    Err(Failure::Usage(format!(
        "refused to uninstall: DaemonSet {namespace}/{name} {reason}. If the chart was rendered and \
         applied without Helm, delete this Job and render with `helm template --no-hooks \
         --include-crds`. To remove Skein from every node all the same, pass --without-helm (chart \
         value cleanup.withoutHelm=true)."
    )))
}

fn annotated(metadata: &ObjectMeta, annotation: &str) -> bool {
    metadata.annotations.as_ref().is_some_and(|all| all.contains_key(annotation))
}

/// Field manager of the newest write of the whole object; `None` if the API server names none. Of
/// two managers in the same second, the one that is not Helm counts.
fn last_writer(metadata: &ObjectMeta) -> Option<&str> {
    let entries = metadata.managed_fields.iter().flatten();
    let main = entries.filter(|entry| entry.subresource.as_deref().unwrap_or_default().is_empty());
    let writes = main.filter_map(|entry| Some((entry.manager.as_deref()?, entry.time.as_ref())));
    let whole = writes.filter(|(manager, _)| {
        !manager.starts_with("kubectl-") || KUBECTL_WRITERS.contains(manager)
    });
    whole.max_by_key(|(manager, time)| (*time, !is_helm(manager))).map(|(manager, _)| manager)
}

/// Returns `true` for field managers of programs that contain Helm: `helm` itself, Flux
/// (`helm-controller`), Terraform (`terraform-provider-helm_…`).
fn is_helm(manager: &str) -> bool {
    manager.contains("helm")
}

async fn remove(
    options: &Options<'_>,
    client: &kube::Client,
    end: Instant,
    say: impl Fn(&str),
) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(options.cleanup)
        .with_context(|| format!("cannot read {}", options.cleanup.display()))?;
    let cleanup: DaemonSet = serde_saphyr::from_str(&text)
        .with_context(|| format!("{} is not a DaemonSet", options.cleanup.display()))?;
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
            let left = left.iter().map(pod_on_node).collect::<Vec<_>>().join(", ");
            Ok(match left.is_empty() {
                true => Progress::Done(()),
                false => Progress::Pending(format!("remaining pods: {left}")),
            })
        });
        gone.await.with_context(|| format!("the pods of DaemonSet {name} do not end"))
    };

    say(PODS_WARNING);
    say(&format!("stopping the agents (DaemonSet {})", options.daemonset));
    stop(end, options.daemonset, options.selector).await?;

    let name = cleanup.metadata.name.clone().context("the cleanup DaemonSet has no name")?;
    say(&format!("cleaning up every node (DaemonSet {name})"));
    let labels = cleanup.spec.as_ref().and_then(|spec| spec.selector.match_labels.as_ref());
    let labels = labels.into_iter().flatten().map(|(key, value)| format!("{key}={value}"));
    let selector = labels.collect::<Vec<_>>().join(",");
    // An empty selector selects every pod of the namespace.
    ensure!(!selector.is_empty(), "the cleanup DaemonSet selects no pods by labels");
    // Removes the DaemonSet of an interrupted attempt.
    stop(end, &name, &selector).await?;
    let parameters = PostParams::default();
    let created = within(end, daemonsets.create(&parameters, &cleanup));
    created.await?.with_context(|| format!("cannot create DaemonSet {name}"))?;
    let cleaned = wait(end, async || {
        let now = daemonsets.get(&name).await?;
        let generation = now.metadata.generation;
        let status = now.status.unwrap_or_default();
        let seen = status.observed_generation == generation;
        let done = status.number_ready == status.desired_number_scheduled;
        if seen && done {
            return Ok(Progress::Done(status.desired_number_scheduled));
        }
        let left = pods.list(&ListParams::default().labels(&selector)).await?.items;
        let left: Vec<_> = left.iter().filter(|pod| !is_ready(pod)).filter_map(node).collect();
        Ok(Progress::Pending(format!("nodes not clean yet: {}", left.join(", "))))
    });
    let cleaned = cleaned.await;
    // Stopped after a failure as well: the DaemonSet would clean a node that returns later, which
    // may have another installation by then.
    let end = end.max(Instant::now() + STOP_TIMEOUT);
    let stopped = stop(end, &name, &selector).await;
    let nodes = cleaned?;
    stopped?;

    let skeinnodes: Api<SkeinNode> = Api::all(client.clone());
    let (parameters, all) = (DeleteParams::default(), ListParams::default());
    let deleted = within(end, skeinnodes.delete_collection(&parameters, &all));
    deleted.await?.context("cannot remove the SkeinNodes")?;
    say(&format!("{nodes} {} clean", if nodes == 1 { "node is" } else { "nodes are" }));
    Ok(())
}

fn node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

/// Returns the pod's name and its node, for error messages.
fn pod_on_node(pod: &Pod) -> String {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    node(pod).map_or_else(|| name.to_owned(), |node| format!("{name} on node {node}"))
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| &status.conditions).flatten();
    conditions.filter(|condition| condition.type_ == "Ready").any(|ready| ready.status == "True")
}

/// Sends one request.
///
/// # Errors
/// An error if the API server does not answer before `end`.
async fn within<T>(
    end: Instant,
    request: impl Future<Output = kube::Result<T>>,
) -> anyhow::Result<kube::Result<T>> {
    let answer = tokio::time::timeout_at(end, request).await;
    answer.context("timed out: the API server does not answer")
}

/// State of an operation that takes time.
enum Progress<T> {
    /// Result of the complete operation.
    Done(T),
    /// Description of the present state.
    Pending(String),
}

/// Calls `poll` until the operation is complete, and returns its result.
///
/// # Errors
/// An error with the last state if `poll` returns no result before `end`.
async fn wait<T>(
    end: Instant,
    poll: impl AsyncFn() -> kube::Result<Progress<T>>,
) -> anyhow::Result<T> {
    loop {
        let state = match within(end, poll()).await? {
            Ok(Progress::Done(found)) => return Ok(found),
            Ok(Progress::Pending(state)) => state,
            Err(error) => error.to_string(),
        };
        if Instant::now() + POLL_INTERVAL > end {
            return Err(anyhow!("timed out: {state}"));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::Router;
    use axum::extract::{Request, State};
    use axum::http::StatusCode;
    use axum::response::{IntoResponse, Response};
    use serde_json::{Value, json};

    use super::*;

    /// An API server that holds one DaemonSet and one ConfigMap, each by its metadata without the
    /// name, and a pod that does not end.
    #[derive(Default)]
    struct FakeApi {
        daemonset: Option<Value>,
        configmap: Option<Value>,
        pod: Option<Value>,
        /// Method and path of every request that changes something.
        writes: Mutex<Vec<String>>,
    }

    impl FakeApi {
        fn answer(&self, request: &Request) -> Response {
            let (method, path) = (request.method().as_str(), request.uri().path());
            if method != "GET" {
                self.writes.lock().unwrap().push(format!("{method} {path}"));
            }
            let object = |metadata: &Option<Value>| {
                let mut metadata = metadata.clone()?;
                metadata["name"] = "skein".into();
                Some(json!({ "metadata": metadata }))
            };
            let cleaned = json!({
                "metadata": { "name": "skein-cleanup", "generation": 1 },
                "status": {
                    "observedGeneration": 1, "desiredNumberScheduled": 2, "numberReady": 2,
                    "currentNumberScheduled": 2, "numberMisscheduled": 0,
                },
            });
            let pods = json!({ "metadata": {}, "items": Vec::from_iter(&self.pod) });
            let success = json!({ "kind": "Status", "metadata": {}, "status": "Success" });
            let body = match (method, path.rsplit('/').next().unwrap_or_default()) {
                ("GET", "skein") if path.contains("/daemonsets/") => object(&self.daemonset),
                ("GET", "skein") => object(&self.configmap),
                ("GET", "skein-cleanup") | ("POST", _) => Some(cleaned),
                ("GET", "pods") => Some(pods),
                _ => Some(success),
            };
            match body {
                Some(body) => axum::Json(body).into_response(),
                None => {
                    let status = json!({
                        "kind": "Status", "status": "Failure", "code": 404, "reason": "NotFound",
                        "message": "not found", "metadata": {},
                    });
                    (StatusCode::NOT_FOUND, axum::Json(status)).into_response()
                }
            }
        }
    }

    /// Uninstalls from the cluster of this API server; returns the result, the writes and the log.
    async fn run(api: FakeApi, without_helm: bool) -> (Result<(), Failure>, Vec<String>, String) {
        let api = Arc::new(api);
        let handle =
            |State(api): State<Arc<FakeApi>>, request: Request| async move { api.answer(&request) };
        let router = Router::new().fallback(handle).with_state(Arc::clone(&api));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move { axum::serve(listener, router).await });
        let directory = tempfile::tempdir().unwrap();
        let (kubeconfig, cleanup) =
            (directory.path().join("kubeconfig"), directory.path().join("cleanup.yaml"));
        let cluster = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "a", "users": [],
            "contexts": [{ "name": "a", "context": { "cluster": "a" } }],
            "clusters": [{ "name": "a", "cluster": { "server": format!("http://{server}") } }],
        });
        std::fs::write(&kubeconfig, cluster.to_string()).unwrap();
        let manifest = json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "skein-cleanup" },
            "spec": {
                "selector": { "matchLabels": { "a": "b" } },
                "template": { "metadata": {}, "spec": { "containers": [] } },
            },
        });
        std::fs::write(&cleanup, manifest.to_string()).unwrap();
        let options = Options {
            namespace: "net",
            daemonset: "skein",
            configmap: Some("skein"),
            without_helm,
            selector: "a=b",
            cleanup: &cleanup,
            timeout: Duration::from_secs(3),
            kubeconfig: Some(&kubeconfig),
        };
        let log = Mutex::new(String::new());
        let say = |line: &str| *log.lock().unwrap() += &format!("{line}\n");
        let result = uninstall(&options, say).await;
        serving.abort();
        let writes = api.writes.lock().unwrap().clone();
        (result, writes, log.into_inner().unwrap())
    }

    const AGENTS: &str = "DELETE /apis/apps/v1/namespaces/net/daemonsets/skein";

    /// Metadata of an object of the release, written by these managers, one per minute.
    fn release(writers: &[(&str, &str)]) -> Value {
        let entry = |(minute, (manager, subresource)): (usize, &(&str, &str))| {
            json!({
                "manager": manager, "operation": "Update", "subresource": subresource,
                "time": format!("2026-01-01T00:{minute:02}:00Z"),
            })
        };
        let mut entries = writers.iter().enumerate().map(entry).collect::<Vec<_>>();
        // The API server sorts by operation and manager, not by time.
        entries.reverse();
        json!({ "annotations": { HELM_RELEASE: "skein" }, "managedFields": entries })
    }

    #[tokio::test]
    async fn uninstall_after_apply_over_helm_release_is_refused() {
        for manager in ["kubectl", "kubectl-client-side-apply", "kubectl-replace", "argocd"] {
            let writers = [("helm", ""), (manager, ""), ("kubectl-rollout", ""), ("kcm", "status")];
            for (daemonset, configmap) in
                [(Some(release(&writers)), None), (None, Some(release(&writers)))]
            {
                let api = FakeApi { daemonset, configmap, ..FakeApi::default() };
                let (result, writes, _) = run(api, false).await;
                let Err(Failure::Usage(error)) = result else { panic!("{result:?}") };
                let reason = format!("was last written by {manager}, not by Helm");
                assert!(error.contains(&reason), "the error must name {manager}: {error}");
                assert!(writes.is_empty(), "a refused uninstall must change nothing: {writes:?}");
            }
        }
    }

    #[tokio::test]
    async fn uninstall_of_installation_adopted_by_helm_proceeds() {
        for (first, last) in [
            ("kubectl-client-side-apply", "helm"),
            ("kubectl", "helm"),
            ("argocd", "helm-controller"),
            ("kubectl-create", "terraform-provider-helm_v3.0.2_x5"),
        ] {
            let mut daemonset = release(&[
                (first, ""),
                (last, ""),
                ("kubectl-rollout", ""),
                ("kube-controller-manager", "status"),
            ]);
            // Left by the first kubectl apply.
            daemonset["annotations"]["kubectl.kubernetes.io/last-applied-configuration"] =
                "{}".into();
            let api = FakeApi { daemonset: Some(daemonset), ..FakeApi::default() };
            let (result, writes, _) = run(api, false).await;
            result.unwrap();
            assert_eq!(writes.first().map(String::as_str), Some(AGENTS), "{first}, then {last}");
        }
    }

    #[test]
    fn writers_of_the_same_second_count_against_helm() {
        let time = "2026-01-01T00:00:00Z";
        for managers in [["helm", "kubectl"], ["kubectl", "helm"]] {
            let entries = managers.map(|manager| json!({ "manager": manager, "time": time }));
            let metadata = json!({ "managedFields": entries });
            let metadata: ObjectMeta = serde_json::from_value(metadata).unwrap();
            assert_eq!(last_writer(&metadata), Some("kubectl"));
        }
        assert_eq!(last_writer(&ObjectMeta::default()), None);
    }

    #[tokio::test]
    async fn uninstall_without_helm_release_changes_nothing() {
        let helm = release(&[]);
        for (daemonset, configmap, reason) in [
            (Some(json!({})), Some(helm), "belongs to no Helm release"),
            (None, Some(json!({})), "belongs to no Helm release"),
            (None, None, "does not exist"),
        ] {
            let api = FakeApi { daemonset, configmap, ..FakeApi::default() };
            let (result, writes, _) = run(api, false).await;
            let Err(Failure::Usage(error)) = result else { panic!("{result:?}") };
            assert!(error.contains(reason), "the error must say {reason:?}: {error}");
            assert!(error.contains("--no-hooks"), "the error must name the remedy: {error}");
            assert!(writes.is_empty(), "a refused uninstall must change nothing: {writes:?}");
        }
    }

    #[tokio::test]
    async fn uninstall_of_helm_release_or_with_flag_proceeds() {
        let helm = || Some(release(&[("helm", "")]));
        for (daemonset, configmap, without_helm) in
            [(helm(), None, false), (None, helm(), false), (Some(json!({})), None, true)]
        {
            let api = FakeApi { daemonset, configmap, ..FakeApi::default() };
            let (result, writes, log) = run(api, without_helm).await;
            result.unwrap();
            assert_eq!(writes.first().map(String::as_str), Some(AGENTS));
            let last = "DELETE /apis/skein.network/v1alpha1/skeinnodes";
            assert_eq!(writes.last().map(String::as_str), Some(last));
            assert!(log.contains("stay Terminating"), "the log must warn about pods: {log}");
        }
    }

    #[tokio::test]
    async fn uninstall_with_node_down_names_the_node() {
        let pod = json!({ "metadata": { "name": "skein-x" }, "spec": {
            "nodeName": "node3", "containers": [],
        } });
        let daemonset = Some(release(&[("helm", "")]));
        let api = FakeApi { daemonset, pod: Some(pod), ..FakeApi::default() };
        let (result, _, _) = run(api, false).await;
        let error = result.unwrap_err().to_string();
        assert!(error.contains("skein-x on node node3"), "{error}");
    }
}
