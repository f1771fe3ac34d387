//! What a process gives up when it starts, so that whoever takes it over by a fault of it gains little:
//! capabilities that it does not need, every way to get more, and core dumps, which would hold keys.

use std::io;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// The data process and its keeper: to open the device's queues, for buffers beyond the system's limit,
/// and to listen on a port below 1024.
pub const DATAPLANE: CapabilitySet =
    CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_BIND_SERVICE);

/// The control process: links, addresses, routes, firewall; and files that another user owns.
pub const CONTROL: CapabilitySet = DATAPLANE.union(CapabilitySet::DAC_OVERRIDE);

/// What serving pods needs beside that: entering their network namespaces, which may be named by a
/// process.
pub const PODS: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_PTRACE);

/// Keeps of its capabilities only those of `keep`, and makes the process unable to gain any again or to be
/// dumped. Programs that it starts have no more. Returns what is left, as the kernel writes it.
///
/// Call it before there is a second thread: the kernel keeps capabilities for each.
///
/// # Errors
/// What the kernel says; it has never refused this.
pub fn drop_capabilities(keep: CapabilitySet) -> io::Result<CapabilitySet> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    for other in CapabilitySet::all().difference(keep).iter() {
        // Without CAP_SETPCAP it cannot, nor need it: no program gains what this process does not have.
        let _ = remove_capability_from_bounding_set(other);
    }
    let has = capabilities(None)?;
    let left = has.permitted.intersection(keep);
    set_capabilities(
        None,
        CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() },
    )?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(left)
}
