//! What a data process can no longer do. The test program starts itself anew for each attempt, as there is no
//! way back.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::io::ErrorKind;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use skein_sys::{confine, seccomp};

const ATTEMPT: &str = "SKEIN_TEST_ATTEMPT";
const SIGSYS: i32 = 31;
const DONE: i32 = 40;
const REFUSED: i32 = 41;

/// What becomes of an attempt in a confined process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It works.
    Done,
    /// As if the kernel did not have it.
    Refused,
    /// The process ends.
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
    // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
    let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, access, MapFlags::PRIVATE) };
    Ok(mapped.map(drop)?)
}

const ATTEMPTS: &[Attempt] = &[
    ("a file to read", || File::open("/proc/self/status").map(drop), Outcome::Done),
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
    // SAFETY: mount namespaces have nothing to do with this process's memory and descriptors.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
}

fn peek() -> std::io::Result<()> {
    // SAFETY: PTRACE_TRACEME has no arguments, and touches no memory.
    match unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Runs in the process that was started for it.
#[test]
fn attempt() {
    let Ok(wanted) = std::env::var(ATTEMPT) else { return };
    let (_, work, _) = ATTEMPTS.iter().find(|(name, ..)| *name == wanted).unwrap();
    confine::give_up(confine::DATAPLANE).unwrap();
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
fn a_confined_process_does_what_it_must_and_nothing_else() {
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

#[test]
fn what_is_given_up_does_not_come_back() {
    // In a thread: the kernel keeps rights for each.
    let after = std::thread::spawn(|| {
        confine::give_up(confine::DATAPLANE).unwrap();
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
    assert_eq!(dumps, rustix::process::DumpableBehavior::NotDumpable, "of the whole process");
}
