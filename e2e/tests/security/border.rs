//! Helpers of the firewall's tests: two nodes, and senders on the underlay.

use std::net::{IpAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use skein_lab::agent::{Agent, Cluster};
use skein_lab::cni::Runtime;
use skein_lab::load::{retry_bind, udp};
use skein_lab::{Family, Lab, Netns, Plan, Pod, checks};

/// Port of the probes in this file.
pub(super) const PORT: u16 = 7400;

/// A cluster of two nodes with one pod each, attached by the CNI plugin or by hand.
pub(super) struct Border {
    pub(super) cluster: Cluster,
    /// Pods that the CNI plugin attached.
    pub(super) attached: Vec<Pod>,
}

impl Border {
    pub(super) fn up(cni: bool, change: impl Fn(&mut Agent)) -> Result<Self> {
        let lab = Lab::new(&Plan { pods: u8::from(!cni), ..Plan::default() })?;
        let mut cluster = Cluster::prepare(lab, Family::V4)?;
        for agent in &mut cluster.agents {
            if cni {
                agent.serve_pods()?;
            }
            change(agent);
        }
        cluster.start()?;
        let mut attached = Vec::new();
        if cni {
            for (agent, node) in cluster.agents.iter().zip(&cluster.lab.nodes) {
                attached.push(Runtime::new(agent, node)?.pod(&format!("pod-{}", node.index))?);
            }
        }
        let border = Self { cluster, attached };
        for family in Family::BOTH {
            checks::reaches(border.pod(0), border.pod(1), family)?;
        }
        for node in [0, 1] {
            // The agent changes the table once more when it knows the data process's ports.
            let rules = || border.node(node).sh("nft list table inet skein").unwrap_or_default();
            let complete = || Ok(!rules().contains("notrack") || rules().contains("udp sport"));
            checks::eventually("the rules name the ports", checks::EVENT_TIMEOUT, complete)?;
        }
        Ok(border)
    }

    pub(super) fn pod(&self, node: usize) -> &Pod {
        self.attached.get(node).unwrap_or_else(|| self.cluster.lab.pod(node))
    }

    pub(super) fn node(&self, index: usize) -> &Netns {
        &self.cluster.lab.nodes[index].ns
    }

    /// A drop counter of the first node.
    pub(super) fn drops(&self, name: &str, family: Family) -> Result<f64> {
        // The agent reads the counters at most once a second.
        thread::sleep(Duration::from_millis(1100));
        let family = if family == Family::V4 { "family=\"ipv4\"" } else { "family=\"ipv6\"" };
        let name = format!("skein_{name}_drops_total");
        Ok(self.cluster.agents[0].metrics()?.sum(&name, &[family]))
    }

    /// A machine on the underlay that routes pods' prefixes of the first node to that node.
    pub(super) fn outsider(&self) -> Result<Netns> {
        let machine = self.cluster.lab.attach("outsider", 77)?;
        machine.sysctl("net.ipv4.ip_forward", "1")?;
        machine.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        Ok(machine)
    }

    /// Sends datagrams with the source `source` from `from`; returns whether they reach the first
    /// node's pod.
    pub(super) fn spoof(
        &self,
        from: &Netns,
        source: IpAddr,
        target: IpAddr,
        by: IpAddr,
    ) -> Result<bool> {
        let bits = if source.is_ipv4() { 32 } else { 128 };
        let nodad = if source.is_ipv4() { "" } else { " nodad" };
        from.ip(&format!("address replace {source}/{bits} dev lo{nodad}"))?;
        from.ip(&format!("route replace {target}/{bits} via {by} src {source}"))?;
        let arrives = udp::arrives(from, &self.pod(0).ns, (target, PORT).into());
        from.ip(&format!("route del {target}/{bits}"))?;
        from.ip(&format!("address del {source}/{bits} dev lo"))?;
        arrives
    }

    /// Sources that an attacker on the underlay may choose: the other node's pod, an unused address
    /// of it, an unused address of the first node, and the nodes' addresses on the overlay.
    pub(super) fn pod_sources(&self, family: Family) -> Result<Vec<IpAddr>> {
        let texts = match family {
            Family::V4 => ["10.244.2.200", "10.244.1.200", "10.244.1.1", "10.244.2.1"],
            Family::V6 => {
                ["fd00:10:244:2::c8", "fd00:10:244:1::c8", "fd00:10:244:1::1", "fd00:10:244:2::1"]
            }
        };
        let mut sources = vec![self.pod(1).address(family)];
        for text in texts {
            sources.push(text.parse()?);
        }
        Ok(sources)
    }
}

/// Address of the outsider on the underlay.
pub(super) fn outside(family: Family) -> Result<IpAddr> {
    let text = if family == Family::V4 { "192.0.2.77" } else { "2001:db8::4d" };
    Ok(text.parse()?)
}

/// Returns the source of datagrams to the address `to` as `at` receives them; `None` if no datagram
/// arrives.
pub(super) fn source_of(
    from: &Netns,
    source: IpAddr,
    at: &Netns,
    to: IpAddr,
) -> Result<Option<IpAddr>> {
    request(from, source, to, at, to)
}

/// Sends datagrams from `source` to `to`, which arrive at `target` in `at`, and awaits the answer
/// to one. Returns the source that the receiver saw; `None` if no datagram or no answer arrives.
pub(super) fn request(
    from: &Netns,
    source: IpAddr,
    to: IpAddr,
    at: &Netns,
    target: IpAddr,
) -> Result<Option<IpAddr>> {
    let timeout = Some(Duration::from_millis(300));
    let receiver =
        at.run(move || retry_bind(|| UdpSocket::bind((target, PORT))))?.context("binding")?;
    let sender = from.run(move || UdpSocket::bind((source, 0)))?.context("binding")?;
    receiver.set_read_timeout(timeout)?;
    sender.set_read_timeout(timeout)?;
    for _ in 0..10 {
        // The first datagrams may wait for a handshake or a neighbour.
        let _ = sender.send_to(b"request", (to, PORT));
        if let Ok((_, seen)) = receiver.recv_from(&mut [0; 16]) {
            receiver.send_to(b"answer", seen)?;
            if sender.recv(&mut [0; 16]).is_ok() {
                return Ok(Some(seen.ip()));
            }
        }
    }
    Ok(None)
}
