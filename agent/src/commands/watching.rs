//! The data process's side of `trace --drops` and `capture`: its socket, and what it refuses.

use std::path::Path;

use anyhow::anyhow;
use skein_ipc::ErrorKind;
use skein_ipc::capture::CaptureRequest;

use crate::control::client::{Client, ClientError};
use crate::failure::Failure;
use crate::status::Document;

/// A connection to the data process of the agent whose status this is.
pub(crate) async fn connect(status: &Document) -> Result<Client, Failure> {
    let socket = status.config.pointer("/dataplane/socket").and_then(|socket| socket.as_str());
    let socket = Path::new(socket.unwrap_or("/run/skein/dataplane.sock"));
    Client::connect(socket).await.map_err(failure)
}

/// Begins a watch there.
pub(crate) async fn begin(status: &Document, watch: CaptureRequest) -> Result<Client, Failure> {
    let mut client = connect(status).await?;
    client.watch(watch).await.map_err(failure)?;
    Ok(client)
}

pub(crate) fn failure(error: ClientError) -> Failure {
    match error {
        ClientError::Refused { kind: ErrorKind::InUse, message } => Failure::Taken(message),
        ClientError::Refused { kind: ErrorKind::Invalid, message } => Failure::Runtime(anyhow!(
            "{message}: is the data process of an older version? (skein-agent dataplane --take-over)"
        )),
        ClientError::Io(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Failure::Privilege(format!("the data process's socket is for root: {error}"))
        }
        ClientError::Io(error) => Failure::Runtime(anyhow!(
            "the data process has ended, or does not listen: {error}: see skein-agent status"
        )),
        other => Failure::Runtime(other.into()),
    }
}
