//! The plugin's binary, called as a container runtime calls it, with a test agent behind the
//! socket.

#![allow(clippy::unwrap_used)]

use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Output, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};
use skein_cni_protocol::{
    Attached, AttachmentId, CniError, Command, Interface, Ip, Request, Response, Route, frame,
    spool,
};

const ALL: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A network namespace of a sleeping child process.
struct Namespace(std::process::Child);

impl Namespace {
    fn new() -> Self {
        let mut child = Process::new("unshare");
        child.args(["--net", "--kill-child", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let child = child.spawn().expect("this test needs unshare (util-linux) and root");
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        let namespace = Self(child);
        for _ in 0..200 {
            if std::fs::read_link(namespace.path()).is_ok_and(|path| path != own) {
                return namespace;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("cannot create a network namespace: run the tests as root");
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Lab {
    directory: tempfile::TempDir,
}

type Received = (Request, Option<OwnedFd>);

impl Lab {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("cni.sock")
    }

    fn spool(&self) -> PathBuf {
        self.directory.path().join("spool")
    }

    /// Starts an agent that sends `answer` to one request and returns the request.
    fn agent(&self, answer: Response) -> JoinHandle<Received> {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let socket = self.socket();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let received = receive_request(&mut stream);
            stream.write_all(&frame::encode(&answer).unwrap()).unwrap();
            std::fs::remove_file(socket).unwrap();
            received
        })
    }

    fn configuration(&self, version: &str, extra: Value) -> Value {
        let mut configuration = json!({
            "cniVersion": version, "name": "skein", "type": "skein-cni",
            "socket": self.socket(), "spool": self.spool(), "timeoutSeconds": 2,
        });
        configuration.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        configuration
    }

    fn run(&self, verb: &str, netns: Option<&Path>, input: &Value) -> Output {
        let mut command = plugin();
        command.env("CNI_COMMAND", verb).env("CNI_PATH", "/opt/cni/bin");
        command.env("CNI_CONTAINERID", "c1").env("CNI_IFNAME", "eth0");
        command.env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web");
        command.envs(netns.map(|path| ("CNI_NETNS", path)));
        run_with_input(command, input.to_string().as_bytes())
    }
}

fn plugin() -> Process {
    let mut command = Process::new(env!("CARGO_BIN_EXE_skein-cni"));
    command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run_with_input(mut command: Process, input: &[u8]) -> Output {
    let mut child = command.spawn().unwrap();
    // A plugin that does not need its input exits without reading it.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn receive_request(stream: &mut UnixStream) -> Received {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut first = [0];
    let slices = &mut [IoSliceMut::new(&mut first)];
    recvmsg(&*stream, slices, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    let request = frame::read(&mut std::io::Read::chain(&first[..], stream)).unwrap();
    (request, descriptor)
}

fn document(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("{error}: {text} {}", String::from_utf8_lossy(&output.stderr))
    })
}

fn code(output: &Output) -> u64 {
    assert!(!output.status.success());
    let document = document(output);
    assert!(!document["msg"].as_str().unwrap().is_empty());
    document["code"].as_u64().unwrap()
}

fn id() -> AttachmentId {
    AttachmentId { container_id: "c1".into(), ifname: "eth0".into() }
}

fn attached() -> Attached {
    let interface =
        |name: &str, mac: &str| Interface { name: name.into(), mac: mac.into(), mtu: 1440 };
    let ip = |address: &str, gateway: &str| Ip {
        address: address.parse().unwrap(),
        gateway: gateway.parse().unwrap(),
    };
    let route = |dst: &str, gw: Option<&str>| Route {
        dst: dst.parse().unwrap(),
        gw: gw.map(|gw| gw.parse().unwrap()),
    };
    Attached {
        host: interface("skp0", "ee:ee:ee:ee:ee:ee"),
        container: interface("eth0", "02:00:00:00:00:01"),
        ips: vec![ip("10.1.0.5/32", "169.254.1.1"), ip("fd00::5/128", "fe80::1")],
        routes: vec![
            route("169.254.1.1/32", None),
            route("0.0.0.0/0", Some("169.254.1.1")),
            route("::/0", Some("fe80::1")),
        ],
    }
}

#[test]
fn add_prints_result_in_every_version() {
    let namespace = Namespace::new();
    let sandbox = namespace.path();
    for version in ALL {
        let lab = Lab::new();
        let agent = lab.agent(Response::Attached(attached()));
        let extra = json!({ "dns": { "nameservers": ["10.96.0.10"] }, "runtimeConfig": { "ips": ["10.1.0.5"] } });
        let output = lab.run("ADD", Some(&sandbox), &lab.configuration(version, extra));
        assert!(output.status.success(), "{version}: {output:?}");
        let (request, descriptor) = agent.join().unwrap();
        let Command::Add(add) = request.command else { panic!("{request:?}") };
        assert_eq!((add.id, add.network.as_str(), &add.netns), (id(), "skein", &sandbox));
        assert_eq!(add.pod.unwrap().name, "web");
        assert_eq!(add.ips, ["10.1.0.5".parse::<std::net::IpAddr>().unwrap()]);
        let inode = |file: rustix::fs::Stat| file.st_ino;
        let sent = inode(rustix::fs::fstat(descriptor.unwrap().as_fd()).unwrap());
        assert_eq!(sent, inode(rustix::fs::stat(&sandbox).unwrap()));
        assert_eq!(document(&output), expected(version, &sandbox), "{version}");
    }
}

fn expected(version: &str, sandbox: &Path) -> Value {
    let dns = json!({ "nameservers": ["10.96.0.10"] });
    if matches!(version, "0.1.0" | "0.2.0") {
        return json!({
            "cniVersion": version,
            "ip4": { "ip": "10.1.0.5/32", "gateway": "169.254.1.1", "routes": [
                { "dst": "169.254.1.1/32" }, { "dst": "0.0.0.0/0", "gw": "169.254.1.1" },
            ]},
            "ip6": { "ip": "fd00::5/128", "gateway": "fe80::1",
                     "routes": [{ "dst": "::/0", "gw": "fe80::1" }] },
            "dns": dns,
        });
    }
    let mut result = json!({
        "cniVersion": version,
        "interfaces": [
            { "name": "skp0", "mac": "ee:ee:ee:ee:ee:ee" },
            { "name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": sandbox },
        ],
        "ips": [
            { "address": "10.1.0.5/32", "gateway": "169.254.1.1", "interface": 1 },
            { "address": "fd00::5/128", "gateway": "fe80::1", "interface": 1 },
        ],
        "routes": [
            { "dst": "169.254.1.1/32" }, { "dst": "0.0.0.0/0", "gw": "169.254.1.1" },
            { "dst": "::/0", "gw": "fe80::1" },
        ],
        "dns": dns,
    });
    match version {
        "1.1.0" => (0..2).for_each(|index| result["interfaces"][index]["mtu"] = 1440.into()),
        "1.0.0" => {}
        _ => {
            result["ips"][0]["version"] = "4".into();
            result["ips"][1]["version"] = "6".into();
        }
    }
    result
}

#[test]
fn result_of_previous_plugins_is_kept() {
    let (lab, namespace) = (Lab::new(), Namespace::new());
    let agent = lab.agent(Response::Attached(attached()));
    let previous = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{ "name": "other0", "sandbox": "/x", "socketPath": "/y" }],
        "ips": [{ "address": "192.0.2.5/24", "interface": 0 }],
        "routes": [{ "dst": "198.51.100.0/24", "priority": 7 }],
        "dns": { "nameservers": ["192.0.2.53"] },
    });
    let extra = json!({ "prevResult": previous, "dns": { "nameservers": ["10.96.0.10"] } });
    let result =
        document(&lab.run("ADD", Some(&namespace.path()), &lab.configuration("1.0.0", extra)));
    agent.join().unwrap();
    assert_eq!(result["interfaces"][0], previous["interfaces"][0]);
    assert_eq!(result["ips"][0], previous["ips"][0]);
    assert_eq!(result["ips"][1]["interface"], 2);
    assert_eq!(result["interfaces"][2]["name"], "eth0");
    assert_eq!(result["routes"][0], previous["routes"][0]);
    assert_eq!(result["dns"], previous["dns"]);
    let broken = json!({ "prevResult": { "interfaces": 5 } });
    // The plugin must refuse the broken result before it sends a request. No agent listens now, so
    // that a request would fail with another code than 6.
    let output = lab.run("ADD", Some(&namespace.path()), &lab.configuration("1.0.0", broken));
    assert_eq!(code(&output), 6);
}

#[test]
fn error_of_the_agent_is_printed() {
    let (lab, namespace) = (Lab::new(), Namespace::new());
    let refusal =
        CniError { code: 11, msg: "no free address in 10.1.0.0/24".into(), details: "more".into() };
    for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        let agent = lab.agent(Response::Refused(refusal.clone()));
        let extra = json!({
            "cni.dev/valid-attachments": [],
            "prevResult": { "interfaces": [{ "name": "eth0", "sandbox": "/x" }] },
        });
        let output = lab.run(verb, Some(&namespace.path()), &lab.configuration("1.1.0", extra));
        agent.join().unwrap();
        assert_eq!(code(&output), 11, "{verb}");
        let said = document(&output);
        assert_eq!((&said["msg"], &said["details"]), (&json!(refusal.msg), &json!("more")));
        assert_eq!(said["cniVersion"], "1.1.0");
    }
    assert!(
        spool::list(&lab.spool()).unwrap().is_empty(),
        "a refused DEL must not be stored in the spool"
    );
}

#[test]
fn unavailable_agent_stores_del_and_fails_other_operations() {
    let (lab, namespace) = (Lab::new(), Namespace::new());
    let netns = namespace.path();
    let configuration = |extra| lab.configuration("1.1.0", extra);
    assert_eq!(code(&lab.run("ADD", Some(&netns), &configuration(json!({})))), 11);
    assert_eq!(code(&lab.run("STATUS", None, &configuration(json!({})))), 50);
    let check = json!({ "prevResult": { "interfaces": [{ "name": "eth0", "sandbox": "/x" }] } });
    assert!(code(&lab.run("CHECK", Some(&netns), &configuration(check))) >= 100);
    // No socket, a socket without a listener, a listener that never responds, an invalid response.
    let hanging = |lab: &Lab| UnixListener::bind(lab.socket()).unwrap();
    let del = |netns: Option<&Path>| lab.run("DEL", netns, &lab.configuration("0.3.1", json!({})));
    assert!(del(None).status.success());
    drop(hanging(&lab));
    assert!(del(Some(Path::new("/run/netns/gone"))).status.success());
    std::fs::remove_file(lab.socket()).unwrap();
    let listener = hanging(&lab);
    let began = std::time::Instant::now();
    let output = del(Some(&netns));
    assert!(output.status.success() && output.stdout.is_empty());
    assert!(began.elapsed() < Duration::from_secs(20), "DEL waited for {:?}.", began.elapsed());
    let nonsense = std::thread::spawn(move || {
        // The connection of the previous DEL is still in the backlog.
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(b"HTTP/1.1 400\r\n");
        }
    });
    assert!(del(None).status.success());
    nonsense.join().unwrap();
    let kept = spool::list(&lab.spool()).unwrap();
    assert_eq!(kept.len(), 1, "repeated DELs must store one entry");
    let Ok(Request { command: Command::Del(kept), .. }) = &kept[0].request else { panic!() };
    assert_eq!(kept.id, id());
    // A spool that cannot be written is an error. Runtimes treat "not found" as success.
    std::fs::remove_dir_all(lab.spool()).unwrap();
    std::fs::write(lab.spool(), "a file").unwrap();
    let output = del(None);
    assert!(code(&output) >= 100);
    assert!(!document(&output).to_string().contains("not found"));
}

#[test]
fn status_times_out_after_5_s_or_the_configured_timeout() {
    let lab = Lab::new();
    // The listener accepts no connection, like a stopped agent.
    let _listener = UnixListener::bind(lab.socket()).unwrap();
    for (seconds, expected) in [(30, 5), (1, 1)] {
        let input = lab.configuration("1.1.0", json!({ "timeoutSeconds": seconds }));
        let began = std::time::Instant::now();
        let output = lab.run("STATUS", None, &input);
        assert_eq!(code(&output), 50);
        let msg = document(&output)["msg"].to_string();
        assert!(msg.contains(&format!("did not answer within {expected} s")), "{msg}");
        let took = began.elapsed().as_secs();
        assert!((expected..expected + 10).contains(&took), "{took} s instead of {expected} s");
    }
}

#[test]
fn own_namespace_and_other_files_are_refused() {
    let (lab, own) = (Lab::new(), Path::new("/proc/self/ns/net"));
    let configuration = lab.configuration("1.0.0", json!({}));
    for verb in ["ADD", "DEL"] {
        assert_eq!(code(&lab.run(verb, Some(own), &configuration)), 8, "{verb}");
    }
    for nothing in ["/nowhere", "/proc/self/status", "/"] {
        assert_eq!(code(&lab.run("ADD", Some(Path::new(nothing)), &configuration)), 3, "{nothing}");
    }
    let agent = lab.agent(Response::Done);
    let mut command = plugin();
    for (key, value) in [
        ("CNI_COMMAND", "DEL"),
        ("CNI_PATH", "/"),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/proc/self/ns/net"),
        ("CNI_NETNS_OVERRIDE", "1"),
    ] {
        command.env(key, value);
    }
    assert!(run_with_input(command, configuration.to_string().as_bytes()).status.success());
    agent.join().unwrap();
}

#[test]
fn operation_of_newer_version_is_refused() {
    let lab = Lab::new();
    for version in ALL {
        let configuration = lab.configuration(version, json!({ "cni.dev/valid-attachments": [] }));
        for (verb, least) in [("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0")] {
            let output = lab.run(verb, Some(Path::new("/nowhere")), &configuration);
            let (code, old) = (code(&output), version < least);
            assert_eq!(code == 1, old, "{verb} {version}: {code}");
            assert_eq!(document(&output)["cniVersion"], version);
        }
    }
    let output = lab.run("GC", None, &lab.configuration("1.1.0", json!({})));
    assert_eq!(code(&output), 7, "a missing list is an error");
}

#[test]
fn version_and_invalid_calls_print_documents() {
    let mut command = plugin();
    command.env("CNI_COMMAND", "VERSION");
    let output = run_with_input(command, b"{\"cniVersion\":\"0.4.0\"}");
    assert!(output.status.success());
    assert_eq!(document(&output)["supportedVersions"], json!(ALL));

    let output = run_with_input(plugin(), b"");
    assert!(output.status.success() && output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("CNI plugin of Skein"));

    let mut command = plugin();
    command.env("CNI_COMMAND", "ADD");
    let output = run_with_input(command, b"{\"cniVersion\":\"0.4.0\"}");
    assert_eq!(code(&output), 4);
    assert_eq!(document(&output)["cniVersion"], "0.4.0");
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        assert!(document(&output)["msg"].as_str().unwrap().contains(name), "{name}");
    }
    let lab = Lab::new();
    for (input, expected) in [
        (json!("x"), 6),
        (json!({ "cniVersion": "9.9.9", "name": "a" }), 1),
        (json!({ "cniVersion": "1.0.0", "name": "" }), 7),
    ] {
        assert_eq!(code(&lab.run("ADD", Some(Path::new("/x")), &input)), expected, "{input}");
    }
    let mut command = plugin();
    command.env("CNI_COMMAND", "STATUS").env("CNI_PATH", "/");
    assert_eq!(
        code(&run_with_input(command, &vec![b' '; 2 << 20])),
        5,
        "the input is longer than MAX_FRAME"
    );
}

#[test]
fn check_sends_addresses_of_the_container_interface() {
    let (lab, namespace) = (Lab::new(), Namespace::new());
    let netns = namespace.path();
    let agent = lab.agent(Response::Done);
    let previous = json!({
        "interfaces": [
            { "name": "eth0" }, { "name": "skp0" }, { "name": "eth0", "sandbox": netns },
        ],
        "ips": [
            { "address": "10.1.0.5/32", "interface": 2 }, { "address": "192.0.2.1/24", "interface": 0 },
            { "address": "fd00::5/128", "interface": 2 }, { "address": "192.0.2.2/24" },
        ],
    });
    let input = lab.configuration("0.4.0", json!({ "prevResult": previous }));
    assert!(lab.run("CHECK", Some(&netns), &input).status.success());
    let (request, descriptor) = agent.join().unwrap();
    let Command::Check(check) = request.command else { panic!() };
    assert_eq!(check.ips, ["10.1.0.5/32".parse().unwrap(), "fd00::5/128".parse().unwrap()]);
    assert!(descriptor.is_some());
    for (previous, expected) in [
        (Value::Null, 7),
        (json!({ "interfaces": [] }), 7),
        (
            json!({ "interfaces": [{ "name": "eth0", "sandbox": "/x" }],
                 "ips": [{ "interface": 0, "address": "x" }] }),
            6,
        ),
    ] {
        let input = lab.configuration("0.4.0", json!({ "prevResult": previous }));
        assert_eq!(code(&lab.run("CHECK", Some(&netns), &input)), expected, "{previous}");
    }
}
