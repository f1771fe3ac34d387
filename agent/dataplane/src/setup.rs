//! Set-up of a data plane: opens and probes the descriptors that the settings demand, and builds
//! the lanes. After an error, all descriptors are closed.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use skein_core::offload::coalesce::CoalesceConfig;
use skein_core::tunnel::Ciphers;
use skein_ipc::{
    Capability, CapabilityName, CapabilityState, CipherChoice, HANDOVER_VERSION, NodeSettings,
    OffloadSettings,
};
use skein_sys::fallback::{Fallback, Feature};
use skein_sys::send::{GsoState, TooLong};
use skein_sys::tun::{self, OpenQueues, TunOffload, TunQueue};
use skein_sys::udp::{self, LongestPayload, UdpOptions};

use super::capabilities::{capabilities, with_ecn};
use super::channel::KeeperChannel;
use super::error::SetupError;
use super::handover::{self, Family, FamilySockets, HandOver};
use super::lane::{LaneHandle, LaneParts, TunReplacement};
use super::queue::ToManagerQueue;
use super::tables::TablesHandle;
use super::tap::Tap;

/// Handles of a data plane to the rest of its process and to the keeper.
#[derive(Clone)]
pub(super) struct ProcessHandles {
    pub(super) to_manager: ToManagerQueue,
    pub(super) tap: Arc<Tap>,
    /// Channel to the keeper; `None` if no process continues with the descriptors after this
    /// process.
    pub(super) keeper: Option<Arc<KeeperChannel>>,
}

impl ProcessHandles {
    fn open_queues(&self, node: &NodeSettings) -> Result<OpenQueues, SetupError> {
        let (name, allowed) = (&node.tun.name, allowed(node.offload));
        match &self.keeper {
            Some(keeper) => keeper.open_queues(name, node.lanes, allowed),
            None => Ok(tun::open_queues(name, node.lanes.into(), allowed)?),
        }
    }
}

/// Open descriptors, and the kernel's capabilities for them.
struct OpenedDescriptors {
    queues: Vec<TunQueue>,
    sockets: Vec<FamilySockets>,
    offload: TunOffload,
    gso: bool,
    capabilities: Vec<Capability>,
    generation: u32,
}

/// Lanes of a data plane, and the manager's sockets for handshakes.
pub(super) struct Running {
    /// Running lanes in the order of their index; empty before [`Running::start_lanes`] and after
    /// [`Running::stop`].
    pub(super) lanes: Vec<LaneHandle>,
    /// States of the offload capabilities.
    pub(super) capabilities: Vec<Capability>,
    /// Lanes that are not started yet.
    parts: Vec<LaneParts>,
    manager_sockets: Vec<(bool, UdpSocket)>,
    /// Ports of all UDP sockets, in ascending order without duplicates.
    pub(super) source_ports: Vec<u16>,
    /// Duplicates of the descriptors of lanes and manager, for the keeper.
    copies: Vec<OwnedFd>,
    families: Vec<Family>,
    /// Number of lanes, independent of whether they run.
    lane_count: usize,
    offload: TunOffload,
    gso: bool,
    handles: ProcessHandles,
    /// Number of times that the TUN device was replaced. Messages of lanes about an earlier device
    /// are ignored.
    pub(super) generation: u32,
}

impl Running {
    /// Opens the queues of the TUN device and the UDP sockets, and probes the offloads.
    ///
    /// # Errors
    /// [`SetupError::Invalid`] if the number of lanes or an address is invalid, or if datagrams
    /// cannot be steered to several lanes; otherwise the error of the device or a socket.
    pub(super) fn open(
        node: &NodeSettings,
        published: &Arc<TablesHandle>,
        handles: &ProcessHandles,
    ) -> Result<Self, SetupError> {
        if !(1..=64).contains(&node.lanes) {
            return Err(SetupError::Invalid(format!("lanes is {}, expected 1 to 64", node.lanes)));
        }
        let addresses = validated_addresses(&node.underlay.addresses)?;
        let lanes = usize::from(node.lanes);
        let OpenQueues { queues, offload, mut fallbacks } = handles.open_queues(node)?;
        let options = UdpOptions {
            receive_buffer: node.underlay.receive_buffer,
            send_buffer: node.underlay.send_buffer,
            gro: node.offload.udp_gro,
            ecn: node.offload.udp_ecn,
        };
        let mut sockets = Vec::new();
        for address in addresses {
            let socket_address = SocketAddr::new(address, node.underlay.port);
            let (pairs, more) = udp::bind_lanes(socket_address, lanes, &options)?;
            let mut missing = more.iter();
            if let Some(steering) = missing.find(|m| m.feature == Feature::ReuseportSteering)
                && lanes > 1
            {
                return Err(SetupError::Invalid(format!(
                    "datagrams cannot be steered to their lanes ({}). Set dataplane.lanes to 1.",
                    steering.reason
                )));
            }
            fallbacks.extend(more);
            let manager = udp::bind_manager(socket_address, &options)?;
            sockets.push(FamilySockets { v4: address.is_ipv4(), lanes: pairs, manager });
        }
        let mut gso = node.offload.udp_gso;
        if gso && let Err(error) = udp::probe_gso() {
            gso = false;
            fallbacks.push(Fallback::refused(Feature::UdpGso, &error));
        }
        let opened = OpenedDescriptors {
            queues,
            sockets,
            offload,
            gso,
            capabilities: capabilities(node.offload, &fallbacks),
            generation: 0,
        };
        Ok(Self::new(node, opened, published, handles)?)
    }

    /// Builds the lanes from the descriptors of the previous data process.
    ///
    /// # Errors
    /// [`SetupError`] if a queue does not belong to the device, or if a descriptor cannot be used.
    pub(super) fn from_inherited(
        node: &NodeSettings,
        state: HandOver,
        queues: Vec<OwnedFd>,
        sockets: Vec<FamilySockets>,
        published: &Arc<TablesHandle>,
        handles: &ProcessHandles,
    ) -> Result<Self, SetupError> {
        let inherit = |fd| tun::inherit_queue(fd, &node.tun.name);
        let ecn = report_ecn(&sockets, node.offload.udp_ecn);
        let capabilities = with_ecn(state.capabilities, node.offload, ecn);
        let opened = OpenedDescriptors {
            queues: queues.into_iter().map(inherit).collect::<Result<_, _>>()?,
            sockets,
            offload: state.offload,
            gso: state.gso,
            capabilities,
            generation: state.generation,
        };
        Ok(Self::new(node, opened, published, handles)?)
    }

    fn new(
        node: &NodeSettings,
        opened: OpenedDescriptors,
        published: &Arc<TablesHandle>,
        handles: &ProcessHandles,
    ) -> io::Result<Self> {
        let OpenedDescriptors { queues, sockets, offload, gso, capabilities, generation } = opened;
        let copies = handover::descriptors(&queues, &sockets)?;
        let source_ports = source_ports(&sockets)?;
        let lane_count = queues.len();
        let busy_poll = node
            .busy_poll_us
            .map_or_else(super::busy_poll::default_limit, |us| Duration::from_micros(us.into()));
        let mut families = Vec::new();
        let mut manager_sockets = Vec::new();
        let mut of_lanes: Vec<Vec<_>> = queues.iter().map(|_| Vec::new()).collect();
        for FamilySockets { v4, lanes, manager } in sockets {
            families.push(Family { v4, gro: lanes.iter().all(|pair| pair.gro) });
            manager_sockets.push((v4, manager));
            of_lanes.iter_mut().zip(lanes).for_each(|(lane, pair)| lane.push(pair));
        }
        let parts = (0..).zip(queues).zip(of_lanes).map(|((index, tun), sockets)| LaneParts {
            index,
            lanes: node.lanes,
            tun,
            coalesce: coalesce(offload),
            sockets,
            gso: if gso { GsoState::new() } else { GsoState::disabled() },
            bundling: node.bundling,
            busy_poll,
            published: Arc::clone(published),
            manager: handles.to_manager.clone(),
            tap: Arc::clone(&handles.tap),
        });
        Ok(Self {
            lanes: Vec::new(),
            capabilities,
            parts: parts.collect(),
            manager_sockets,
            source_ports,
            copies,
            families,
            lane_count,
            offload,
            gso,
            handles: handles.clone(),
            generation,
        })
    }

    /// Starts the lanes. Tables must be published before.
    ///
    /// # Errors
    /// The kernel's error if a thread or an event descriptor cannot be created.
    pub(super) fn start_lanes(&mut self) -> io::Result<()> {
        for parts in std::mem::take(&mut self.parts) {
            self.lanes.push(LaneHandle::start(parts)?);
        }
        Ok(())
    }

    /// Returns the description of the state for the next process, and the descriptors of the queues
    /// and sockets. The keeper receives these descriptors after those of the snapshot and of the
    /// session store, in one message.
    pub(super) fn hand_over_state(&self, node: &NodeSettings) -> (HandOver, Vec<BorrowedFd<'_>>) {
        let state = HandOver {
            version: HANDOVER_VERSION,
            lanes: node.lanes,
            families: self.families.clone(),
            offload: self.offload,
            gso: self.gso,
            capabilities: self.capabilities.clone(),
            generation: self.generation,
        };
        (state, self.copies.iter().map(AsFd::as_fd).collect())
    }

    /// Stops the lanes. The kernel keeps queueing packets while any process holds copies of the
    /// descriptors.
    pub(super) fn stop(&mut self) {
        self.lanes.clear();
    }

    /// Disables reports of the ECN field, which the kernel passes as ancillary data of recvmsg(2).
    /// The next process may belong to an earlier release, whose buffer for ancillary data is too
    /// small for these reports. A process of this release enables the reports again.
    pub(super) fn stop_ecn_reports(&self) {
        let sockets = self.copies.get(self.lane_count..).unwrap_or_default();
        let per_family = 2 * self.lane_count + 1;
        for (family, sockets) in self.families.iter().zip(sockets.chunks(per_family)) {
            for receive in sockets.iter().step_by(2).take(self.lane_count) {
                if let Err(error) = udp::report_ecn(receive.as_fd(), family.v4, false) {
                    tracing::warn!(%error, "cannot disable reports of the ECN field");
                }
            }
        }
    }

    /// Returns whether the kernel reports the ECN field of received datagrams, so that peers may
    /// set the field.
    pub(super) fn has_ecn(&self) -> bool {
        let is_on = |capability: &Capability| capability.state == CapabilityState::On;
        let mut capabilities = self.capabilities.iter();
        capabilities
            .any(|capability| capability.name == CapabilityName::UdpEcn && is_on(capability))
    }

    /// Attaches every lane to the TUN device after it was created again.
    ///
    /// # Errors
    /// [`SetupError`] if the queues cannot be opened.
    pub(super) fn attach_tun(&mut self, node: &NodeSettings) -> Result<(), SetupError> {
        let OpenQueues { queues, offload, fallbacks } = self.handles.open_queues(node)?;
        self.generation += 1;
        self.offload = offload;
        let copies = handover::descriptors(&queues, &[])?;
        self.copies.splice(..self.lanes.len(), copies);
        for (lane, tun) in self.lanes.iter().zip(queues) {
            let (coalesce, generation) = (coalesce(offload), self.generation);
            lane.replace_tun(TunReplacement { tun, coalesce, generation });
        }
        let fresh = capabilities(node.offload, &fallbacks);
        for (old, new) in self.capabilities.iter_mut().zip(fresh) {
            if new.name.known().is_some_and(CapabilityName::is_of_tun) {
                *old = new;
            }
        }
        Ok(())
    }

    /// Wakes every lane, so that it adopts new tables.
    pub(super) fn wake_lanes(&self) {
        for lane in &self.lanes {
            lane.wake();
        }
    }

    /// Returns whether a socket of the destination's address family exists.
    pub(super) fn can_reach(&self, destination: SocketAddr) -> bool {
        self.manager_sockets.iter().any(|(v4, _)| *v4 == destination.is_ipv4())
    }

    /// Sends a handshake or control message. The engine repeats lost messages, so other errors are
    /// only logged.
    ///
    /// # Errors
    /// [`TooLong`] if the message is longer than this host's route to the destination carries.
    pub(super) fn send(&self, destination: SocketAddr, payload: &[u8]) -> Result<(), TooLong> {
        let sent =
            self.manager_socket(destination).map(|socket| socket.send_to(payload, destination));
        let Some(Err(error)) = sent else { return Ok(()) };
        tracing::debug!(%destination, %error, "handshake or control message not sent");
        match error.raw_os_error() {
            Some(libc::EMSGSIZE) => Err(TooLong { destination, len: payload.len() }),
            _ => Ok(()),
        }
    }

    /// Returns the longest UDP payload that this host's route to `destination` carries, after the
    /// kernel has refused a payload of `refused` bytes.
    pub(super) fn longest_payload(
        &self,
        destination: SocketAddr,
        refused: usize,
    ) -> LongestPayload {
        let from = self.manager_socket(destination).and_then(|socket| socket.local_addr().ok());
        let Some(from) = from else { return LongestPayload::Unknown };
        udp::longest_payload(from.ip(), destination, refused).unwrap_or_else(|error| {
            tracing::debug!(%destination, %error, "cannot read the MTU of the route");
            LongestPayload::Unknown
        })
    }

    fn manager_socket(&self, destination: SocketAddr) -> Option<&UdpSocket> {
        let found = self.manager_sockets.iter().find(|(v4, _)| *v4 == destination.is_ipv4());
        found.map(|(_, socket)| socket)
    }
}

/// Returns the AEADs to offer in handshakes.
pub(super) fn ciphers(choice: CipherChoice) -> Ciphers {
    let hardware = aes_in_hardware();
    match choice {
        CipherChoice::Auto => {
            Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: hardware }
        }
        CipherChoice::Aes256Gcm => {
            Ciphers { aes256_gcm: true, chacha20_poly1305: false, aes_hardware: hardware }
        }
        CipherChoice::Chacha20Poly1305 => {
            Ciphers { aes256_gcm: false, chacha20_poly1305: true, aes_hardware: hardware }
        }
    }
}

/// Returns whether the CPU has AES instructions.
fn aes_in_hardware() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[allow(unreachable_code)]
    false
}

/// Returns the configured underlay addresses, after a check that there is at least one address, and
/// at most one per address family.
///
/// # Errors
/// [`SetupError::Invalid`] if there is no address, or with the second address of a family.
fn validated_addresses(configured: &[IpAddr]) -> Result<Vec<IpAddr>, SetupError> {
    for (index, address) in configured.iter().enumerate() {
        if configured[..index].iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            return Err(SetupError::Invalid(format!(
                "underlay.addresses: {address} is a second address of its family. Configure one \
                 address per family."
            )));
        }
    }
    if configured.is_empty() {
        return Err(SetupError::Invalid("underlay.addresses is empty".to_owned()));
    }
    Ok(configured.to_vec())
}

/// Returns the ports of all sockets, in ascending order without duplicates.
///
/// # Errors
/// The kernel's error if it does not return the address of a socket.
fn source_ports(sockets: &[FamilySockets]) -> io::Result<Vec<u16>> {
    let of_family = |family: &FamilySockets| {
        let lanes: Vec<_> =
            family.lanes.iter().flat_map(|pair| [&pair.receive, &pair.send]).collect();
        lanes.into_iter().chain([&family.manager]).map(UdpSocket::local_addr).collect::<Vec<_>>()
    };
    let addresses = sockets.iter().flat_map(of_family);
    let ports: BTreeSet<u16> =
        addresses.map(|address| address.map(|at| at.port())).collect::<io::Result<_>>()?;
    Ok(ports.into_iter().collect())
}

fn allowed(settings: OffloadSettings) -> TunOffload {
    TunOffload { checksum: settings.tun_checksum, tso: settings.tun_tso, uso: settings.tun_uso }
}

/// Returns the superpackets that may be written to a TUN device whose reading side has `offload`.
/// Both directions use the same offloads, so that an offload that the configuration disables
/// (state `forced off`) is disabled in both.
fn coalesce(offload: TunOffload) -> CoalesceConfig {
    CoalesceConfig { tcp: offload.tso, udp: offload.uso, partial_checksum: offload.checksum }
}

/// Enables or disables reports of the ECN field for every receive socket.
///
/// # Errors
/// The error of setsockopt(2).
fn report_ecn(sockets: &[FamilySockets], on: bool) -> io::Result<()> {
    for family in sockets {
        for lane in &family.lanes {
            udp::report_ecn(lane.receive.as_fd(), family.v4, on)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_address_of_a_family_is_refused() {
        assert!(validated_addresses(&[]).is_err());
        assert!(validated_addresses(&[[192, 0, 2, 1].into(), [192, 0, 2, 2].into()]).is_err());
        assert!(
            validated_addresses(&[[192, 0, 2, 1].into(), std::net::Ipv6Addr::LOCALHOST.into()])
                .is_ok()
        );
    }
}
