//! Hand-over between data processes: a description of the state, and the descriptors that carry it.
//!
//! The keeper ([`super::keeper`]) holds copies of all descriptors and sends them to each data
//! process that it starts, or to another keeper. Messages are frames of [`skein_ipc`]; descriptors
//! follow their frame (SCM_RIGHTS).

use std::fs::File;
use std::io::{self, Seek};
use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use skein_ipc::{Capability, ErrorKind, Snapshot, read_frame, write_frame};
use skein_sys::descriptors;
use skein_sys::tun::{TunOffload, TunQueue};
use skein_sys::udp::LaneSockets;

/// Start message of the keeper to a data process. The listening socket, the lock and the
/// descriptors of the previous data process follow.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StartMessage {
    /// State of the previous data process; `None` for the first data process.
    #[serde(rename = "left")]
    pub(super) state: Option<HandOver>,
}

/// Message of a data process to its keeper.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub(super) enum ToKeeper {
    /// Replaces the stored state. The descriptors follow.
    #[serde(rename = "keep")]
    Store {
        /// Description of the descriptors.
        #[serde(rename = "left")]
        state: HandOver,
    },
    /// Replaces the stored [`skein_ipc::Snapshot`], the desired state of the data process. The
    /// memfd with the new snapshot follows.
    Snapshot,
    /// Deletes the stored state, which this process could not use.
    Forget,
    /// Requests queues of the TUN device: [`Answer::Queues`].
    OpenQueues {
        /// Name of the device.
        name: String,
        /// Number of queues, one for each lane.
        queues: u8,
        /// Offloads that the configuration allows.
        allowed: TunOffload,
    },
    /// Requests a new listening socket at the same path: [`Answer::Listener`].
    Listen,
    /// Requests the deletion of the listening socket's file: [`Answer::Done`].
    DeleteSocket,
    /// Reports that the lanes have stopped, and requests a hand-over of the data plane to another
    /// keeper. The descriptor of the connection to that keeper follows.
    #[serde(rename = "give_away")]
    HandOver,
}

/// Description of the handed-over descriptors and of the kernel's capabilities. The descriptors
/// are, in this order: the snapshot, the session store, one queue of the TUN device per lane, and
/// for each address family the receive and the send socket of each lane, then the manager's socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HandOver {
    /// [`skein_ipc::HANDOVER_VERSION`] of the release that wrote the description.
    pub(super) version: u32,
    /// Number of lanes, 1 to 64.
    pub(super) lanes: u8,
    /// Address families in the order of their sockets.
    pub(super) families: Vec<Family>,
    /// Offloads that are active on the queues.
    pub(super) offload: TunOffload,
    /// True if UDP_SEGMENT may be used.
    pub(super) gso: bool,
    /// States of the offload capabilities.
    pub(super) capabilities: Vec<Capability>,
    /// Number of times that the TUN device was replaced.
    pub(super) generation: u32,
}

impl HandOver {
    /// Returns the number of descriptors that the description covers.
    pub(super) fn descriptor_count(&self) -> usize {
        let lanes = usize::from(self.lanes);
        2 + lanes + self.families.len() * (2 * lanes + 1)
    }
}

/// Properties of the sockets of one address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Family {
    /// True for IPv4, false for IPv6.
    pub(super) v4: bool,
    /// True if UDP_GRO is active on the receive sockets.
    pub(super) gro: bool,
}

/// Answer of the keeper to a request of its data process. The descriptors follow.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub(super) enum Answer {
    /// Queues of the TUN device, one descriptor each.
    Queues {
        /// Number of queues.
        queues: u8,
        /// Offloads that are active.
        offload: TunOffload,
        /// Offloads that are not active, with the reason.
        notes: Vec<(String, String)>,
    },
    /// The new listening socket, one descriptor.
    Listener,
    /// The request was carried out; no descriptor.
    Done,
    /// The request failed; no descriptor.
    Refused {
        /// Kind of the failure, for the exit code.
        kind: ErrorKind,
        /// Error and remedy.
        message: String,
    },
}

impl Answer {
    /// Returns the number of descriptors that follow.
    pub(super) fn descriptor_count(&self) -> usize {
        match self {
            Self::Queues { queues, .. } => (*queues).into(),
            Self::Listener => 1,
            Self::Done | Self::Refused { .. } => 0,
        }
    }
}

/// Descriptors of a [`HandOver`], by purpose.
pub(super) struct InheritedFds {
    pub(super) snapshot: OwnedFd,
    pub(super) sessions: OwnedFd,
    pub(super) queues: Vec<OwnedFd>,
    /// Sockets in the order of [`HandOver::families`].
    pub(super) sockets: Vec<FamilySockets>,
}

/// UDP sockets of one address family.
pub(super) struct FamilySockets {
    pub(super) v4: bool,
    pub(super) lanes: Vec<LaneSockets>,
    pub(super) manager: UdpSocket,
}

impl InheritedFds {
    /// Assigns descriptors to their purposes; `None` if their number does not match `state`.
    pub(super) fn from_descriptors(state: &HandOver, descriptors: Vec<OwnedFd>) -> Option<Self> {
        let mut rest = descriptors.into_iter();
        let (snapshot, sessions) = (rest.next()?, rest.next()?);
        let lanes = usize::from(state.lanes);
        let queues: Vec<_> = rest.by_ref().take(lanes).collect();
        let mut sockets = Vec::new();
        for &Family { v4, gro } in &state.families {
            let mut of_lanes = Vec::with_capacity(lanes);
            for _ in 0..lanes {
                let (receive, send) = (rest.next()?.into(), rest.next()?.into());
                of_lanes.push(LaneSockets { receive, send, gro });
            }
            sockets.push(FamilySockets { v4, lanes: of_lanes, manager: rest.next()?.into() });
        }
        let all = queues.len() == lanes && rest.next().is_none();
        all.then_some(Self { snapshot, sessions, queues, sockets })
    }
}

/// Duplicates the descriptors of all queues and sockets, in the order of [`HandOver`] after the
/// snapshot and the sessions.
///
/// # Errors
/// The kernel's error if a descriptor cannot be duplicated.
pub(super) fn descriptors<'a>(
    queues: &'a [TunQueue],
    sockets: &'a [FamilySockets],
) -> io::Result<Vec<OwnedFd>> {
    let mut all: Vec<BorrowedFd<'a>> = queues.iter().map(AsFd::as_fd).collect();
    for family in sockets {
        all.extend(family.lanes.iter().flat_map(|pair| [pair.receive.as_fd(), pair.send.as_fd()]));
        all.push(family.manager.as_fd());
    }
    all.into_iter().map(|fd| fd.try_clone_to_owned()).collect()
}

/// Writes a snapshot to a new memfd and seals it against changes.
///
/// # Errors
/// The kernel's error for the memfd, or an encoding error.
pub(super) fn write_sealed_snapshot(snapshot: &Snapshot) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create("skein-snapshot", flags)?);
    write_frame(&mut file, snapshot)?;
    let all = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, all)?;
    Ok(file.into())
}

/// Reads a snapshot from the memfd that [`write_sealed_snapshot`] returned.
///
/// # Errors
/// The error of the file, or `InvalidData` if it holds no snapshot.
pub(super) fn read_snapshot(file: OwnedFd) -> io::Result<Snapshot> {
    let mut file = File::from(file);
    file.rewind()?;
    read_frame(&mut file)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Sends a message, followed by its descriptors.
///
/// # Errors
/// The error of the socket.
pub(super) fn send<T: Serialize>(
    stream: &UnixStream,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    write_frame(&mut &*stream, message)?;
    descriptors::send(stream, descriptors)
}

/// Receives a message; `None` if the other side has closed the connection. The caller receives its
/// descriptors with [`descriptors::receive`].
///
/// # Errors
/// The error of the socket, or `InvalidData` for a malformed message.
pub(super) fn receive<T: DeserializeOwned>(stream: &UnixStream) -> io::Result<Option<T>> {
    read_frame(&mut &*stream)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use skein_ipc::HANDOVER_VERSION;

    fn file() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    #[test]
    fn descriptors_are_assigned_unless_their_number_is_wrong() {
        let family = |v4| Family { v4, gro: true };
        let state = HandOver {
            version: HANDOVER_VERSION,
            lanes: 3,
            families: vec![family(true), family(false)],
            offload: TunOffload::NONE,
            gso: true,
            capabilities: Vec::new(),
            generation: 0,
        };
        assert_eq!(state.descriptor_count(), 2 + 3 + 2 * 7);
        let fds =
            InheritedFds::from_descriptors(&state, (0..19).map(|_| file()).collect()).unwrap();
        assert_eq!((fds.queues.len(), fds.sockets.len()), (3, 2));
        assert!(fds.sockets.iter().all(|family| family.lanes.len() == 3));
        for wrong in [0, 1, 4, 18, 20] {
            assert!(
                InheritedFds::from_descriptors(&state, (0..wrong).map(|_| file()).collect())
                    .is_none(),
                "{wrong}"
            );
        }
    }
}
