//! The status socket: whoever connects gets one JSON document; another agent may ask this one to give way.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net as std_net;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use super::shared::{Document, Shared};
use crate::failure::Failure;
use crate::sys::socket::is_absent;

/// How long a reader may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long a reader that says nothing may mean to say something.
const SILENCE: Duration = Duration::from_millis(100);
/// What another agent says that is to take this one's place.
const GIVE_WAY: &[u8] = b"give way\n";

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

/// Answers until it is aborted. `give_way` is told when another agent is to take this one's place.
pub async fn serve(listener: UnixListener, shared: Shared, give_way: watch::Sender<bool>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (shared, give_way) = (shared.clone(), give_way.clone());
                tokio::spawn(async move {
                    let answer = answer(stream, &shared, &give_way);
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

async fn answer(
    mut stream: UnixStream,
    shared: &Shared,
    give_way: &watch::Sender<bool>,
) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    if uid != 0 && uid != rustix::process::geteuid().as_raw() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let mut said = [0; GIVE_WAY.len()];
    let listened = tokio::time::timeout(SILENCE, stream.read_exact(&mut said)).await;
    if matches!(listened, Ok(Ok(_))) && said == GIVE_WAY {
        give_way.send_replace(true);
        return Ok(());
    }
    let document = serde_json::to_vec(&shared.document().await)?;
    stream.write_all(&document).await?;
    stream.shutdown().await
}

/// Asks the agent that listens on `path`, if one does, to give way.
pub async fn ask_to_give_way(path: &Path) -> io::Result<()> {
    let ask = async {
        let mut stream = match UnixStream::connect(path).await {
            Ok(stream) => stream,
            Err(error) if is_absent(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        stream.write_all(GIVE_WAY).await?;
        // It closes the connection when it has read that.
        stream.read_to_end(&mut Vec::new()).await.map(drop)
    };
    tokio::time::timeout(DEADLINE, ask).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}

/// Fetches the status of the agent that listens on `path`.
pub async fn fetch(path: &Path) -> io::Result<Document> {
    let ask = async {
        let mut stream = UnixStream::connect(path).await?;
        // Nothing is asked.
        stream.shutdown().await?;
        let mut text = Vec::new();
        stream.read_to_end(&mut text).await?;
        Ok(serde_json::from_slice(&text)?)
    };
    tokio::time::timeout(DEADLINE, ask).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}
