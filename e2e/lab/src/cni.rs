//! The CNI plugin, called as a container runtime calls it: environment, standard input, standard output.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::{Value, json};

use super::agent::Agent;
use super::process::{self, Finished};
use super::{Netns, Node, Pod, registry};

/// How long one call may take.
const LIMIT: Duration = Duration::from_secs(30);
/// Of linux/sockios.h.
const SIOCGSKNS: libc::c_ulong = 0x894c;

/// The plugin's program: `SKEIN_CNI_BIN`, or beside the agent's.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SKEIN_CNI_BIN") {
        return Ok(path.into());
    }
    let path = super::agent::binary()?.with_file_name("skein-cni");
    if !path.is_file() {
        bail!("no {}: build it first (cargo build --release -p skein-cni)", path.display());
    }
    Ok(path)
}

/// A runtime of one node that knows no other plugin.
#[derive(Debug, Clone)]
pub struct Runtime {
    node: String,
    program: PathBuf,
    /// The plugin's configuration, as libcni hands it over.
    pub configuration: Value,
}

/// One interface of one container.
#[derive(Debug, Clone, Copy)]
pub struct Attachment<'a> {
    /// `CNI_CONTAINERID`.
    pub container: &'a str,
    /// `CNI_IFNAME`.
    pub interface: &'a str,
    /// `CNI_NETNS`, where there is one.
    pub netns: Option<&'a str>,
}

impl Runtime {
    /// For an agent that was prepared with [`Agent::serve_pods`].
    pub fn new(agent: &Agent, node: &Node) -> Result<Self> {
        let configuration = json!({
            "cniVersion": "1.1.0",
            "name": "skein",
            "type": "skein-cni",
            "socket": agent.cni_socket(),
            "spool": agent.cni_spool(),
        });
        Ok(Self { node: node.ns.name().to_owned(), program: binary()?, configuration })
    }

    /// One call; a refusal is no error here.
    pub fn call(&self, verb: &str, of: Option<Attachment<'_>>, extra: Value) -> Result<Finished> {
        let mut configuration = self.configuration.clone();
        if let (Some(all), Value::Object(extra)) = (configuration.as_object_mut(), extra) {
            all.extend(extra);
        }
        let mut command = std::process::Command::new("ip");
        command.args(["netns", "exec", &self.node]).arg(&self.program);
        command.env("CNI_COMMAND", verb);
        // The specification requires CNI_PATH for GC only.
        if verb == "GC" {
            command.env("CNI_PATH", "/opt/cni/bin");
        }
        if let Some(of) = of {
            command.env("CNI_CONTAINERID", of.container).env("CNI_IFNAME", of.interface);
            command.envs(of.netns.map(|netns| ("CNI_NETNS", netns)));
        }
        process::finish(&mut command, configuration.to_string().as_bytes(), LIMIT)
    }

    /// The same; a refusal is an error that shows what the plugin said.
    pub fn done(&self, verb: &str, of: Option<Attachment<'_>>, extra: Value) -> Result<Value> {
        let finished = self.call(verb, of, extra)?;
        if finished.code != 0 {
            bail!("{verb} ended with {}: {}{}", finished.code, finished.stdout, finished.stderr);
        }
        match finished.stdout.trim() {
            "" => Ok(Value::Null),
            text => serde_json::from_str(text).with_context(|| format!("{verb} said {text}")),
        }
    }

    /// Must be refused; the code and the message.
    pub fn refused(
        &self,
        verb: &str,
        of: Option<Attachment<'_>>,
        extra: Value,
    ) -> Result<(u64, String)> {
        let finished = self.call(verb, of, extra)?;
        if finished.code == 0 {
            bail!("{verb} succeeded: {}", finished.stdout);
        }
        let error: Value = serde_json::from_str(&finished.stdout)
            .with_context(|| format!("{verb} said {}{}", finished.stdout, finished.stderr))?;
        let code = error["code"].as_u64().context("no code")?;
        Ok((code, format!("{} {}", error["msg"], error["details"])))
    }

    /// Attaches `netns` as the container of that name, by `eth0`.
    pub fn add(&self, container: &str, netns: &Netns) -> Result<Value> {
        let path = path(netns);
        self.done("ADD", Some(attachment(container, Some(&path))), Value::Null)
    }

    /// Detaches it, its namespace being there or not.
    pub fn del(&self, container: &str, netns: Option<&Netns>) -> Result<()> {
        let path = netns.map(path);
        self.done("DEL", Some(attachment(container, path.as_deref())), Value::Null).map(drop)
    }

    /// A new namespace, attached.
    pub fn pod(&self, container: &str) -> Result<Pod> {
        let ns = Netns::create(container)?;
        let result = self.add(container, &ns)?;
        pod(ns, &result)
    }
}

/// `eth0` of a container.
pub fn attachment<'a>(container: &'a str, netns: Option<&'a str>) -> Attachment<'a> {
    Attachment { container, interface: super::node::POD_INTERFACE, netns }
}

/// Path of a namespace, as a runtime names it.
pub fn path(netns: &Netns) -> String {
    Path::new(registry::NETNS_DIR).join(netns.name()).to_string_lossy().into_owned()
}

/// The addresses of a result.
pub fn addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let ips = result["ips"].as_array().context("no ips in the result")?;
    let address = |ip: &Value| {
        let text = ip["address"].as_str().context("no address")?;
        let (address, _) = text.split_once('/').context("no prefix length")?;
        address.parse().with_context(|| format!("address {address}"))
    };
    ips.iter().map(address).collect()
}

/// A pod from its namespace and the plugin's result.
pub fn pod(ns: Netns, result: &Value) -> Result<Pod> {
    let mut pod = Pod {
        ns,
        v4: Ipv4Addr::UNSPECIFIED,
        v6: Ipv6Addr::UNSPECIFIED,
        host_interface: result["interfaces"][0]["name"].as_str().unwrap_or_default().to_owned(),
    };
    for address in addresses(result)? {
        match address {
            IpAddr::V4(address) => pod.v4 = address,
            IpAddr::V6(address) => pod.v6 = address,
        }
    }
    Ok(pod)
}

/// What pods leave on a node: interfaces, addresses, routes, neighbours, rules of the firewall, and network
/// namespaces that the node's processes keep alive. To be compared before and after.
pub fn traces(node: &Netns) -> Result<Vec<String>> {
    let mut lines = node.interfaces()?;
    for what in
        ["-o address show", "-4 route show table all", "-6 route show table all", "neighbour show"]
    {
        // Not what comes and goes by itself.
        let lasting = |line: &&str| {
            ![
                "fe80",
                "REACHABLE",
                "STALE",
                "DELAY",
                "PROBE",
                "FAILED",
                "INCOMPLETE",
                "multicast",
                "expires",
            ]
            .iter()
            .any(|word| line.contains(word))
        };
        lines.extend(node.ip(what)?.lines().filter(lasting).map(str::to_owned));
    }
    lines.extend(rules(node)?);
    lines.extend(namespaces(node)?);
    lines.sort();
    Ok(lines)
}

/// Each line of the ruleset with its table and chain, without counters' values.
fn rules(node: &Netns) -> Result<Vec<String>> {
    let (mut inside, mut lines) = (Vec::new(), Vec::new());
    for line in node.sh("nft --stateless list ruleset")?.lines().map(str::trim) {
        // Each data process has source ports of its own.
        let ports = line.strip_prefix("udp sport { ").and_then(|rest| rest.split_once(" } "));
        let shown = ports.map_or(line.to_owned(), |(_, rest)| format!("udp sport PORTS {rest}"));
        lines.push(format!("nft: {} {shown}", inside.join(" ")));
        match line.strip_suffix('{') {
            Some(head) => inside.push(head.trim().to_owned()),
            None if line == "}" => drop(inside.pop()),
            None => {}
        }
    }
    Ok(lines)
}

/// Namespaces that live by a process of the node: it or one that it has started has a thread or a socket in it,
/// has it open, or has it mounted as container runtimes do (`cni-...`).
fn namespaces(node: &Netns) -> Result<BTreeSet<String>> {
    let own = fs::metadata(node.path())?;
    let (mut found, mut pids) = (BTreeSet::new(), node.pids());
    while let Some(pid) = pids.pop() {
        pids.extend(process::children(pid));
        let proc = PathBuf::from(format!("/proc/{pid}"));
        // A process may end while it is looked at. What a descriptor's link says depends on the path by
        // which it was opened.
        let descriptors = fs::read_dir(proc.join("fd")).into_iter().flatten().flatten();
        let mut files: Vec<PathBuf> = descriptors.map(|entry| entry.path()).collect();
        let sockets = files.iter().filter_map(|path| socket_namespace(pid, path).ok());
        found.extend(sockets);
        let threads = fs::read_dir(proc.join("task")).into_iter().flatten().flatten();
        files.extend(threads.map(|entry| entry.path().join("ns/net")));
        let files = files.iter().filter_map(|path| fs::metadata(path).ok());
        found.extend(files.filter(|file| file.dev() == own.dev()).map(|file| file.ino()));
        // Other mounts are the laboratory's own, which every process sees.
        let mounts = fs::read_to_string(proc.join("mountinfo")).unwrap_or_default();
        let runtimes = mounts.lines().filter(|line| line.contains("/cni-"));
        let inode = |line: &str| -> Option<u64> {
            line.split_once("net:[")?.1.split_once(']')?.0.parse().ok()
        };
        found.extend(runtimes.filter_map(inode));
    }
    found.remove(&own.ino());
    Ok(found.iter().map(|inode| format!("namespace {inode}")).collect())
}

/// In which namespace a socket of another process is (SIOCGSKNS, socket(7)).
fn socket_namespace(pid: i32, descriptor: &Path) -> Result<u64> {
    ensure!(fs::read_link(descriptor)?.to_string_lossy().starts_with("socket:"), "no socket");
    let number = descriptor.file_name().and_then(OsStr::to_str).context("no number")?.parse()?;
    let process = Pid::from_raw(pid).context("no process")?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let socket = pidfd_getfd(process, number, PidfdGetfdFlags::empty())?;
    // SAFETY: without an argument, and what comes back is checked.
    let namespace = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) };
    ensure!(namespace >= 0, "{}", io::Error::last_os_error());
    // SAFETY: it is new, and nobody else has it.
    let namespace = File::from(unsafe { OwnedFd::from_raw_fd(namespace) });
    Ok(namespace.metadata()?.ino())
}

/// Whether a node is as it was.
pub fn same(before: &[String], after: &[String]) -> Result<()> {
    // What is there twice counts twice.
    let without = |all: &[String], others: &[String]| {
        let mut rest = all.to_vec();
        for other in others {
            if let Some(index) = rest.iter().position(|line| line == other) {
                rest.swap_remove(index);
            }
        }
        rest
    };
    let (left, gone) = (without(after, before), without(before, after));
    ensure!(left.is_empty() && gone.is_empty(), "left behind {left:#?}, gone {gone:#?}");
    Ok(())
}

/// The spool's entries.
pub fn spooled(agent: &Agent) -> Result<Vec<PathBuf>> {
    match fs::read_dir(agent.cni_spool()) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(vec![]),
        Err(error) => Err(error.into()),
    }
}
