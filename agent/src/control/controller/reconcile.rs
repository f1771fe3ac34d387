//! Reconciliation of the interface and its routes, and publication of the outcome.

use skein_netlink::InterfaceError;
use skein_netlink::NetlinkError;
use skein_netlink::interface::{InterfaceSpec, Present, RouteConflict};
use skein_netlink::link::Link;

use super::Controller;
use crate::control::border::{firewall_rules, networks};
use crate::control::logs::{abridged, log_changes};
use crate::status::InterfaceStatus;

impl Controller {
    /// Reconciles interface, addresses and routes with the desired state; creates a deleted
    /// interface again. Problems are logged once and make the agent unready.
    pub(super) async fn reconcile(&mut self) {
        if !self.started {
            return;
        }
        let wanted = self.desired.interface(&self.config, &self.reduced_paths);
        // The unreachable route to a prefix is added before the first route to it, and stays when
        // that route is gone.
        let mut problems = self.ensure_unreachable_routes().await;
        if let Err(error) = self.ensure_interface(&wanted, &mut problems).await {
            problems.push(error.to_string());
        }
        for problem in problems.iter().filter(|new| !self.logged_problems.contains(new)) {
            tracing::error!(interface = wanted.name, "{problem}");
        }
        self.not_ready = match problems.is_empty() {
            true => None,
            false => {
                let reason = format!("interface {}: {}", wanted.name, problems.join("; "));
                Some(self.published.readiness.block(reason))
            }
        };
        self.logged_problems = problems;
    }

    /// Reads the node's interfaces and addresses, updates `self.networks`, and configures the
    /// interface. Problems of the interface are added to `problems`.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel does not list its links or addresses.
    pub(super) async fn ensure_interface(
        &mut self,
        wanted: &InterfaceSpec,
        problems: &mut Vec<String>,
    ) -> Result<(), NetlinkError> {
        let links = self.netlink.links().await?;
        let device = self.device(wanted, &links).await;
        let addresses = self.netlink.addresses(None).await?;
        let networks = networks(&links, &addresses, &self.config);
        if networks != self.networks {
            self.networks = networks;
            self.propagate();
        }
        if let Err(error) = device {
            problems.push(error.to_string());
            return Ok(());
        }
        let outcome = wanted.configure(&self.netlink, self.interface.index, &addresses).await;
        if !outcome.changes.is_empty() {
            tracing::info!(
                interface = wanted.name,
                "interface configured: {}",
                abridged(&outcome.changes)
            );
        }
        problems.extend(outcome.errors);
        self.set_conflicts(outcome.conflicts);
        Ok(())
    }

    /// Stores the peers' prefixes to which another program has a route. The conflict concerns only
    /// these peers: this node stays ready.
    pub(super) fn set_conflicts(&mut self, found: Vec<RouteConflict>) {
        let conflicts = self.desired.conflicts(found);
        for new in conflicts.iter().filter(|new| !self.conflicts.contains(new)) {
            tracing::error!(peer = new.peer, prefix = %new.prefix, "{}", new.problem);
        }
        if self.conflicts != conflicts {
            self.conflicts = conflicts;
            self.propagate();
        }
    }

    /// Adds and removes unreachable routes until they match `self.desired`; returns the errors.
    pub(super) async fn ensure_unreachable_routes(&mut self) -> Vec<String> {
        let before = std::mem::replace(&mut self.unreachable, self.desired.unreachable.clone());
        let (wanted, alias) = (&self.unreachable, self.config.alias());
        let outcome = self.netlink.ensure_unreachable_routes(wanted, &before, &alias).await;
        log_changes(&outcome);
        outcome.errors
    }

    /// Creates the interface unless it exists. A new interface is published to the data process.
    ///
    /// # Errors
    /// [`InterfaceError`] if the name belongs to another owner, or if the device cannot be created.
    pub(super) async fn device(
        &mut self,
        wanted: &InterfaceSpec,
        links: &[Link],
    ) -> Result<(), InterfaceError> {
        let present = wanted.ensure_device(&self.netlink, links).await?;
        if present.index != self.interface.index {
            tracing::warn!(interface = wanted.name, "interface was deleted, created again");
            let created = self.interface.created || present.created;
            self.interface = Present { created, ..present };
            self.monitor.set_index(present.index);
            self.publish_snapshot();
            self.propagate();
        }
        Ok(())
    }

    /// Passes the desired state to the firewall, the pods and the status.
    pub(super) fn propagate(&mut self) {
        let rules = firewall_rules(&self.config, &self.desired, &self.networks, &self.source_ports);
        self.firewall.set_rules(rules);
        if let Some(policy) = &self.policy {
            policy.set_networks(self.desired.pod_networks());
        }
        if let Some(pods) = &self.pods {
            pods.set_network(self.desired.network(&self.config));
        }
        self.published.node.set_registry(self.registry.status());
        let wanted = self.desired.interface(&self.config, &self.reduced_paths);
        self.published.node.set_interface(InterfaceStatus {
            name: wanted.name,
            index: self.interface.index,
            mtu: self.desired.mtu,
            mtu_problem: self.desired.mtu_problem.clone(),
            addresses: wanted.addresses,
            routes: wanted.routes,
            local_cidrs: self.desired.local_cidrs.clone(),
            conflicts: self.conflicts.clone(),
        });
    }
}
