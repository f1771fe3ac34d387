//! Capture requests of `trace --drops` and `capture` to the data process, and their errors.

use std::path::Path;

use anyhow::anyhow;
use skein_ipc::ErrorKind;
use skein_ipc::capture::CaptureRequest;

use crate::control::client::{Client, ClientError};
use crate::failure::Failure;
use crate::status::Document;

/// Connects to the data process. `status` names its socket.
pub(crate) async fn connect(status: &Document) -> Result<Client, Failure> {
    let socket = status.config.pointer("/dataplane/socket").and_then(|socket| socket.as_str());
    let socket = Path::new(socket.unwrap_or("/run/skein/dataplane.sock"));
    Client::connect(socket).await.map_err(failure)
}

/// Connects to the data process and starts a capture.
pub(crate) async fn start_capture(
    status: &Document,
    watch: CaptureRequest,
) -> Result<Client, Failure> {
    let mut client = connect(status).await?;
    client.start_capture(watch).await.map_err(failure)?;
    Ok(client)
}

/// Converts an error of the data process to the failure of the command.
pub(crate) fn failure(error: ClientError) -> Failure {
    match error {
        ClientError::Refused { kind: ErrorKind::InUse, message } => Failure::InUse(message),
        ClientError::Refused { kind: ErrorKind::Invalid, message } => Failure::Runtime(anyhow!(
            "{message}. If the data process is older than this command, run skein-agent dataplane \
             --take-over, which replaces the data process."
        )),
        ClientError::Io(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Failure::Privilege(format!(
                "cannot use the data process's socket: {error}. Run the command as root."
            ))
        }
        ClientError::Io(error) => Failure::Runtime(anyhow!(
            "no connection to the data process: {error}. See skein-agent status."
        )),
        other => Failure::Runtime(other.into()),
    }
}
