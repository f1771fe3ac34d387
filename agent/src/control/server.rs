//! The status socket: whoever connects gets one JSON document.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net as std_net;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::shared::{Document, Shared};
use crate::failure::Failure;

/// How long a reader may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// Binds the socket for its owner only; takes over a path that nobody listens on.
pub fn bind(path: &Path) -> Result<UnixListener, Failure> {
    bind_socket("control.socket", path)
}

/// The same for the socket that the configuration calls `key`.
pub fn bind_socket(key: &str, path: &Path) -> Result<UnixListener, Failure> {
    let shown = path.display();
    let failed = |error| Failure::io(format!("cannot listen on {key} {shown}"), error);
    if std_net::UnixStream::connect(path).is_ok() {
        return Err(Failure::Taken(format!(
            "another agent listens on {shown}: stop it, or set {key} to another path"
        )));
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
            return Err(Failure::Taken(format!(
                "{shown} is no socket: remove it, or set {key} to another path"
            )));
        }
        Ok(_) => std::fs::remove_file(path).map_err(failed)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Answers until it is aborted.
pub async fn serve(listener: UnixListener, shared: Shared) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let shared = shared.clone();
                tokio::spawn(async move {
                    let answer = answer(stream, &shared);
                    if let Ok(Err(error)) = tokio::time::timeout(DEADLINE, answer).await {
                        tracing::debug!(%error, "status not delivered");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the control socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, shared: &Shared) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    if uid != 0 && uid != rustix::process::geteuid().as_raw() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let document = serde_json::to_vec(&shared.document().await)?;
    stream.write_all(&document).await?;
    stream.shutdown().await
}

/// Fetches the status of the agent that listens on `path`.
pub async fn fetch(path: &Path) -> io::Result<Document> {
    let ask = async {
        let mut stream = UnixStream::connect(path).await?;
        let mut text = Vec::new();
        stream.read_to_end(&mut text).await?;
        Ok(serde_json::from_slice(&text)?)
    };
    tokio::time::timeout(DEADLINE, ask).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}
