//! Confinement of the agent's processes, access to their sockets, and secrecy of private keys.

use std::fs::{self, Permissions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use rustix::process::{Gid, Pid, Signal, Uid, kill_process};
use rustix::thread::{
    UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};
use skein_lab::agent::{Agent, Cluster};
use skein_lab::checks;
use skein_lab::{Family, Lab, Plan, process};

const NOBODY: u32 = 65_534;

/// Runs `work` with the working directory `directory` as the user nobody, who may lack the right to
/// enter the directory. The kernel keeps user and working directory for each thread.
fn as_nobody<T: Send>(directory: &Path, work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let nobody = scope.spawn(|| -> Result<T> {
            // SAFETY: UnshareFlags::FS gives this thread a working directory of its own; memory and
            // descriptors stay shared.
            unsafe { unshare_unsafe(UnshareFlags::FS)? };
            std::env::set_current_dir(directory)?;
            let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
            set_thread_groups(&[])?;
            set_thread_res_gid(group, group, group)?;
            set_thread_res_uid(user, user, user)?;
            Ok(work())
        });
        nobody.join().ok().context("the thread panicked")?
    })
}

/// Sends `question` and returns the first 64 bytes of the answer; empty if the peer closes the
/// connection.
fn answer(mut stream: UnixStream, question: &[u8]) -> Result<Vec<u8>> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // A connection that the peer has already closed may refuse the write.
    let asked = stream.write_all(question).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut answer = vec![0; 64];
    match asked.and_then(|()| stream.read(&mut answer)) {
        Ok(n) => answer.truncate(n),
        Err(error)
            if [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()) =>
        {
            answer.clear();
        }
        Err(error) => return Err(error.into()),
    }
    Ok(answer)
}

fn framed(length: [u8; 4], json: &str) -> Vec<u8> {
    [&length[..], json.as_bytes()].concat()
}

#[test]
fn sockets_answer_root_only() -> Result<()> {
    let lab = Lab::new(&Plan { nodes: 1, pods: 0, ..Plan::default() })?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    cluster.agents[0].serve_pods()?;
    cluster.start()?;
    let directory = cluster.lab.directory().join("node-a");
    let hello = r#"{"request":"report","peers":false}"#;
    let status = r#"{"protocol":1,"command":"status"}"#;
    let sockets: [(&str, Vec<u8>); 3] = [
        ("control.sock", b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
        ("dataplane.sock", framed((hello.len() as u32).to_be_bytes(), hello)),
        ("cni.sock", framed((status.len() as u32).to_le_bytes(), status)),
    ];
    for (name, question) in &sockets {
        let path = directory.join(name);
        let mode = fs::metadata(&path)?.permissions().mode();
        ensure!(mode & 0o777 == 0o600, "The socket {name} has mode {mode:o}.");
        let asked = answer(UnixStream::connect(&path)?, question)?;
        ensure!(!asked.is_empty(), "The socket {name} does not answer root.");
    }
    // The mode of the file refuses other users.
    for (name, _) in &sockets {
        let connect = || UnixStream::connect(name).err().map(|error| error.kind());
        let error = as_nobody(&directory, connect)?;
        ensure!(
            error == Some(ErrorKind::PermissionDenied),
            "Another user's connect to {name} returned: {error:?}"
        );
    }
    // If the mode was changed, the agent checks the peer's credentials (SO_PEERCRED).
    fs::set_permissions(&directory, Permissions::from_mode(0o711))?;
    for (name, question) in &sockets {
        let path = directory.join(name);
        fs::set_permissions(&path, Permissions::from_mode(0o666))?;
        let stream = as_nobody(&directory, || UnixStream::connect(name))?;
        let stream = stream.with_context(|| format!("{name}: mode 666 refuses another user"))?;
        let said = answer(stream, question)?;
        let text = String::from_utf8_lossy(&said);
        ensure!(said.is_empty(), "The socket {name} answers another user: {text}");
        let asked = answer(UnixStream::connect(&path)?, question)?;
        ensure!(!asked.is_empty(), "The socket {name} no longer answers root.");
    }
    Ok(())
}

#[test]
fn sockets_are_not_created_where_others_may_write() -> Result<()> {
    let lab = Lab::new(&Plan { nodes: 1, pods: 0, ..Plan::default() })?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    let open = cluster.lab.directory().join("open");
    fs::create_dir(&open)?;
    let theirs = cluster.lab.directory().join("theirs");
    fs::create_dir(&theirs)?;
    std::os::unix::fs::chown(&theirs, Some(NOBODY), None)?;
    let link = cluster.lab.directory().join("link");
    std::os::unix::fs::symlink(cluster.lab.directory().join("node-a"), &link)?;
    std::os::unix::fs::lchown(&link, Some(NOBODY), None)?;
    fs::set_permissions(&open, Permissions::from_mode(0o777))?;
    cluster.agents[0].serve_pods()?;
    for directory in [open, theirs, link] {
        let refused = |what: &str, finished: process::Finished| {
            let said = format!("{}{}", finished.stdout, finished.stderr);
            let named = said.contains(&directory.display().to_string());
            ensure!(
                finished.code != 0 && named,
                "{what}: The process ended with code {} and this output: {said}",
                finished.code
            );
            let made = fs::read_dir(&directory)?.flatten().map(|entry| entry.path());
            let sockets: Vec<_> =
                made.filter(|path| path.extension().is_some_and(|end| end == "sock")).collect();
            ensure!(
                directory.is_symlink() || sockets.is_empty(),
                "{what}: Sockets were created: {sockets:?}"
            );
            Ok(())
        };
        for key in ["control.socket", "dataplane.socket", "cni.socket"] {
            let agent = &mut cluster.agents[0];
            let before = agent.config.clone();
            let socket: PathBuf = directory.join("s.sock");
            agent.set(key, socket.to_string_lossy().into_owned());
            refused(key, agent.run_to_end(Duration::from_secs(10))?)?;
            agent.config = before;
        }
        let agent = &cluster.agents[0];
        let instance = directory.to_string_lossy().into_owned();
        let run = ["run", "--dataplane", "external", "--instance", &instance];
        refused("run --instance", agent.run_command(&run)?)?;
        let mut data = cluster.lab.nodes[0].ns.command(&agent.program);
        data.args(["dataplane", "--instance", &instance, "--socket"]);
        data.arg(cluster.lab.directory().join("data.sock"));
        let finished = process::finish(&mut data, &[], Duration::from_secs(10))?;
        refused("dataplane --instance", finished)?;
    }
    Ok(())
}

/// Returns the field `name` of `/proc/PID/status`.
fn field(pid: i32, name: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let found = lines.find(|(key, _)| *key == name).context("no such field")?;
    Ok(found.1.trim().to_owned())
}

fn capabilities(pid: i32, set: &str) -> Result<u64> {
    Ok(u64::from_str_radix(&field(pid, set)?, 16)?)
}

/// Bits of capabilities, as `linux/capability.h` numbers them.
const DAC_OVERRIDE: u64 = 1 << 1;
const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_ADMIN: u64 = 1 << 12;
const SYS_PTRACE: u64 = 1 << 19;
const SYS_ADMIN: u64 = 1 << 21;

#[test]
fn processes_keep_only_the_capabilities_that_they_need() -> Result<()> {
    let lab = Lab::new(&Plan { nodes: 2, pods: 0, ..Plan::default() })?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    cluster.agents[0].serve_pods()?;
    cluster.agents[1].set("dataplane.seccomp", false);
    cluster.start()?;
    let data = NET_ADMIN | NET_BIND_SERVICE;
    let control = data | DAC_OVERRIDE;
    for (agent, control, seccomp) in [
        (&cluster.agents[0], control | SYS_ADMIN | SYS_PTRACE, "2"),
        (&cluster.agents[1], control, "0"),
    ] {
        let pid = agent.control_pid().context("no control process")?;
        let pids = [(vec![pid], control, "0"), (agent.keeper_pids(), data, "0")];
        let workers = (agent.dataplane_pids(), data, seccomp);
        for (pids, allowed, seccomp) in pids.into_iter().chain([workers]) {
            ensure!(pids.len() == 1, "There is not exactly one process: {pids:?}");
            for entry in fs::read_dir(format!("/proc/{}/task", pids[0]))? {
                let task: i32 = entry?.file_name().to_string_lossy().parse()?;
                for set in ["CapEff", "CapPrm"] {
                    let has = capabilities(task, set)?;
                    ensure!(
                        has == allowed,
                        "{set} of thread {task} is {has:x} instead of {allowed:x}."
                    );
                }
                // Reducing the bounding set needs CAP_SETPCAP, which a child lacks. With
                // NoNewPrivs, the bounding set gives a child no capability.
                let bounds = capabilities(task, "CapBnd")?;
                ensure!(bounds == control, "The bounding set of thread {task} is {bounds:x}.");
                ensure!(capabilities(task, "CapInh")? == 0 && capabilities(task, "CapAmb")? == 0);
                let no_new = field(task, "NoNewPrivs")?;
                ensure!(no_new == "1", "NoNewPrivs of thread {task} is {no_new}.");
                let mode = field(task, "Seccomp")?;
                ensure!(mode == seccomp, "Seccomp of thread {task} is {mode}, not {seccomp}.");
            }
        }
    }
    let log = fs::read_to_string(cluster.agents[1].log())?;
    ensure!(
        log.contains("not confined: seccomp forced off"),
        "The log does not report the missing filter: {log}"
    );
    Ok(())
}

#[test]
fn missing_confinement_is_shown_and_can_be_refused() -> Result<()> {
    let lab = Lab::new(&Plan { nodes: 2, pods: 0, ..Plan::default() })?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    cluster.agents[0].preload("no_confinement")?;
    cluster.agents[1].set("dataplane.require_confinement", true);
    cluster.start()?;
    let shown = |agent: &Agent, mechanism: &str, state: &str| -> Result<()> {
        let labels = [format!("mechanism=\"{mechanism}\""), format!("state=\"{state}\"")];
        let labels = labels.each_ref().map(String::as_str);
        ensure!(
            agent.metrics()?.sum("skein_confinement", &labels) == 1.0,
            "The metric does not have {labels:?}."
        );
        let status = agent.run_command(&["status", "--interval", "0"])?.stdout;
        ensure!(status.contains(&format!("{mechanism} {state}")), "{status}");
        Ok(())
    };
    for mechanism in ["seccomp", "landlock"] {
        shown(&cluster.agents[0], mechanism, "unsupported")?;
        shown(&cluster.agents[1], mechanism, "on")?;
    }
    let agent = &mut cluster.agents[0];
    ensure!(agent.stop()? == 0);
    agent.set("dataplane.require_confinement", true);
    let finished = agent.run_to_end(Duration::from_secs(20))?;
    let said = format!("{}{}", finished.stdout, finished.stderr);
    ensure!(
        finished.code != 0 && said.contains("dataplane.require_confinement"),
        "The error names another cause: {said}"
    );
    ensure!(
        said.contains("the kernel does not support seccomp filters"),
        "The error names another cause: {said}"
    );
    ensure!(agent.dataplane_pids().is_empty(), "A data process runs without confinement.");

    // A data process that was started without the setting is replaced.
    let agent = &mut cluster.agents[1];
    agent.set("dataplane.require_confinement", false);
    agent.set("dataplane.seccomp", false);
    agent.set("dataplane.keep_on_exit", true);
    ensure!(agent.stop()? == 0);
    agent.start()?;
    let before = agent.dataplane_pids();
    ensure!(field(before[0], "Seccomp")? == "0", "The data process is confined.");
    ensure!(agent.stop()? == 0 && agent.dataplane_pids() == before, "The data process has ended.");
    agent.set("dataplane.seccomp", true);
    agent.set("dataplane.require_confinement", true);
    agent.start()?;
    let after = agent.dataplane_pids();
    ensure!(after.len() == 1 && after != before, "The data process was not replaced: {after:?}");
    ensure!(field(after[0], "Seccomp")? == "2", "The data process is not confined.");
    Ok(())
}

/// Returns the texts in which the key could appear: base64, hexadecimal, and lists of numbers.
fn shapes(key: &str) -> Result<Vec<String>> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(key)?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let list: Vec<_> = bytes.iter().map(u8::to_string).collect();
    // Half of a key is also a leak.
    let start = &list[..12];
    let shapes =
        vec![key[..16].to_owned(), hex[..24].to_owned(), start.join(", "), start.join(",")];
    Ok(shapes.into_iter().chain([hex[..24].to_uppercase()]).collect())
}

#[test]
fn private_key_appears_in_no_output() -> Result<()> {
    let lab = Lab::new(&Plan::default())?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    for agent in &mut cluster.agents {
        agent.set("log.level", "trace");
    }
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let said = |agent: &Agent| -> Result<String> {
        let mut all = agent.metrics()?.0 + &agent.status()?.to_string();
        all += &agent.run_command(&["status", "--interval", "0"])?.stdout;
        all += &agent.http("/healthz")?.body;
        Ok(all)
    };
    let mut all = String::new();
    for agent in &cluster.agents {
        all += &said(agent)?;
    }
    // Faults and restarts cause further log lines.
    let victim = cluster.agents[0].dataplane_pids();
    kill_process(Pid::from_raw(victim[0]).context("no process")?, Signal::KILL)?;
    checks::all_reach_all(&cluster.lab)?;
    cluster.agents[0].take_over()?;
    cluster.agents[1].set("dataplane.lanes", 1);
    cluster.agents[1].kill_control();
    cluster.agents[1].start()?;
    checks::all_reach_all(&cluster.lab)?;
    for agent in &cluster.agents {
        all += &said(agent)?;
        all += &fs::read_to_string(agent.log())?;
    }
    ensure!(all.contains("\"level\":\"trace\""), "The log has no lines of level trace.");
    for node in ["node-a", "node-b"] {
        let key = fs::read_to_string(cluster.lab.directory().join(node).join("node.key"))?;
        for shape in shapes(key.trim())? {
            ensure!(
                !all.contains(&shape),
                "The private key of {node} appears in an output: {shape}"
            );
        }
    }
    // Counter-check: the search finds a public key.
    let public = &cluster.agents[0].record.public_key;
    let is_found = shapes(public)?.iter().any(|shape| all.contains(shape));
    ensure!(is_found, "The search does not find the public key in the outputs.");
    Ok(())
}
