//! Notifications of the kernel about changes of the interface, its addresses, its routes, the
//! unreachable routes, the forwarding settings, and the underlay.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::connection::NetlinkError;
use super::netconf::Subscription;
use super::pod::HOST_PREFIX;
use super::route::PROTOCOL;
use super::unreachable::is_unreachable;

/// Delay after an error of the netlink socket that reports changed settings.
const SETTINGS_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Subscription to the kernel's notifications about one interface and the underlay.
#[derive(Debug)]
pub struct Monitor {
    /// Index of the overlay's interface; 0 before [`Monitor::set_index`].
    index: Arc<AtomicU32>,
    /// Notified of each change of the overlay.
    changed: Arc<Notify>,
    /// Notified of each change that may belong to the underlay.
    underlay: Arc<Notify>,
    tasks: [JoinHandle<()>; 3],
}

impl Monitor {
    /// Subscribes to rtnetlink notifications for links, addresses, routes and policy rules (IPv4
    /// and IPv6), and to changed settings. `name` is the overlay's interface. The kernel drops
    /// notifications under load, so the caller must also reconcile periodically.
    ///
    /// # Errors
    /// [`NetlinkError`] if a netlink socket cannot be opened or a multicast group cannot be joined.
    pub fn start(name: &str) -> Result<Self, NetlinkError> {
        let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            // Router advertisements change the IPv6 MTU of a link.
            MulticastGroup::Ipv6Ifinfo,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ])
        .map_err(|source| NetlinkError { what: "subscribe to rtnetlink".to_owned(), source })?;
        let index = Arc::new(AtomicU32::new(0));
        let changed = Arc::new(Notify::new());
        let underlay = Arc::new(Notify::new());
        let (seen, notify) = (Arc::clone(&index), Arc::clone(&changed));
        let settings = report_changed_settings(Subscription::new()?, seen, notify);
        let (seen, name) = (Arc::clone(&index), name.to_owned());
        let (notify, notify_underlay) = (Arc::clone(&changed), Arc::clone(&underlay));
        let filter = async move {
            while let Some((message, _)) = messages.next().await {
                let NetlinkPayload::InnerMessage(message) = message.payload else { continue };
                let index = seen.load(Ordering::Relaxed);
                if concerns_overlay(&message, &name, index) {
                    notify.notify_one();
                }
                if concerns_underlay(&message, &name, index) {
                    notify_underlay.notify_one();
                }
            }
        };
        let tasks = [tokio::spawn(connection), tokio::spawn(filter), tokio::spawn(settings)];
        Ok(Self { index, changed, underlay, tasks })
    }

    /// Sets the index of the overlay's interface.
    pub fn set_index(&self, index: u32) {
        self.index.store(index, Ordering::Relaxed);
    }

    /// Waits until a change of the overlay was reported since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Waits until the kernel has reported, since the last call, a change of a link, an address, a
    /// route or a policy rule that may belong to the underlay.
    pub async fn underlay_changed(&self) {
        self.underlay.notified().await;
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Reports changed settings while the monitor exists.
async fn report_changed_settings(
    mut changes: Subscription,
    index: Arc<AtomicU32>,
    notify: Arc<Notify>,
) {
    loop {
        match changes.concerns(|| index.load(Ordering::Relaxed)).await {
            Ok(true) => notify.notify_one(),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%error, "notifications of changed settings failed");
                tokio::time::sleep(SETTINGS_RETRY_DELAY).await;
            }
        }
    }
}

/// Returns whether the message concerns the overlay's interface, one of its addresses, or one of
/// Skein's routes through the interface or unreachable routes.
fn concerns_overlay(message: &RouteNetlinkMessage, name: &str, index: u32) -> bool {
    match message {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            let named = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::IfName(other) if other == name);
            link.header.index == index || link.attributes.iter().any(named)
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            address.header.index == index
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            is_overlay_route(route, index)
        }
        _ => false,
    }
}

/// Returns true unless the message concerns the overlay's interface, a pod's interface, or a route
/// of Skein.
fn concerns_underlay(message: &RouteNetlinkMessage, overlay: &str, index: u32) -> bool {
    match message {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            let ours = |attribute: &LinkAttribute| match attribute {
                LinkAttribute::IfName(name) => name == overlay || name.starts_with(HOST_PREFIX),
                _ => false,
            };
            link.header.index != index && !link.attributes.iter().any(ours)
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            address.header.index != index
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            route.header.protocol != RouteProtocol::Other(PROTOCOL)
        }
        RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => true,
        _ => false,
    }
}

/// Returns whether the route is Skein's and leads through the interface with `index`, or is one of
/// Skein's unreachable routes.
fn is_overlay_route(route: &RouteMessage, index: u32) -> bool {
    route.header.protocol == RouteProtocol::Other(PROTOCOL)
        && (route.attributes.contains(&RouteAttribute::Oif(index)) || is_unreachable(route))
}

#[cfg(test)]
mod tests;
