//! A fake API server for tests: lists and watches with versions, selectors, pages and faults.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Parameters of a request by name.
type Parameters = BTreeMap<String, String>;

/// Objects and faults of the server.
#[derive(Default)]
pub(super) struct Cluster {
    /// Objects by the path of their resource without a namespace, and by namespace and name.
    objects: BTreeMap<(String, String), Value>,
    version: u64,
    /// Changes: version, resource, the object before and after.
    history: Vec<(u64, String, Option<Value>, Option<Value>)>,
    /// Versions below this one are forgotten: watches from there get the status 410.
    compacted: u64,
    /// Resources that the cluster does not have.
    pub(super) absent: BTreeSet<String>,
    /// Lists break off after the first object.
    pub(super) half_lists: bool,
    /// Requests get the status 500.
    pub(super) broken: bool,
    /// Pause between the bytes of a watch's event; zero for none.
    pub(super) slowness: Duration,
    /// Paths and parameters of all requests.
    pub(super) requests: Vec<(String, Parameters)>,
    /// Number of the connection faults; watches of earlier numbers are cut off.
    cuts: u64,
}

/// The server. It ends when the value is dropped.
pub(super) struct FakeApi {
    cluster: Arc<Mutex<Cluster>>,
    /// Signal that the cluster has changed.
    changed: watch::Sender<()>,
    address: SocketAddr,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Shared {
    cluster: Arc<Mutex<Cluster>>,
    changed: watch::Receiver<()>,
}

impl FakeApi {
    pub(super) async fn start() -> Self {
        let cluster = Arc::new(Mutex::new(Cluster { version: 1, ..Cluster::default() }));
        let (changed, receiver) = watch::channel(());
        let shared = Shared { cluster: Arc::clone(&cluster), changed: receiver };
        let router = Router::new().fallback(answer).with_state(shared);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { cluster, changed, address, task }
    }

    pub(super) fn client(&self) -> Client {
        let url = format!("http://{}", self.address).parse().unwrap();
        let mut config = Config::new(url);
        config.default_retry = false;
        Client::try_from(config).unwrap()
    }

    pub(super) fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().unwrap()
    }

    /// Adds, replaces or removes an object.
    fn set(&self, resource: &str, namespace: &str, name: &str, object: Option<Value>) {
        let mut cluster = self.cluster();
        cluster.version += 1;
        let version = cluster.version;
        let key = (resource.to_owned(), format!("{namespace}/{name}"));
        let mut object = object;
        if let Some(object) = &mut object {
            object["metadata"]["name"] = json!(name);
            if !namespace.is_empty() {
                object["metadata"]["namespace"] = json!(namespace);
            }
            object["metadata"]["resourceVersion"] = json!(version.to_string());
        }
        let before = match object.clone() {
            Some(object) => cluster.objects.insert(key, object),
            None => cluster.objects.remove(&key),
        };
        cluster.history.push((version, resource.to_owned(), before, object));
        drop(cluster);
        self.changed.send_replace(());
    }

    pub(super) fn apply(&self, resource: &str, namespace: &str, name: &str, object: Value) {
        self.set(resource, namespace, name, Some(object));
    }

    pub(super) fn delete(&self, resource: &str, namespace: &str, name: &str) {
        self.set(resource, namespace, name, None);
    }

    /// Removes an object without a change that a watch could report. All watches are cut off and
    /// need a list.
    pub(super) fn forget(&self, resource: &str, namespace: &str, name: &str) {
        let mut cluster = self.cluster();
        cluster.objects.remove(&(resource.to_owned(), format!("{namespace}/{name}")));
        cluster.version += 1;
        cluster.compacted = cluster.version;
        cluster.cuts += 1;
        drop(cluster);
        self.changed.send_replace(());
    }

    /// Cuts all watches off.
    pub(super) fn cut(&self) {
        self.cluster().cuts += 1;
        self.changed.send_replace(());
    }

    /// Returns the number of watches that have been started with these words in path or parameters.
    pub(super) fn watches(&self, words: &[&str]) -> usize {
        let cluster = self.cluster();
        let is_one = |(path, parameters): &&(String, Parameters)| {
            let text = format!("{path} {parameters:?}");
            parameters.contains_key("watch") && words.iter().all(|word| text.contains(word))
        };
        cluster.requests.iter().filter(is_one).count()
    }
}

impl Drop for FakeApi {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn status(code: StatusCode, reason: &str, message: &str) -> Response {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "code": code.as_u16(), "reason": reason, "message": message,
    });
    (code, axum::Json(body)).into_response()
}

/// Returns the resource's path without a namespace, and the namespace.
fn resource(path: &str) -> (String, String) {
    let parts: Vec<_> = path.split('/').collect();
    match parts.iter().position(|part| *part == "namespaces") {
        Some(at) if at + 2 < parts.len() => {
            let resource = [&parts[..at], &parts[at + 2..]].concat().join("/");
            (resource, parts[at + 1].to_owned())
        }
        _ => (path.to_owned(), String::new()),
    }
}

/// Returns whether a request selects an object. Label selectors are lists of `key=value`.
fn selects(namespace: &str, parameters: &Parameters, object: &Value) -> bool {
    let metadata = &object["metadata"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pairs = |name: &str| {
        let list = parameters.get(name).cloned().unwrap_or_default();
        let pairs = list.split(',').filter_map(|pair| pair.split_once('='));
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect::<Vec<_>>()
    };
    let has_fields = pairs("fieldSelector").iter().all(|(key, value)| {
        let pointer = format!("/{}", key.replace('.', "/"));
        text(object.pointer(&pointer).unwrap_or(&Value::Null)) == *value
    });
    let has_labels =
        pairs("labelSelector").iter().all(|(key, value)| text(&metadata["labels"][key]) == *value);
    (namespace.is_empty() || text(&metadata["namespace"]) == namespace) && has_fields && has_labels
}

async fn answer(
    State(shared): State<Shared>,
    Query(parameters): Query<Parameters>,
    request: Request,
) -> Response {
    let path = request.uri().path().to_owned();
    let (resource, namespace) = resource(&path);
    let mut cluster = shared.cluster.lock().unwrap();
    cluster.requests.push((path, parameters.clone()));
    if cluster.broken {
        return status(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", "etcd is away");
    }
    if cluster.absent.contains(&resource) {
        return (StatusCode::NOT_FOUND, "404 page not found\n").into_response();
    }
    if parameters.contains_key("watch") {
        drop(cluster);
        return watch_answer(shared, resource, namespace, parameters);
    }
    let all: Vec<_> = cluster
        .objects
        .iter()
        .filter(|((of, _), object)| *of == resource && selects(&namespace, &parameters, object))
        .map(|(_, object)| object.clone())
        .collect();
    let number = |name: &str| parameters.get(name).and_then(|text| text.parse::<usize>().ok());
    let start = number("continue").unwrap_or_default();
    let end = number("limit").map_or(all.len(), |limit| all.len().min(start + limit));
    let next = if end < all.len() { end.to_string() } else { String::new() };
    let list = json!({
        "kind": "List", "apiVersion": "v1", "items": all[start..end],
        "metadata": { "resourceVersion": cluster.version.to_string(), "continue": next },
    });
    let half = cluster.half_lists;
    drop(cluster);
    if !half {
        return axum::Json(list).into_response();
    }
    let mut text = list.to_string();
    text.truncate(text.len() * 2 / 3);
    let parts = [Ok(Bytes::from(text)), Err(std::io::Error::other("connection lost"))];
    Body::from_stream(stream::iter(parts)).into_response()
}

/// Returns the line of a change for a watch; `None` if the watch does not select the object.
fn line(
    resource: &str,
    namespace: &str,
    parameters: &Parameters,
    change: &(u64, String, Option<Value>, Option<Value>),
) -> Option<String> {
    let (version, of, before, after) = change;
    if of != resource {
        return None;
    }
    let selected = |object: &&Value| selects(namespace, parameters, object);
    let before = before.as_ref().filter(selected);
    let (kind, mut object) = match (before, after.as_ref().filter(selected)) {
        (None, Some(after)) => ("ADDED", after.clone()),
        (Some(_), Some(after)) => ("MODIFIED", after.clone()),
        (Some(before), None) => ("DELETED", before.clone()),
        (None, None) => return None,
    };
    object["metadata"]["resourceVersion"] = json!(version.to_string());
    Some(format!("{}\n", json!({ "type": kind, "object": object })))
}

fn watch_answer(
    shared: Shared,
    resource: String,
    namespace: String,
    parameters: Parameters,
) -> Response {
    let version = parameters.get("resourceVersion").and_then(|text| text.parse().ok());
    let (version, cuts, compacted, slowness): (u64, _, _, _) = {
        let cluster = shared.cluster.lock().unwrap();
        let version = version.unwrap_or_default();
        (version, cluster.cuts, cluster.compacted, cluster.slowness)
    };
    if version < compacted {
        let gone = json!({ "type": "ERROR", "object": {
            "kind": "Status", "code": 410, "reason": "Expired", "message": "too old version",
        } });
        return Body::from(format!("{gone}\n")).into_response();
    }
    let state = (shared, version, Vec::<Bytes>::new());
    let lines = stream::unfold(state, move |(mut shared, mut version, mut queue)| {
        let (resource, namespace) = (resource.clone(), namespace.clone());
        let parameters = parameters.clone();
        async move {
            loop {
                if !queue.is_empty() {
                    if slowness > Duration::ZERO {
                        tokio::time::sleep(slowness).await;
                    }
                    let part = queue.remove(0);
                    return Some((Ok::<_, Infallible>(part), (shared, version, queue)));
                }
                shared.changed.borrow_and_update();
                {
                    let cluster = shared.cluster.lock().unwrap();
                    if cluster.cuts != cuts {
                        return None;
                    }
                    for change in cluster.history.iter().filter(|change| change.0 > version) {
                        let Some(line) = line(&resource, &namespace, &parameters, change) else {
                            continue;
                        };
                        let size = if slowness > Duration::ZERO { 16 } else { line.len() };
                        queue.extend(line.as_bytes().chunks(size).map(Bytes::copy_from_slice));
                    }
                    version = version.max(cluster.version);
                }
                if queue.is_empty() && shared.changed.changed().await.is_err() {
                    return None;
                }
            }
        }
    });
    Body::from_stream(lines).into_response()
}
