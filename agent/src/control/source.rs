//! Where node records come from: files, or Kubernetes.

use std::path::PathBuf;

use super::kubernetes::{self, Kubernetes, Records};
use super::records::{self, Files};
use super::watch::SourceWatch;

/// Reads the records. Cheap to clone.
#[derive(Debug, Clone)]
pub enum Reader {
    /// A file or a directory.
    Path(PathBuf),
    /// SkeinNodes.
    Kubernetes(Records),
}

/// Tells when to read them again.
#[derive(Debug)]
pub enum Source {
    /// A file or a directory.
    Path(SourceWatch),
    /// SkeinNodes.
    Kubernetes(Kubernetes),
}

impl Reader {
    /// All records.
    pub fn read(&self) -> Result<Files, String> {
        match self {
            Reader::Path(path) => records::read(path).map_err(|error| error.to_string()),
            Reader::Kubernetes(records) => records.read(),
        }
    }

    /// What is wrong with the source although it could be read.
    pub fn error(&self) -> Option<String> {
        match self {
            Reader::Path(_) => None,
            Reader::Kubernetes(records) => records.error(),
        }
    }

    /// Under which name it has the record of this node that is made here, where it is.
    pub fn made_here(&self, node: &str) -> Option<PathBuf> {
        match self {
            Reader::Path(_) => None,
            Reader::Kubernetes(_) => Some(kubernetes::path(node)),
        }
    }

    /// How the source is shown; the last good records of another one are not used.
    pub fn name(&self) -> PathBuf {
        match self {
            Reader::Path(path) => path.clone(),
            Reader::Kubernetes(_) => "kubernetes".into(),
        }
    }
}

impl Source {
    /// Waits until the records should be read again.
    pub async fn due(&mut self) {
        match self {
            Source::Path(watch) => watch.due().await,
            Source::Kubernetes(kubernetes) => kubernetes.due().await,
        }
    }
}
