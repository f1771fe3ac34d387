//! Tests of the confinement of a data process. Each attempt runs in a new process of the test
//! program, because a confinement cannot be removed.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::io::ErrorKind;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use skein_sys::{confine, landlock, seccomp};

const ATTEMPT: &str = "SKEIN_TEST_ATTEMPT";
const SIGSYS: i32 = 31;
const DONE: i32 = 40;
const REFUSED: i32 = 41;

/// Outcome of an attempt in a confined process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The attempt succeeds.
    Done,
    /// The system call fails with ENOSYS.
    Refused,
    /// The kernel kills the process (SIGSYS).
    Killed,
}

type Attempt = (&'static str, fn() -> std::io::Result<()>, Outcome);

fn exec() -> std::io::Result<()> {
    Err(Command::new("/bin/true").exec())
}

fn start() -> std::io::Result<()> {
    Command::new("/bin/true").status().map(drop)
}

fn socket(family: AddressFamily, kind: SocketType) -> std::io::Result<()> {
    Ok(rustix::net::socket(family, kind, None).map(drop)?)
}

fn code_from_data() -> std::io::Result<()> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
    let access = ProtFlags::READ | ProtFlags::EXEC;
    // SAFETY: the kernel chooses the address (no MAP_FIXED), so that the new mapping replaces no
    // other memory.
    let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, access, MapFlags::PRIVATE) };
    Ok(mapped.map(drop)?)
}

/// Makes a system call and returns its result.
fn call(number: libc::c_long, arguments: [libc::c_long; 6]) -> std::io::Result<libc::c_long> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: each caller passes null, numbers, or pointers to memory that is valid during the
    // call. If a forbidden call succeeds, the test fails and the process exits.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(std::io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Succeeds if the call failed with ENOSYS.
fn must_be_refused(what: &str, result: std::io::Result<libc::c_long>) -> std::io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        other => Err(std::io::Error::other(format!("{what}: {other:?}"))),
    }
}

/// Opens files by each system call and with each combination of the flags that give access to a
/// file.
fn every_way_to_open() -> std::io::Result<()> {
    const FLAGS: [i32; 10] = [
        libc::O_CREAT,
        libc::O_TRUNC,
        libc::O_APPEND,
        libc::O_NONBLOCK,
        libc::O_CLOEXEC,
        libc::O_PATH,
        libc::O_DIRECTORY,
        libc::O_TMPFILE,
        libc::O_SYNC,
        libc::O_NOFOLLOW,
    ];
    let paths =
        [c"/proc/self/mem", c"/proc/thread-self/mem", c"/etc/passwd", c"/dev/net/tun", c"/"];
    for path in paths {
        let path_pointer = path.as_ptr() as libc::c_long;
        for chosen in 0..1 << FLAGS.len() {
            let chosen = FLAGS.iter().enumerate().filter(|(bit, _)| chosen >> bit & 1 == 1);
            let more = chosen.fold(0, |flags, (_, flag)| flags | flag);
            for access in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_ACCMODE] {
                let flags = (access | more).into();
                let at = libc::AT_FDCWD.into();
                let what = format!("{path:?} with flags {flags:#o}");
                let opened = call(libc::SYS_openat, [at, path_pointer, flags, 0o600, 0, 0]);
                must_be_refused(&what, opened)?;
                let how = [flags as u64, 0, 0];
                let how = (&raw const how) as libc::c_long;
                let opened = call(libc::SYS_openat2, [at, path_pointer, how, 24, 0, 0]);
                must_be_refused(&what, opened)?;
                #[cfg(target_arch = "x86_64")]
                must_be_refused(
                    &what,
                    call(libc::SYS_open, [path_pointer, flags, 0o600, 0, 0, 0]),
                )?;
            }
        }
        #[cfg(target_arch = "x86_64")]
        must_be_refused("creat", call(libc::SYS_creat, [path_pointer, 0o600, 0, 0, 0, 0]))?;
        must_be_refused("truncate", call(libc::SYS_truncate, [path_pointer, 0, 0, 0, 0, 0]))?;
        let at = libc::AT_FDCWD.into();
        must_be_refused("unlinkat", call(libc::SYS_unlinkat, [at, path_pointer, 0, 0, 0, 0]))?;
        let tree = call(libc::SYS_open_tree, [at, path_pointer, 1, 0, 0, 0]);
        must_be_refused("open_tree", tree)?;
    }
    Ok(())
}

/// Creates executable memory by each system call and with each combination of protection and flags.
fn every_way_to_code() -> std::io::Result<()> {
    const PAGE: libc::c_long = 4096;
    for protection in 0..8 {
        let executable = protection & libc::PROT_EXEC != 0;
        for flags in 0..64 {
            let flags = libc::MAP_ANONYMOUS | flags & 3 | (flags & !3) << 11;
            let arguments = [0, PAGE, protection.into(), flags.into(), -1, 0];
            let mapped = call(libc::SYS_mmap, arguments);
            if executable {
                must_be_refused("mmap", mapped)?;
            } else if let Ok(start) = mapped {
                let all = libc::PROT_EXEC | protection;
                let changed = call(libc::SYS_mprotect, [start, PAGE, all.into(), 0, 0, 0]);
                must_be_refused("mprotect", changed)?;
                let changed = call(libc::SYS_pkey_mprotect, [start, PAGE, all.into(), -1, 0, 0]);
                must_be_refused("pkey_mprotect", changed)?;
                call(libc::SYS_munmap, [start, PAGE, 0, 0, 0, 0])?;
            }
        }
    }
    must_be_refused("shmat", call(libc::SYS_shmat, [0, 0, 0o100000, 0, 0, 0]))?;
    must_be_refused("pwrite64", call(libc::SYS_pwrite64, [1, 0, 0, 0, 0, 0]))?;
    must_be_refused("pwritev", call(libc::SYS_pwritev, [1, 0, 0, 0, 0, 0]))?;
    must_be_refused("pwritev2", call(libc::SYS_pwritev2, [1, 0, 0, 0, 0, 0]))?;
    must_be_refused("splice", call(libc::SYS_splice, [0, 0, 1, 0, 0, 0]))?;
    must_be_refused("copy_file_range", call(libc::SYS_copy_file_range, [0, 0, 1, 0, 0, 0]))
}

/// Affects another process, here the parent, by system calls that are allowed for other purposes.
fn every_way_to_a_process() -> std::io::Result<()> {
    let parent = rustix::process::getppid().unwrap().as_raw_pid().into();
    let own = std::process::id().into();
    for command in (0..16).chain([0x400, 0x402, 0x405, 0x407, 0x408, 0x410]) {
        let needed = [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL];
        if !needed.contains(&command) {
            let what = format!("fcntl {command}");
            must_be_refused(&what, call(libc::SYS_fcntl, [2, command.into(), parent, 0, 0, 0]))?;
        }
    }
    let limits = [0u64; 2];
    let limits = (&raw const limits) as libc::c_long;
    for (process, new) in [(parent, 0), (parent, limits), (own, 0), (0, limits)] {
        let cpu = libc::RLIMIT_CPU.into();
        let changed = call(libc::SYS_prlimit64, [process, cpu, new, 0, 0, 0]);
        must_be_refused("prlimit64", changed)?;
    }
    must_be_refused("tgkill", call(libc::SYS_tgkill, [parent, parent, 0, 0, 0, 0]))?;
    must_be_refused("kill", call(libc::SYS_kill, [parent, 0, 0, 0, 0, 0]))?;
    must_be_refused("pidfd_open", call(libc::SYS_pidfd_open, [parent, 0, 0, 0, 0, 0]))?;
    must_be_refused("process_madvise", call(libc::SYS_process_madvise, [0, 0, 0, 0, 0, 0]))?;
    for namespace in [0x20000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x2000_0000, 0x4000_0000] {
        // Without CLONE_VM, the kernel refuses a thread, so that none starts even without the
        // filter.
        let flags = i64::from(libc::CLONE_THREAD) | namespace;
        must_be_refused("clone", call(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]))?;
    }
    for protocol in
        (0..32).filter(|p| ![libc::NETLINK_ROUTE, libc::NETLINK_KOBJECT_UEVENT].contains(p))
    {
        let (family, kind) = (libc::AF_NETLINK.into(), libc::SOCK_RAW.into());
        must_be_refused(
            "netlink",
            call(libc::SYS_socket, [family, kind, protocol.into(), 0, 0, 0]),
        )?;
    }
    Ok(())
}

/// Makes a call of the x32 ABI, whose system calls have other numbers.
#[cfg(target_arch = "x86_64")]
fn other_table() -> std::io::Result<()> {
    const X32: libc::c_long = 0x4000_0000;
    let path = c"/proc/self/mem".as_ptr() as libc::c_long;
    let arguments = [libc::AT_FDCWD.into(), path, libc::O_RDWR.into(), 0, 0, 0];
    must_be_refused("x32", call(X32 | libc::SYS_openat, arguments))
}
#[cfg(not(target_arch = "x86_64"))]
fn other_table() -> std::io::Result<()> {
    Ok(())
}

const ATTEMPTS: &[Attempt] = &[
    ("a file to read", || File::open("/proc/self/status").map(drop), Outcome::Refused),
    ("opening files", every_way_to_open, Outcome::Done),
    ("executable memory", every_way_to_code, Outcome::Done),
    ("other processes", every_way_to_a_process, Outcome::Done),
    ("another table of system calls", other_table, Outcome::Done),
    ("udp", || UdpSocket::bind("127.0.0.1:0").map(drop), Outcome::Done),
    (
        "a thread",
        || std::thread::spawn(|| ()).join().map_err(|_| ErrorKind::Other.into()),
        Outcome::Done,
    ),
    ("memory", || rustix_memory().map(drop), Outcome::Done),
    ("a program in its place", exec, Outcome::Killed),
    ("a file to write", || File::create("/tmp/skein-confine").map(drop), Outcome::Refused),
    (
        "a file to change",
        || File::options().write(true).open("/dev/null").map(drop),
        Outcome::Refused,
    ),
    ("tcp", || TcpListener::bind("127.0.0.1:0").map(drop), Outcome::Refused),
    ("unix", || socket(AddressFamily::UNIX, SocketType::STREAM), Outcome::Refused),
    ("packet", || socket(AddressFamily::PACKET, SocketType::RAW), Outcome::Refused),
    ("raw", || socket(AddressFamily::INET, SocketType::RAW), Outcome::Refused),
    ("another process", start, Outcome::Refused),
    ("code from data", code_from_data, Outcome::Refused),
    ("a directory", || std::fs::create_dir("/tmp/skein-confine"), Outcome::Refused),
    ("a new name", || std::fs::rename("/tmp/skein-a", "/tmp/skein-b"), Outcome::Refused),
    ("another mode", || chmod(), Outcome::Refused),
    (
        "a signal",
        || Ok(rustix::process::kill_process(parent(), rustix::process::Signal::URG)?),
        Outcome::Refused,
    ),
    ("namespaces", || Ok(unshare()?), Outcome::Killed),
    ("others' memory", peek, Outcome::Killed),
    (
        "others' memory, to write",
        || call(libc::SYS_process_vm_writev, [1, 0, 0, 0, 0, 0]).map(drop),
        Outcome::Killed,
    ),
    (
        "a program in memory",
        || call(libc::SYS_execveat, [0, 0, 0, 0, 0, 0]).map(drop),
        Outcome::Killed,
    ),
    (
        "a file by its handle",
        || call(libc::SYS_open_by_handle_at, [0, 0, 0, 0, 0, 0]).map(drop),
        Outcome::Killed,
    ),
    (
        "code by personality",
        || call(libc::SYS_personality, [0x0040_0000, 0, 0, 0, 0, 0]).map(drop),
        Outcome::Killed,
    ),
    ("io_uring", || call(libc::SYS_io_uring_setup, [0, 0, 0, 0, 0, 0]).map(drop), Outcome::Killed),
];

fn rustix_memory() -> std::io::Result<std::os::fd::OwnedFd> {
    Ok(rustix::fs::memfd_create("skein-test", rustix::fs::MemfdFlags::CLOEXEC)?)
}

fn chmod() -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions("/dev/null", std::fs::Permissions::from_mode(0o666))
}

fn parent() -> rustix::process::Pid {
    rustix::process::getpid()
}

fn unshare() -> Result<(), Errno> {
    // SAFETY: CLONE_NEWNS does not unshare the descriptor table, which makes `unshare_unsafe`
    // unsound.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
}

fn peek() -> std::io::Result<()> {
    // SAFETY: PTRACE_TRACEME has no arguments and accesses no memory of this process.
    match unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Executes the attempt that the environment variable names, in a process of
/// `confined_process_makes_only_allowed_calls`; does nothing without the variable.
#[test]
fn attempt() {
    let Ok(wanted) = std::env::var(ATTEMPT) else { return };
    let (_, work, _) = ATTEMPTS.iter().find(|(name, ..)| *name == wanted).unwrap();
    confine::drop_capabilities(confine::DATAPLANE).unwrap();
    landlock::confine().unwrap();
    seccomp::confine().unwrap();
    let code = match work() {
        Ok(()) => DONE,
        Err(error) if error.raw_os_error() == Some(Errno::NOSYS.raw_os_error()) => REFUSED,
        Err(error) => {
            eprintln!("{error}");
            50
        }
    };
    std::process::exit(code);
}

#[test]
fn confined_process_makes_only_allowed_calls() {
    for (name, _, expected) in ATTEMPTS {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let output = command
            .args(["--exact", "attempt", "--nocapture", "--test-threads=1"])
            .env(ATTEMPT, name)
            .output()
            .unwrap();
        let outcome = match (output.status.code(), output.status.signal()) {
            (Some(DONE), _) => Outcome::Done,
            (Some(REFUSED), _) => Outcome::Refused,
            (_, Some(SIGSYS)) => Outcome::Killed,
            _ => panic!("{name}: {output:?}"),
        };
        assert_eq!(outcome, *expected, "{name}");
    }
}

/// Tests Landlock without the filter, in a thread, because Landlock confines threads.
#[test]
fn landlock_denies_files_without_the_filter() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "before").unwrap();
    let own = File::options().read(true).write(true).open("/proc/self/mem");
    assert!(own.is_ok(), "an unconfined process must be able to open its memory");
    let attempts: [(&str, &(dyn Fn() -> std::io::Result<()> + Sync)); 7] = [
        ("own memory", &|| File::options().write(true).open("/proc/self/mem").map(drop)),
        ("reading", &|| File::open(&file).map(drop)),
        ("writing", &|| File::options().write(true).open(&file).map(drop)),
        ("creating", &|| File::create(directory.path().join("new")).map(drop)),
        ("deleting", &|| std::fs::remove_file(&file)),
        ("executing", &|| Command::new("/bin/true").status().map(drop)),
        ("tcp", &|| TcpListener::bind("127.0.0.1:0").map(drop)),
    ];
    std::thread::scope(|scope| {
        let confined = scope.spawn(|| {
            confine::drop_capabilities(confine::DATAPLANE).unwrap();
            landlock::probe().unwrap();
            landlock::confine().unwrap();
            attempts.map(|(name, attempt)| (name, attempt().map_err(|error| error.kind())))
        });
        for (name, outcome) in confined.join().unwrap() {
            assert_eq!(outcome, Err(ErrorKind::PermissionDenied), "{name}");
        }
    });
    assert_eq!(std::fs::read_to_string(file).unwrap(), "before");
}

#[test]
fn dropped_capabilities_cannot_be_regained() {
    // The kernel keeps capabilities per thread.
    let after = std::thread::spawn(|| {
        confine::drop_capabilities(confine::DATAPLANE).unwrap();
        let program = Command::new("cat").arg("/proc/self/status").output().unwrap();
        String::from_utf8(program.stdout).unwrap()
    });
    let after = after.join().unwrap();
    let field = |name: &str| {
        let line = after.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    let most = confine::DATAPLANE.bits();
    for set in ["CapEff:", "CapPrm:"] {
        assert_eq!(field(set) & !most, 0, "{after}");
    }
    assert_eq!(field("NoNewPrivs:"), 1);
    let dumps = rustix::process::dumpable_behavior().unwrap();
    assert_eq!(dumps, rustix::process::DumpableBehavior::NotDumpable, "applies to the process");
}

#[test]
fn restricted_capabilities_come_back_by_exec_only() {
    // In a thread: the kernel keeps rights for each.
    let test = || {
        confine::drop_capabilities(confine::CONTROL).unwrap();
        confine::restrict_effective(confine::HOLDER).unwrap();
        let own = rustix::thread::capabilities(None).unwrap();
        assert_eq!(own.effective, own.permitted.intersection(confine::HOLDER));
        let program = Command::new("cat").arg("/proc/self/status").output().unwrap();
        let status = String::from_utf8(program.stdout).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
        let effective = u64::from_str_radix(line.trim(), 16).unwrap();
        assert_eq!(effective, own.permitted.bits(), "The next agent needs its capabilities.");
    };
    std::thread::spawn(test).join().unwrap();
}
