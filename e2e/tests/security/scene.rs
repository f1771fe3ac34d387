//! Helpers of the plaintext tests: probes with a marker, captures of the underlay.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use std::{io, thread};

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::Cluster;
use skein_lab::load::capture::Capture;
use skein_lab::{Family, Lab, Netns, Plan, Task, checks};

/// Payload of the probes, which is absent from encrypted datagrams.
pub(super) const MARK: &[u8] = b"probe of the plaintext tests";

pub(super) const PORT: u16 = 7009;

pub(super) const GATEWAY: u8 = 254;

/// Maximum number of probes up to the first refusal, one probe per millisecond.
pub(super) const MAX_UNREFUSED_PROBES: u32 = 450;

/// Probes of each sender before a change, and after the change: enough for the repair of it.
pub(super) const PROBES_BEFORE: u32 = 150;

pub(super) const PROBES_AFTER: u32 = 700;

/// Pause after which the kernel reports the next refusal to a sender, with a margin. An ICMP error
/// costs one second in the limit net.ipv4.route.error_cost, and one in net.ipv4.icmp_ratelimit.
pub(super) const ICMP_INTERVAL: Duration = Duration::from_millis(2500);

/// Address blocks of the laboratory's pods.
pub(super) const CLUSTER: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];

pub(super) struct Scene {
    pub(super) cluster: Cluster,
    pub(super) _gateway: Netns,
}

impl Scene {
    /// Three nodes with two pods each and a default route; `cluster_cidrs` are configured or not.
    pub(super) fn prepare(cluster_cidrs: bool) -> Result<Self> {
        let lab = Lab::new(&Plan { nodes: 3, pods: 2, ..Plan::default() })?;
        let gateway = lab.attach("gateway", GATEWAY)?;
        for node in &lab.nodes {
            node.ns.ip(&format!("route add default via 192.0.2.{GATEWAY}"))?;
            node.ns.ip(&format!("route add default via 2001:db8::{GATEWAY:x}"))?;
        }
        let mut cluster = Cluster::prepare(lab, Family::V4)?;
        if cluster_cidrs {
            let cidrs = CLUSTER.map(|cidr| toml::Value::from(cidr.to_owned()));
            cluster.agents.iter_mut().for_each(|agent| agent.set("cluster_cidrs", cidrs.to_vec()));
        }
        Ok(Self { cluster, _gateway: gateway })
    }

    pub(super) fn up(cluster_cidrs: bool) -> Result<Self> {
        let mut scene = Self::prepare(cluster_cidrs)?;
        scene.cluster.start()?;
        checks::all_reach_all(&scene.cluster.lab)?;
        // The gateway's hardware address is configured, so that even the first packet would leave
        // at once.
        for node in &scene.cluster.lab.nodes {
            node.ns.sh(&format!("ping -c 1 -W 2 192.0.2.{GATEWAY}"))?;
            node.ns.sh(&format!("ping -c 1 -W 2 2001:db8::{GATEWAY:x}"))?;
        }
        Ok(scene)
    }

    pub(super) fn ns(&self, node: usize) -> &Netns {
        &self.cluster.lab.nodes[node].ns
    }

    /// Sends probes from node a and from its first pod to `to`, while `change` runs. Fails if a
    /// probe appears on the underlay. Returns the refusals that the senders received.
    pub(super) fn nothing_in_clear(
        &mut self,
        what: &str,
        to: &[IpAddr],
        change: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<Vec<Sent>> {
        let capture = Capture::start(self.cluster.lab.switch()?)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (mut tasks, mut counts) = (Vec::new(), Vec::new());
        for &to in to {
            for (sender, ns) in [("pod", &self.cluster.lab.pod(0).ns), ("node", self.ns(0))] {
                let name = format!("{what}: {sender} to {to}");
                let probes = Arc::new(AtomicU32::new(0));
                tasks.push(probe(ns, name, to, Arc::clone(&stop), Arc::clone(&probes)));
                counts.push(probes);
            }
        }
        let more = |number: u32| {
            let count = |probes: &Arc<AtomicU32>| probes.load(Ordering::Relaxed);
            let goals: Vec<_> = counts.iter().map(|probes| count(probes) + number).collect();
            checks::eventually("every sender sends probes", checks::EVENT_TIMEOUT, || {
                Ok(counts.iter().zip(&goals).all(|(probes, goal)| count(probes) >= *goal))
            })
        };
        let began = more(PROBES_BEFORE);
        let changed = change(self).with_context(|| what.to_owned());
        let ended = more(PROBES_AFTER);
        stop.store(true, Ordering::Relaxed);
        let sent = tasks.into_iter().map(Task::join).collect::<Result<Vec<_>>>()?;
        let frames = capture.stop()?;
        began.and(ended)?;
        changed?;
        let clear: Vec<_> = frames.iter().filter(|frame| frame.contains(MARK)).collect();
        println!("{what}: {} packets in clear; {sent:?}", clear.len());
        ensure!(frames.len() > 10 || clear.is_empty(), "{what}: the capture saw nothing at all");
        ensure!(
            clear.is_empty(),
            "{what}: {} packets in clear, the first to {:?}: {sent:?}",
            clear.len(),
            clear[0].destination()
        );
        Ok(sent)
    }

    /// Sends probes to addresses without an owner and without a change: every sender must receive a
    /// refusal at once.
    pub(super) fn refused(&mut self, what: &str, to: &[IpAddr]) -> Result<()> {
        // The kernel limits ICMP errors by sender; earlier probes may have used the limit up.
        thread::sleep(ICMP_INTERVAL);
        for sent in self.nothing_in_clear(what, to, |_| Ok(()))? {
            let first = sent.refusal.with_context(|| format!("no refusal arrived: {sent:?}"))?;
            ensure!(first <= MAX_UNREFUSED_PROBES, "The refusal arrived late: {sent:?}");
        }
        Ok(())
    }

    /// The first pod of a node, in both families.
    pub(super) fn pod(&self, node: usize) -> Vec<IpAddr> {
        Family::BOTH.map(|family| self.cluster.lab.pod(node).address(family)).into()
    }
}

/// An address of a node's pod CIDRs that no pod has, in both families.
pub(super) fn unused(node: u8) -> [IpAddr; 2] {
    let number = node + 1;
    [
        format!("10.244.{number}.200").parse().expect("an address"),
        format!("fd00:10:244:{number:x}::200").parse().expect("an address"),
    ]
}

#[derive(Debug)]
#[allow(dead_code, reason = "the name is for the messages of failures")]
pub(super) struct Sent {
    pub(super) name: String,
    pub(super) probes: u32,
    /// Number of the probe that received the first refusal.
    pub(super) refusal: Option<u32>,
}

pub(super) fn probe(
    ns: &Netns,
    name: String,
    to: IpAddr,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU32>,
) -> Task<Sent> {
    let any: SocketAddr = match to {
        IpAddr::V4(_) => ([0; 4], 0).into(),
        IpAddr::V6(_) => ([0_u16; 8], 0).into(),
    };
    ns.spawn(move || {
        let socket = UdpSocket::bind(any)?;
        report_refusals(&socket, to)?;
        let mut sent = Sent { name, probes: 0, refusal: None };
        while !stop.load(Ordering::Relaxed) {
            // The route is looked up with every connect; a refusal by ICMP comes with the next
            // send.
            let result = socket.connect((to, PORT)).and_then(|()| socket.send(MARK));
            sent.probes += 1;
            count.store(sent.probes, Ordering::Relaxed);
            if result.is_err_and(|error| is_refusal(&error)) && sent.refusal.is_none() {
                sent.refusal = Some(sent.probes);
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(sent)
    })
}

/// Makes the kernel report every ICMP error, not only those that it considers final (IP_RECVERR,
/// ip(7)).
pub(super) fn report_refusals(socket: &UdpSocket, to: IpAddr) -> Result<()> {
    let (level, option) = match to {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_RECVERR),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    };
    let on: libc::c_int = 1;
    // SAFETY: the pointer is to an int that lives until the call returns, and its length is given.
    let code = unsafe {
        let length = size_of_val(&on) as libc::socklen_t;
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), length)
    };
    ensure!(code == 0, "setting IP_RECVERR: {}", io::Error::last_os_error());
    Ok(())
}

pub(super) fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable)
}

/// Waits until the first pods of nodes a and b reach each other again.
pub(super) fn repaired(cluster: &Cluster) -> Result<()> {
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    for family in Family::BOTH {
        checks::wait_until_reached(a, b, family, Duration::from_secs(10))?;
    }
    Ok(())
}

pub(super) fn remove_record(cluster: &Cluster, name: &str) -> Result<()> {
    cluster.agents.iter().try_for_each(|agent| agent.remove_record(name))
}
