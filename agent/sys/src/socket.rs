//! Who is at the other end of a unix socket, and whether anybody is.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

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

/// Makes the directory of a socket where there is none. Refuses one in which other users could put a socket of
/// theirs in its place: a snapshot with the node's key goes to whoever listens.
pub fn make_directory(socket: &Path) -> io::Result<()> {
    let Some(directory) = socket.parent().filter(|parent| !parent.as_os_str().is_empty()) else {
        return Ok(());
    };
    // Whatever the umask of whoever started this.
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    let refused = |why: &str| {
        let text = format!(
            "the directory {} {why}: use one that only root may change, as /run/skein",
            directory.display()
        );
        Err(io::Error::other(text))
    };
    let itself = std::fs::symlink_metadata(directory)?;
    let found = std::fs::metadata(directory)?;
    if !is_trusted(itself.uid()) || !is_trusted(found.uid()) {
        return refused("belongs to another user");
    }
    let others = if found.gid() == 0 { 0o002 } else { 0o022 };
    if found.mode() & others != 0 {
        return refused("can be changed by other users");
    }
    Ok(())
}

/// Whether a connection failed because nobody listens: there is no socket, or a dead process left it.
pub fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Whether the other side closed the connection in the middle of an exchange.
pub fn hung_up(error: &io::Error) -> bool {
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
    fn the_peer_of_a_pair_is_this_process() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = peer_credentials(&a).unwrap();
        assert_eq!(peer.pid, Some(std::process::id()));
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert_eq!(peer.gid, rustix::process::getegid().as_raw());
    }
}
