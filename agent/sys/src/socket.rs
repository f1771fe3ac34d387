//! Trust between processes over unix sockets: credentials of the peer (unix(7)), ownership of the
//! socket's directory, and classification of connection errors.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};

/// Maximum number of symbolic links in a path, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Credentials of the peer of a unix socket (SO_PEERCRED): those of the process that called
/// connect(2), or, for a listener, listen(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process id in the PID namespace of this process; `None` if the peer is outside of it.
    pub pid: Option<u32>,
    /// Effective user id of the peer.
    pub uid: u32,
    /// Effective group id of the peer.
    pub gid: u32,
}

/// Reads the credentials of the peer of a connection (SO_PEERCRED).
///
/// # Errors
/// The error of getsockopt(2).
pub fn peer_credentials(stream: &UnixStream) -> io::Result<PeerCredentials> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the option writes a ucred of at most `len` bytes. `credentials` and `len` are
    // borrowed for the call.
    let result = unsafe {
        libc::getsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // The kernel reports the process id 0 for a peer outside of the PID namespace. The type of
    // rustix cannot represent 0, so that this function calls libc.
    let pid = u32::try_from(credentials.pid).ok().filter(|&pid| pid != 0);
    Ok(PeerCredentials { pid, uid: credentials.uid, gid: credentials.gid })
}

/// Returns true if `uid` is root or the effective user of this process.
pub fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// Identity of a file: device number and inode number.
pub type FileId = (u64, u64);

/// Returns the identity of the file at `path` without following a symbolic link. Returns `None` if
/// the file does not exist or cannot be read.
pub fn file_id(path: &Path) -> Option<FileId> {
    let file = std::fs::symlink_metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}

/// Connects to a listener that belongs to root or to the user of this process.
///
/// # Errors
/// The error of connect(2), for example `NotFound` or `ConnectionRefused` ([`is_no_listener`]);
/// `PermissionDenied` if the listener belongs to another user.
pub fn connect_trusted(path: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    check_listener(peer_credentials(&stream)?.uid)?;
    Ok(stream)
}

/// Checks the user `uid` of a listener.
///
/// # Errors
/// `PermissionDenied` unless the user is trusted ([`is_trusted`]).
pub fn check_listener(uid: u32) -> io::Result<()> {
    if is_trusted(uid) {
        return Ok(());
    }
    let own = rustix::process::geteuid().as_raw();
    let text = format!("the listener belongs to user {uid}, expected root or user {own}");
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

/// Creates the directory of `socket` and its parents with mode 0755 and checks them. The listening
/// process receives the node's private key, so that no other user may be able to replace the
/// socket.
///
/// # Errors
/// An I/O error if a directory cannot be created, or if [`check_directory`] refuses the directory.
pub fn make_directory(socket: &Path) -> io::Result<()> {
    let socket = std::path::absolute(socket)?;
    let Some(directory) = socket.parent() else { return Ok(()) };
    // The mode is explicit, because the umask is inherited from an arbitrary parent process.
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    check_directory(directory)
}

/// Checks that no other user can change the directory at `path`, or replace the directory, one of
/// its parents, or a symbolic link in the path. A parent with mode 1777, as `/tmp`, is accepted:
/// the sticky bit keeps other users from replacing entries.
///
/// # Errors
/// An error that names the directory or link and the remedy, if another user owns it or can change
/// it; ELOOP after more than 40 symbolic links; an I/O error if a part of the path cannot be read.
pub fn check_directory(path: &Path) -> io::Result<()> {
    let path = std::path::absolute(path)?;
    let mut at = PathBuf::from("/");
    let mut rest = components(&path);
    check_entry(&at, !rest.is_empty())?;
    let mut links = 0;
    while let Some(name) = rest.pop() {
        if name == ".." {
            at.pop();
            continue;
        }
        let next = at.join(name);
        if !check_entry(&next, !rest.is_empty())? {
            at = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let target = std::fs::read_link(&next)?;
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        rest.extend(components(&target));
    }
    Ok(())
}

/// Returns the names in a path, last one first.
fn components(path: &Path) -> Vec<OsString> {
    let names = path
        .components()
        .rev()
        .filter(|component| matches!(component, Component::Normal(_) | Component::ParentDir));
    names.map(|name| name.as_os_str().to_owned()).collect()
}

/// Checks one directory or symbolic link. Returns true for a link. `is_parent` is true for parents
/// of the checked directory.
fn check_entry(path: &Path, is_parent: bool) -> io::Result<bool> {
    let found = std::fs::symlink_metadata(path)?;
    let shown = path.display();
    let refused = |why: String, command: &str| {
        Err(io::Error::other(format!(
            "{shown} {why}. Run {command} {shown}, or use another directory that only root can \
             change."
        )))
    };
    if !is_trusted(found.uid()) {
        return refused(format!("belongs to another user ({})", found.uid()), "chown -h root");
    }
    if found.is_symlink() {
        return Ok(true);
    }
    let others = if found.gid() == 0 { 0o002 } else { 0o022 };
    let is_sticky = found.mode() & 0o1000 != 0;
    if found.mode() & others != 0 && !(is_parent && is_sticky) {
        let mode = found.mode() & 0o7777;
        // The sticky bit suffices for a parent, which other users may need, as `/tmp`.
        let command = if is_parent { "chmod +t" } else { "chmod go-w" };
        return refused(format!("can be changed by other users (mode {mode:o})"), command);
    }
    Ok(false)
}

/// Returns true if a connection failed because no process listens: the socket does not exist, or
/// its process has exited.
pub fn is_no_listener(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Returns true for an error that occurs if the peer closes the connection during an exchange.
pub fn is_disconnect(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn directory_is_created_and_refused_if_others_can_change_it() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("a/b/s.sock");
        make_directory(&socket).unwrap();
        make_directory(&socket).unwrap();
        make_directory(Path::new("s.sock")).unwrap();
        let parent = socket.parent().unwrap();
        let set = |mode, gid| {
            std::os::unix::fs::chown(parent, None, Some(gid)).expect("this test needs root");
            std::fs::set_permissions(parent, std::fs::Permissions::from_mode(mode)).unwrap();
            make_directory(&socket)
        };
        for (mode, gid) in [(0o777, 0), (0o1777, 0), (0o757, 0), (0o775, 65_534)] {
            let error = set(mode, gid).unwrap_err().to_string();
            assert!(error.contains("a/b"), "{error}");
            assert!(error.contains(&format!("(mode {mode:o}). Run chmod go-w ")), "{error}");
        }
        // Members of root's group are trusted.
        set(0o775, 0).unwrap();
    }

    #[test]
    fn every_parent_and_link_in_the_path_is_checked() {
        use std::os::unix::fs::{PermissionsExt, chown, symlink};
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let socket = at("a/b/c/s.sock");
        make_directory(&socket).unwrap();
        let mode = |name: &str, mode| {
            std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let refused = |path: &Path, named: &str| {
            let error = make_directory(path).unwrap_err().to_string();
            assert!(error.contains(&format!("{} ", at(named).display())), "{error}");
        };
        mode("a", 0o777);
        refused(&socket, "a");
        mode("a", 0o1777);
        make_directory(&socket).unwrap();
        chown(at("a/b"), Some(65_534), None).expect("this test needs root");
        refused(&socket, "a/b");
        chown(at("a/b"), Some(0), None).unwrap();
        make_directory(&socket).unwrap();
        // The owner of a link, a directory in the target of a link, and a loop of links.
        symlink("../elsewhere/open/inside", at("a/link")).unwrap();
        std::fs::create_dir_all(at("elsewhere/open/inside")).unwrap();
        make_directory(&at("a/link/s.sock")).unwrap();
        mode("elsewhere/open", 0o777);
        refused(&at("a/link/s.sock"), "elsewhere/open");
        mode("elsewhere/open", 0o755);
        std::os::unix::fs::lchown(at("a/link"), Some(65_534), None).unwrap();
        refused(&at("a/link/s.sock"), "a/link");
        symlink("round", at("round")).unwrap();
        assert!(check_directory(&at("round")).is_err());
    }

    #[test]
    fn listener_of_another_user_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        connect_trusted(&path).unwrap();
        // The kernel reports the user that called listen(2). The user of a thread can differ from
        // that of its process.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let nobody = rustix::process::Uid::from_raw(65_534);
                let set = rustix::thread::set_thread_res_uid(nobody, nobody, nobody);
                set.expect("this test needs root");
                rustix::net::listen(&listener, 4).unwrap();
            });
        });
        let error = connect_trusted(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn peer_credentials_of_a_pair_are_those_of_this_process() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = peer_credentials(&a).unwrap();
        assert_eq!(peer.pid, Some(std::process::id()));
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert_eq!(peer.gid, rustix::process::getegid().as_raw());
    }
}
