//! Start, refused starts, recovery and shutdown of the agent process in new network namespaces. The
//! tests need root.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs::Permissions;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use skein_agent::status::Document;
use skein_ipc::{ErrorKind, HANDOVER_VERSION, Request, Response, read_frame, write_frame};
use skein_netlink::staged::StagedInterface;
use skein_sys::in_new_network_namespace;
use skein_sys::tun::{OpenQueues, TunOffload, create_persistent, open_queues};
use support::{PROCESS_TIMEOUT, Process, finish, send};

const AGENT: &str = env!("CARGO_BIN_EXE_skein-agent");

/// Files of a node, and the agent processes that use them.
struct Node {
    directory: tempfile::TempDir,
    agents: Vec<Process>,
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("nodes")).unwrap();
        let node = Self { directory, agents: Vec::new() };
        node.configure("", "");
        ip("link set lo up");
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes the configuration with additional keys before and after its top-level keys.
    fn configure(&self, head: &str, tail: &str) {
        let path = self.directory.path().display();
        let text = format!(
            "{head}\nname = 'node-a'\nstate_dir = '{path}/state'\nnodes = '{path}/nodes'\n\
             pod_cidrs = ['10.244.1.0/24', 'fd00:1::/64']\n\
             control = {{ socket = '{path}/control.sock' }}\n\
             metrics = {{ listen = '127.0.0.1:9464' }}\n\
             underlay = {{ port = 51900 }}\n{tail}\n\
             [dataplane]\nsocket = '{path}/dataplane.sock'\nlanes = 2\n"
        );
        std::fs::write(self.path("agent.toml"), text).unwrap();
    }

    fn command(&self, command: &str) -> Command {
        let mut agent = Command::new(AGENT);
        agent.args(command.split_whitespace()).arg("--config").arg(self.path("agent.toml"));
        agent
    }

    fn output(&self, command: &str) -> Output {
        finish(&mut self.command(command)).unwrap()
    }

    /// Starts the agent and waits until it is ready.
    fn run(&mut self) -> Document {
        let log = std::fs::File::create(self.path("log")).unwrap();
        // The data process may outlive the agent, and must not hold the output of the tests open.
        let agent = Process::start(self.command("run").stdout(Stdio::null()).stderr(log));
        self.agents.push(agent.unwrap());
        self.until("the agent is ready", |document| document.ready)
    }

    fn until(&mut self, what: &str, condition: impl Fn(&Document) -> bool) -> Document {
        let deadline = Instant::now() + PROCESS_TIMEOUT;
        loop {
            let output = self.output("status -o json");
            let document = serde_json::from_slice::<Document>(&output.stdout);
            if let Ok(document) = document
                && condition(&document)
            {
                return document;
            }
            let ended = self.agents.last_mut().and_then(|agent| agent.exited().unwrap());
            let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
            let late = Instant::now() > deadline;
            assert!(
                ended.is_none() && !late,
                "The test waited until {what}, but the condition did not hold; exit status {ended:?}; \
                 log:\n{log}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs the agent until it exits, and returns exit code and message.
    fn fail(&mut self) -> (i32, String) {
        run_to_exit(&mut self.command("run"))
    }

    /// Sends a signal to the last started agent and returns its exit code.
    fn signal(&mut self, signal: Signal) -> Option<i32> {
        let mut agent = self.agents.pop().unwrap();
        agent.signal(signal).unwrap();
        agent.wait().unwrap().code()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A panic in `drop` would prevent the cleanup of other tests.
        for agent in &mut self.agents {
            let _ = agent.signal(Signal::TERM).and_then(|()| agent.wait());
        }
        self.agents.clear();
        // The command also ends a data process that still runs.
        let _ = finish(&mut self.command("cleanup"));
    }
}

/// Runs a command until it exits, and returns exit code and message.
fn run_to_exit(command: &mut Command) -> (i32, String) {
    let output = finish(command).unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn ip(arguments: &str) -> String {
    let output = finish(Command::new("ip").args(arguments.split_whitespace()));
    let output = output.expect("ip is missing: install the Debian package iproute2");
    assert!(output.status.success(), "`ip {arguments}` failed: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn exists(interface: &str) -> bool {
    ip("-brief link").lines().any(|line| line.split(['@', ' ']).next() == Some(interface))
}

fn in_namespace(test: impl FnOnce() + Send) {
    in_new_network_namespace(test)
        .expect("this test needs root: CAP_SYS_ADMIN for a network namespace");
}

/// Checks that the agent refuses to start: exit code, parts of the message, and no sockets left.
fn assert_refused(node: &mut Node, code: i32, words: &[&str]) {
    let (found, message) = node.fail();
    assert_eq!(found, code, "The exit code is wrong: {message}");
    for word in words {
        assert!(message.contains(word), "The message does not contain {word:?}: {message}");
    }
    assert!(!node.path("control.sock").exists() && !node.path("dataplane.sock").exists());
}

#[test]
fn wrong_configuration_or_record_exits_with_2() {
    in_namespace(|| {
        let mut node = Node::new();
        node.configure("nmae = 'x'", "");
        assert_refused(&mut node, 2, &["agent.toml", "line 1", "nmae"]);
        node.configure("private_key_file = '/nonexistent/key'", "");
        assert_refused(&mut node, 2, &["private_key_file", "keygen"]);
        node.configure("", "");
        let file = node.path("nodes/b.toml");
        let record = |text: &str| {
            let key = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
            let text = format!("public_key = '{key}'\nendpoints = ['192.0.2.2']\n{text}");
            std::fs::write(&file, text).unwrap();
        };
        record("name = 'node-b'\npod_cidrs = ['10.244.1.128/25']");
        assert_refused(&mut node, 2, &["b.toml", "pod_cidrs", "overlap"]);
        record("name = 'node-a'\npod_cidrs = ['10.244.1.0/24', 'fd00:1::/64']");
        assert_refused(&mut node, 2, &["b.toml", "public_key", "Correct"]);
        std::fs::remove_dir_all(node.path("nodes")).unwrap();
        assert_refused(&mut node, 2, &["nodes", "Create the directory"]);
        assert!(!exists("skein0"));
    });
}

#[test]
fn resource_in_use_exits_with_5_and_is_unchanged() {
    in_namespace(|| {
        let mut node = Node::new();
        let socket = UdpSocket::bind("0.0.0.0:51900").unwrap();
        assert_refused(&mut node, 5, &["51900"]);
        assert!(!exists("skein0"), "A failed start must remove its interface.");
        drop(socket);
        let listener = TcpListener::bind("127.0.0.1:9464").unwrap();
        assert_refused(&mut node, 5, &["metrics.listen", "9464"]);
        drop(listener);
        ip("tuntap add skein0 mode tun");
        let before = ip("-details link show skein0");
        assert_refused(&mut node, 5, &["skein0", "another program", "interface.name"]);
        assert_eq!(ip("-details link show skein0"), before);
        let cleanup = node.output("cleanup");
        assert_eq!(cleanup.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&cleanup.stderr).contains("another program"));
        assert!(exists("skein0"));
    });
}

#[test]
fn device_in_use_exits_with_5_and_foreign_address_with_2() {
    in_namespace(|| {
        let mut node = Node::new();
        // The device of this node, which another process has opened.
        create_persistent("skein0").unwrap();
        ip("link set skein0 alias skein:node-a");
        let OpenQueues { queues, .. } = open_queues("skein0", 1, TunOffload::NONE).unwrap();
        assert_refused(&mut node, 5, &["another process uses TUN device skein0"]);
        drop(queues);
        let file = node.path("agent.toml");
        let good = std::fs::read_to_string(&file).unwrap();
        let foreign = "underlay = { addresses = ['192.0.2.200'], port";
        std::fs::write(&file, good.replace("underlay = { port", foreign)).unwrap();
        assert_refused(&mut node, 2, &["192.0.2.200", "underlay.addresses"]);
        std::fs::write(&file, good.replace("control.sock", "dataplane.sock")).unwrap();
        assert_refused(&mut node, 2, &["dataplane.socket", "control.socket", "its own"]);
        let long = format!("control.sock{}", "x".repeat(100));
        std::fs::write(&file, good.replace("control.sock", &long)).unwrap();
        assert_refused(&mut node, 2, &["control.socket", "107"]);
    });
}

#[test]
fn status_needs_root_or_agent_user() {
    in_namespace(|| {
        let mut node = Node::new();
        node.run();
        // Other users can reach the program and the socket's directory, but not the socket.
        let open = |path: &Path| std::fs::set_permissions(path, Permissions::from_mode(0o755));
        open(node.directory.path()).unwrap();
        let program = node.path("agent");
        // Another program makes the copy, because a file that this process has open for writing
        // cannot be executed (ETXTBSY).
        assert!(finish(Command::new("cp").arg(AGENT).arg(&program)).unwrap().status.success());
        open(&program).unwrap();
        let mut status = Command::new("setpriv");
        status.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
        status.arg("status").arg("--socket").arg(node.path("control.sock"));
        let (code, message) = run_to_exit(&mut status);
        assert_eq!(code, 3, "The exit code is wrong: {message}");
        assert!(
            message.contains("control.sock") && message.contains("as root"),
            "The message is wrong: {message}"
        );
    });
}

#[test]
fn two_agents_cannot_share_a_state_directory() {
    in_namespace(|| {
        let mut node = Node::new();
        node.run();
        let (code, message) = node.fail();
        assert_eq!(code, 5, "The exit code is wrong: {message}");
        assert!(message.contains("state_dir"), "The message is wrong: {message}");
        let cleanup = node.output("cleanup");
        assert_eq!(cleanup.status.code(), Some(5), "cleanup must fail while the agent runs.");
        assert!(node.until("the first still runs", |document| document.ready).ready);
    });
}

#[test]
fn missing_privilege_exits_with_3_and_device_with_4() {
    in_namespace(|| {
        let node = Node::new();
        let run = |wrapper: &[&str]| {
            let mut command = Command::new(wrapper[0]);
            command.args(&wrapper[1..]).arg(AGENT).arg("run").arg("--config");
            let result = run_to_exit(command.arg(node.path("agent.toml")));
            assert!(!exists("skein0"));
            result
        };
        let (code, message) = run(&["setpriv", "--bounding-set=-net_admin"]);
        assert_eq!(code, 3, "The exit code is wrong: {message}");
        assert!(message.contains("CAP_NET_ADMIN"), "The message is wrong: {message}");
        let hide = "mount -t tmpfs none /dev/net && exec \"$@\"";
        let (code, message) = run(&["unshare", "--mount", "sh", "-c", hide, "sh"]);
        assert_eq!(code, 4, "The exit code is wrong: {message}");
        assert!(message.contains("/dev/net/tun"), "The message is wrong: {message}");
    });
}

#[test]
fn data_process_of_killed_agent_is_adopted() {
    in_namespace(|| {
        let mut node = Node::new();
        let before = node.run();
        node.signal(Signal::KILL);
        let after = node.run();
        assert_eq!(after.dataplane.pid, before.dataplane.pid);
        assert!(after.dataplane.revision > before.dataplane.revision);
        assert_eq!(after.interface.index, before.interface.index);
    });
}

#[test]
fn probe_fails_if_data_process_hangs() {
    in_namespace(|| {
        let mut node = Node::new();
        let socket = node.path("dataplane.sock");
        let probe = || {
            let mut probe = Command::new(AGENT);
            run_to_exit(probe.args(["dataplane", "--probe", "--socket"]).arg(&socket))
        };
        let (code, message) = probe();
        assert!(
            code != 0 && message.contains("no data process answers"),
            "The message is wrong: {message}"
        );
        let pid = node.run().dataplane.pid.unwrap();
        assert_eq!(probe(), (0, String::new()));
        send(Signal::STOP, pid).unwrap();
        let (code, message) = probe();
        send(Signal::CONT, pid).unwrap();
        assert!(
            code != 0 && message.contains("does not answer"),
            "The message is wrong: {message}"
        );
        assert_eq!(probe().0, 0);
    });
}

#[test]
fn data_process_with_other_settings_is_replaced() {
    in_namespace(|| {
        let mut node = Node::new();
        let before = node.run();
        node.signal(Signal::KILL);
        node.configure("cluster_id = 'other'", "");
        let after = node.run();
        assert_ne!(after.dataplane.pid, before.dataplane.pid);
        assert_eq!(after.interface.index, before.interface.index);
    });
}

#[test]
fn killed_data_process_is_restarted() {
    in_namespace(|| {
        let mut node = Node::new();
        let before = node.run();
        send(Signal::KILL, before.dataplane.pid.unwrap()).unwrap();
        let after = node
            .until("the data process is restarted", |now| now.ready && now.dataplane.restarts == 1);
        assert_ne!(after.dataplane.pid, before.dataplane.pid);
        assert_eq!(after.interface.index, before.interface.index, "The TUN device must stay.");
    });
}

#[test]
fn deleted_interface_is_created_again() {
    in_namespace(|| {
        let mut node = Node::new();
        let before = node.run();
        ip("link del skein0");
        let index = before.interface.index;
        node.until("the data process is attached to another", |now| {
            now.interface.index != index && now.dataplane.revision > before.dataplane.revision
        });
        let deadline = Instant::now() + Duration::from_secs(30);
        while !ip("address show dev skein0").contains("10.244.1.1/32") {
            assert!(Instant::now() < deadline, "The new interface has no address.");
            std::thread::sleep(Duration::from_millis(20));
        }
        let link = ip("-details link show skein0");
        assert!(link.contains("LOWER_UP"), "The lanes are not attached to the interface: {link}");
    });
}

#[test]
fn shutdown_and_cleanup_leave_nothing() {
    in_namespace(|| {
        let mut node = Node::new();
        let document = node.run();
        let pid = document.dataplane.pid.unwrap();
        assert_eq!(node.signal(Signal::TERM), Some(0));
        assert!(
            !Path::new(&format!("/proc/{pid}")).exists(),
            "The data process must end with the agent."
        );
        assert!(exists("skein0"), "The interface must stay for the next start.");
        for expected in ["removed interface skein0", "nothing to remove"] {
            let cleanup = node.output("cleanup --state");
            assert!(cleanup.status.success(), "cleanup failed: {cleanup:?}");
            assert!(
                String::from_utf8_lossy(&cleanup.stdout).contains(expected),
                "The output lacks {expected:?}: {cleanup:?}"
            );
        }
        assert!(!exists("skein0") && !node.path("state").exists());
        let status = node.output("status");
        assert_eq!(status.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&status.stderr).contains("no agent answers"));
    });
}

#[test]
fn cleanup_removes_unfinished_interface() {
    in_namespace(|| {
        let node = Node::new();
        let staged = StagedInterface::new("skein0", "skein:node-a");
        let name = staged.name();
        create_persistent(name).unwrap();
        let cleanup = node.output("cleanup");
        assert!(cleanup.status.success(), "cleanup failed: {cleanup:?}");
        let message = String::from_utf8_lossy(&cleanup.stdout);
        assert!(
            message.contains(&format!("removed unfinished interface {name}")),
            "The message is wrong: {message}"
        );
        assert!(!exists(name));
    });
}

#[test]
fn cleanup_ends_running_data_process() {
    in_namespace(|| {
        let mut node = Node::new();
        let pid = node.run().dataplane.pid.unwrap();
        node.signal(Signal::KILL);
        let cleanup = node.output("cleanup");
        assert!(cleanup.status.success(), "cleanup failed: {cleanup:?}");
        assert!(String::from_utf8_lossy(&cleanup.stdout).contains("removed data process"));
        let deadline = Instant::now() + Duration::from_secs(30);
        // The process is a zombie until its new parent waits for it.
        let alive = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            stat.is_ok_and(|stat| !stat.contains(") Z "))
        };
        while alive() {
            assert!(Instant::now() < deadline, "The data process still runs.");
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

#[test]
fn hand_over_with_other_version_is_refused() {
    in_namespace(|| {
        let mut node = Node::new();
        let before = node.run().dataplane.pid.unwrap();
        for version in [0, HANDOVER_VERSION + 1] {
            let mut stream = UnixStream::connect(node.path("dataplane.sock")).unwrap();
            write_frame(&mut stream, &Request::TakeOver { version }).unwrap();
            let answer = read_frame::<Response>(&mut stream).unwrap().unwrap();
            let invalid = matches!(&answer, Response::Error { kind: ErrorKind::Invalid, .. });
            assert!(invalid, "The data process accepted version {version}: {answer:?}");
            write_frame(&mut stream, &Request::Report { peers: false }).unwrap();
            let answer = read_frame::<Response>(&mut stream).unwrap().unwrap();
            assert!(
                matches!(&answer, Response::Report { .. }),
                "The data process must continue to answer: {answer:?}"
            );
        }
        let after = node.until("the agent is ready again", |document| document.ready);
        assert_eq!(after.dataplane.pid, Some(before));
    });
}

#[test]
fn keygen_and_pubkey_print_same_public_key() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("key");
    let run = |arguments: &[&str]| finish(Command::new(AGENT).args(arguments).arg(&file)).unwrap();
    let public = run(&["keygen", "--out"]);
    assert!(public.status.success(), "keygen failed: {public:?}");
    assert_eq!(run(&["pubkey"]).stdout, public.stdout);
    let again = run(&["keygen", "--out"]);
    assert_eq!(again.status.code(), Some(5), "keygen must not overwrite a key.");
}
