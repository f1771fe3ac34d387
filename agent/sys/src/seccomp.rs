//! Seccomp filters of the data process (seccomp(2)), which processes packets of unauthenticated
//! senders.
//!
//! A system call that is not listed fails with ENOSYS, as on a kernel without it. C libraries have
//! fallbacks for ENOSYS, so that a new call in a later library does not stop the data process. A
//! system call that only an attacker would make ([`HOSTILE`]) kills the process, and the keeper
//! restarts it.
//!
//! The data process cannot open files. A filter sees no path: permission to open some file for
//! reading would include every file of root, and permission to open `/proc/self/mem` for writing
//! would allow changes of the code. The keeper opens the required files and passes the descriptors.

use std::collections::BTreeMap;
use std::io;

use libc::{c_int, c_long};
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

/// System calls that are allowed with all arguments: packet I/O, clocks, memory, synchronisation
/// and exit of threads, and operations on open descriptors.
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

/// System calls that are allowed with all arguments and exist only on some architectures.
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

/// System calls that neither the data process nor one of its libraries makes on any kernel. A call
/// kills the process.
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

/// Allowed requests of ioctl(2): flags of descriptors, and reads of terminal settings.
const IOCTL_REQUESTS: &[u64] = &[
    libc::FIONBIO,
    libc::FIOCLEX,
    // isatty(3), for the format of the log.
    libc::TCGETS,
];

/// Allowed commands of fcntl(2): copies and flags of descriptors, and seals of memfds. Other
/// commands can send signals to other processes (F_SETOWN, F_NOTIFY, F_SETLEASE) or change locks.
const FCNTL_COMMANDS: [u64; 7] = [
    libc::F_DUPFD_CLOEXEC as u64,
    libc::F_GETFD as u64,
    libc::F_SETFD as u64,
    libc::F_GETFL as u64,
    libc::F_SETFL as u64,
    libc::F_ADD_SEALS as u64,
    libc::F_GET_SEALS as u64,
];

/// Flags of clone(2) that create namespaces.
const NAMESPACE_FLAGS: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;

/// Allowed options of prctl(2), which glibc uses: names of threads and of memory, and the auxiliary
/// vector (0x41555856, PR_GET_AUXV).
const PRCTL_OPTIONS: [u64; 3] = [libc::PR_SET_NAME as u64, libc::PR_SET_VMA as u64, 0x4155_5856];

/// Installs the filters for the calling thread and all threads that it starts later. The filters
/// cannot be removed.
///
/// # Errors
/// `Unsupported` if the kernel does not support seccomp filters; otherwise the kernel's error.
pub fn confine() -> io::Result<()> {
    for program in programs().map_err(io::Error::other)? {
        seccompiler::apply_filter(&program).map_err(|error| match error {
            seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => refused(error),
            other => io::Error::other(other),
        })?;
    }
    Ok(())
}

/// Checks that the kernel supports the filters of [`confine`]. The function installs no filter.
///
/// # Errors
/// `Unsupported` if the kernel does not support seccomp filters; otherwise the kernel's error.
pub fn probe() -> io::Result<()> {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: SECCOMP_GET_ACTION_AVAIL reads one u32, which is borrowed for the call.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action)
    };
    if result == 0 { Ok(()) } else { Err(refused(io::Error::last_os_error())) }
}

fn refused(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP) => {
            let text = "the kernel does not support seccomp filters (CONFIG_SECCOMP_FILTER)";
            io::Error::new(io::ErrorKind::Unsupported, text)
        }
        _ => error,
    }
}

/// Returns the two filters in the order of installation. For each system call, the kernel applies
/// the stricter result. The first filter must allow the installation of the second.
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
    // clone(2) may create threads but no processes. clone3(2) passes its flags in memory, which a
    // filter cannot read; it fails with ENOSYS, and glibc falls back to clone(2).
    let thread = libc::CLONE_THREAD as u64;
    let flags = masked(0, thread | NAMESPACE_FLAGS, thread)?;
    rules.insert(libc::SYS_clone, vec![rule(&[flags])?]);
    // Memory must not become executable.
    let executable = libc::PROT_EXEC as u64;
    rules.insert(libc::SYS_mmap, vec![rule(&[masked(2, executable, 0)?])?]);
    rules.insert(libc::SYS_mprotect, vec![rule(&[masked(2, executable, 0)?])?]);
    // Limits may be read for this process only. A new limit of CPU time would kill another process.
    let no_limits = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    rules.insert(libc::SYS_prlimit64, vec![rule(&[equal(0, 0)?, no_limits])?]);
    // abort(3) sends a signal to its own process.
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

/// Returns a rule that matches if all conditions match.
fn rule(conditions: &[SeccompCondition]) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(conditions.to_vec())?)
}

/// Returns the condition that the lower 32 bits of an argument equal `value`.
fn equal(argument: u8, value: u64) -> Result<SeccompCondition, Error> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?)
}

/// Returns the condition that the bits `mask` of the lower 32 bits of an argument equal `value`.
fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, Error> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?)
}
