//! Notice when somebody changes the interface, its addresses or its routes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::StreamExt;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::NetlinkError;
use super::route::PROTOCOL;

/// Listens to the kernel's announcements about one interface.
#[derive(Debug)]
pub struct Monitor {
    index: Arc<AtomicU32>,
    changed: Arc<Notify>,
    tasks: [JoinHandle<()>; 2],
}

impl Monitor {
    /// Subscribes. The kernel loses announcements when it has many: look again from time to time too.
    pub fn start(name: &str) -> Result<Self, NetlinkError> {
        let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])
        .map_err(|source| NetlinkError { what: "subscribe to rtnetlink".to_owned(), source })?;
        let index = Arc::new(AtomicU32::new(0));
        let changed = Arc::new(Notify::new());
        let (seen, notify, name) = (Arc::clone(&index), Arc::clone(&changed), name.to_owned());
        let filter = async move {
            while let Some((message, _)) = messages.next().await {
                if let NetlinkPayload::InnerMessage(message) = message.payload
                    && concerns(&message, &name, seen.load(Ordering::Relaxed))
                {
                    notify.notify_one();
                }
            }
        };
        Ok(Self { index, changed, tasks: [tokio::spawn(connection), tokio::spawn(filter)] })
    }

    /// Tells which interface is meant now.
    pub fn set_index(&self, index: u32) {
        self.index.store(index, Ordering::Relaxed);
    }

    /// Waits until something has been announced since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn concerns(message: &RouteNetlinkMessage, name: &str, index: u32) -> bool {
    match message {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            let named = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::IfName(other) if other == name);
            link.header.index == index || link.attributes.iter().any(named)
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            address.header.index == index
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            ours(route, index)
        }
        _ => false,
    }
}

fn ours(route: &RouteMessage, index: u32) -> bool {
    route.header.protocol == RouteProtocol::Other(PROTOCOL)
        && route.attributes.contains(&RouteAttribute::Oif(index))
}
