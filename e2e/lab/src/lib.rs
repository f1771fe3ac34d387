//! The laboratory: machines, pods and links as network namespaces of this host. Nothing is ever
//! made in the host's own namespace.
//!
//! [`load`] has the traffic between pods, [`checks`] what tests require of it. [`packages`],
//! [`programs`] and [`newer`] get programs of other projects; [`cargo`] and [`skein_image`] build
//! Skein. Needs root.

pub mod agent;
pub mod browser;
pub mod cargo;
pub mod cgroup;
pub mod chart;
pub mod checks;
mod cluster;
pub mod cni;
pub mod console;
pub mod containerd;
pub mod cri;
pub mod elf;
pub mod image;
pub mod instance;
pub mod link;
pub mod load;
mod metrics;
pub mod netns;
pub mod newer;
pub mod node;
pub mod packages;
pub mod pods;
pub mod process;
pub mod programs;
mod record;
pub mod registry;
pub mod relay;
pub mod skein_image;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

pub use link::Offloads;
pub use netns::{Netns, Task};
pub use node::{Node, Pod, UNDERLAY};

/// Address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// How the nodes are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underlay {
    /// Two nodes by one veth pair.
    Direct,
    /// Any number by a bridge in a namespace of its own, where a test can listen, send, and cut.
    Switch,
}

/// What to build.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Number of nodes.
    pub nodes: u8,
    /// Pods on each.
    pub pods: u8,
    /// How the nodes are joined.
    pub underlay: Underlay,
    /// What the nodes' underlay interfaces can do.
    pub offloads: Offloads,
    /// MTU of the underlay in bytes.
    pub mtu: u32,
    /// MTU of the pods in bytes.
    pub pod_mtu: u32,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            nodes: 2,
            pods: 1,
            underlay: Underlay::Switch,
            offloads: Offloads::Ideal,
            mtu: 1500,
            pod_mtu: 1420,
        }
    }
}

/// Namespaces for nodes and pods, gone when dropped. One exists at a time on a machine, so that
/// tests do not disturb each other's timing.
#[derive(Debug)]
pub struct Lab {
    /// The nodes.
    pub nodes: Vec<Node>,
    /// The switch, unless the underlay is [`Underlay::Direct`].
    pub switch: Option<Netns>,
    directory: PathBuf,
    _turn: Option<Turn>,
}

impl Lab {
    /// Builds it; waits for its turn first.
    pub fn new(plan: &Plan) -> Result<Self> {
        Self::build(plan, true)
    }

    /// Builds one that does without a turn: for what takes long and does not mind who else is at work.
    pub fn without_turn(plan: &Plan) -> Result<Self> {
        Self::build(plan, false)
    }

    fn build(plan: &Plan, takes_turn: bool) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("making network namespaces needs root: run this as root, for example with sudo");
        }
        let turn = takes_turn.then(Turn::take).transpose()?;
        let directory = registry::directory("lab")?;
        let mut lab = Self { nodes: vec![], switch: None, directory, _turn: turn };
        for index in 0..plan.nodes {
            lab.nodes.push(Node::create(index)?);
        }
        match plan.underlay {
            Underlay::Direct => lab.join_directly(plan)?,
            Underlay::Switch => lab.join_by_switch(plan)?,
        }
        for node in &mut lab.nodes {
            link::set_offloads(&node.ns, UNDERLAY, plan.offloads)?;
            node.address_underlay()?;
            for _ in 0..plan.pods {
                node.add_pod(plan.pod_mtu)?;
            }
        }
        Ok(lab)
    }

    fn join_directly(&self, plan: &Plan) -> Result<()> {
        let [a, b] = &self.nodes[..] else { bail!("a direct underlay joins exactly two nodes") };
        link::veth((&a.ns, UNDERLAY), (&b.ns, UNDERLAY), plan.mtu)
    }

    fn join_by_switch(&mut self, plan: &Plan) -> Result<()> {
        let switch = self.switch.insert(Netns::create("switch")?);
        link::bridge(switch, "br0")?;
        for node in &self.nodes {
            let port = node.port();
            link::veth((&node.ns, UNDERLAY), (switch, &port), plan.mtu)?;
            link::enslave(switch, &port, "br0")?;
        }
        Ok(())
    }

    /// A directory for files, gone with the laboratory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The first pod of node `index`.
    pub fn pod(&self, index: usize) -> &Pod {
        &self.nodes[index].pods[0]
    }

    /// The switch; an error where the nodes are joined directly.
    pub fn switch(&self) -> Result<&Netns> {
        self.switch.as_ref().context("this laboratory has no switch")
    }

    /// A further machine on the switch, with the addresses 192.0.2.`number` and 2001:db8::`number`
    /// (in hexadecimal) on its `eth0`.
    pub fn attach(&self, label: &str, number: u8) -> Result<Netns> {
        let (switch, port) = (self.switch()?, format!("extra{number}"));
        let machine = Netns::create(label)?;
        link::veth((&machine, UNDERLAY), (switch, &port), 1500)?;
        link::enslave(switch, &port, "br0")?;
        machine.ip_batch(&[
            format!("address add 192.0.2.{number}/24 dev {UNDERLAY}"),
            format!("address add 2001:db8::{number:x}/64 dev {UNDERLAY} nodad"),
        ])?;
        Ok(machine)
    }

    /// Takes the node's cable out of the switch, or puts it in again. The node sees the loss of
    /// carrier and keeps its addresses.
    pub fn set_cable(&self, node: usize, plugged: bool) -> Result<()> {
        let state = if plugged { "up" } else { "down" };
        self.switch()?.ip(&format!("link set {} {state}", self.nodes[node].port())).map(drop)
    }
}

impl Node {
    /// The switch's interface for this node.
    pub fn port(&self) -> String {
        format!("port{}", self.index)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.nodes.clear();
        self.switch = None;
        registry::remove_directory(&self.directory);
    }
}

/// How long another laboratory may take before this one gives up: less than the test that waits
/// may take (ten minutes), so that it can say why.
pub const TURN_TIMEOUT: Duration = Duration::from_secs(8 * 60);

/// Environment variable with the number of laboratories that may exist at the same time.
pub const LABORATORIES_VARIABLE: &str = "SKEIN_LABORATORIES";

/// One of the places for a laboratory, held by a lock on a file. A process that may not have
/// company holds all places.
#[derive(Debug)]
pub struct Turn(#[allow(dead_code, reason = "holds the locks until dropped")] Vec<File>);

/// Number of lock files, the limit of [`LABORATORIES_VARIABLE`].
const MAX_LABORATORIES: usize = 16;

impl Turn {
    /// Waits for a place: one of the first [`LABORATORIES_VARIABLE`], or all places if that is 1 or not set.
    ///
    /// # Errors
    ///
    /// Returns an error if other laboratories hold the places for [`TURN_TIMEOUT`], or if a lock file
    /// cannot be used.
    pub fn take() -> Result<Self> {
        let places = std::env::var(LABORATORIES_VARIABLE).ok().and_then(|text| text.parse().ok());
        let places = places.unwrap_or(1).clamp(1, MAX_LABORATORIES);
        let start = Instant::now();
        let mut notified = false;
        loop {
            if let Some(turn) = Self::try_take(places)? {
                return Ok(turn);
            }
            if start.elapsed() > TURN_TIMEOUT {
                bail!("another laboratory is at work and does not end");
            }
            if !notified {
                eprintln!("waiting for another laboratory to end");
                notified = true;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn try_take(places: usize) -> Result<Option<Self>> {
        let home = registry::home()?;
        let mut held = Vec::new();
        for index in 0..MAX_LABORATORIES {
            let path = home.join(format!("lock.{index}"));
            let file =
                File::create(&path).with_context(|| format!("creating {}", path.display()))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if places > 1 => return Ok(Some(Self(vec![file]))),
                Ok(()) => held.push(file),
                Err(Errno::WOULDBLOCK) if places > 1 && index + 1 < places => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => {
                    return Err(error).with_context(|| format!("locking {}", path.display()));
                }
            }
        }
        Ok(Some(Self(held)))
    }
}
