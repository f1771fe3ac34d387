//! What goes into the archive. Whatever cannot be had is noted, and the rest goes on.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::archive::{Archive, ENTRY};
use crate::commands::{Agent, check};
use crate::config::Config;
use crate::netlink::Netlink;

/// How long a program may take.
const LIMIT: Duration = Duration::from_secs(10);
/// How long the metrics may take.
const SCRAPE: Duration = Duration::from_secs(5);
/// Node record files, at most.
const RECORDS: usize = 1000;

/// The containers of the chart's DaemonSet.
const CONTAINERS: [&str; 2] = ["agent", "dataplane"];

/// Programs whose output is kept, each under the name of its file.
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

/// Files of the kernel that are kept.
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

/// Settings of the kernel that decide whether packets pass.
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
    // Validated: it holds paths of secrets, never secrets.
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
    container_logs(archive);
}

async fn metrics(archive: &mut Archive, config: &Config) {
    const NAME: &str = "metrics.txt";
    let Some(address) = config.metrics.listen else {
        return archive.missing(NAME, "metrics.listen is off");
    };
    match tokio::time::timeout(SCRAPE, scrape(address)).await {
        Ok(Ok(text)) => archive.add(NAME, &text),
        Ok(Err(error)) => archive.missing(NAME, &format!("{address}: {error}")),
        Err(_) => archive.missing(NAME, &format!("{address} does not answer")),
    }
}

/// One request by hand: the agent answers it and closes the connection.
async fn scrape(mut address: std::net::SocketAddr) -> std::io::Result<Vec<u8>> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    if address.ip().is_unspecified() {
        let v4 = std::net::Ipv4Addr::LOCALHOST.into();
        address.set_ip(if address.is_ipv4() { v4 } else { std::net::Ipv6Addr::LOCALHOST.into() });
    }
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let end = answer.windows(4).position(|part| part == b"\r\n\r\n");
    Ok(end.map_or_else(Vec::new, |end| answer.split_off(end + 4)))
}

/// The records as they lie on this node; they hold public keys only.
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
    // Whatever else somebody has put beside them is not Skein's.
    paths.retain(|path| path.extension().is_some_and(|end| end == "toml"));
    paths.sort();
    for path in paths.iter().take(RECORDS) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        file(archive, &format!("records/{name}"), path);
    }
}

/// The same as `ip` says, for images that have no such program.
async fn netlink(archive: &mut Archive) {
    const NAME: &str = "network/netlink.txt";
    let look = async {
        let netlink = Netlink::connect()?;
        let links = netlink.links().await?;
        let addresses = netlink.addresses(None).await?;
        let routes = netlink.routes(None).await?;
        let list = |title: &str, lines: Vec<String>| format!("{title}\n{}\n\n", lines.join("\n"));
        Ok::<_, crate::netlink::NetlinkError>(
            list("links", links.iter().map(|link| format!("{link:?}")).collect())
                + &list(
                    "addresses",
                    addresses
                        .iter()
                        .map(|a| format!("{} on interface {}", a.net, a.index))
                        .collect(),
                )
                + &list("routes of Skein", routes.iter().map(|r| format!("{r:?}")).collect()),
        )
    };
    match look.await {
        Ok(text) => archive.add(NAME, text.as_bytes()),
        Err(error) => archive.missing(NAME, &error.to_string()),
    }
}

async fn program(archive: &mut Archive, name: &str, words: &[&str]) {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(LIMIT, command.output()).await {
        Err(_) => archive.missing(name, &format!("{} did not end within {LIMIT:?}", words[0])),
        Ok(Err(error)) => archive.missing(name, &format!("{}: {error}", words[0])),
        Ok(Ok(output)) if output.status.success() => archive.add(name, &output.stdout),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let line = said.lines().next().unwrap_or_default();
            archive.missing(name, &format!("{}: {line}", words[0]));
        }
    }
}

fn file(archive: &mut Archive, name: &str, path: &Path) {
    match end_of(path) {
        Ok(content) => archive.add(name, &content),
        Err(error) => archive.missing(name, &error.to_string()),
    }
}

/// The end of a file, as much of it as is kept.
fn end_of(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    if length > ENTRY as u64 {
        file.seek(SeekFrom::Start(length - ENTRY as u64))?;
    }
    let mut content = Vec::new();
    // One that grows meanwhile, or never ends, is not followed.
    file.take(ENTRY as u64).read_to_end(&mut content)?;
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

/// What kubelet keeps of the chart's containers, where it can be reached: a directory a pod, with one a container.
fn container_logs(archive: &mut Archive) {
    let inside = |path: &Path| {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let named = |path: &PathBuf, ours: fn(&str) -> bool| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(ours)
    };
    let root = Path::new("/var/log/pods");
    for pod in inside(root).iter().filter(|pod| named(pod, is_ours)) {
        for container in inside(pod).iter().filter(|c| named(c, |name| CONTAINERS.contains(&name)))
        {
            for log in inside(container) {
                let name = log.strip_prefix(root).unwrap_or(&log).display();
                file(archive, &format!("logs/pods/{name}"), &log);
            }
        }
    }
}

/// Whether a directory of logs, NAMESPACE_POD_UID, is of a pod of the chart's DaemonSet. Which namespace that
/// is in is not known here.
fn is_ours(directory: &str) -> bool {
    let mut parts = directory.split('_');
    let pod = parts.nth(1).filter(|_| parts.next().is_some());
    pod.and_then(|pod| pod.strip_prefix("skein-")).is_some_and(|end| {
        end.len() == 5 && end.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_called_as_in_the_chart() {
        let chart = include_str!("../../../../charts/skein/templates/daemonset.yaml");
        let (_, containers) = chart.split_once("containers:").unwrap_or_default();
        let (containers, _) = containers.split_once("\n      volumes:").unwrap_or_default();
        let names = containers.lines().filter_map(|line| line.strip_prefix("        - name: "));
        assert!(names.eq(CONTAINERS));
    }

    #[test]
    fn logs_are_those_of_the_daemon_set() {
        assert!(is_ours("kube-system_skein-x7k2p_0a1b2c3d-0000-4000-8000-000000000000"));
        for others in [
            "default_skein-demo-7d9c5b6f4-x7k2p_0a1b",
            "default_skein-demo_0a1b",
            "skein-x7k2p_web-x7k2p_0a1b",
            "kube-system_my-skein-x7k2p_0a1b",
            "kube-system_skein-x7k2p",
            "kube-system_skein-cleanup-x7k2p_0a1b",
            "skein-x7k2p",
        ] {
            assert!(!is_ours(others), "{others}");
        }
    }
}
