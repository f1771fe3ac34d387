//! Who is at the other end of a unix socket, and whether anybody is.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};

/// Maximum number of symbolic links on the way to a directory, as the kernel's.
const MAX_LINKS: usize = 40;

/// The process at the other end of a unix socket, as it was when it connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process id in this process's namespace; `None` where it has none here.
    pub pid: Option<u32>,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

/// Asks the kernel who connected (SO_PEERCRED).
pub fn peer_credentials(stream: &UnixStream) -> io::Result<PeerCredentials> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: ucred is what the option fills; it and `len` live across the call, and `len` says
    // how much may be written.
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
    // rustix's type cannot hold the 0 that a peer in a foreign pid namespace has.
    let pid = u32::try_from(credentials.pid).ok().filter(|&pid| pid != 0);
    Ok(PeerCredentials { pid, uid: credentials.uid, gid: credentials.gid })
}

/// Whether a user may be trusted as this process is: root, or its own user.
pub fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// Device and inode of a file.
pub type FileId = (u64, u64);

/// Returns the identity of the file at `path`, without following a symbolic link; `None` if there is
/// no file.
pub fn file_id(path: &Path) -> Option<FileId> {
    let file = std::fs::symlink_metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}

/// Connects to a listener of root or of this process's own user (SO_PEERCRED).
///
/// # Errors
/// An I/O error if no process listens at `path`, and `PermissionDenied` if the listener belongs to
/// another user.
pub fn connect_trusted(path: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    check_listener(peer_credentials(&stream)?.uid)?;
    Ok(stream)
}

/// Checks the user of a listener to which this process has connected.
///
/// # Errors
/// `PermissionDenied` unless `uid` is root's or this process's own.
pub fn check_listener(uid: u32) -> io::Result<()> {
    if is_trusted(uid) {
        return Ok(());
    }
    let text = format!("the listener belongs to user {uid}, who is not trusted");
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

/// Creates the directory of a socket if it does not exist. The process that listens there receives
/// the node's key, so no other user may be able to put a socket in its place.
///
/// # Errors
/// An I/O error, also if another user can change the directory or one on the way to it
/// ([`check_directory`]).
pub fn make_directory(socket: &Path) -> io::Result<()> {
    let socket = std::path::absolute(socket)?;
    let Some(directory) = socket.parent() else { return Ok(()) };
    // The umask of the process that started this one must not count.
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    check_directory(directory)
}

/// Checks that no other user can change the directory at `path`, or replace it or a directory or
/// symbolic link on the way to it. On the way, a directory that all may change is accepted if its
/// sticky bit is set, as that of `/tmp`.
///
/// # Errors
/// An I/O error that names the directory or link and the remedy.
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

/// Names of a path's components, the last one first.
fn components(path: &Path) -> Vec<OsString> {
    let names = path
        .components()
        .rev()
        .filter(|component| matches!(component, Component::Normal(_) | Component::ParentDir));
    names.map(|name| name.as_os_str().to_owned()).collect()
}

/// Checks one directory or link; returns whether it is a link. `is_on_the_way` is true unless it is
/// the directory in question.
fn check_entry(path: &Path, is_on_the_way: bool) -> io::Result<bool> {
    let found = std::fs::symlink_metadata(path)?;
    let refused = |why: &str| {
        let text = format!(
            "{} {why}: use a directory that only root can change, such as /run/skein, or change its \
             owner or mode",
            path.display()
        );
        Err(io::Error::other(text))
    };
    if !is_trusted(found.uid()) {
        return refused("belongs to another user");
    }
    if found.is_symlink() {
        return Ok(true);
    }
    let others = if found.gid() == 0 { 0o002 } else { 0o022 };
    let is_sticky = found.mode() & 0o1000 != 0;
    if found.mode() & others != 0 && !(is_on_the_way && is_sticky) {
        return refused("can be changed by other users");
    }
    Ok(false)
}

/// Whether a connection failed because nobody listens: there is no socket, or a dead process left it.
pub fn is_no_listener(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Whether the other side closed the connection in the middle of an exchange.
pub fn is_disconnect(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_made_and_those_of_others_refused() {
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
        }
        // Root's own group.
        set(0o775, 0).unwrap();
    }

    #[test]
    fn every_directory_on_the_way_is_checked() {
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
        // The link itself, a directory that only its target names, and links without an end.
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
        // The kernel reports the user who has called listen(2). Users are a thread's own.
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
    fn the_peer_of_a_pair_is_this_process() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = peer_credentials(&a).unwrap();
        assert_eq!(peer.pid, Some(std::process::id()));
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert_eq!(peer.gid, rustix::process::getegid().as_raw());
    }
}
