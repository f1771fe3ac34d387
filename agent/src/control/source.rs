//! Where node records come from: files, or Kubernetes.

use std::path::PathBuf;

use super::kubernetes::{self, Kubernetes, Records};
use super::records::{self, ParsedRecords};
use super::watch::SourceWatch;

/// Reads the records. Cheap to clone.
#[derive(Debug, Clone)]
pub enum RecordSource {
    /// A file or a directory.
    Path(PathBuf),
    /// SkeinNodes.
    Kubernetes(Records),
}

/// Tells when to read them again.
#[derive(Debug)]
pub enum RecordChanges {
    /// A file or a directory.
    Path(SourceWatch),
    /// SkeinNodes.
    Kubernetes(Kubernetes),
}

impl RecordSource {
    /// All records.
    pub fn read(&self) -> Result<ParsedRecords, String> {
        match self {
            RecordSource::Path(path) => records::read(path).map_err(|error| error.to_string()),
            RecordSource::Kubernetes(records) => records.read(),
        }
    }

    /// What is wrong with the source although it could be read.
    pub fn error(&self) -> Option<String> {
        match self {
            RecordSource::Path(_) => None,
            RecordSource::Kubernetes(records) => records.error(),
        }
    }

    /// Under which name it has the record of this node that is made here, where it is.
    pub fn own_record(&self, node: &str) -> Option<PathBuf> {
        match self {
            RecordSource::Path(_) => None,
            RecordSource::Kubernetes(_) => Some(kubernetes::path(node)),
        }
    }

    /// How the source is shown; the last good records of another one are not used.
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
