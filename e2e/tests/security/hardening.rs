//! What the agent's processes may do, who may talk to them, and what they never say.

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

/// Does something in a directory as a user without rights, who need not be able to get there. The kernel keeps
/// these for each thread.
fn as_nobody<T: Send>(directory: &Path, work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let nobody = scope.spawn(|| -> Result<T> {
            // SAFETY: this thread has no working directory in common with the others from now on, and they
            // none with it; nothing of memory or descriptors changes.
            unsafe { unshare_unsafe(UnshareFlags::FS)? };
            std::env::set_current_dir(directory)?;
            let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
            set_thread_groups(&[])?;
            set_thread_res_gid(group, group, group)?;
            set_thread_res_uid(user, user, user)?;
            Ok(work())
        });
        nobody.join().ok().context("panicked")?
    })
}

/// What is answered to these bytes; nothing where whoever listens hangs up.
fn answer(mut stream: UnixStream, question: &[u8]) -> Result<Vec<u8>> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // Whoever is hung up on at once may not even get to ask.
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
        ensure!(mode & 0o777 == 0o600, "{name} has mode {mode:o}");
        let asked = answer(UnixStream::connect(&path)?, question)?;
        ensure!(!asked.is_empty(), "{name} does not answer root");
    }
    // The file's mode keeps others away …
    for (name, _) in &sockets {
        let connect = || UnixStream::connect(name).err().map(|error| error.kind());
        let error = as_nobody(&directory, connect)?;
        ensure!(error == Some(ErrorKind::PermissionDenied), "{name}: {error:?}");
    }
    // … and where somebody has changed it, the kernel's word for who they are.
    fs::set_permissions(&directory, Permissions::from_mode(0o711))?;
    for (name, question) in &sockets {
        let path = directory.join(name);
        fs::set_permissions(&path, Permissions::from_mode(0o666))?;
        let stream = as_nobody(&directory, || UnixStream::connect(name))?;
        let stream = stream.with_context(|| format!("{name}: the file keeps nobody away now"))?;
        let said = answer(stream, question)?;
        ensure!(said.is_empty(), "{name} answers nobody: {}", String::from_utf8_lossy(&said));
        let asked = answer(UnixStream::connect(&path)?, question)?;
        ensure!(!asked.is_empty(), "{name} answers root no more");
    }
    Ok(())
}

#[test]
fn sockets_are_not_made_where_others_may_write() -> Result<()> {
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
            ensure!(finished.code != 0 && named, "{what}: {}: {said}", finished.code);
            let made = fs::read_dir(&directory)?.flatten().map(|entry| entry.path());
            let sockets: Vec<_> =
                made.filter(|path| path.extension().is_some_and(|end| end == "sock")).collect();
            ensure!(directory.is_symlink() || sockets.is_empty(), "{what}: {sockets:?}");
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

/// A field of `/proc/PID/status`.
fn field(pid: i32, name: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let found = lines.find(|(key, _)| *key == name).context("no such field")?;
    Ok(found.1.trim().to_owned())
}

fn capabilities(pid: i32, set: &str) -> Result<u64> {
    Ok(u64::from_str_radix(&field(pid, set)?, 16)?)
}

/// Of `linux/capability.h`.
const DAC_OVERRIDE: u64 = 1 << 1;
const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_ADMIN: u64 = 1 << 12;
const SYS_PTRACE: u64 = 1 << 19;
const SYS_ADMIN: u64 = 1 << 21;

#[test]
fn processes_keep_the_rights_that_they_need_and_no_others() -> Result<()> {
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
            ensure!(pids.len() == 1, "{pids:?}");
            for entry in fs::read_dir(format!("/proc/{}/task", pids[0]))? {
                let task: i32 = entry?.file_name().to_string_lossy().parse()?;
                for set in ["CapEff", "CapPrm"] {
                    let has = capabilities(task, set)?;
                    ensure!(has == allowed, "{task}: {set} {has:x} where it needs {allowed:x}");
                }
                // A child cannot bound itself further, nor need it: it gains nothing.
                let bounds = capabilities(task, "CapBnd")?;
                ensure!(bounds == control, "{task}: bounded by {bounds:x}");
                ensure!(capabilities(task, "CapInh")? == 0 && capabilities(task, "CapAmb")? == 0);
                ensure!(field(task, "NoNewPrivs")? == "1", "{task}");
                ensure!(field(task, "Seccomp")? == seccomp, "{task}: {}", field(task, "Seccomp")?);
            }
        }
    }
    // By log, too.
    let log = fs::read_to_string(cluster.agents[1].log())?;
    ensure!(log.contains("not confined: seccomp forced off"), "{log}");
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
        ensure!(agent.metrics()?.sum("skein_confinement", &labels) == 1.0, "{labels:?}");
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
    ensure!(finished.code != 0 && said.contains("dataplane.require_confinement"), "{said}");
    ensure!(said.contains("the kernel does not support seccomp filters"), "{said}");
    ensure!(agent.dataplane_pids().is_empty(), "a data process runs");

    // A data process from a time without the setting is replaced.
    let agent = &mut cluster.agents[1];
    agent.set("dataplane.require_confinement", false);
    agent.set("dataplane.seccomp", false);
    agent.set("dataplane.keep_on_exit", true);
    ensure!(agent.stop()? == 0);
    agent.start()?;
    let before = agent.dataplane_pids();
    ensure!(field(before[0], "Seccomp")? == "0", "the data process is confined");
    ensure!(agent.stop()? == 0 && agent.dataplane_pids() == before, "the data process has ended");
    agent.set("dataplane.seccomp", true);
    agent.set("dataplane.require_confinement", true);
    agent.start()?;
    let after = agent.dataplane_pids();
    ensure!(after.len() == 1 && after != before, "the data process was kept: {after:?}");
    ensure!(field(after[0], "Seccomp")? == "2", "the data process is not confined");
    Ok(())
}

/// How a secret could be written.
fn shapes(key: &str) -> Result<Vec<String>> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(key)?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let list: Vec<_> = bytes.iter().map(u8::to_string).collect();
    // Half of it is as bad.
    let start = &list[..12];
    let shapes =
        vec![key[..16].to_owned(), hex[..24].to_owned(), start.join(", "), start.join(",")];
    Ok(shapes.into_iter().chain([hex[..24].to_uppercase()]).collect())
}

#[test]
fn no_private_key_is_ever_said() -> Result<()> {
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
    // What only a fault makes it say.
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
    ensure!(all.contains("\"level\":\"trace\""), "the log is not at its finest");
    for node in ["node-a", "node-b"] {
        let key = fs::read_to_string(cluster.lab.directory().join(node).join("node.key"))?;
        for shape in shapes(key.trim())? {
            ensure!(!all.contains(&shape), "{node}'s private key is said: {shape}");
        }
    }
    // The search would find one.
    let public = &cluster.agents[0].record.public_key;
    ensure!(shapes(public)?.iter().any(|shape| all.contains(shape)), "public keys are not found");
    Ok(())
}
