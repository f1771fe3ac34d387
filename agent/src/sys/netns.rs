//! Scratch network namespaces, for probing and for tests.

use std::io;
use std::thread;

use rustix::thread::{UnshareFlags, unshare_unsafe};

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
