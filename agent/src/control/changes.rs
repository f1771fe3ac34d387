//! Subscription to changes in the data process, so that the supervisor requests a report at once.

use std::path::PathBuf;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::client::{Client, ClientError};
use super::supervisor::DataplaneState;

/// Delay before the next request to a data process that is absent or of a release without this
/// request.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// A task that makes the supervisor request a report after each change. The task ends when the
/// value is dropped.
#[derive(Debug)]
pub(super) struct Subscription(JoinHandle<()>);

impl Subscription {
    /// Subscribes at the data process that listens on `socket`.
    pub(super) fn start(socket: PathBuf, dataplane: DataplaneState) -> Self {
        Self(tokio::spawn(async move {
            loop {
                // Without notifications, reports still come every second.
                if let Err(error) = follow(&socket, &dataplane).await {
                    tracing::debug!(%error, "no notifications from the data process");
                }
                sleep(RETRY_DELAY).await;
            }
        }))
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn follow(socket: &std::path::Path, dataplane: &DataplaneState) -> Result<(), ClientError> {
    let mut client = Client::connect(socket).await?;
    let mut known = 0;
    loop {
        let version = client.changes(known).await?;
        if version != known {
            known = version;
            dataplane.request_report();
        }
    }
}
