//! Removal of everything that an agent leaves on its node: data process, interfaces, routes, rules,
//! sockets, and on request its state directory.

use std::fmt::Display;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{anyhow, bail};
use skein_ipc::{NodeIdentity, Request};
use skein_netlink::firewall;
use skein_netlink::interface::ALIAS_PREFIX;
use skein_netlink::staged::StagedInterface;
use skein_netlink::{Netlink, NetlinkError};
use skein_sys::socket::{is_disconnect, is_no_listener};

use super::client::{Client, ClientError};
use super::identity;
use super::lock::StateLock;
use super::registry::Stored;
use super::rotation;
use crate::cni;
use crate::config::{Config, KEY};
use crate::failure::Failure;
use crate::policy;

/// Timeout of the data process's exit after a shutdown request.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Result of a cleanup.
#[derive(Debug, Default)]
pub struct CleanupReport {
    /// Names of the removed things.
    pub removed: Vec<String>,
    /// Messages about things that could not be removed: the name and the cause.
    pub errors: Vec<String>,
}

impl CleanupReport {
    /// Adds the result of one removal; `Ok(false)` means that the thing did not exist.
    fn add(&mut self, what: &str, result: Result<bool, impl Display>) {
        match result {
            Ok(true) => self.removed.push(what.to_owned()),
            Ok(false) => {}
            Err(error) => self.errors.push(format!("{what}: {error}")),
        }
    }
}

/// Removes everything that an agent has left, with `state` also its state directory. Continues
/// after an error, which the report contains.
///
/// # Errors
/// [`Failure::InUse`] if an agent holds the lock of the state directory; nothing is removed then.
pub async fn cleanup(config: &Config, state: bool) -> Result<CleanupReport, Failure> {
    let lock = match config.state_dir.is_dir() {
        true => Some(StateLock::acquire(&config.state_dir)?),
        false => None,
    };
    let mut cleaned = CleanupReport::default();
    let stopped = stop_dataplane(config).await;
    // A data process that still runs keeps its socket.
    let dataplane_socket = stopped.is_ok().then_some(&config.dataplane.socket);
    cleaned.add("data process", stopped);
    // Pods keep their interfaces if cni.enabled was switched off after they were attached.
    if config.cni.enabled || config.state_dir.join(skein_ipam::FILE).exists() {
        for removal in cni::remove(config).await {
            cleaned.add(&removal.what, removal.outcome);
        }
        for (what, outcome) in policy::remove(config).await {
            cleaned.add(&what, outcome);
        }
        let socket = &config.cni.socket;
        cleaned.add(&format!("socket {}", socket.display()), remove_file(socket));
    }
    let former = Stored::read(config).and_then(|stored| stored.former_table(config));
    for table in [config.cni.table.clone()].into_iter().chain(former) {
        let removed = firewall::remove(&table).await;
        cleaned.add(&format!("nftables table inet {table}"), removed);
    }
    let interface = format!("interface {}", config.interface.name);
    let staged = StagedInterface::new(&config.interface.name, &config.alias());
    cleaned.add(&interface, remove_interface(config, &staged).await);
    let unfinished = format!("unfinished interface {}", staged.name());
    cleaned.add(&unfinished, remove_staged(&staged).await);
    remove_unreachable_routes(config, &mut cleaned).await;
    for socket in dataplane_socket.into_iter().chain([&config.control.socket]) {
        cleaned.add(&format!("socket {}", socket.display()), remove_file(socket));
    }
    if let Some(socket) = dataplane_socket {
        let lock = skein_dataplane::lock_path(socket);
        cleaned.add("lock of the data plane", remove_file(&lock).map(|_| false));
    }
    if state {
        let ours = config.state_dir.join("cni");
        let leases = ["leases.redb", "leases.redb.damaged", "leases.redb.new"];
        for path in leases.map(|name| ours.join(name)) {
            cleaned.add(&format!("leases {}", path.display()), remove_file(&path));
        }
        remove_spool(&config.cni.spool, &mut cleaned);
        cleaned.add(&format!("directory {}", ours.display()), remove_directory(&ours));
        // A key in another directory (private_key_file) belongs to the operator.
        let keys = rotation::files::all(&config.state_dir.join(KEY));
        let others = [
            "registry.json",
            "registry.json.new",
            "clock",
            "clock.new",
            "handshakes.json",
            "handshakes.json.new",
            "policy.json",
            "policy.json.new",
        ];
        for path in keys.into_iter().chain(others.map(|name| config.state_dir.join(name))) {
            cleaned.add(&format!("file {}", path.display()), remove_file(&path));
        }
    }
    if let Some(lock) = lock {
        cleaned.add("lock", lock.remove().map(|()| false));
    }
    if state {
        let directory = &config.state_dir;
        let removed = remove_directory(directory);
        cleaned.add(&format!("directory {}", directory.display()), removed);
    }
    Ok(cleaned)
}

/// Removes the spool of the plugin, incomplete entries included.
fn remove_spool(spool: &Path, cleaned: &mut CleanupReport) {
    for entry in std::fs::read_dir(spool).into_iter().flatten().flatten() {
        let path = entry.path();
        cleaned.add(&format!("file {}", path.display()), remove_file(&path));
    }
    cleaned.add(&format!("directory {}", spool.display()), remove_directory(spool));
}

/// Removes a directory if it is empty; returns whether it was removed.
fn remove_directory(path: &Path) -> io::Result<bool> {
    use io::ErrorKind::{DirectoryNotEmpty, NotFound, ReadOnlyFilesystem, ResourceBusy};
    match std::fs::remove_dir(path) {
        Ok(()) => Ok(true),
        // A mount point (ResourceBusy), or a directory on the read-only root of a container, stays.
        Err(error)
            if matches!(
                error.kind(),
                NotFound | DirectoryNotEmpty | ResourceBusy | ReadOnlyFilesystem
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Stops the data process; returns whether there was one.
async fn stop_dataplane(config: &Config) -> anyhow::Result<bool> {
    let socket = &config.dataplane.socket;
    let mut client = match Client::connect(socket).await {
        Ok(client) => client,
        Err(ClientError::Io(error)) if is_no_listener(&error) => return Ok(false),
        Err(error) => {
            bail!(
                "{}: {error}. Stop the process that listens, and clean up again.",
                socket.display()
            );
        }
    };
    // The key identifies a data process of this node after a change of the node's name.
    let key = identity::load(&config.key_path()).ok().flatten().and_then(|key| key.public().ok());
    let ours = |node: &NodeIdentity| node.name == config.name || Some(node.public_key) == key;
    if let Some(node) = client.node().filter(|node| !ours(node)) {
        bail!("it works for the node {:?} and is not stopped", node.name);
    }
    let stop = async {
        match client.apply(&Request::Shutdown).await {
            Ok(_) => client.closed().await,
            // The process may exit before it has written its answer.
            Err(ClientError::Io(error)) if is_disconnect(&error) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    };
    let late = || Err(anyhow!("it does not exit within {STOP_TIMEOUT:?}. Kill it."));
    tokio::time::timeout(STOP_TIMEOUT, stop).await.unwrap_or_else(|_| late())
}

async fn remove_interface(config: &Config, staged: &StagedInterface) -> anyhow::Result<bool> {
    let name = &config.interface.name;
    let netlink = Netlink::connect()?;
    let mut links = netlink.links().await?;
    links.retain(|link| link.is_tun_of(&config.alias()) && link.name != staged.name());
    let mut removed = false;
    // Interfaces of this node that another program renamed.
    for link in links {
        netlink.delete_link(link.index).await?;
        removed = true;
    }
    let Some(link) = netlink.link(name).await? else {
        return Ok(removed);
    };
    if link.alias != config.alias() {
        let owner = match link.alias.strip_prefix(ALIAS_PREFIX) {
            Some(node) => format!("the Skein node {node:?}"),
            None => format!("another program ({link})"),
        };
        bail!("it belongs to {owner} and is not removed");
    }
    netlink.delete_link(link.index).await?;
    Ok(true)
}

/// Removes every unreachable route of Skein, unless another agent has an interface in this network
/// namespace. In that case the owner of a route cannot be determined, and the next start of that
/// agent removes stale routes.
async fn remove_unreachable_routes(config: &Config, cleaned: &mut CleanupReport) {
    let removed = async {
        let netlink = Netlink::connect()?;
        if netlink.has_interface_of_another_agent(&config.alias()).await? {
            return Ok(0);
        }
        let routes = netlink.unreachable_routes().await?;
        for net in &routes {
            netlink.delete_unreachable_route(net).await?;
        }
        Ok::<_, NetlinkError>(routes.len())
    };
    match removed.await {
        Ok(0) => {}
        Ok(1) => cleaned.removed.push("1 unreachable route".to_owned()),
        Ok(count) => cleaned.removed.push(format!("{count} unreachable routes")),
        Err(error) => cleaned.errors.push(format!("unreachable routes: {error}")),
    }
}

async fn remove_staged(staged: &StagedInterface) -> anyhow::Result<bool> {
    Ok(staged.remove(&Netlink::connect()?).await?)
}

fn remove_file(path: &Path) -> io::Result<bool> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use skein_ipc::keys::PublicKey;
    use skein_ipc::{PROTOCOL_VERSION, Response, read_frame, write_frame};
    use std::os::unix::net::UnixListener;

    fn config(socket: &Path) -> Config {
        let socket = socket.display();
        Config::parse(&format!("name = 'node-a'\n[dataplane]\nsocket = '{socket}'")).unwrap()
    }

    #[tokio::test]
    async fn absent_data_process_is_no_error_and_other_is_one() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let config = config(&socket);
        assert!(!stop_dataplane(&config).await.unwrap());
        drop(UnixListener::bind(&socket).unwrap());
        assert!(
            !stop_dataplane(&config).await.unwrap(),
            "A socket file without a process must be no error."
        );
        std::fs::remove_file(&socket).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            // The first connection closes without an answer, the second is one of another node.
            drop(listener.accept().unwrap());
            let (mut stream, _) = listener.accept().unwrap();
            let hello = read_frame::<Request>(&mut stream).unwrap();
            assert!(matches!(hello, Some(Request::Hello { .. })));
            let node = NodeIdentity { name: "node-b".to_owned(), public_key: PublicKey([1; 32]) };
            let answer = Response::Hello {
                version: PROTOCOL_VERSION,
                pid: 1,
                node: Some(node),
                accepts_seen_handshakes: false,
            };
            write_frame(&mut stream, &answer).unwrap();
            assert!(
                read_frame::<Request>(&mut stream).unwrap().is_none(),
                "The data process of another node must get no further request."
            );
        });
        for expected in ["clean up again", "node-b"] {
            let error = stop_dataplane(&config).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn data_process_that_exits_without_answer_is_stopped() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            read_frame::<Request>(&mut stream).unwrap();
            let hello = Response::Hello {
                version: PROTOCOL_VERSION,
                pid: 1,
                node: None,
                accepts_seen_handshakes: false,
            };
            write_frame(&mut stream, &hello).unwrap();
            let asked = read_frame::<Request>(&mut stream).unwrap();
            assert!(matches!(asked, Some(Request::Shutdown)));
        });
        assert!(stop_dataplane(&config(&socket)).await.unwrap());
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn data_process_that_never_answers_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("dataplane.sock");
        let _listener = UnixListener::bind(&socket).unwrap();
        let path = directory.path();
        let text = format!(
            "state_dir = {:?}\n[interface]\nname = 'sk-none'\n[control]\nsocket = {:?}\n\
             [dataplane]\nsocket = {socket:?}",
            path.join("state"),
            path.join("control.sock"),
        );
        drop(UnixListener::bind(path.join("control.sock")).unwrap());
        let cleaned = cleanup(&Config::parse(&text).unwrap(), false).await.unwrap();
        assert_eq!(cleaned.errors.len(), 1, "{cleaned:?}");
        assert!(cleaned.errors[0].contains("does not answer"), "{cleaned:?}");
        assert!(
            !path.join("control.sock").exists(),
            "The control socket must be removed in spite of the error."
        );
        assert!(socket.exists(), "The socket of the running data process must stay.");
    }

    #[test]
    fn every_file_of_a_key_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let key = directory.path().join(KEY);
        for ending in ["", ".next", ".previous", ".new-7", ".next.new-8"] {
            std::fs::write(directory.path().join(format!("{KEY}{ending}")), "key").unwrap();
        }
        std::fs::write(directory.path().join("other"), "not ours").unwrap();
        for file in rotation::files::all(&key) {
            assert!(remove_file(&file).unwrap(), "{} did not exist", file.display());
        }
        let left = std::fs::read_dir(directory.path()).unwrap();
        assert_eq!(left.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>(), ["other"]);
    }
}
