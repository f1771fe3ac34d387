//! Monitor of the underlay's MTU. Checks the MTU at start, when endpoints of nodes change, after
//! notifications of the kernel, and at least every 60 s.

use std::fmt;
use std::time::Duration;

use skein_netlink::underlay::{ETHERNET_MTU, Underlay, UnderlayMtu};
use skein_netlink::{Netlink, NetlinkError};
use tokio::time::Instant;

use super::desired::Desired;
use super::registry::Registry;
use crate::config::Config;

/// Delay between a notification of the kernel and the check, so that one check covers several
/// notifications.
const CHECK_DELAY: Duration = Duration::from_millis(100);
/// Minimum interval between two checks, because a routing daemon may change thousands of routes.
const MIN_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum interval between two checks, because the kernel drops notifications under load.
const MAX_CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// The MTU of the underlay, and the time of the next check.
#[derive(Debug, Default)]
pub(super) struct UnderlayWatch {
    /// Input of the last check.
    asked: Option<Underlay>,
    found: Option<UnderlayMtu>,
    checked: Option<Instant>,
    due: Option<Instant>,
    /// True after the warning that no device was found was logged.
    warned: bool,
}

impl UnderlayWatch {
    /// Returns the last known MTU in bytes; 1500 (Ethernet) before the first result.
    pub(super) fn mtu(&self) -> u32 {
        self.found.as_ref().map_or(ETHERNET_MTU, |found| found.mtu)
    }

    /// Returns the desired state of this node, whose MTU follows from the underlay. If the MTU is
    /// too small, the problem names the device with the smallest MTU.
    pub(super) fn desired(&self, config: &Config, registry: &Registry) -> Desired {
        let mut desired = Desired::new(config, registry, self.mtu());
        if let Some(problem) = desired.mtu_problem.as_mut().filter(|_| self.checked.is_some()) {
            *problem += &format!(" (underlay: {self})");
        }
        desired
    }

    /// Makes a check due after a notification of the kernel.
    pub(super) fn changed(&mut self) {
        let earliest = self.checked.map(|checked| checked + MIN_CHECK_INTERVAL);
        self.due = earliest.max(Some(Instant::now() + CHECK_DELAY));
    }

    /// Makes a check due after a change of the node records if endpoints differ.
    pub(super) fn records_changed(&mut self, config: &Config, registry: &Registry) {
        if self.asked.as_ref().is_some_and(|asked| *asked != underlay(config, registry)) {
            self.changed();
        }
    }

    /// Returns true while a check is due because of a notification.
    pub(super) fn is_due(&self) -> bool {
        self.due.is_some()
    }

    /// Returns the time of the next check; `None` if the configuration sets the overlay's MTU.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.due.or(self.checked.map(|checked| checked + MAX_CHECK_INTERVAL))
    }

    /// Reads the MTU from the kernel; returns true if it has changed. Keeps the previous MTU if no
    /// device leads to the peers now. Does nothing if the configuration sets the overlay's MTU.
    ///
    /// # Errors
    /// An error if the kernel does not list its links, addresses or routes. The MTU stays
    /// unchanged.
    pub(super) async fn check(
        &mut self,
        netlink: &Netlink,
        config: &Config,
        registry: &Registry,
    ) -> Result<bool, NetlinkError> {
        self.due = None;
        if config.interface.mtu.is_some() {
            return Ok(false);
        }
        self.checked = Some(Instant::now());
        let asked = self.asked.insert(underlay(config, registry));
        let found = netlink.underlay_mtu(asked).await?;
        if found.is_none() && !self.warned {
            tracing::warn!(
                mtu = self.mtu(),
                "no device leads to a peer and there is no default route, using this MTU of the underlay. \
                 Add a route to the peers, or set interface.mtu."
            );
        }
        self.warned = found.is_none();
        let before = self.mtu();
        self.found = found.or(self.found.take());
        Ok(self.mtu() != before)
    }
}

/// Returns the addresses of this node and its peers, from which the kernel finds the underlay's
/// devices.
fn underlay(config: &Config, registry: &Registry) -> Underlay {
    let peers = registry.peers().flat_map(|record| &record.endpoints);
    let own = registry.own().into_iter().flat_map(|record| &record.endpoints);
    Underlay {
        addresses: config.underlay.addresses.clone(),
        // An endpoint whose interface is absent carries no datagrams.
        peers: peers.filter_map(|endpoint| endpoint.on_this_host().ok()).collect(),
        own: own.filter_map(|endpoint| endpoint.on_this_host().ok()).collect(),
        overlay: config.interface.name.clone(),
    }
}

impl fmt::Display for UnderlayWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.found {
            Some(UnderlayMtu { mtu, interface }) => write!(f, "{interface}, {mtu} bytes"),
            None => write!(f, "assumed, {ETHERNET_MTU} bytes"),
        }
    }
}
