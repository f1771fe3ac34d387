//! Calls of the CNI plugin as a container runtime makes them, with environment variables, standard
//! input and standard output; and the traces that pods leave on a node.

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

/// Maximum time of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Request of ioctl(2) for the network namespace of a socket (linux/sockios.h).
const SIOCGSKNS: libc::c_ulong = 0x894c;

/// Returns the path of the plugin's program: `SKEIN_CNI_BIN`, or `skein-cni` in the directory of
/// the agent's program.
///
/// # Errors
/// If `SKEIN_CNI_BIN` is not set and the file does not exist.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SKEIN_CNI_BIN") {
        return Ok(path.into());
    }
    let path = super::agent::binary()?.with_file_name("skein-cni");
    if !path.is_file() {
        bail!(
            "{} does not exist. Build it (cargo build --release -p skein-cni), or set SKEIN_CNI_BIN.",
            path.display()
        );
    }
    Ok(path)
}

/// A minimal container runtime on one node that calls Skein's plugin only.
#[derive(Debug, Clone)]
pub struct Runtime {
    node: String,
    program: PathBuf,
    /// Configuration of the plugin, as libcni passes it on standard input.
    pub configuration: Value,
    /// Value of `CNI_ARGS`, such as the name of a Kubernetes pod; `None` leaves the variable unset.
    pub arguments: Option<String>,
}

/// Attachment of the CNI specification: an interface of a container.
#[derive(Debug, Clone, Copy)]
pub struct Attachment<'a> {
    /// Container identifier, the value of `CNI_CONTAINERID`.
    pub container: &'a str,
    /// Name of the interface in the container, the value of `CNI_IFNAME`.
    pub interface: &'a str,
    /// Path of the network namespace, the value of `CNI_NETNS`; `None` leaves the variable unset.
    pub netns: Option<&'a str>,
}

impl Runtime {
    /// Creates a runtime for an agent that was prepared with [`Agent::serve_pods`].
    ///
    /// # Errors
    /// If the plugin's program is missing.
    pub fn new(agent: &Agent, node: &Node) -> Result<Self> {
        let configuration = json!({
            "cniVersion": "1.1.0",
            "name": "skein",
            "type": "skein-cni",
            "socket": agent.cni_socket(),
            "spool": agent.cni_spool(),
        });
        let (node, program) = (node.ns.name().to_owned(), binary()?);
        Ok(Self { node, program, configuration, arguments: None })
    }

    /// Calls the plugin. `extra` is added to the configuration, such as `prevResult`. An exit code
    /// other than 0 is not an error.
    ///
    /// # Errors
    /// If the plugin cannot be started, or does not exit within 30 s.
    pub fn call(
        &self,
        operation: &str,
        attachment: Option<Attachment<'_>>,
        extra: Value,
    ) -> Result<Finished> {
        let mut configuration = self.configuration.clone();
        if let (Some(all), Value::Object(extra)) = (configuration.as_object_mut(), extra) {
            all.extend(extra);
        }
        let mut command = std::process::Command::new("ip");
        command.args(["netns", "exec", &self.node]).arg(&self.program);
        command.env("CNI_COMMAND", operation);
        // The specification requires CNI_PATH for GC only.
        if operation == "GC" {
            command.env("CNI_PATH", "/opt/cni/bin");
        }
        if let Some(attachment) = attachment {
            command
                .env("CNI_CONTAINERID", attachment.container)
                .env("CNI_IFNAME", attachment.interface);
            command.envs(attachment.netns.map(|netns| ("CNI_NETNS", netns)));
            command.envs(self.arguments.as_ref().map(|arguments| ("CNI_ARGS", arguments)));
        }
        process::finish(&mut command, configuration.to_string().as_bytes(), CALL_TIMEOUT)
    }

    /// Calls the plugin, which must succeed, and returns its result; null if it prints none.
    ///
    /// # Errors
    /// If the plugin fails; with its output.
    pub fn done(
        &self,
        operation: &str,
        attachment: Option<Attachment<'_>>,
        extra: Value,
    ) -> Result<Value> {
        let finished = self.call(operation, attachment, extra)?;
        if finished.code != 0 {
            bail!(
                "{operation} ended with code {}: {}{}",
                finished.code,
                finished.stdout,
                finished.stderr
            );
        }
        match finished.stdout.trim() {
            "" => Ok(Value::Null),
            text => {
                serde_json::from_str(text).with_context(|| format!("{operation} printed {text}"))
            }
        }
    }

    /// Calls the plugin, which must fail, and returns the error's code and its message with the
    /// details.
    ///
    /// # Errors
    /// If the plugin succeeds, or prints no CNI error.
    pub fn refused(
        &self,
        operation: &str,
        attachment: Option<Attachment<'_>>,
        extra: Value,
    ) -> Result<(u64, String)> {
        let finished = self.call(operation, attachment, extra)?;
        if finished.code == 0 {
            bail!("{operation} succeeded: {}", finished.stdout);
        }
        let error: Value = serde_json::from_str(&finished.stdout).with_context(|| {
            format!("{operation} printed {}{}", finished.stdout, finished.stderr)
        })?;
        let code = error["code"].as_u64().context("no code")?;
        Ok((code, format!("{} {}", error["msg"], error["details"])))
    }

    /// Adds `eth0` to the namespace of a container and returns the result of ADD.
    ///
    /// # Errors
    /// If the plugin fails.
    pub fn add(&self, container: &str, netns: &Netns) -> Result<Value> {
        let path = path(netns);
        self.done("ADD", Some(attachment(container, Some(&path))), Value::Null)
    }

    /// Removes `eth0` of a container. `netns` is `None` if the namespace does not exist any more.
    ///
    /// # Errors
    /// If the plugin fails.
    pub fn del(&self, container: &str, netns: Option<&Netns>) -> Result<()> {
        let path = netns.map(path);
        self.done("DEL", Some(attachment(container, path.as_deref())), Value::Null).map(drop)
    }

    /// Creates a namespace and adds `eth0` to it. The container has the name of the pod.
    ///
    /// # Errors
    /// If the namespace cannot be created, or if the plugin fails.
    pub fn pod(&self, container: &str) -> Result<Pod> {
        let ns = Netns::create(container)?;
        let result = self.add(container, &ns)?;
        pod(ns, &result)
    }
}

/// Returns the attachment of `eth0` of a container.
pub fn attachment<'a>(container: &'a str, netns: Option<&'a str>) -> Attachment<'a> {
    Attachment { container, interface: super::node::POD_INTERFACE, netns }
}

/// Returns the path of a namespace, as a runtime passes it in `CNI_NETNS`.
pub fn path(netns: &Netns) -> String {
    Path::new(registry::NETNS_DIR).join(netns.name()).to_string_lossy().into_owned()
}

/// Returns the addresses in a result of ADD.
///
/// # Errors
/// If the result has no `ips`, or an address that cannot be parsed.
pub fn addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let ips = result["ips"].as_array().context("no ips in the result")?;
    let address = |ip: &Value| {
        let text = ip["address"].as_str().context("no address")?;
        let (address, _) = text.split_once('/').context("no prefix length")?;
        address.parse().with_context(|| format!("address {address}"))
    };
    ips.iter().map(address).collect()
}

/// Makes a pod of its namespace and the result of ADD. The address of an absent family is
/// unspecified.
///
/// # Errors
/// If the result has no `ips`, or an address that cannot be parsed.
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

/// Lists everything that pods can leave on a node: interfaces, addresses, routes, neighbours,
/// nftables rules, and network namespaces that the node's processes keep alive. Compare two lists
/// with [`same`].
///
/// # Errors
/// If `ip` or `nft` fails.
pub fn traces(node: &Netns) -> Result<Vec<String>> {
    let mut lines = node.interfaces()?;
    for what in
        ["-o address show", "-4 route show table all", "-6 route show table all", "neighbour show"]
    {
        // The kernel changes these entries by itself.
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

/// Returns each line of the ruleset with its table and chain, without the values of counters.
fn rules(node: &Netns) -> Result<Vec<String>> {
    let (mut inside, mut lines) = (Vec::new(), Vec::new());
    for line in node.sh("nft --stateless list ruleset")?.lines().map(str::trim) {
        // The source ports differ between data processes.
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

/// Returns the network namespaces that processes of the node and their descendants keep alive: by a
/// thread, a socket, an open file, or a mount of a container runtime (`cni-...`).
fn namespaces(node: &Netns) -> Result<BTreeSet<String>> {
    let own = fs::metadata(node.path())?;
    let (mut found, mut pids) = (BTreeSet::new(), node.pids());
    while let Some(pid) = pids.pop() {
        pids.extend(process::children(pid));
        let proc = PathBuf::from(format!("/proc/{pid}"));
        // A process may exit meanwhile, so errors are ignored. The text of a descriptor's link
        // depends on the path by which the file was opened; device and inode do not.
        let descriptors = fs::read_dir(proc.join("fd")).into_iter().flatten().flatten();
        let mut files: Vec<PathBuf> = descriptors.map(|entry| entry.path()).collect();
        let sockets = files.iter().filter_map(|path| socket_namespace(pid, path).ok());
        found.extend(sockets);
        let threads = fs::read_dir(proc.join("task")).into_iter().flatten().flatten();
        files.extend(threads.map(|entry| entry.path().join("ns/net")));
        let files = files.iter().filter_map(|path| fs::metadata(path).ok());
        found.extend(files.filter(|file| file.dev() == own.dev()).map(|file| file.ino()));
        // Every process sees the mounts of the laboratory itself.
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

/// Returns the inode of the network namespace of another process's socket (SIOCGSKNS).
fn socket_namespace(pid: i32, descriptor: &Path) -> Result<u64> {
    ensure!(fs::read_link(descriptor)?.to_string_lossy().starts_with("socket:"), "no socket");
    let number = descriptor.file_name().and_then(OsStr::to_str).context("no number")?.parse()?;
    let process = Pid::from_raw(pid).context("no process")?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let socket = pidfd_getfd(process, number, PidfdGetfdFlags::empty())?;
    // SAFETY: SIOCGSKNS takes no argument and writes no memory. The result is checked.
    let namespace = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) };
    ensure!(namespace >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the ioctl returned a new descriptor, which has no other owner.
    let namespace = File::from(unsafe { OwnedFd::from_raw_fd(namespace) });
    Ok(namespace.metadata()?.ino())
}

/// Checks that two lists of [`traces`] are equal.
///
/// # Errors
/// If an entry was added or removed; with these entries.
pub fn same(before: &[String], after: &[String]) -> Result<()> {
    // Equal entries count separately.
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
    ensure!(left.is_empty() && gone.is_empty(), "left behind: {left:#?}, removed: {gone:#?}");
    Ok(())
}

/// Returns the paths of the entries in the agent's spool.
///
/// # Errors
/// If the directory exists and cannot be read.
pub fn spooled(agent: &Agent) -> Result<Vec<PathBuf>> {
    match fs::read_dir(agent.cni_spool()) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(vec![]),
        Err(error) => Err(error.into()),
    }
}
