//! Subscription to changes in the data process, so that the supervisor requests a report at once.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::sleep;

use super::client::{Client, ClientError};
use super::dataplane::DataplaneState;

/// Delay before the next request to a data process that is absent or of a release without this
/// request.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Makes the supervisor request a report after each change in the data process that listens on
/// `socket`. Never ends.
pub(super) async fn subscribe(socket: PathBuf, dataplane: DataplaneState) {
    loop {
        // Without notifications, reports still come every second.
        if let Err(error) = follow(&socket, &dataplane).await {
            tracing::debug!(%error, "no notifications from the data process");
        }
        sleep(RETRY_DELAY).await;
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
