//! Stand-in for the module `kubernetes` in a build without the Cargo feature of that name. No value
//! of these types exists: a configuration with `kubernetes.enabled` is refused at the start.

use std::path::PathBuf;
use std::sync::Arc;

use prometheus::proto::MetricFamily;
use skein_ipc::keys::PublicKeys;
use tokio::sync::watch;

use super::records::{ParsedRecords, SourceError};
use super::view::AgentView;
use crate::config::Config;
use crate::failure::Failure;
use crate::status::RotationStatus;

/// The connection to an API server, which this build cannot have.
#[derive(Debug)]
pub enum Kubernetes {}

/// The records of an API server, which this build cannot have.
#[derive(Debug, Clone)]
pub enum Records {}

/// Counters of requests to an API server, which this build cannot have.
#[derive(Debug, Clone)]
pub enum Requests {}

impl Kubernetes {
    /// Refuses the configuration.
    ///
    /// # Errors
    /// [`Failure::Usage`] always.
    pub async fn start(_: &AgentView, _: Requests) -> Result<Self, Failure> {
        Err(refusal())
    }

    /// Refuses the configuration.
    ///
    /// # Errors
    /// [`Failure::Usage`] always.
    pub async fn follow(
        _: Arc<Config>,
        _: watch::Receiver<RotationStatus>,
        _: Requests,
    ) -> Result<Self, Failure> {
        Err(refusal())
    }

    /// Cannot be called, because no value of this type exists.
    ///
    /// # Errors
    /// No error is possible.
    pub async fn start_with(
        &mut self,
        _: &Config,
        _: bool,
        _: impl Fn(&str),
    ) -> Result<(), Failure> {
        match *self {}
    }

    /// Cannot be called, because no value of this type exists.
    pub async fn due(&mut self) {
        match *self {}
    }

    /// Cannot be called, because no value of this type exists.
    pub fn records(&self) -> Records {
        match *self {}
    }
}

impl Records {
    /// Cannot be called, because no value of this type exists.
    ///
    /// # Errors
    /// No error is possible.
    pub fn read(&self) -> Result<ParsedRecords, SourceError> {
        match *self {}
    }

    /// Cannot be called, because no value of this type exists.
    pub fn published_keys(&self) -> Option<PublicKeys> {
        match *self {}
    }

    /// Cannot be called, because no value of this type exists.
    pub fn error(&self) -> Option<String> {
        match *self {}
    }
}

impl Requests {
    /// Refuses the configuration.
    ///
    /// # Errors
    /// [`Failure::Usage`] always.
    pub fn new() -> Result<Self, Failure> {
        Err(refusal())
    }

    /// Cannot be called, because no value of this type exists.
    pub fn families(&self) -> Vec<MetricFamily> {
        match *self {}
    }
}

/// Returns an empty path, because no record comes from an API server.
pub(super) fn path(_: &str) -> PathBuf {
    PathBuf::new()
}

/// Returns the error of every command that needs Kubernetes.
pub(crate) fn refusal() -> Failure {
    Failure::Usage(
        "this skein-agent was built without Kubernetes. Build it with the Cargo feature \"kubernetes\"."
            .to_owned(),
    )
}
