//! Source of the node records: files or Kubernetes.

use std::path::PathBuf;

use super::kubernetes::{self, Kubernetes, Records};
use super::records::{self, ParsedRecords, SourceError};
use crate::watch::SourceWatch;

/// Source of the node records. Cheap to clone.
#[derive(Debug, Clone)]
pub enum RecordSource {
    /// A file or a directory.
    Path(PathBuf),
    /// SkeinNodes of the Kubernetes API.
    Kubernetes(Records),
}

/// Notifications of changes of the node records.
#[derive(Debug)]
pub enum RecordChanges {
    /// A file or a directory.
    Path(SourceWatch),
    /// Watch of the Kubernetes API.
    Kubernetes(Kubernetes),
}

impl RecordSource {
    /// Reads all records.
    ///
    /// # Errors
    /// [`SourceError`] if the path cannot be read, or if not all SkeinNodes are known yet.
    pub fn read(&self) -> Result<ParsedRecords, SourceError> {
        match self {
            RecordSource::Path(path) => Ok(records::read(path)?),
            RecordSource::Kubernetes(records) => records.read(),
        }
    }

    /// Returns the reason why the last records may be outdated, for example an API server that does
    /// not answer; `None` for files.
    pub fn error(&self) -> Option<String> {
        match self {
            RecordSource::Path(_) => None,
            RecordSource::Kubernetes(records) => records.error(),
        }
    }

    /// Returns the path under which this node's own record appears in the source, if the agent
    /// writes the record; `None` for files.
    pub fn own_record(&self, node: &str) -> Option<PathBuf> {
        match self {
            RecordSource::Path(_) => None,
            RecordSource::Kubernetes(_) => Some(kubernetes::path(node)),
        }
    }

    /// Returns the name of the source, for messages and registry.json. Last good records of a
    /// source with another name are not used.
    pub fn name(&self) -> PathBuf {
        match self {
            RecordSource::Path(path) => path.clone(),
            RecordSource::Kubernetes(_) => "kubernetes".into(),
        }
    }
}

impl RecordChanges {
    /// Waits until the records should be read again.
    pub async fn due(&mut self) {
        match self {
            RecordChanges::Path(watch) => watch.due().await,
            RecordChanges::Kubernetes(kubernetes) => kubernetes.due().await,
        }
    }
}
