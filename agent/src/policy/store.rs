//! Storage of the objects in the state directory, so that an agent without its source enforces the
//! last known policies.
//!
//! The file contains resolved policies and properties of pods, not API objects. A file of another
//! format version is not read.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skein_policy::api::Labels;
use skein_policy::model::{Inventory, NodeInfo, PodId, PodInfo, Policy};
use tokio::time::Instant;

use super::objects::{LocalPod, Objects};
use super::source::PodScope;
use crate::files::replace;

/// Name of the file in the state directory.
pub(super) const FILE: &str = "policy.json";

/// Version of the file's format. A change of the model that older files do not have needs another
/// version.
const FORMAT: u32 = 1;
/// Minimum interval between two writes.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum interval between two writes, in durations of a write: writing takes at most 5 % of the
/// time.
const MIN_INTERVAL_WRITES: u32 = 20;

/// Content of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Content<'a> {
    format: u32,
    /// Name of the source of the objects.
    source: Cow<'a, str>,
    policies: Vec<Cow<'a, Policy>>,
    namespaces: BTreeMap<Cow<'a, str>, Cow<'a, Labels>>,
    nodes: Cow<'a, BTreeMap<String, NodeInfo>>,
    /// Scopes other than `Local` with their pods; the scope `All` has none here.
    scopes: Vec<(Cow<'a, PodScope>, Cow<'a, BTreeSet<PodId>>)>,
    /// Pods of these scopes, without those of the scope `Local`.
    pods: Vec<(Cow<'a, PodId>, Cow<'a, PodInfo>)>,
    /// Pods of the scope `Local`.
    local: Vec<(Cow<'a, PodId>, Cow<'a, LocalPod>)>,
}

/// Version of [`Content`] alone, to distinguish an unknown version from a damaged file.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// Writer and reader of the file.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    source: String,
    /// True if the objects differ from the last started write.
    is_changed: bool,
    /// Earliest time of the next write.
    next: Instant,
    writer: Option<JoinHandle<(Duration, io::Result<()>)>>,
    /// Error of the last write.
    pub(super) error: Option<String>,
}

impl Store {
    /// Returns the store of a state directory. `source` is the name of the objects' source: objects
    /// of another source are not restored.
    pub(super) fn new(state_dir: &Path, source: String) -> Self {
        Self {
            path: state_dir.join(FILE),
            source,
            is_changed: false,
            next: Instant::now(),
            writer: None,
            error: None,
        }
    }

    /// Reads the file into the engine. A file that is missing, damaged, of another version or of
    /// another source changes nothing; the reason is logged.
    pub(super) fn restore(&self, objects: &mut Objects) {
        let path = self.path.display();
        let text = match std::fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                tracing::error!(%path, %error, "stored network policies not read");
                return;
            }
        };
        match parse(&text) {
            Ok(content) if content.source != self.source => {
                let (stored, source) = (content.source, &self.source);
                tracing::info!(%path, %stored, source, "stored network policies are of another source");
            }
            Ok(content) => {
                let policies = content.policies.len();
                restore(content, objects);
                tracing::info!(%path, policies, "stored network policies restored");
            }
            Err(error) => tracing::error!(
                %path,
                error,
                "stored network policies not readable: pods that are not known are refused all \
                 forwarded traffic"
            ),
        }
    }

    /// Records that the objects have changed.
    pub(super) fn mark_changed(&mut self) {
        self.is_changed = true;
    }

    /// Returns the time of the next call of [`Store::save`]; `None` if the file is up to date.
    pub(super) fn due(&self) -> Option<Instant> {
        (self.is_changed || self.writer.is_some()).then_some(self.next)
    }

    /// Starts to write the objects on a thread of its own, unless a write is active or was less
    /// than [`MIN_INTERVAL`] ago. Objects of incomplete lists are not written.
    pub(super) fn save(&mut self, objects: &Objects) {
        let now = Instant::now();
        if self.writer.as_ref().is_some_and(JoinHandle::is_finished) {
            self.collect();
        }
        if self.writer.is_some() {
            self.next = self.next.max(now + MIN_INTERVAL);
            return;
        }
        if !self.is_changed || now < self.next {
            return;
        }
        self.is_changed = false;
        if !objects.are_policies_known() {
            return;
        }
        self.next = now + MIN_INTERVAL;
        let snapshot = Snapshot {
            source: self.source.clone(),
            inventory: objects.engine.inventory().clone(),
            scopes: objects.scopes.clone(),
            local: objects.local.clone(),
        };
        let path = self.path.clone();
        let thread = std::thread::Builder::new().name("policy-store".to_owned());
        let writer = thread.spawn(move || {
            let start = std::time::Instant::now();
            let result = snapshot.write(&path);
            (start.elapsed(), result)
        });
        match writer {
            Ok(writer) => self.writer = Some(writer),
            Err(error) => self.set_result(Err(error)),
        }
    }

    /// Writes the last changes.
    pub(super) fn finish(&mut self, objects: &Objects) {
        self.collect();
        self.next = Instant::now();
        self.save(objects);
        self.collect();
    }

    /// Waits for the writer.
    fn collect(&mut self) {
        let Some(writer) = self.writer.take() else { return };
        let (took, result) = writer
            .join()
            .unwrap_or_else(|_| (Duration::ZERO, Err(io::Error::other("the writer panicked"))));
        self.next = self.next.max(Instant::now() + took * MIN_INTERVAL_WRITES);
        self.set_result(result);
    }

    fn set_result(&mut self, result: io::Result<()>) {
        match result {
            Ok(()) => self.error = None,
            Err(error) => {
                // The objects are written again at the next opportunity.
                self.is_changed = true;
                let error = format!("cannot write {}: {error}", self.path.display());
                if self.error.as_ref() != Some(&error) {
                    tracing::error!("network policies not stored: {error}");
                }
                self.error = Some(error);
            }
        }
    }
}

/// Removes the file; returns whether it existed.
///
/// # Errors
/// The file cannot be removed.
pub(super) fn remove(file: &Path) -> io::Result<bool> {
    match std::fs::remove_file(file) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Objects at one moment.
struct Snapshot {
    source: String,
    inventory: Inventory,
    scopes: BTreeMap<PodScope, BTreeSet<PodId>>,
    local: BTreeMap<PodId, LocalPod>,
}

impl Snapshot {
    fn write(&self, path: &Path) -> io::Result<()> {
        let inventory = &self.inventory;
        let namespaces = inventory.namespaces();
        let pods = inventory.pods().filter(|(id, _)| !self.local.contains_key(*id));
        let content = Content {
            format: FORMAT,
            source: Cow::Borrowed(&self.source),
            policies: inventory.policies().map(|policy| Cow::Borrowed(&**policy)).collect(),
            namespaces: namespaces
                .map(|(name, labels)| (Cow::Borrowed(name), Cow::Borrowed(labels)))
                .collect(),
            nodes: Cow::Borrowed(inventory.nodes()),
            scopes: self
                .scopes
                .iter()
                .map(|(scope, pods)| (Cow::Borrowed(scope), Cow::Borrowed(pods)))
                .collect(),
            pods: pods.map(|(id, info)| (Cow::Borrowed(id), Cow::Borrowed(info))).collect(),
            local: self
                .local
                .iter()
                .map(|(id, pod)| (Cow::Borrowed(id), Cow::Borrowed(pod)))
                .collect(),
        };
        replace(path, &serde_json::to_vec(&content)?)
    }
}

/// Parses the file.
///
/// # Errors
/// A message if the text is not JSON of this format version.
fn parse(text: &[u8]) -> Result<Content<'static>, String> {
    let Format { format } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if format != FORMAT {
        return Err(format!("format {format}, but this version reads format {FORMAT}"));
    }
    serde_json::from_slice(text).map_err(|error| error.to_string())
}

fn restore(content: Content<'_>, objects: &mut Objects) {
    let engine = &mut objects.engine;
    for (name, labels) in content.namespaces {
        engine.set_namespace(&name, &labels);
    }
    for policy in content.policies {
        engine.set_policy(policy.into_owned());
    }
    for (name, info) in content.nodes.into_owned() {
        engine.set_node(name, info);
    }
    for (id, info) in content.pods {
        engine.set_pod(&id, Some(info.into_owned()));
    }
    for (id, pod) in content.local {
        engine.set_pod(&id, pod.info.clone());
        objects.local.insert(id.into_owned(), pod.into_owned());
    }
    let scopes = content.scopes.into_iter();
    objects.scopes = scopes.map(|(scope, pods)| (scope.into_owned(), pods.into_owned())).collect();
    objects.stored = objects.scopes.keys().cloned().collect();
    objects.restored = true;
}
