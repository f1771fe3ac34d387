//! Takes back what an agent leaves: data process, interface, sockets; on demand also its state.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::client::Client;
use super::lock::StateLock;
use crate::config::{ALIAS_PREFIX, Config};
use crate::failure::Failure;
use crate::ipc::Request;
use crate::netlink::Netlink;

/// How long a data process may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was removed, and what could not be.
#[derive(Debug, Default)]
pub struct Cleaned {
    /// Removed.
    pub removed: Vec<String>,
    /// Not removed, and why.
    pub errors: Vec<String>,
}

impl Cleaned {
    fn note(&mut self, what: &str, result: Result<bool, String>) {
        match result {
            Ok(true) => self.removed.push(what.to_owned()),
            Ok(false) => {}
            Err(error) => self.errors.push(format!("{what}: {error}")),
        }
    }
}

/// Removes everything that is there; goes on after an error. Refuses while the agent runs.
pub async fn cleanup(config: &Config, state: bool) -> Result<Cleaned, Failure> {
    let lock = match config.state_dir.is_dir() {
        true => Some(StateLock::take(&config.state_dir)?),
        false => None,
    };
    let mut cleaned = Cleaned::default();
    let stopped = stop_dataplane(&config.dataplane.socket).await;
    cleaned.note("data process", stopped);
    let interface = format!("interface {}", config.interface.name);
    cleaned.note(&interface, remove_interface(config).await);
    for socket in [&config.dataplane.socket, &config.control.socket] {
        cleaned.note(&format!("socket {}", socket.display()), remove_file(socket));
    }
    if state {
        for file in ["node.key", "registry.json", "registry.json.new"] {
            let path = config.state_dir.join(file);
            cleaned.note(&format!("file {}", path.display()), remove_file(&path));
        }
    }
    if let Some(lock) = lock {
        let removed = lock.remove().map(|()| false).map_err(|error| error.to_string());
        cleaned.note("lock", removed);
    }
    if state {
        // Only what the agent made: a directory that holds anything else stays.
        let directory = &config.state_dir;
        let removed = match std::fs::remove_dir(directory) {
            Ok(()) => Ok(true),
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty => Ok(false),
                _ => Err(error.to_string()),
            },
        };
        cleaned.note(&format!("directory {}", directory.display()), removed);
    }
    Ok(cleaned)
}

async fn stop_dataplane(socket: &Path) -> Result<bool, String> {
    let Ok(mut client) = Client::connect(socket).await else { return Ok(false) };
    let stop = async {
        client.apply(&Request::Shutdown).await.map_err(|error| error.to_string())?;
        client.closed().await;
        Ok(true)
    };
    let late = || Err(format!("it does not end within {PATIENCE:?}: kill it"));
    tokio::time::timeout(PATIENCE, stop).await.unwrap_or_else(|_| late())
}

async fn remove_interface(config: &Config) -> Result<bool, String> {
    let name = &config.interface.name;
    let netlink = Netlink::connect().map_err(|error| error.to_string())?;
    let Some(link) = netlink.link(name).await.map_err(|error| error.to_string())? else {
        return Ok(false);
    };
    if link.alias != config.alias() {
        let owner = match link.alias.strip_prefix(ALIAS_PREFIX) {
            Some(node) => format!("the Skein node {node:?}"),
            None => format!("another program ({link})"),
        };
        return Err(format!("it belongs to {owner} and stays"));
    }
    netlink.delete_link(link.index).await.map_err(|error| error.to_string())?;
    Ok(true)
}

fn remove_file(path: &Path) -> Result<bool, String> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.to_string()),
    }
}
