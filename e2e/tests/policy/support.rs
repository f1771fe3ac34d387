//! Agents in static mode, pods with names, and probes.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::agent::{Agent, Cluster};
use skein_lab::cni::{self, attachment};
use skein_lab::pods::{prepared, runtime};
use skein_lab::{Family, Netns, Pod, files};

/// Time after which a probe without an answer counts as dropped.
const PROBE_TIMEOUT: Duration = Duration::from_millis(400);

/// Namespace of all pods.
pub(super) const NAMESPACE: &str = "shop";

/// Returns the directory of the objects of an agent.
pub(super) fn directory(agent: &Agent) -> PathBuf {
    agent.directory().join("policies")
}

/// Starts agents in static mode on `nodes` nodes, with these objects.
pub(super) fn up(nodes: u8, objects: &str) -> Result<Cluster> {
    let mut cluster = prepared(nodes, |agent| {
        let path = directory(agent).to_string_lossy().into_owned();
        agent.set("policy.directory", path);
    })?;
    for agent in &cluster.agents {
        fs::create_dir_all(directory(agent))?;
        put(agent, "objects.yaml", objects)?;
    }
    cluster.start()?;
    Ok(cluster)
}

/// Writes a file of objects for an agent.
pub(super) fn put(agent: &Agent, name: &str, text: &str) -> Result<()> {
    files::replace(&directory(agent).join(name), text)
}

/// Writes a file of objects for all agents.
pub(super) fn put_all(cluster: &Cluster, name: &str, text: &str) -> Result<()> {
    cluster.agents.iter().try_for_each(|agent| put(agent, name, text))
}

/// Attaches a pod with a name to the node with this index. `addresses` are requested addresses.
pub(super) fn attach(
    cluster: &Cluster,
    index: usize,
    name: &str,
    ns: Netns,
    addresses: &[&str],
) -> Result<Pod> {
    let mut runtime = runtime(cluster, index)?;
    runtime.arguments = Some(format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={name};K8S_POD_UID=uid-{name}"
    ));
    let extra = match addresses.is_empty() {
        true => Value::Null,
        false => json!({ "runtimeConfig": { "ips": addresses } }),
    };
    let path = cni::path(&ns);
    let result = runtime.done("ADD", Some(attachment(name, Some(&path))), extra)?;
    cni::pod(ns, &result)
}

/// Removes a pod.
pub(super) fn detach(cluster: &Cluster, index: usize, name: &str) -> Result<()> {
    runtime(cluster, index)?.del(name, None)
}

/// Returns the object of a pod with the label `app`.
pub(super) fn object(name: &str, app: &str, pod: Option<&Pod>) -> String {
    let mut text = format!(
        "---\napiVersion: v1\nkind: Pod\n\
         metadata: {{name: {name}, namespace: {NAMESPACE}, labels: {{app: {app}}}}}\n"
    );
    if let Some(pod) = pod {
        let (v4, v6) = (pod.v4, pod.v6);
        text += &format!("status: {{podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}]}}\n");
    }
    text
}

/// Returns a NetworkPolicy for the pods with `app: web` that allows ingress by these rules.
pub(super) fn ingress_policy(rules: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {{name: web, namespace: {NAMESPACE}}}\n\
         spec: {{podSelector: {{matchLabels: {{app: web}}}}, policyTypes: [Ingress], ingress: {rules}}}\n"
    )
}

/// A server for TCP and UDP on one port of all addresses, which returns what it receives. It ends
/// when the value is dropped.
pub(super) struct Server {
    ended: Arc<AtomicBool>,
}

impl Server {
    /// Starts the server in a namespace.
    pub(super) fn start(ns: &Netns, port: u16) -> Result<Self> {
        let sockets = ns.run(|| -> std::io::Result<_> {
            let at = (Ipv6Addr::UNSPECIFIED, port);
            let (tcp, udp) = (TcpListener::bind(at)?, UdpSocket::bind(at)?);
            tcp.set_nonblocking(true)?;
            udp.set_read_timeout(Some(Duration::from_millis(20)))?;
            Ok((tcp, udp))
        })?;
        let (tcp, udp) = sockets.with_context(|| format!("binding port {port}"))?;
        let ended = Arc::new(AtomicBool::new(false));
        let is_ended = Arc::clone(&ended);
        thread::spawn(move || {
            let mut buffer = [0; 64];
            let mut streams: Vec<TcpStream> = Vec::new();
            while !is_ended.load(Ordering::Relaxed) {
                if let Ok((stream, _)) = tcp.accept()
                    && stream.set_nonblocking(true).is_ok()
                {
                    streams.push(stream);
                }
                for stream in &mut streams {
                    if let Ok(length) = stream.read(&mut buffer) {
                        let _ = stream.write(&buffer[..length]);
                    }
                }
                if let Ok((length, from)) = udp.recv_from(&mut buffer) {
                    // The peer may be gone.
                    let _ = udp.send_to(&buffer[..length], from);
                }
            }
        });
        Ok(Self { ended })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// Returns whether a TCP connection can be opened; an error if it is refused by a reset.
pub(super) fn tcp(from: &Netns, to: IpAddr, port: u16) -> Result<bool> {
    let to = SocketAddr::new(to, port);
    let connected = from.run(|| TcpStream::connect_timeout(&to, PROBE_TIMEOUT))?;
    match connected {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::TimedOut => Ok(false),
        Err(error) => Err(error).with_context(|| format!("connecting to {to}")),
    }
}

/// Returns whether a UDP datagram is answered.
pub(super) fn udp(from: &Netns, to: IpAddr, port: u16) -> Result<bool> {
    let socket = from.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)))??;
    socket.set_read_timeout(Some(PROBE_TIMEOUT))?;
    // The socket is of IPv6: an IPv4 destination has the mapped form.
    let to = match to {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), port),
        IpAddr::V6(_) => SocketAddr::new(to, port),
    };
    socket.send_to(b"probe", to)?;
    match socket.recv_from(&mut [0; 64]) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            Ok(false)
        }
        Err(error) => Err(error).with_context(|| format!("no answer from {to}")),
    }
}

/// Checks whether TCP and UDP pass from a pod to another, over both families.
pub(super) fn expect(from: &Pod, to: &Pod, port: u16, wanted: bool) -> Result<()> {
    for family in Family::BOTH {
        let address = to.address(family);
        let found = [tcp(&from.ns, address, port)?, udp(&from.ns, address, port)?];
        ensure!(
            found == [wanted; 2],
            "TCP and UDP to {address} port {port} pass: {found:?}, expected: {wanted}"
        );
    }
    Ok(())
}
