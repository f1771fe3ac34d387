//! The system calls that the data process may make from its start on. It is the process that strangers'
//! packets reach.
//!
//! What is not listed fails as on a kernel that does not have it (ENOSYS): that is what C libraries have
//! other ways for, so that a library or kernel of tomorrow costs a warning and not the node's network.
//! What only an intruder would call ends the process; its keeper starts another and says so.
//!
//! No file can be opened. A filter sees no path, so a process that may open some file for reading may
//! read every file of root, and one that may open `/proc/self/mem` for writing changes its own code.
//! The keeper opens what the data process needs and passes the descriptors.

use std::collections::BTreeMap;
use std::io;

use libc::{c_int, c_long};
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

/// Allowed whatever their arguments: what moves packets, time, memory, threads' waiting and ending, and what
/// concerns descriptors that the process has.
const ALLOWED: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_geteuid,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_listen,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_write,
    libc::SYS_writev,
];

/// The same of those that only the older architectures have.
#[cfg(target_arch = "x86_64")]
const ALLOWED_OLD: &[c_long] = &[
    libc::SYS_accept,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_OLD: &[c_long] = &[libc::SYS_accept];

/// Nothing that this process, or a library of it, calls on any kernel.
const HOSTILE: &[c_long] = &[
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_delete_module,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_io_uring_setup,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_setns,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// Requests of `ioctl(2)`: flags of descriptors, and the terminal's settings.
const IOCTL_REQUESTS: &[u64] = &[
    libc::FIONBIO,
    libc::FIOCLEX,
    // Whether the log goes to a terminal.
    libc::TCGETS,
];

/// Commands of `fcntl(2)`: copies and flags of descriptors, and seals of memory. The others send
/// signals to other processes (F_SETOWN, F_NOTIFY, F_SETLEASE) or change locks.
const FCNTL_COMMANDS: [u64; 7] = [
    libc::F_DUPFD_CLOEXEC as u64,
    libc::F_GETFD as u64,
    libc::F_SETFD as u64,
    libc::F_GETFL as u64,
    libc::F_SETFL as u64,
    libc::F_ADD_SEALS as u64,
    libc::F_GET_SEALS as u64,
];

/// Flags of `clone(2)` that give a new thread its own namespaces.
const NAMESPACE_FLAGS: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;

/// Of `prctl(2)`: names of threads and of memory, as glibc gives them, and what the kernel told at the start.
const PRCTL_OPTIONS: [u64; 3] = [libc::PR_SET_NAME as u64, libc::PR_SET_VMA as u64, 0x4155_5856];

/// Confines this thread, and all that it starts, to the calls above. There is no way back.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] if the kernel has no seccomp filters, the kernel's error otherwise.
pub fn confine() -> io::Result<()> {
    for program in programs().map_err(io::Error::other)? {
        seccompiler::apply_filter(&program).map_err(|error| match error {
            seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => refused(error),
            other => io::Error::other(other),
        })?;
    }
    Ok(())
}

/// Checks that the kernel has the filters that [`confine`] installs, without installing one.
///
/// # Errors
/// As [`confine`].
pub fn probe() -> io::Result<()> {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: SECCOMP_GET_ACTION_AVAIL reads one u32, which lives across the call.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action)
    };
    if result == 0 { Ok(()) } else { Err(refused(io::Error::last_os_error())) }
}

fn refused(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP) => {
            let text = "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)";
            io::Error::new(io::ErrorKind::Unsupported, text)
        }
        _ => error,
    }
}

/// Two filters: of their answers the sterner one counts. The first allows that there is a second.
fn programs() -> Result<[BpfProgram; 2], Error> {
    let arch = std::env::consts::ARCH.try_into()?;
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    let allowed = SeccompFilter::new(rules()?, missing, SeccompAction::Allow, arch)?;
    let hostile = HOSTILE.iter().map(|&call| (call, vec![])).collect();
    let kill = SeccompAction::KillProcess;
    let hostile = SeccompFilter::new(hostile, SeccompAction::Allow, kill, arch)?;
    Ok([hostile.try_into()?, allowed.try_into()?])
}

fn rules() -> Result<BTreeMap<c_long, Vec<SeccompRule>>, Error> {
    let mut rules: BTreeMap<_, _> =
        ALLOWED.iter().chain(ALLOWED_OLD).map(|&call| (call, vec![])).collect();
    // Threads, no processes. (clone3(2), whose flags cannot be seen, is not there: so clone(2) is used.)
    let thread = libc::CLONE_THREAD as u64;
    let flags = masked(0, thread | NAMESPACE_FLAGS, thread)?;
    rules.insert(libc::SYS_clone, vec![rule(&[flags])?]);
    // No code that was data.
    let executable = libc::PROT_EXEC as u64;
    rules.insert(libc::SYS_mmap, vec![rule(&[masked(2, executable, 0)?])?]);
    rules.insert(libc::SYS_mprotect, vec![rule(&[masked(2, executable, 0)?])?]);
    // Limits are read, of this process only: a limit of CPU time ends another process.
    let no_limits = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    rules.insert(libc::SYS_prlimit64, vec![rule(&[equal(0, 0)?, no_limits])?]);
    // Only itself, by abort(3).
    let itself = equal(0, std::process::id().into())?;
    rules.insert(libc::SYS_tgkill, vec![rule(&[itself])?]);
    let socket = |domain: c_int, kind: c_int| {
        rule(&[equal(0, domain as u64)?, masked(1, 0xf, kind as u64)?])
    };
    let netlink =
        |protocol: c_int| rule(&[equal(0, libc::AF_NETLINK as u64)?, equal(2, protocol as u64)?]);
    rules.insert(
        libc::SYS_socket,
        vec![
            socket(libc::AF_INET, libc::SOCK_DGRAM)?,
            socket(libc::AF_INET6, libc::SOCK_DGRAM)?,
            netlink(libc::NETLINK_ROUTE)?,
            netlink(libc::NETLINK_KOBJECT_UEVENT)?,
        ],
    );
    let one_of = |argument, values: &[u64]| -> Result<Vec<_>, Error> {
        values.iter().map(|&value| rule(&[equal(argument, value)?])).collect()
    };
    rules.insert(libc::SYS_fcntl, one_of(1, &FCNTL_COMMANDS)?);
    rules.insert(libc::SYS_ioctl, one_of(1, IOCTL_REQUESTS)?);
    rules.insert(libc::SYS_prctl, one_of(0, &PRCTL_OPTIONS)?);
    Ok(rules)
}

fn rule(conditions: &[SeccompCondition]) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(conditions.to_vec())?)
}

fn equal(argument: u8, value: u64) -> Result<SeccompCondition, Error> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, Error> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?)
}
