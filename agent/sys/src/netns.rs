//! Network namespaces: pods' to be entered, scratch ones for probing and for tests.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::thread;

use rustix::fs::fstatfs;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// The magic number of nsfs (linux/magic.h), which namespaces' files are on.
const NSFS: rustix::fs::FsWord = 0x6e73_6673;

/// Which namespace a file stands for: the same for every path and descriptor of it, as long as it
/// lives (ioctl_ns(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespaceId {
    /// Device of nsfs.
    pub device: u64,
    /// Inode.
    pub inode: u64,
}

impl NamespaceId {
    /// Of an open namespace. An error where the descriptor is something else.
    pub fn of(namespace: impl AsFd) -> io::Result<Self> {
        let namespace = namespace.as_fd();
        if fstatfs(namespace)?.f_type != NSFS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no namespace"));
        }
        let found = rustix::fs::fstat(namespace)?;
        Ok(Self { device: found.st_dev, inode: found.st_ino })
    }

    /// Of what is at a path now; an error where there is nothing.
    pub fn at(path: &Path) -> io::Result<Self> {
        let found = rustix::fs::stat(path)?;
        Ok(Self { device: found.st_dev, inode: found.st_ino })
    }

    /// Of this thread's network namespace.
    pub fn own() -> io::Result<Self> {
        Self::at(Path::new("/proc/thread-self/ns/net"))
    }
}

/// Runs `f` in a thread that has entered a network namespace; /proc/sys/net is that namespace's
/// there. Needs CAP_SYS_ADMIN. An error where the descriptor is no network namespace.
pub fn in_network_namespace<T: Send>(
    namespace: BorrowedFd<'_>,
    f: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("pod-netns".into()).spawn_scoped(scope, || {
            move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
            Ok(f())
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `f` in a thread that has a network namespace of its own, empty but for a loopback device
/// that is down. Needs CAP_SYS_ADMIN.
///
/// The namespace goes with the thread and with the last socket or device descriptor that was opened
/// in it. Programs started by `f` run in it too; `/sys` still shows the old namespace.
pub fn in_new_network_namespace<T: Send>(f: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread =
            thread::Builder::new().name("scratch-netns".into()).spawn_scoped(scope, || {
                // SAFETY: NEWNET alone changes which network this thread sees; it does not unshare
                // the descriptor table, which is what makes other flags unsound.
                unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
                Ok(f())
            })?;
        // A panic of `f` (a failed assertion in a test) is the caller's.
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
