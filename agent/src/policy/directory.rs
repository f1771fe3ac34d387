//! Static mode: objects from a directory of YAML files.
//!
//! A file contains one or more documents, or a `List`. A file that cannot be read keeps its last
//! readable content. Until every file was readable once, no object is removed: the unreadable file
//! may contain the object.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use skein_cni_protocol::excerpt::message_excerpt;
use skein_policy::api::{ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, Pod};

use super::source::{PodScope, PolicyEvent, PolicyObject, PolicySink, Scope, ServiceEnded};
use crate::watch::SourceWatch;

/// Maximum length of a file, bytes.
const MAX_FILE: u64 = 16 << 20;

/// All scopes of the directory. Each of its pods can be a pod of this node.
const SCOPES: [Scope; 5] = [
    Scope::Namespaces,
    Scope::NetworkPolicies,
    Scope::ClusterNetworkPolicies,
    Scope::Nodes,
    Scope::Pods(PodScope::Local),
];

/// Reader of the directory.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Files by path.
    files: BTreeMap<PathBuf, FileState>,
    /// Errors of the last reading, by file or object.
    errors: BTreeMap<String, String>,
    /// True after a reading in which each file was readable.
    is_complete: bool,
    /// True after the first reading of the directory.
    is_read: bool,
}

#[derive(Debug, Default)]
struct FileState {
    /// Text of the last reading, or its error.
    text: Option<Result<String, String>>,
    /// Objects of the last readable text.
    objects: Vec<Object>,
    /// Error of the last text.
    error: Option<String>,
}

/// An object with the name by which messages refer to it.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) name: String,
    pub(super) object: PolicyObject,
}

impl Directory {
    /// Returns the reader of a directory, which need not exist.
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            files: BTreeMap::new(),
            errors: BTreeMap::new(),
            is_complete: false,
            is_read: false,
        }
    }

    /// Sends the objects to the service and follows changes until the service ends.
    pub(super) async fn follow(mut self, sink: PolicySink) {
        let mut watch = SourceWatch::start(&self.path);
        loop {
            let read = tokio::task::spawn_blocking(move || {
                let changed = self.read();
                (self, changed)
            });
            // The task panics only if the reader panics, which the panic hook has logged.
            let Ok((directory, changed)) = read.await else { return };
            self = directory;
            for event in changed {
                if sink.send(event).await == Err(ServiceEnded) {
                    return;
                }
            }
            watch.due().await;
        }
    }

    /// Reads the directory and returns the events since the last reading.
    fn read(&mut self) -> Vec<PolicyEvent> {
        let mut events = Vec::new();
        match self.read_files() {
            Err(error) => {
                let error = format!("policy.directory {}: {error}", self.path.display());
                self.is_read = false;
                return vec![PolicyEvent::Unavailable(Some(error))];
            }
            Ok(false) if self.is_read => return events,
            Ok(_) => {}
        }
        events.push(PolicyEvent::Unavailable(None));
        let mut errors = BTreeMap::new();
        for (path, file) in &self.files {
            if let Some(error) = &file.error {
                errors.insert(path.display().to_string(), error.clone());
            }
        }
        let mut origins = BTreeMap::new();
        let mut objects = Vec::new();
        for (path, file) in &self.files {
            for object in &file.objects {
                match origins.get(&object.name) {
                    None => {
                        origins.insert(object.name.clone(), path);
                        objects.push(object.object.clone());
                    }
                    Some(first) => {
                        let error = format!("ignored, because {} has it too", first.display());
                        errors.insert(format!("{}: {}", path.display(), object.name), error);
                    }
                }
            }
        }
        self.is_complete |= self.files.values().all(|file| file.error.is_none());
        if self.is_complete {
            events.extend(SCOPES.map(PolicyEvent::ListStarted));
        }
        events.extend(objects.into_iter().map(PolicyEvent::Upsert));
        if self.is_complete {
            events.extend(SCOPES.map(PolicyEvent::ListComplete));
            events.push(PolicyEvent::Complete);
        }
        let gone: BTreeSet<_> =
            self.errors.keys().filter(|part| !errors.contains_key(*part)).cloned().collect();
        events.extend(gone.into_iter().map(|part| PolicyEvent::Unreadable(part, None)));
        let new = errors.iter().filter(|(part, error)| self.errors.get(*part) != Some(error));
        events.extend(
            new.map(|(part, error)| PolicyEvent::Unreadable(part.clone(), Some(error.clone()))),
        );
        self.errors = errors;
        self.is_read = true;
        events
    }

    /// Reads all files; returns whether a file has changed.
    ///
    /// # Errors
    /// The directory cannot be listed.
    fn read_files(&mut self) -> std::io::Result<bool> {
        let mut paths = BTreeSet::new();
        for entry in std::fs::read_dir(&self.path)? {
            let path = entry?.path();
            if is_policy_file(&path) {
                paths.insert(path);
            }
        }
        let before = self.files.len();
        self.files.retain(|path, _| paths.contains(path));
        let mut changed = self.files.len() != before;
        for path in paths {
            let text = read_file(&path);
            let file = self.files.entry(path).or_default();
            if file.text.as_ref() == Some(&text) {
                continue;
            }
            changed = true;
            match text.as_deref().map_err(Clone::clone).and_then(parse) {
                Ok(objects) => (file.objects, file.error) = (objects, None),
                Err(error) => file.error = Some(error),
            }
            file.text = Some(text);
        }
        Ok(changed)
    }
}

/// Returns whether a file of the directory is read: not hidden, with the extension of YAML or JSON.
fn is_policy_file(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let extension = path.extension().and_then(|extension| extension.to_str());
    !hidden && extension.is_some_and(|extension| ["yaml", "yml", "json"].contains(&extension))
}

fn read_file(path: &Path) -> Result<String, String> {
    let cannot = |error| format!("the file cannot be read: {error}");
    let length = std::fs::metadata(path).map_err(cannot)?.len();
    if length > MAX_FILE {
        return Err(format!("the file is longer than {MAX_FILE} bytes. Split it."));
    }
    std::fs::read_to_string(path).map_err(cannot)
}

/// Reads the objects of a file.
///
/// # Errors
/// A message if the file cannot be read, or with the number of the document and the field.
pub(super) fn read_objects(path: &Path) -> Result<Vec<Object>, String> {
    parse(&read_file(path)?)
}

/// Parses the documents of a file.
///
/// # Errors
/// A message with the number of the document and the field.
fn parse(text: &str) -> Result<Vec<Object>, String> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text)
        .map_err(|error| message_excerpt(error.to_string().trim()).into_owned())?;
    let mut objects = Vec::new();
    for (index, document) in documents.into_iter().enumerate() {
        let at = |error| format!("document {}: {error}", index + 1);
        match document {
            Value::Null => {}
            document => parse_document(document, &mut objects).map_err(at)?,
        }
    }
    Ok(objects)
}

/// Type of an object.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TypeMeta {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
}

fn parse_document(mut document: Value, objects: &mut Vec<Object>) -> Result<(), String> {
    let TypeMeta { api_version, kind } =
        TypeMeta::deserialize(&document).map_err(|error| format!("apiVersion, kind: {error}"))?;
    let object = match (api_version.as_str(), kind.as_str()) {
        ("v1", "List") => {
            let Some(Value::Array(items)) = document.get_mut("items").map(Value::take) else {
                return Err("items: the field of a List is missing or is not a list".to_owned());
            };
            for (index, item) in items.into_iter().enumerate() {
                parse_document(item, objects)
                    .map_err(|error| format!("items[{index}]: {error}"))?;
            }
            return Ok(());
        }
        ("networking.k8s.io/v1", "NetworkPolicy") => {
            let policy: NetworkPolicy = read(document, true)?;
            PolicyObject::NetworkPolicy(Box::new(policy))
        }
        ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy") => {
            let policy: ClusterNetworkPolicy = read(document, false)?;
            PolicyObject::ClusterNetworkPolicy(Box::new(policy))
        }
        ("v1", "Namespace") => {
            let namespace: Namespace = read(document, false)?;
            PolicyObject::Namespace(Box::new(namespace))
        }
        ("v1", "Node") => {
            let node: Node = read(document, false)?;
            PolicyObject::Node(Box::new(node))
        }
        ("v1", "Pod") => {
            let pod: Pod = read(document, true)?;
            PolicyObject::Pod(PodScope::Local, Box::new(pod))
        }
        (_, "") => return Err("kind: the field is missing".to_owned()),
        _ => {
            return Err(format!(
                "kind: {kind} of apiVersion {api_version:?} is not supported. Use NetworkPolicy \
                 (networking.k8s.io/v1), ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2), \
                 Namespace, Pod, Node or List (v1)."
            ));
        }
    };
    objects.push(Object { name: object_name(&kind, &object), object });
    Ok(())
}

/// Returns the name of an object for messages, unique among all objects.
fn object_name(kind: &str, object: &PolicyObject) -> String {
    let metadata = match object {
        PolicyObject::NetworkPolicy(policy) => &policy.metadata,
        PolicyObject::ClusterNetworkPolicy(policy) => &policy.metadata,
        PolicyObject::Namespace(namespace) => &namespace.metadata,
        PolicyObject::Node(node) => &node.metadata,
        PolicyObject::Pod(_, pod) => &pod.metadata,
    };
    match metadata.namespace.as_str() {
        "" => format!("{kind} {}", metadata.name),
        namespace => format!("{kind} {namespace}/{}", metadata.name),
    }
}

/// Reads an object. A kind in namespaces gets the namespace `default` if it names none, and a kind
/// without namespaces gets none.
///
/// # Errors
/// A message with the field.
fn read<T: DeserializeOwned>(mut document: Value, in_namespace: bool) -> Result<T, String> {
    let Some(metadata) = document.get_mut("metadata").and_then(Value::as_object_mut) else {
        return Err("metadata: the field is missing or is not an object".to_owned());
    };
    match metadata.get("name") {
        Some(Value::String(name)) if !name.is_empty() => {}
        Some(_) => return Err("metadata.name: the name is empty or is not a string".to_owned()),
        None => return Err("metadata.name: the field is missing".to_owned()),
    }
    let is_missing = |value: Option<&Value>| {
        value.is_none_or(|value| value.is_null() || value.as_str() == Some(""))
    };
    if !in_namespace {
        metadata.remove("namespace");
    } else if is_missing(metadata.get("namespace")) {
        metadata.insert("namespace".to_owned(), Value::from("default"));
    }
    T::deserialize(document).map_err(|error| message_excerpt(&error.to_string()).into_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: web, namespace: shop }
spec: { podSelector: {}, policyTypes: [Ingress] }
";

    /// Returns the text forms of upserts, removals of scopes and errors.
    fn summary(events: &[PolicyEvent]) -> Vec<String> {
        let text = |event: &PolicyEvent| match event {
            PolicyEvent::Upsert(PolicyObject::Pod(_, pod)) => {
                Some(format!("pod {}/{}", pod.metadata.namespace, pod.metadata.name))
            }
            PolicyEvent::Upsert(PolicyObject::NetworkPolicy(policy)) => {
                Some(format!("policy {}", policy.metadata.name))
            }
            PolicyEvent::Upsert(PolicyObject::Namespace(namespace)) => {
                Some(format!("namespace {}", namespace.metadata.name))
            }
            PolicyEvent::Complete => Some("complete".to_owned()),
            PolicyEvent::Unreadable(part, error) => {
                Some(format!("{part}: {}", error.as_deref().unwrap_or("readable")))
            }
            PolicyEvent::Unavailable(Some(error)) => Some(error.clone()),
            _ => None,
        };
        events.iter().filter_map(text).collect()
    }

    #[test]
    fn documents_of_all_files_are_read_in_order_of_names() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(directory.path().join(name), text).unwrap();
        };
        let pods = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\napiVersion: v1\nkind: List\n\
                    items: [{apiVersion: v1, kind: Namespace, metadata: {name: shop}}]\n---\n";
        write("b.yaml", POLICY);
        write("a.yml", pods);
        write("ignored.txt", "kind: [");
        write(".hidden.yaml", "kind: [");
        let mut reader = Directory::new(directory.path().to_owned());
        let expected = ["pod default/a", "namespace shop", "policy web", "complete"];
        assert_eq!(summary(&reader.read()), expected);
        assert!(reader.read().is_empty(), "Files without a change must cause no event.");
    }

    #[test]
    fn unreadable_file_keeps_its_last_objects() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.yaml");
        std::fs::write(&file, POLICY).unwrap();
        std::fs::write(directory.path().join("b.yaml"), POLICY.replace("web", "b")).unwrap();
        let mut reader = Directory::new(directory.path().to_owned());
        assert_eq!(summary(&reader.read()), ["policy web", "policy b", "complete"]);
        std::fs::write(&file, POLICY.replace("name: web, ", "")).unwrap();
        std::fs::remove_file(directory.path().join("b.yaml")).unwrap();
        let shown = file.display();
        let error = format!("{shown}: document 1: metadata.name: the field is missing");
        assert_eq!(
            summary(&reader.read()),
            ["policy web".to_owned(), "complete".to_owned(), error]
        );
        std::fs::write(&file, POLICY).unwrap();
        assert_eq!(
            summary(&reader.read()),
            ["policy web".to_owned(), "complete".to_owned(), format!("{shown}: readable")]
        );
    }

    #[test]
    fn objects_are_incomplete_until_every_file_was_readable() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("broken.yaml");
        std::fs::write(directory.path().join("a.yaml"), POLICY).unwrap();
        std::fs::write(&file, "apiVersion: apps/v1\nkind: Deployment\n").unwrap();
        let mut reader = Directory::new(directory.path().to_owned());
        let events = reader.read();
        assert!(
            !events.iter().any(|event| matches!(event, PolicyEvent::ListStarted(_))),
            "A list without the broken file must not remove objects."
        );
        let found = summary(&events);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[1].contains("Deployment"), "{found:?}");
        std::fs::remove_file(file).unwrap();
        assert!(summary(&reader.read()).contains(&"complete".to_owned()));
    }

    #[test]
    fn object_in_two_files_is_read_once_and_reported() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.yaml", "b.yaml"] {
            std::fs::write(directory.path().join(name), POLICY).unwrap();
        }
        let found = summary(&Directory::new(directory.path().to_owned()).read());
        assert_eq!(found[..2], ["policy web", "complete"]);
        assert!(found[2].contains("b.yaml: NetworkPolicy shop/web: ignored"), "{found:?}");
    }

    #[test]
    fn missing_directory_is_reported() {
        let mut reader = Directory::new("/nonexistent/policies".into());
        let found = summary(&reader.read());
        assert!(found[0].contains("policy.directory /nonexistent/policies"), "{found:?}");
    }

    #[test]
    fn syntax_error_names_the_place() {
        let error = parse("kind: Pod\nmetadata: {name: [}\n").unwrap_err();
        assert!(error.contains("line 2"), "{error}");
    }
}
