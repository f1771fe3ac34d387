//! Helpers of the tests with pods that the CNI plugin attached.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use skein_lab::agent::Cluster;
use skein_lab::{Family, Netns, Pod, checks};

/// Checks that a pod reaches another over both families.
pub(super) fn reach(a: &Pod, b: &Pod) -> Result<()> {
    for family in Family::BOTH {
        checks::reaches(a, b, family).with_context(|| format!("{family}"))?;
    }
    Ok(())
}

/// Attaches a machine to the underlay that is not a node and routes the pod CIDRs of the first node
/// to that node. [`outside_address`] returns its address.
pub(super) fn outside(cluster: &Cluster) -> Result<Netns> {
    let machine = cluster.lab.attach("outside", 77)?;
    let node = &cluster.lab.nodes[0];
    for family in Family::BOTH {
        let (cidr, by) = (node.pod_cidr(family), node.underlay(family));
        machine.ip(&format!("route add {cidr} via {by}"))?;
    }
    Ok(machine)
}

pub(super) fn outside_address(family: Family) -> Result<IpAddr> {
    Ok(match family {
        Family::V4 => IpAddr::from([192, 0, 2, 77]),
        Family::V6 => "2001:db8::4d".parse()?,
    })
}
