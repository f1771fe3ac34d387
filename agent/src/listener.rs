//! Listening sockets of the agent: unix sockets that stay reachable at their paths, and TCP.

use std::fs::Permissions;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net as std_net;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use skein_ipc::log_limit::LogLimit;
use skein_sys::socket::{FileId, file_id, make_directory};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::failure::Failure;
use crate::lifecycle::{NotReady, Readiness};

/// Maximum number of connections that wait for accept(2). The kernel limits it to
/// `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Delay after a failed accept, because descriptors are not released at once.
pub(crate) const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Interval at which the path is compared with the socket by lstat(2). inotify does not notice that
/// a directory is replaced, and the number of inotify instances is small
/// (`fs.inotify.max_user_instances`).
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// A listening unix socket whose file is created again when another program deletes or replaces it.
///
/// The check runs in [`Listener::accept`], so the caller must call it in a loop. Existing
/// connections are not affected.
#[derive(Debug)]
pub struct Listener {
    key: &'static str,
    path: PathBuf,
    socket: UnixListener,
    file: Option<FileId>,
    checks: Interval,
    readiness: Option<Readiness>,
    lost: Option<Lost>,
    failures: LogLimit,
}

/// State while the path does not refer to the socket.
#[derive(Debug)]
struct Lost {
    error: String,
    _not_ready: Option<NotReady>,
}

impl Listener {
    /// Listens at `path`, the value of the configuration key `key`, with mode 0600. With
    /// `readiness`, the agent is not ready while the socket cannot be created again.
    ///
    /// # Errors
    /// [`Failure::InUse`] if another process listens at `path` or if the file is not a socket,
    /// [`Failure`] if the socket cannot be created.
    pub fn bind(
        key: &'static str,
        path: &Path,
        readiness: Option<Readiness>,
    ) -> Result<Self, Failure> {
        let socket = bind_socket(key, path)?;
        let mut checks = interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let file = file_id(path);
        Ok(Self {
            key,
            path: path.to_owned(),
            socket,
            file,
            checks,
            readiness,
            lost: None,
            failures: LogLimit::default(),
        })
    }

    /// Waits for a connection. After an error of accept(2), for example EMFILE, tries again.
    pub async fn accept(&mut self) -> UnixStream {
        loop {
            tokio::select! {
                // Connections of a socket that is about to be replaced are accepted first.
                biased;
                accepted = self.socket.accept() => match accepted {
                    Ok((stream, _)) => return stream,
                    Err(error) => {
                        if let Some(suppressed) = self.failures.count(Instant::now()) {
                            tracing::warn!(%error, suppressed, "cannot accept on {}", self.key);
                        }
                        tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                    }
                },
                _ = self.checks.tick() => self.check(),
            }
        }
    }

    fn check(&mut self) {
        let (key, path) = (self.key, self.path.display());
        if self.file.is_some() && file_id(&self.path) == self.file {
            if self.lost.take().is_some() {
                tracing::info!(%path, key, "socket is reachable again");
            }
            return;
        }
        match bind_socket(key, &self.path) {
            Ok(socket) => {
                tracing::warn!(%path, key, "socket was deleted by another program, created again");
                (self.socket, self.file, self.lost) = (socket, file_id(&self.path), None);
            }
            Err(error) => {
                let error = error.to_string();
                if self.lost.as_ref().is_some_and(|lost| lost.error == error) {
                    return;
                }
                tracing::error!(%path, key, %error, "socket was deleted by another program, cannot create it");
                let reason = format!("{key} was deleted by another program: {error}");
                let not_ready = self.readiness.as_ref().map(|readiness| readiness.block(reason));
                self.lost = Some(Lost { error, _not_ready: not_ready });
            }
        }
    }
}

/// Binds a unix socket with mode 0600 at `path`, the value of the configuration key `key`. A socket
/// file that no process listens on is replaced.
///
/// # Errors
/// [`Failure::InUse`] if a process listens at `path` or if the file is not a socket, another
/// [`Failure`] if a system call fails.
pub(crate) fn bind_socket(key: &str, path: &Path) -> Result<UnixListener, Failure> {
    let shown = path.display();
    let failed = |error| Failure::io(format!("cannot listen on {key} {shown}"), error);
    if std_net::UnixStream::connect(path).is_ok() {
        return Err(Failure::InUse(format!(
            "another agent listens on {shown}. Stop it, or set {key} to another path."
        )));
    }
    make_directory(path).map_err(failed)?;
    match std::fs::symlink_metadata(path) {
        Ok(found) if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
            return Err(Failure::InUse(format!(
                "{shown} is not a socket. Remove it, or set {key} to another path."
            )));
        }
        Ok(_) => std::fs::remove_file(path).map_err(failed)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Binds `address`, the value of the configuration key `key`, if it is set. `[::]` means all
/// addresses of both families, or of IPv4 on a host without IPv6.
///
/// # Errors
/// [`Failure::InUse`] if the port is in use, [`Failure::Usage`] if the address is not one of this
/// host's, [`Failure::Runtime`] for any other error.
pub(crate) fn bind_tcp(
    key: &str,
    address: Option<SocketAddr>,
) -> Result<Option<TcpListener>, Failure> {
    let Some(address) = address else { return Ok(None) };
    let any = address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let listener = match listen(address) {
        Err(error) if any && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            listen(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))
        }
        result => result,
    };
    listener.map(Some).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => Failure::InUse(format!(
            "{key} = {address}: the port is in use. Set another port, or \"off\"."
        )),
        io::ErrorKind::AddrNotAvailable => Failure::Usage(format!(
            "{key} = {address}: not an address of this host. Set another address, or \"off\"."
        )),
        _ => Failure::io(format!("cannot listen on {key} = {address}"), error),
    })
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // The default is the sysctl net.ipv6.bindv6only. A specific address accepts one family
        // only.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use super::*;

    /// Starts a task that accepts connections, and returns the readiness of the listener.
    fn listen(path: &Path) -> Readiness {
        let readiness = Readiness::default();
        let mut listener = Listener::bind("cni.socket", path, Some(readiness.clone())).unwrap();
        tokio::spawn(async move {
            loop {
                let _ = listener.accept().await;
            }
        });
        readiness
    }

    async fn eventually(what: &str, condition: impl Fn() -> bool) {
        for _ in 0..600 {
            if condition() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}");
    }

    #[tokio::test]
    async fn deleted_socket_is_created_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = Arc::new(directory.path().join("run/cni.sock"));
        let readiness = listen(&path);
        let connects = || std::os::unix::net::UnixStream::connect(&**path).is_ok();
        assert!(connects());
        let renamed = directory.path().join("renamed");
        let damages: [&dyn Fn(); 4] = [
            &|| fs::remove_file(&**path).unwrap(),
            // Deletes the whole directory, as a careless cleanup of /run does.
            &|| fs::remove_dir_all(path.parent().unwrap()).unwrap(),
            &|| fs::rename(&**path, &renamed).unwrap(),
            // Leaves the stale socket of a process that has ended.
            &|| {
                fs::remove_file(&**path).unwrap();
                drop(std::os::unix::net::UnixListener::bind(&**path).unwrap());
            },
        ];
        for damage in damages {
            damage();
            eventually("the socket is created again", connects).await;
            let mode = fs::metadata(&**path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600);
            assert!(readiness.reasons().is_empty(), "{:?}", readiness.reasons());
        }
    }

    #[tokio::test]
    async fn agent_is_not_ready_while_socket_cannot_be_created() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        let readiness = listen(&path);
        let not_ready = |part: &str| {
            let reasons = readiness.reasons();
            reasons.len() == 1 && reasons[0].contains(part)
        };
        // Another process listens at the path, so that its socket stays.
        fs::remove_file(&path).unwrap();
        let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        eventually("another listener is reported", || not_ready("another agent listens")).await;
        drop(other);
        eventually("it is ready again", || readiness.reasons().is_empty()).await;
        fs::remove_file(&path).unwrap();
        fs::write(&path, "a file").unwrap();
        eventually("a foreign file is reported", || not_ready("is not a socket")).await;
        fs::remove_file(&path).unwrap();
        eventually("it is ready again", || readiness.reasons().is_empty()).await;
    }

    #[test]
    fn unspecified_ipv6_listener_accepts_both_families() {
        let listener =
            bind_tcp("metrics.listen", Some("[::]:0".parse().unwrap())).unwrap().unwrap();
        let port = listener.local_addr().unwrap().port();
        for address in ["127.0.0.1", "::1"] {
            let address: IpAddr = address.parse().unwrap();
            std::net::TcpStream::connect((address, port)).unwrap();
        }
        // An old agent on 0.0.0.0 blocks a new one on [::] until the old one releases the port.
        let second = bind_tcp("metrics.listen", Some(SocketAddr::from(([0, 0, 0, 0], port))));
        assert!(matches!(second, Err(Failure::InUse(_))), "{second:?}");
    }
}
