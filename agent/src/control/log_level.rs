//! Log level of the control process and the data process, at run time.

use std::path::PathBuf;

use skein_ipc::Request;
use thiserror::Error;

use super::client::{Client, ClientError};
use crate::logging::{self, LevelError};

/// Failure to set the log level.
#[derive(Debug, Error)]
pub enum LogLevelError {
    /// The level is not a level or a filter, or the process has no log.
    #[error(transparent)]
    Agent(#[from] LevelError),
    /// The level is set in this process, but not in the data process.
    #[error("the level is set in the agent only: {0}")]
    DataProcess(#[from] ClientError),
}

/// Setter of the log level of both processes.
#[derive(Debug, Clone)]
pub struct LogLevels {
    /// Socket of the data process.
    pub dataplane: PathBuf,
}

impl LogLevels {
    /// Sets the log level of both processes; `None` restores the configured one.
    ///
    /// # Errors
    /// [`LogLevelError`] if the level is invalid, or if only this process has it.
    pub async fn set(&self, level: Option<&str>) -> Result<(), LogLevelError> {
        logging::set_level(level)?;
        let request = Request::LogLevel { level: level.map(str::to_owned) };
        let ask =
            async { Client::connect(&self.dataplane).await?.request(&request).await.map(drop) };
        Ok(ask.await?)
    }
}
