//! Loss of privileges at the start of a process: capabilities that it does not need
//! (capabilities(7)), every way to gain new ones (PR_SET_NO_NEW_PRIVS), and core dumps, which would
//! contain keys. The measures limit the effect of a compromised process.

use std::io;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Capabilities of the data process and its keeper: CAP_NET_ADMIN for TUN queues and for socket
/// buffers above the limit of the sysctl, CAP_NET_BIND_SERVICE for UDP ports below 1024.
pub const DATAPLANE: CapabilitySet =
    CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_BIND_SERVICE);

/// Capabilities of the control process: those of [`DATAPLANE`] for links, addresses, routes and the
/// firewall, and CAP_DAC_OVERRIDE for files of other users.
pub const CONTROL: CapabilitySet = DATAPLANE.union(CapabilitySet::DAC_OVERRIDE);

/// Additional capabilities of a control process that serves pods: CAP_SYS_ADMIN to enter network
/// namespaces, CAP_SYS_PTRACE for namespaces in the form `/proc/<pid>/ns/net`.
pub const PODS: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_PTRACE);

/// Effective capabilities of `skein-agent hold`, which only waits for a lock. The state directory
/// may belong to another user.
pub const HOLDER: CapabilitySet = CapabilitySet::DAC_OVERRIDE;

/// Drops all capabilities except those in `keep`, for the calling thread and for programs that it
/// starts. Also sets PR_SET_NO_NEW_PRIVS, and disables core dumps of the process. Returns the
/// remaining capabilities.
///
/// Call the function before the process starts a second thread, because the kernel keeps
/// capabilities per thread.
///
/// # Errors
/// The error of prctl(2), capget(2) or capset(2).
pub fn drop_capabilities(keep: CapabilitySet) -> io::Result<CapabilitySet> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    for other in CapabilitySet::all().difference(keep).iter() {
        // The call needs CAP_SETPCAP. Without it, PR_SET_NO_NEW_PRIVS alone keeps programs from
        // gaining capabilities.
        let _ = remove_capability_from_bounding_set(other);
    }
    let has = capabilities(None)?;
    let remaining = has.permitted.intersection(keep);
    set_capabilities(
        None,
        CapabilitySets {
            effective: remaining,
            permitted: remaining,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(remaining)
}

/// Makes only the capabilities of `keep` effective for the calling thread. The permitted set stays,
/// so that a program that root executes from here has all of them again.
///
/// Call it before there is a second thread: the kernel keeps capabilities for each.
///
/// # Errors
/// The error of capget(2) or capset(2).
pub fn restrict_effective(keep: CapabilitySet) -> io::Result<()> {
    let has = capabilities(None)?;
    let effective = has.permitted.intersection(keep);
    Ok(set_capabilities(None, CapabilitySets { effective, ..has })?)
}
