//! Collection of the archive's content. Content that is not available is recorded, and the
//! collection continues.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{Dir, Mode, OFlags, openat};
use skein_netlink::Netlink;
use tokio::process::Command;

use super::archive::{Archive, MAX_ENTRY};
use crate::commands::{Agent, check};
use crate::config::Config;

/// Maximum run time of a program.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of the request for metrics.
const METRICS_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of files of one directory.
const MAX_FILES: usize = 1000;

/// Names of the containers in the chart's DaemonSet.
const CONTAINERS: [&str; 2] = ["agent", "dataplane"];

/// File name in the archive and command of each program whose output is collected.
const PROGRAMS: &[(&str, &[&str])] = &[
    ("network/links.txt", &["ip", "-details", "-statistics", "link", "show"]),
    ("network/addresses.txt", &["ip", "address", "show"]),
    ("network/routes4.txt", &["ip", "-4", "route", "show", "table", "all"]),
    ("network/routes6.txt", &["ip", "-6", "route", "show", "table", "all"]),
    ("network/rules4.txt", &["ip", "-4", "rule", "show"]),
    ("network/rules6.txt", &["ip", "-6", "rule", "show"]),
    ("network/neighbours.txt", &["ip", "neighbour", "show"]),
    ("network/sockets.txt", &["ss", "--udp", "--numeric", "--all", "--processes", "--extended"]),
    ("network/queues.txt", &["tc", "-statistics", "qdisc", "show"]),
    ("firewall/nftables.txt", &["nft", "list", "ruleset"]),
    ("firewall/iptables.txt", &["iptables-save"]),
    ("firewall/ip6tables.txt", &["ip6tables-save"]),
    ("machine/kernel.txt", &["uname", "-a"]),
    ("logs/journal.txt", &["journalctl", "--no-pager", "--lines=20000", "_COMM=skein-agent"]),
    ("logs/journal-kernel.txt", &["journalctl", "--no-pager", "--lines=2000", "--dmesg"]),
];

/// Files of the kernel and the system that are collected.
const FILES: &[&str] = &[
    "/proc/version",
    "/proc/cmdline",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/uptime",
    "/proc/modules",
    "/proc/net/dev",
    "/proc/net/snmp",
    "/proc/net/snmp6",
    "/proc/net/netstat",
    "/proc/net/softnet_stat",
    "/etc/os-release",
];

/// Sysctls that are collected, because they affect the delivery of packets.
const SYSCTLS: &[&str] = &[
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/default/rp_filter",
    "net/ipv4/conf/all/forwarding",
    "net/ipv6/conf/all/forwarding",
    "net/ipv6/conf/all/disable_ipv6",
    "net/ipv4/ip_no_pmtu_disc",
    "net/core/rmem_max",
    "net/core/wmem_max",
    "net/core/netdev_max_backlog",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_max",
    "kernel/osrelease",
];

pub(super) async fn collect(archive: &mut Archive, config: &Config, agent: &Agent) {
    match agent.status().await {
        Ok(status) => match serde_json::to_vec_pretty(&status) {
            Ok(text) => archive.add("status.json", &text),
            Err(error) => archive.missing("status.json", &error.to_string()),
        },
        Err(failure) => archive.missing("status.json", &failure.to_string()),
    }
    metrics(archive, config).await;
    // The validated configuration contains paths of secrets, but no secrets.
    match serde_json::to_vec_pretty(config) {
        Ok(text) => archive.add("config.json", &text),
        Err(error) => archive.missing("config.json", &error.to_string()),
    }
    match serde_json::to_vec_pretty(&check::document(&check::probes(Ok(Some(config))).await)) {
        Ok(text) => archive.add("check.json", &text),
        Err(error) => archive.missing("check.json", &error.to_string()),
    }
    let version = format!("skein-agent {}\n", env!("CARGO_PKG_VERSION"));
    archive.add("version.txt", version.as_bytes());
    records(archive, config);
    netlink(archive).await;
    for (name, words) in PROGRAMS {
        program(archive, name, words).await;
    }
    for path in FILES {
        file(archive, &format!("machine{path}"), Path::new(path));
    }
    sysctls(archive, config);
    container_logs(archive, Path::new("/var/log/pods"), own_namespace().as_deref());
}

async fn metrics(archive: &mut Archive, config: &Config) {
    const NAME: &str = "metrics.txt";
    let Some(address) = config.metrics.listen else {
        return archive.missing(NAME, "metrics.listen is off");
    };
    match tokio::time::timeout(METRICS_TIMEOUT, scrape(address)).await {
        Ok(Ok(text)) => archive.add(NAME, &text),
        Ok(Err(error)) => archive.missing(NAME, &format!("{address}: {error}")),
        Err(_) => {
            archive.missing(NAME, &format!("{address}: no answer within {METRICS_TIMEOUT:?}"))
        }
    }
}

/// Requests the metrics with HTTP/1.0, so that the agent closes the connection after its answer.
async fn scrape(mut address: std::net::SocketAddr) -> std::io::Result<Vec<u8>> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    if address.ip().is_unspecified() {
        let v4 = std::net::Ipv4Addr::LOCALHOST.into();
        address.set_ip(if address.is_ipv4() { v4 } else { std::net::Ipv6Addr::LOCALHOST.into() });
    }
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").await?;
    let mut answer = Vec::new();
    // Another program may listen on the port and send without end.
    stream.take(MAX_ENTRY as u64).read_to_end(&mut answer).await?;
    let end = answer.windows(4).position(|part| part == b"\r\n\r\n");
    Ok(end.map_or_else(Vec::new, |end| answer.split_off(end + 4)))
}

/// Adds the node records of this node. They contain public keys only.
fn records(archive: &mut Archive, config: &Config) {
    file(archive, "records/last-good.json", &config.state_dir.join("registry.json"));
    if config.kubernetes.enabled {
        return;
    }
    if !config.nodes.is_dir() {
        return file(archive, "records/nodes.toml", &config.nodes);
    }
    let Ok(entries) = std::fs::read_dir(&config.nodes) else {
        return archive.missing("records", &format!("cannot read {}", config.nodes.display()));
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    // Other files in the directory are not node records.
    paths.retain(|path| path.extension().is_some_and(|end| end == "toml"));
    paths.sort();
    for path in paths.iter().take(MAX_FILES) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        file(archive, &format!("records/{name}"), path);
    }
}

/// Adds links, addresses and routes from netlink, for images without the program `ip`.
async fn netlink(archive: &mut Archive) {
    const NAME: &str = "network/netlink.txt";
    let query = async {
        let netlink = Netlink::connect()?;
        let links = netlink.links().await?;
        let addresses = netlink.addresses(None).await?;
        let routes = netlink.routes(None).await?;
        let list = |title: &str, lines: Vec<String>| format!("{title}\n{}\n\n", lines.join("\n"));
        Ok::<_, skein_netlink::NetlinkError>(
            list("links", links.iter().map(|link| format!("{link:?}")).collect())
                + &list(
                    "addresses",
                    addresses
                        .iter()
                        .map(|a| format!("{} on interface {}", a.net, a.index))
                        .collect(),
                )
                + &list("Skein routes", routes.iter().map(|r| format!("{r:?}")).collect()),
        )
    };
    match query.await {
        Ok(text) => archive.add(NAME, text.as_bytes()),
        Err(error) => archive.missing(NAME, &error.to_string()),
    }
}

async fn program(archive: &mut Archive, name: &str, words: &[&str]) {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(PROGRAM_TIMEOUT, command.output()).await {
        Err(_) => {
            archive.missing(name, &format!("{} did not end within {PROGRAM_TIMEOUT:?}", words[0]))
        }
        Ok(Err(error)) => archive.missing(name, &format!("{}: {error}", words[0])),
        Ok(Ok(output)) if output.status.success() => archive.add(name, &output.stdout),
        Ok(Ok(output)) => {
            let message = String::from_utf8_lossy(&output.stderr);
            let line = message.lines().next().unwrap_or_default();
            archive.missing(name, &format!("{}: {line}", words[0]));
        }
    }
}

fn file(archive: &mut Archive, name: &str, path: &Path) {
    let opened =
        File::options().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path);
    match opened.and_then(end_of) {
        Ok(content) => archive.add(name, &content),
        Err(error) => archive.missing(name, &error.to_string()),
    }
}

/// Returns the end of a file, at most [`MAX_ENTRY`] bytes.
///
/// # Errors
/// The file is not a regular file, or it cannot be read.
fn end_of(mut file: File) -> io::Result<Vec<u8>> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let length = metadata.len();
    if length > MAX_ENTRY as u64 {
        file.seek(SeekFrom::Start(length - MAX_ENTRY as u64))?;
    }
    let mut content = Vec::new();
    // The file may grow without end while it is read.
    file.take(MAX_ENTRY as u64).read_to_end(&mut content)?;
    Ok(content)
}

fn sysctls(archive: &mut Archive, config: &Config) {
    let mut names: Vec<String> = SYSCTLS.iter().map(ToString::to_string).collect();
    let interface = &config.interface.name;
    names.extend([
        format!("net/ipv4/conf/{interface}/rp_filter"),
        format!("net/ipv4/conf/{interface}/forwarding"),
        format!("net/ipv6/conf/{interface}/disable_ipv6"),
    ]);
    let line = |name: &String| {
        let value = std::fs::read_to_string(Path::new("/proc/sys").join(name));
        let value = value.unwrap_or_else(|error| error.to_string());
        format!("{} = {}\n", name.replace('/', "."), value.trim())
    };
    archive.add("machine/sysctls.txt", names.iter().map(line).collect::<String>().as_bytes());
}

/// Adds the logs of the chart's containers that kubelet stores below `root`, if this process can
/// read them. `root` has one directory for each pod, with one for each container. `namespace` is
/// the chart's namespace, if it is known.
///
/// A pod with a writable hostPath volume of `/var/log` can place files there. No link is followed
/// on the way from `root`, and only regular files with a single name are read.
fn container_logs(archive: &mut Archive, root: &Path, namespace: Option<&str>) {
    let Ok(root) = open_below(rustix::fs::CWD, root, OFlags::DIRECTORY) else { return };
    let pods = names(&root).into_iter().filter(|pod| is_own_pod(pod, namespace));
    for (pod, container) in pods.flat_map(|pod| CONTAINERS.map(|name| (pod.clone(), name))) {
        let directory = open_below(&root, &pod, OFlags::DIRECTORY)
            .and_then(|pod| open_below(pod, container, OFlags::DIRECTORY));
        let Ok(directory) = directory else { continue };
        for log in names(&directory) {
            let name = format!("logs/pods/{pod}/{container}/{log}");
            let opened = open_below(&directory, &log, OFlags::empty()).map(File::from);
            match opened.map_err(io::Error::from).and_then(with_single_name).and_then(end_of) {
                Ok(content) => archive.add(&name, &content),
                Err(error) => archive.missing(&name, &error.to_string()),
            }
        }
    }
}

/// Opens `name` in `directory` for reading. Fails if `name` is a symbolic link.
fn open_below(
    directory: impl AsFd,
    name: impl rustix::path::Arg,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::empty())
}

/// Returns the sorted names in `directory`, at most [`MAX_FILES`]; names that are not UTF-8 are
/// left out.
fn names(directory: &OwnedFd) -> Vec<String> {
    let entries = Dir::read_from(directory).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned));
    let mut names: Vec<_> =
        names.filter(|name| name != "." && name != "..").take(MAX_FILES).collect();
    names.sort();
    names
}

/// Fails if the file has a second name, because a hard link may refer to a file of another owner.
fn with_single_name(file: File) -> io::Result<File> {
    match file.metadata()?.nlink() {
        1 => Ok(file),
        links => Err(io::Error::other(format!("the file has {links} names"))),
    }
}

/// Returns the namespace of this process's pod, or `None` outside of a pod.
fn own_namespace() -> Option<String> {
    std::fs::read_to_string("/var/run/secrets/kubernetes.io/serviceaccount/namespace").ok()
}

/// Returns whether a log directory, named NAMESPACE_POD_UID, belongs to a pod of the chart's
/// DaemonSet.
fn is_own_pod(directory: &str, namespace: Option<&str>) -> bool {
    let mut parts = directory.split('_');
    let (of, pod, uid) = (parts.next(), parts.next(), parts.next());
    let end = pod.filter(|_| uid.is_some()).and_then(|pod| pod.strip_prefix("skein-"));
    let lowercase = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (namespace.is_none() || of == namespace)
        && end.is_some_and(|end| end.len() == 5 && end.bytes().all(lowercase))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    #[test]
    fn container_names_match_chart() {
        let chart = include_str!("../../../../charts/skein/templates/daemonset.yaml");
        let (_, containers) = chart.split_once("containers:").unwrap_or_default();
        let (containers, _) = containers.split_once("\n      volumes:").unwrap_or_default();
        let names = containers.lines().filter_map(|line| line.strip_prefix("        - name: "));
        assert!(names.eq(CONTAINERS));
    }

    #[test]
    fn only_logs_of_daemon_set_are_collected() {
        let ours = "kube-system_skein-x7k2p_0a1b2c3d-0000-4000-8000-000000000000";
        assert!(is_own_pod(ours, None) && is_own_pod(ours, Some("kube-system")));
        assert!(!is_own_pod(ours, Some("skein")), "The pod is in another namespace.");
        for others in [
            "default_skein-demo-7d9c5b6f4-x7k2p_0a1b",
            "default_skein-demo_0a1b",
            "skein-x7k2p_web-x7k2p_0a1b",
            "kube-system_my-skein-x7k2p_0a1b",
            "kube-system_skein-x7k2p",
            "kube-system_skein-cleanup-x7k2p_0a1b",
            "skein-x7k2p",
        ] {
            assert!(!is_own_pod(others, None), "{others}");
        }
    }

    #[test]
    fn logs_that_are_links_or_fifos_are_skipped() {
        use std::os::unix::fs::symlink;
        let directory = tempfile::tempdir().unwrap();
        let secret = directory.path().join("secret");
        std::fs::create_dir(&secret).unwrap();
        std::fs::write(secret.join("0.log"), "hidden").unwrap();
        let root = directory.path().join("pods");
        let pod = root.join("kube-system_skein-aaaaa_1");
        let logs = pod.join("agent");
        std::fs::create_dir_all(&logs).unwrap();
        std::fs::write(logs.join("0.log"), "a line").unwrap();
        symlink(secret.join("0.log"), logs.join("1.log")).unwrap();
        std::fs::hard_link(secret.join("0.log"), logs.join("2.log")).unwrap();
        let fifo = FileType::Fifo;
        mknodat(CWD, logs.join("3.log"), fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        symlink(&secret, pod.join("dataplane")).unwrap();
        let elsewhere = secret.join("agent");
        std::fs::create_dir(&elsewhere).unwrap();
        std::fs::write(elsewhere.join("0.log"), "hidden").unwrap();
        symlink(&secret, root.join("kube-system_skein-bbbbb_1")).unwrap();
        let mut archive = Archive::new("dump", 0, &[]);
        container_logs(&mut archive, &root, Some("kube-system"));
        let read: Vec<_> = archive
            .entries()
            .into_iter()
            .filter(|entry| entry.bytes > 0)
            .map(|entry| entry.name)
            .collect();
        assert_eq!(read, ["logs/pods/kube-system_skein-aaaaa_1/agent/0.log"]);
    }

    #[tokio::test]
    async fn endless_metrics_are_truncated() {
        use tokio::io::AsyncWriteExt;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").await.unwrap();
            while stream.write_all(&[b'x'; 1 << 16]).await.is_ok() {}
        });
        let text = tokio::time::timeout(METRICS_TIMEOUT, scrape(address)).await.unwrap().unwrap();
        assert!((1..=MAX_ENTRY).contains(&text.len()), "{} bytes", text.len());
        server.await.unwrap();
    }
}
