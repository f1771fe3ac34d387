//! The laboratory: machines, pods and links as network namespaces of this host. Nothing is created
//! in the host's own network namespace. Needs root.
//!
//! [`load`] sends and measures traffic between pods, [`checks`] requires that traffic arrives.
//! [`packages`], [`programs`] and [`newer`] get programs of other projects; [`cargo`] and
//! [`skein_image`] build Skein.

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
pub mod elf;
pub mod files;
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

/// Address family of the Internet Protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Internet Protocol version 4.
    V4,
    /// Internet Protocol version 6.
    V6,
}

impl Family {
    /// Both families, IPv4 first.
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

/// Topology of the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underlay {
    /// A veth pair between two nodes.
    Direct,
    /// A bridge in a namespace of its own that joins any number of nodes. A test can capture and
    /// send frames there, and unplug nodes.
    Switch,
}

/// Plan of a laboratory: number and properties of nodes and pods.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Number of nodes.
    pub nodes: u8,
    /// Number of pods per node.
    pub pods: u8,
    /// Topology of the underlay.
    pub underlay: Underlay,
    /// Offloads of the nodes' underlay interfaces.
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

/// Network namespaces of nodes, pods and the switch, which exist as long as the value. Unless
/// [`LABORATORIES_VARIABLE`] allows more, a host has one laboratory at a time ([`LabPermit`]), so
/// that tests do not disturb each other's timing.
#[derive(Debug)]
pub struct Lab {
    /// Nodes in the order of their index.
    pub nodes: Vec<Node>,
    /// Namespace of the switch; `None` if the underlay is [`Underlay::Direct`].
    pub switch: Option<Netns>,
    directory: PathBuf,
    _permit: Option<LabPermit>,
}

impl Lab {
    /// Waits for a permit ([`LabPermit::acquire`]) and builds a laboratory.
    ///
    /// # Errors
    /// If the process does not run as root, if there is no permit within [`PERMIT_TIMEOUT`],
    /// or if a namespace, link or address cannot be created.
    pub fn new(plan: &Plan) -> Result<Self> {
        Self::build(plan, true)
    }

    /// Builds a laboratory without a permit, for long runs whose results do not depend on other
    /// laboratories.
    ///
    /// # Errors
    /// If the process does not run as root, or if a namespace, link or address cannot be created.
    pub fn without_permit(plan: &Plan) -> Result<Self> {
        Self::build(plan, false)
    }

    fn build(plan: &Plan, needs_permit: bool) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!(
                "creating network namespaces needs root. Run this as root, for example with sudo."
            );
        }
        let permit = needs_permit.then(LabPermit::acquire).transpose()?;
        let directory = registry::directory("lab")?;
        let mut lab = Self { nodes: vec![], switch: None, directory, _permit: permit };
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
        let [a, b] = &self.nodes[..] else { bail!("a direct underlay has exactly two nodes") };
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

    /// Returns the directory for files of the laboratory, which is removed together with it.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the first pod of node `index`.
    ///
    /// # Panics
    /// If there is no such node, or if it has no pod.
    pub fn pod(&self, index: usize) -> &Pod {
        &self.nodes[index].pods[0]
    }

    /// Returns the namespace of the switch.
    ///
    /// # Errors
    /// If the underlay is [`Underlay::Direct`].
    pub fn switch(&self) -> Result<&Netns> {
        self.switch.as_ref().context("this laboratory has no switch")
    }

    /// Adds a machine to the switch, with the addresses 192.0.2.`number` and 2001:db8::`number`
    /// (hexadecimal) on its `eth0`.
    ///
    /// # Errors
    /// If there is no switch, or if the namespace or its link cannot be created.
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

    /// Plugs or unplugs the node's cable at the switch. An unplugged node loses the carrier and
    /// keeps its addresses.
    ///
    /// # Errors
    /// If there is no switch, or if `ip` fails.
    pub fn set_cable(&self, node: usize, plugged: bool) -> Result<()> {
        let state = if plugged { "up" } else { "down" };
        self.switch()?.ip(&format!("link set {} {state}", self.nodes[node].port())).map(drop)
    }
}

impl Node {
    /// Returns the name of the switch's interface for this node.
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

/// Maximum time to wait for other laboratories. It is less than the ten minutes that a test may
/// take, so that the test fails with a message.
pub const PERMIT_TIMEOUT: Duration = Duration::from_secs(8 * 60);

/// Environment variable with the number of laboratories that may exist at the same time.
pub const LABORATORIES_VARIABLE: &str = "SKEIN_LABORATORIES";

/// A permit for a laboratory, held by locks on files. If several laboratories may exist at the same
/// time, the permit holds the lock of one file. If only one laboratory may exist, the permit holds
/// the locks of all files.
#[derive(Debug)]
pub struct LabPermit(#[allow(dead_code, reason = "holds the locks until dropped")] Vec<File>);

/// Number of lock files, the limit of [`LABORATORIES_VARIABLE`].
const MAX_LABORATORIES: usize = 16;

impl LabPermit {
    /// Waits for a permit. If the variable [`LABORATORIES_VARIABLE`] is a number *n* from 2 to 16,
    /// the permit is one of *n* permits. Otherwise the permit excludes all other laboratories.
    ///
    /// # Errors
    ///
    /// Returns an error if other laboratories hold the permits for [`PERMIT_TIMEOUT`], or if a lock
    /// file cannot be used.
    pub fn acquire() -> Result<Self> {
        let places = std::env::var(LABORATORIES_VARIABLE).ok().and_then(|text| text.parse().ok());
        let places = places.unwrap_or(1).clamp(1, MAX_LABORATORIES);
        let start = Instant::now();
        let mut notified = false;
        loop {
            if let Some(permit) = Self::try_acquire(places)? {
                return Ok(permit);
            }
            if start.elapsed() > PERMIT_TIMEOUT {
                bail!("another laboratory did not end within {} s", PERMIT_TIMEOUT.as_secs());
            }
            if !notified {
                eprintln!("waiting until another laboratory ends");
                notified = true;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn try_acquire(places: usize) -> Result<Option<Self>> {
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
