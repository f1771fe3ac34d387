//! The real program in scratch network namespaces: how it starts, refuses to start, goes on and
//! ends. These tests need root.

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
use skein_netlink::provisional::Provisional;
use skein_sys::in_new_network_namespace;
use skein_sys::tun::{TunOffload, create_persistent, open_queues};
use support::{LIMIT, Process, finish, send};

const AGENT: &str = env!("CARGO_BIN_EXE_skein-agent");

/// A node's files, and the agents that run with them.
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

    /// Writes the configuration with more keys at its head and at its end.
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
        // Its data process may outlive it, and must not hold the tests' own output open.
        let agent = Process::start(self.command("run").stdout(Stdio::null()).stderr(log));
        self.agents.push(agent.unwrap());
        self.until("it is ready", |document| document.ready)
    }

    fn until(&mut self, what: &str, condition: impl Fn(&Document) -> bool) -> Document {
        let deadline = Instant::now() + LIMIT;
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
            assert!(ended.is_none() && !late, "waited until {what}; {ended:?}; log:\n{log}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs the agent to its end, which must come by itself.
    fn fail(&mut self) -> (i32, String) {
        end(&mut self.command("run"))
    }

    /// Ends the agent that was started last; its exit code.
    fn signal(&mut self, signal: Signal) -> Option<i32> {
        let mut agent = self.agents.pop().unwrap();
        agent.signal(signal).unwrap();
        agent.wait().unwrap().code()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A panic in here would end the other tests' clean-up too.
        for agent in &mut self.agents {
            let _ = agent.signal(Signal::TERM).and_then(|()| agent.wait());
        }
        self.agents.clear();
        // It ends a data process that was left, too.
        let _ = finish(&mut self.command("cleanup"));
    }
}

/// Exit code and message of a command that must end by itself.
fn end(command: &mut Command) -> (i32, String) {
    let output = finish(command).unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn ip(arguments: &str) -> String {
    let output = finish(Command::new("ip").args(arguments.split_whitespace()));
    let output = output.expect("ip is missing: install the Debian package iproute2");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn exists(interface: &str) -> bool {
    ip("-brief link").lines().any(|line| line.split(['@', ' ']).next() == Some(interface))
}

fn in_namespace(test: impl FnOnce() + Send) {
    in_new_network_namespace(test)
        .expect("this test needs root: CAP_SYS_ADMIN for a network namespace");
}

/// Runs the agent expecting an exit code and words of its message; nothing may stay behind.
fn refused(node: &mut Node, code: i32, words: &[&str]) {
    let (found, message) = node.fail();
    assert_eq!(found, code, "{message}");
    for word in words {
        assert!(message.contains(word), "no {word:?} in {message}");
    }
    assert!(!node.path("control.sock").exists() && !node.path("dataplane.sock").exists());
}

#[test]
fn wrong_configurations_and_records_end_with_2() {
    in_namespace(|| {
        let mut node = Node::new();
        node.configure("nmae = 'x'", "");
        refused(&mut node, 2, &["agent.toml", "line 1", "nmae"]);
        node.configure("private_key_file = '/nonexistent/key'", "");
        refused(&mut node, 2, &["private_key_file", "keygen"]);
        node.configure("", "");
        let file = node.path("nodes/b.toml");
        let record = |text: &str| {
            let key = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
            let text = format!("public_key = '{key}'\nendpoints = ['192.0.2.2']\n{text}");
            std::fs::write(&file, text).unwrap();
        };
        record("name = 'node-b'\npod_cidrs = ['10.244.1.128/25']");
        refused(&mut node, 2, &["b.toml", "pod_cidrs", "overlap"]);
        record("name = 'node-a'\npod_cidrs = ['10.244.1.0/24', 'fd00:1::/64']");
        refused(&mut node, 2, &["b.toml", "public_key", "Correct"]);
        std::fs::remove_dir_all(node.path("nodes")).unwrap();
        refused(&mut node, 2, &["nodes", "Create the directory"]);
        assert!(!exists("skein0"));
    });
}

#[test]
fn what_is_taken_ends_with_5_and_stays_untouched() {
    in_namespace(|| {
        let mut node = Node::new();
        let socket = UdpSocket::bind("0.0.0.0:51900").unwrap();
        refused(&mut node, 5, &["51900"]);
        assert!(!exists("skein0"), "an interface made by a failed start is taken back");
        drop(socket);
        let listener = TcpListener::bind("127.0.0.1:9464").unwrap();
        refused(&mut node, 5, &["metrics.listen", "9464"]);
        drop(listener);
        ip("tuntap add skein0 mode tun");
        let before = ip("-details link show skein0");
        refused(&mut node, 5, &["skein0", "another program", "interface.name"]);
        assert_eq!(ip("-details link show skein0"), before);
        let cleanup = node.output("cleanup");
        assert_eq!(cleanup.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&cleanup.stderr).contains("another program"));
        assert!(exists("skein0"));
    });
}

#[test]
fn a_device_in_use_is_taken_and_a_foreign_address_is_configuration() {
    in_namespace(|| {
        let mut node = Node::new();
        // This node's own device, which somebody has open already.
        create_persistent("skein0").unwrap();
        ip("link set skein0 alias skein:node-a");
        let (queues, ..) = open_queues("skein0", 1, TunOffload::NONE).unwrap();
        refused(&mut node, 5, &["skein0", "open in another process"]);
        drop(queues);
        let file = node.path("agent.toml");
        let good = std::fs::read_to_string(&file).unwrap();
        let elsewhere = "underlay = { addresses = ['192.0.2.200'], port";
        std::fs::write(&file, good.replace("underlay = { port", elsewhere)).unwrap();
        refused(&mut node, 2, &["192.0.2.200", "underlay.addresses"]);
        std::fs::write(&file, good.replace("control.sock", "dataplane.sock")).unwrap();
        refused(&mut node, 2, &["dataplane.socket", "control.socket", "its own"]);
        let long = format!("control.sock{}", "x".repeat(100));
        std::fs::write(&file, good.replace("control.sock", &long)).unwrap();
        refused(&mut node, 2, &["control.socket", "107"]);
    });
}

#[test]
fn the_status_is_not_for_everybody() {
    in_namespace(|| {
        let mut node = Node::new();
        node.run();
        // The program and the socket's directory can be reached; the socket is for root.
        let open = |path: &Path| std::fs::set_permissions(path, Permissions::from_mode(0o755));
        open(node.directory.path()).unwrap();
        let program = node.path("agent");
        // By another program: a copy open for writing in here could not be run yet.
        assert!(finish(Command::new("cp").arg(AGENT).arg(&program)).unwrap().status.success());
        open(&program).unwrap();
        let mut status = Command::new("setpriv");
        status.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
        status.arg("status").arg("--socket").arg(node.path("control.sock"));
        let (code, message) = end(&mut status);
        assert_eq!(code, 3, "{message}");
        assert!(message.contains("control.sock") && message.contains("as root"), "{message}");
    });
}

#[test]
fn two_agents_cannot_share_a_state_directory() {
    in_namespace(|| {
        let mut node = Node::new();
        node.run();
        let (code, message) = node.fail();
        assert_eq!(code, 5, "{message}");
        assert!(message.contains("state_dir"), "{message}");
        let cleanup = node.output("cleanup");
        assert_eq!(cleanup.status.code(), Some(5), "not while it runs");
        assert!(node.until("the first still runs", |document| document.ready).ready);
    });
}

#[test]
fn missing_privileges_and_devices_end_with_3_and_4() {
    in_namespace(|| {
        let node = Node::new();
        let run = |wrapper: &[&str]| {
            let mut command = Command::new(wrapper[0]);
            command.args(&wrapper[1..]).arg(AGENT).arg("run").arg("--config");
            let result = end(command.arg(node.path("agent.toml")));
            assert!(!exists("skein0"));
            result
        };
        let (code, message) = run(&["setpriv", "--bounding-set=-net_admin"]);
        assert_eq!(code, 3, "{message}");
        assert!(message.contains("CAP_NET_ADMIN"), "{message}");
        let hide = "mount -t tmpfs none /dev/net && exec \"$@\"";
        let (code, message) = run(&["unshare", "--mount", "sh", "-c", hide, "sh"]);
        assert_eq!(code, 4, "{message}");
        assert!(message.contains("/dev/net/tun"), "{message}");
    });
}

#[test]
fn the_data_process_outlives_a_killed_agent_and_is_taken_over() {
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
fn a_probe_tells_a_data_process_that_hangs() {
    in_namespace(|| {
        let mut node = Node::new();
        let socket = node.path("dataplane.sock");
        let probe = || {
            let mut probe = Command::new(AGENT);
            end(probe.args(["dataplane", "--probe", "--socket"]).arg(&socket))
        };
        let (code, said) = probe();
        assert!(code != 0 && said.contains("no data process answers"), "{said}");
        let pid = node.run().dataplane.pid.unwrap();
        assert_eq!(probe(), (0, String::new()));
        send(Signal::STOP, pid).unwrap();
        let (code, said) = probe();
        send(Signal::CONT, pid).unwrap();
        assert!(code != 0 && said.contains("does not answer"), "{said}");
        assert_eq!(probe().0, 0);
    });
}

#[test]
fn a_data_process_with_other_settings_is_replaced() {
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
fn a_killed_data_process_is_back_at_once() {
    in_namespace(|| {
        let mut node = Node::new();
        let before = node.run();
        send(Signal::KILL, before.dataplane.pid.unwrap()).unwrap();
        let after = node.until("it is back", |now| now.ready && now.dataplane.restarts == 1);
        assert_ne!(after.dataplane.pid, before.dataplane.pid);
        assert_eq!(after.interface.index, before.interface.index, "the device has stayed");
    });
}

#[test]
fn a_deleted_interface_is_made_again() {
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
            assert!(Instant::now() < deadline, "no address");
            std::thread::sleep(Duration::from_millis(20));
        }
        let link = ip("-details link show skein0");
        assert!(link.contains("LOWER_UP"), "the lanes are not attached: {link}");
    });
}

#[test]
fn an_orderly_end_and_a_cleanup_leave_nothing() {
    in_namespace(|| {
        let mut node = Node::new();
        let document = node.run();
        let pid = document.dataplane.pid.unwrap();
        assert_eq!(node.signal(Signal::TERM), Some(0));
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the data process has ended too");
        assert!(exists("skein0"), "the interface stays for the next start");
        for expected in ["removed interface skein0", "nothing to remove"] {
            let cleanup = node.output("cleanup --state");
            assert!(cleanup.status.success(), "{cleanup:?}");
            assert!(String::from_utf8_lossy(&cleanup.stdout).contains(expected), "{cleanup:?}");
        }
        assert!(!exists("skein0") && !node.path("state").exists());
        let status = node.output("status");
        assert_eq!(status.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&status.stderr).contains("no agent answers"));
    });
}

#[test]
fn cleanup_removes_what_a_killed_start_has_left() {
    in_namespace(|| {
        let node = Node::new();
        let provisional = Provisional::new("skein0", "skein:node-a");
        let name = provisional.name();
        create_persistent(name).unwrap();
        let cleanup = node.output("cleanup");
        assert!(cleanup.status.success(), "{cleanup:?}");
        let said = String::from_utf8_lossy(&cleanup.stdout);
        assert!(said.contains(&format!("removed unfinished interface {name}")), "{said}");
        assert!(!exists(name));
    });
}

#[test]
fn cleanup_ends_a_data_process_that_was_left() {
    in_namespace(|| {
        let mut node = Node::new();
        let pid = node.run().dataplane.pid.unwrap();
        node.signal(Signal::KILL);
        let cleanup = node.output("cleanup");
        assert!(cleanup.status.success(), "{cleanup:?}");
        assert!(String::from_utf8_lossy(&cleanup.stdout).contains("removed data process"));
        let deadline = Instant::now() + Duration::from_secs(30);
        // A zombie until whoever adopted it collects it.
        let alive = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            stat.is_ok_and(|stat| !stat.contains(") Z "))
        };
        while alive() {
            assert!(Instant::now() < deadline, "it still runs");
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

/// Whoever asks so is of another release. It ends this one then, or leaves it alone.
#[test]
fn a_hand_over_in_another_format_is_refused_and_nothing_ends() {
    in_namespace(|| {
        let mut node = Node::new();
        let before = node.run().dataplane.pid.unwrap();
        for version in [0, HANDOVER_VERSION + 1] {
            let mut stream = UnixStream::connect(node.path("dataplane.sock")).unwrap();
            write_frame(&mut stream, &Request::TakeOver { version }).unwrap();
            let answer = read_frame::<Response>(&mut stream).unwrap().unwrap();
            let invalid = matches!(&answer, Response::Error { kind: ErrorKind::Invalid, .. });
            assert!(invalid, "{answer:?}");
            write_frame(&mut stream, &Request::Report { peers: false }).unwrap();
            let answer = read_frame::<Response>(&mut stream).unwrap().unwrap();
            assert!(matches!(&answer, Response::Report { .. }), "it goes on: {answer:?}");
        }
        let after = node.until("it is as it was", |document| document.ready);
        assert_eq!(after.dataplane.pid, Some(before));
    });
}

#[test]
fn keys_are_made_and_their_public_half_computed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("key");
    let run = |arguments: &[&str]| finish(Command::new(AGENT).args(arguments).arg(&file)).unwrap();
    let public = run(&["keygen", "--out"]);
    assert!(public.status.success(), "{public:?}");
    assert_eq!(run(&["pubkey"]).stdout, public.stdout);
    let again = run(&["keygen", "--out"]);
    assert_eq!(again.status.code(), Some(5), "a key is never overwritten");
}
