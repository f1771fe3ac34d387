//! Network namespaces (network_namespaces(7)): entering those of pods, and temporary ones for
//! probes and tests.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::thread;

use rustix::fs::fstatfs;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// Magic number of nsfs, the file system of namespace files (linux/magic.h).
const NSFS: rustix::fs::FsWord = 0x6e73_6673;

/// Identity of a namespace, equal for all paths and descriptors of it while the namespace exists
/// (ioctl_ns(2)). The kernel may reuse the inode number afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespaceId {
    /// Device number of nsfs.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

impl NamespaceId {
    /// Returns the identity of an open namespace.
    ///
    /// # Errors
    /// `InvalidInput` if the descriptor is not a namespace; the error of fstatfs(2) or fstat(2).
    pub fn of(namespace: impl AsFd) -> io::Result<Self> {
        let namespace = namespace.as_fd();
        if fstatfs(namespace)?.f_type != NSFS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file is not a namespace"));
        }
        let found = rustix::fs::fstat(namespace)?;
        Ok(Self { device: found.st_dev, inode: found.st_ino })
    }

    /// Returns the identity of the file at `path`. The function does not check that the file is a
    /// namespace.
    ///
    /// # Errors
    /// The error of stat(2).
    pub fn at(path: &Path) -> io::Result<Self> {
        let found = rustix::fs::stat(path)?;
        Ok(Self { device: found.st_dev, inode: found.st_ino })
    }

    /// Returns the identity of the calling thread's network namespace.
    ///
    /// # Errors
    /// The error of stat(2) for `/proc/thread-self/ns/net`.
    pub fn own() -> io::Result<Self> {
        Self::at(Path::new("/proc/thread-self/ns/net"))
    }
}

/// Runs `f` in a new thread that has entered `namespace`. In this thread, `/proc/sys/net` has the
/// settings of that namespace. Requires CAP_SYS_ADMIN.
///
/// # Errors
/// The error of setns(2), for example if the descriptor is not a network namespace; an error if the
/// thread cannot be started.
///
/// # Panics
/// Panics if `f` panics.
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

/// Runs `f` in a new thread with a new network namespace, which has only a loopback device, down.
/// Requires CAP_SYS_ADMIN.
///
/// The namespace exists until the thread has ended and the last socket or device descriptor of the
/// namespace is closed. Programs that `f` starts run in the namespace. `/sys` shows the namespace
/// of the caller.
///
/// # Errors
/// The error of unshare(2); an error if the thread cannot be started.
///
/// # Panics
/// Panics if `f` panics.
pub fn in_new_network_namespace<T: Send>(f: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread =
            thread::Builder::new().name("scratch-netns".into()).spawn_scoped(scope, || {
                // SAFETY: `unshare_unsafe` is unsound with flags that unshare the descriptor table.
                // CLONE_NEWNET changes only the network namespace of the thread.
                unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
                Ok(f())
            })?;
        // A panic of `f`, for example of an assertion in a test, continues in the caller.
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
