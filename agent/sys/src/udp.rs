//! UDP sockets of the underlay (udp(7), ip(7), ipv6(7)).
//!
//! All lanes receive on one port, each on its own socket of an SO_REUSEPORT group. Each lane sends
//! from a second socket with an ephemeral port, so that NICs and routers treat the traffic of each
//! lane as a separate flow.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use skein_core::wire::header::LANE_OFFSET;

use super::fallback::{Fallback, Feature};
use super::sockopt;

/// Buffer sizes and features of the sockets.
#[derive(Debug, Clone, Copy)]
pub struct UdpOptions {
    /// Receive buffer in bytes (SO_RCVBUF; the kernel doubles the value for its overhead).
    pub receive_buffer: usize,
    /// Send buffer in bytes (SO_SNDBUF; the kernel doubles the value for its overhead).
    pub send_buffer: usize,
    /// True to receive merged datagrams (UDP_GRO).
    pub gro: bool,
    /// True to report the ECN field of received datagrams (IP_RECVTOS, IPV6_RECVTCLASS).
    pub ecn: bool,
}

/// Sockets of one lane at one address. Both are nonblocking.
#[derive(Debug)]
pub struct LaneSockets {
    /// Receive socket, bound to the port of all lanes.
    pub receive: UdpSocket,
    /// Send socket, bound to an ephemeral port. A socket filter drops every received datagram.
    pub send: UdpSocket,
    /// True if `receive` may return merged datagrams (UDP_GRO).
    pub gro: bool,
}

/// Longest UDP payload that a route of this host carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LongestPayload {
    /// The kernel sent the payload that it had refused before.
    Carries,
    /// Longest payload in bytes, computed from the MTU that the kernel reported with its refusal.
    Limit(usize),
    /// The kernel refused the payload and reported no MTU.
    Unknown,
}

/// Error of creating or binding a socket.
#[derive(Debug, thiserror::Error)]
pub enum UdpError {
    /// The port is in use by another socket (EADDRINUSE).
    #[error(
        "UDP port {} is in use at {}: stop the program that uses it (ss -lnup 'sport = {}') or \
         set another underlay.port",
        address.port(), address.ip(), address.port()
    )]
    AddrInUse {
        /// Address and port of the bind(2) call.
        address: SocketAddr,
    },
    /// The address does not belong to this host (EADDRNOTAVAIL).
    #[error("{} is not an address of this host: correct underlay.addresses", address.ip())]
    AddrNotAvailable {
        /// Address and port of the bind(2) call.
        address: SocketAddr,
    },
    /// The host does not support the address family (EAFNOSUPPORT).
    #[error("this host has no {}: leave {} out of underlay.addresses",
        if address.is_ipv4() { "IPv4" } else { "IPv6" }, address.ip())]
    NoFamily {
        /// Address of the unsupported family.
        address: SocketAddr,
    },
    /// The process lacks a privilege (EACCES, EPERM).
    #[error("binding UDP {address} was refused: ports below 1024 need CAP_NET_BIND_SERVICE")]
    Permission {
        /// Address and port of the bind(2) call.
        address: SocketAddr,
    },
    /// Any other error of a system call.
    #[error("{context} (UDP {address}): {source}")]
    Io {
        /// Failed action, for example "setting SO_REUSEPORT".
        context: &'static str,
        /// Address of the socket.
        address: SocketAddr,
        /// Error of the system call.
        source: io::Error,
    },
}

/// Creates the sockets of `lanes` lanes (at least one) at `address`. The kernel delivers a datagram
/// to the receive socket with the index of its lane byte modulo `lanes`. Port 0 binds an ephemeral
/// port.
///
/// The second value lists the features that the kernel refused or the options disable: `UdpGro`,
/// `UdpEcn`, `ReuseportSteering`, and `ReceiveBuffer` or `SendBuffer` if the buffer is smaller than
/// requested.
///
/// # Errors
/// [`UdpError::AddrInUse`] if any other socket uses the port, even a socket of this process or a
/// socket with SO_REUSEPORT; [`UdpError::AddrNotAvailable`] or [`UdpError::NoFamily`] if the host
/// lacks the address or its family; [`UdpError::Permission`] for a port below 1024 without
/// CAP_NET_BIND_SERVICE; [`UdpError::Io`] otherwise.
pub fn bind_lanes(
    address: SocketAddr,
    lanes: usize,
    options: &UdpOptions,
) -> Result<(Vec<LaneSockets>, Vec<Fallback>), UdpError> {
    let failed = |context| move |source| failed(context, address, source);
    let mut fallbacks = Vec::new();

    // The first socket is bound without SO_REUSEPORT, so that bind(2) fails if another socket uses
    // the port, even one with SO_REUSEPORT of the same user (a second agent). SO_REUSEPORT is set
    // after bind(2) and opens the group for the next sockets of this loop.
    let mut group: Vec<Socket> = Vec::with_capacity(lanes);
    let mut bound = address;
    while group.len() < lanes.max(1) {
        let socket = new_socket(address)?;
        let join = |socket: &Socket| socket.set_reuse_port(true);
        if group.is_empty() {
            bind(&socket, bound)?;
            let local = socket.local_addr().map_err(failed("reading the local address"))?;
            bound = local.as_socket().unwrap_or(address);
            join(&socket).map_err(failed("setting SO_REUSEPORT"))?;
        } else {
            join(&socket).map_err(failed("setting SO_REUSEPORT"))?;
            bind(&socket, bound)?;
        }
        group.push(socket);
    }
    if let [first, _, ..] = group.as_slice()
        && let Err(error) = steer_by_lane(first.as_fd(), group.len())
    {
        push_fallback(&mut fallbacks, Fallback::refused(Feature::ReuseportSteering, &error));
    }

    let mut sockets = Vec::with_capacity(group.len());
    for receive in group {
        receive.set_nonblocking(true).map_err(failed("setting O_NONBLOCK"))?;
        // SO_RXQ_OVFL exists since Linux 2.6.33 and only counts lost datagrams: its error is
        // ignored.
        let _ = sockopt::set_int(receive.as_fd(), libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1);
        let gro = enable_gro(receive.as_fd(), options.gro, &mut fallbacks);
        match options.ecn {
            true => {
                if let Err(error) = report_ecn(receive.as_fd(), address.is_ipv4(), true) {
                    push_fallback(&mut fallbacks, Fallback::refused(Feature::UdpEcn, &error));
                }
            }
            false => push_fallback(&mut fallbacks, Fallback::disabled(Feature::UdpEcn)),
        }
        set_buffer_size(&receive, Buffer::Receive, options.receive_buffer, &mut fallbacks);

        let send = bind_sender(address, options, &mut fallbacks)?;
        sockets.push(LaneSockets { receive: receive.into(), send: send.into(), gro });
    }
    Ok((sockets, fallbacks))
}

/// Creates a nonblocking send socket for the session manager, with an ephemeral port at the IP
/// address of `address`. The port of `address` is ignored.
///
/// # Errors
/// [`UdpError::AddrNotAvailable`] or [`UdpError::NoFamily`] if the host lacks the address or its
/// family; [`UdpError::Io`] for another error of a system call.
pub fn bind_manager(address: SocketAddr, options: &UdpOptions) -> Result<UdpSocket, UdpError> {
    Ok(bind_sender(address, options, &mut Vec::new())?.into())
}

/// Checks that sockets of this host support UDP_SEGMENT.
///
/// # Errors
/// The kernel's refusal of the socket option.
pub fn probe_gso() -> io::Result<()> {
    probe_option(libc::UDP_SEGMENT, 1_200)
}

/// Checks that sockets of this host support UDP_GRO.
///
/// # Errors
/// The kernel's refusal of the socket option.
pub fn probe_gro() -> io::Result<()> {
    probe_option(libc::UDP_GRO, 1)
}

/// Returns whether this host supports the address family of `ip`. A kernel may be built without
/// IPv6 or started with `ipv6.disable=1`.
pub fn is_family_supported(ip: IpAddr) -> bool {
    let domain = Domain::for_address(SocketAddr::new(ip, 0));
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP));
    // Other errors do not concern the address family.
    !matches!(socket, Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT))
}

/// Returns the longest UDP payload that this host's route from `from` to `destination` carries. The
/// function sends a datagram of `refused` bytes, a length that a lane's socket refused (EMSGSIZE),
/// and reads the MTU from the socket's error queue (IP_RECVERR). ICMP messages have no influence.
///
/// # Errors
/// The error of the failed system call, for example ENETUNREACH without a route.
pub fn longest_payload(
    from: IpAddr,
    destination: SocketAddr,
    refused: usize,
) -> io::Result<LongestPayload> {
    let socket = new_socket(destination).map_err(io::Error::other)?;
    let (level, option, headers) = match destination {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_RECVERR, 20 + 8),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 40 + 8),
    };
    sockopt::set_int(socket.as_fd(), level, option, 1)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    match UdpSocket::from(socket.try_clone()?).send_to(&vec![0; refused], destination) {
        Ok(_) => return Ok(LongestPayload::Carries),
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {}
        Err(error) => return Err(error),
    }
    let mtu = super::recv::reported_mtu(socket.as_fd())?;
    let limit = mtu.and_then(|mtu| (mtu as usize).checked_sub(headers));
    Ok(limit.map_or(LongestPayload::Unknown, LongestPayload::Limit))
}

fn probe_option(option: i32, value: i32) -> io::Result<()> {
    Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))
        .or_else(|_| Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)))
        .and_then(|socket| sockopt::set_int(socket.as_fd(), libc::SOL_UDP, option, value))
}

fn bind_sender(
    address: SocketAddr,
    options: &UdpOptions,
    fallbacks: &mut Vec<Fallback>,
) -> Result<Socket, UdpError> {
    let socket = new_socket(address)?;
    bind(&socket, SocketAddr::new(address.ip(), 0))?;
    socket.set_nonblocking(true).map_err(|source| failed("setting O_NONBLOCK", address, source))?;
    set_buffer_size(&socket, Buffer::Send, options.send_buffer, fallbacks);
    // No peer sends to this port. The filter keeps datagrams of other senders out of the receive
    // buffer.
    let nothing = [SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0)];
    socket
        .attach_filter(&nothing)
        .map_err(|source| failed("attaching a filter", address, source))?;
    Ok(socket)
}

fn new_socket(address: SocketAddr) -> Result<Socket, UdpError> {
    let failed = |context| move |source| failed(context, address, source);
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))
        .map_err(failed("creating a socket"))?;
    // IP_PMTUDISC_PROBE sets DF and ignores the path MTU of ICMP messages, which any host can
    // spoof. IP_RECVERR stays off: with it, an ICMP error about one peer would fail a send to
    // another peer.
    let (level, option, value) = match address {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
        SocketAddr::V6(_) => {
            socket.set_only_v6(true).map_err(failed("setting IPV6_V6ONLY"))?;
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
        }
    };
    sockopt::set_int(socket.as_fd(), level, option, value)
        .map_err(failed("setting path MTU discovery"))?;
    Ok(socket)
}

fn bind(socket: &Socket, address: SocketAddr) -> Result<(), UdpError> {
    socket.bind(&address.into()).map_err(|source| failed("binding", address, source))
}

fn failed(context: &'static str, address: SocketAddr, source: io::Error) -> UdpError {
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => UdpError::AddrInUse { address },
        Some(libc::EADDRNOTAVAIL) => UdpError::AddrNotAvailable { address },
        Some(libc::EAFNOSUPPORT) => UdpError::NoFamily { address },
        Some(libc::EACCES | libc::EPERM) => UdpError::Permission { address },
        _ => UdpError::Io { context, address, source },
    }
}

/// Attaches a program to the SO_REUSEPORT group that selects the socket of index
/// `payload[LANE_OFFSET] % lanes`. A datagram without that byte goes to the first socket.
fn steer_by_lane(first: BorrowedFd<'_>, lanes: usize) -> io::Result<()> {
    let lanes = u32::try_from(lanes).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut program = [
        instruction(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, LANE_OFFSET as u32),
        instruction(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, lanes),
        instruction(libc::BPF_RET | libc::BPF_A, 0),
    ];
    sockopt::attach_reuseport_cbpf(first, &mut program)
}

fn instruction(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn enable_gro(socket: BorrowedFd<'_>, allowed: bool, fallbacks: &mut Vec<Fallback>) -> bool {
    if !allowed {
        push_fallback(fallbacks, Fallback::disabled(Feature::UdpGro));
        return false;
    }
    match sockopt::set_int(socket, libc::SOL_UDP, libc::UDP_GRO, 1) {
        Ok(()) => true,
        Err(error) => {
            push_fallback(fallbacks, Fallback::refused(Feature::UdpGro, &error));
            false
        }
    }
}

/// Enables or disables the ancillary data of recvmsg(2) with the ECN field of received datagrams
/// (IP_RECVTOS, or IPV6_RECVTCLASS unless `v4`). The change also applies to datagrams that are
/// already queued, because the kernel reads the field when the process receives the datagram.
///
/// # Errors
/// The kernel's refusal of the socket option.
pub fn report_ecn(socket: BorrowedFd<'_>, v4: bool, on: bool) -> io::Result<()> {
    let (level, option) = match v4 {
        true => (libc::IPPROTO_IP, libc::IP_RECVTOS),
        false => (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    };
    sockopt::set_int(socket, level, option, on.into())
}

#[derive(Clone, Copy)]
enum Buffer {
    Receive,
    Send,
}

/// Sets the size of a socket buffer in bytes. A smaller buffer than requested is a fallback, not an
/// error.
fn set_buffer_size(socket: &Socket, buffer: Buffer, size: usize, fallbacks: &mut Vec<Fallback>) {
    let (feature, force, sysctl) = match buffer {
        Buffer::Receive => (Feature::ReceiveBuffer, libc::SO_RCVBUFFORCE, "net.core.rmem_max"),
        Buffer::Send => (Feature::SendBuffer, libc::SO_SNDBUFFORCE, "net.core.wmem_max"),
    };
    // The kernel stores twice the value in an int.
    let size = i32::try_from(size).unwrap_or(i32::MAX).min(i32::MAX / 2);
    if sockopt::set_int(socket.as_fd(), libc::SOL_SOCKET, force, size).is_ok() {
        return;
    }
    // Without CAP_NET_ADMIN, the limit of the sysctl applies.
    let effective = match buffer {
        Buffer::Receive => {
            socket.set_recv_buffer_size(size as usize).and_then(|()| socket.recv_buffer_size())
        }
        Buffer::Send => {
            socket.set_send_buffer_size(size as usize).and_then(|()| socket.send_buffer_size())
        }
    };
    let reason = match effective {
        Ok(bytes) if bytes / 2 >= size as usize => return,
        Ok(bytes) => {
            let got = bytes / 2;
            format!("{got} bytes instead of {size}: raise {sysctl} or grant CAP_NET_ADMIN")
        }
        Err(error) => format!("cannot be set: {error}"),
    };
    push_fallback(fallbacks, Fallback { feature, reason });
}

/// Adds a fallback unless there is one of the same feature, because the sockets of all lanes get
/// the same refusals.
fn push_fallback(fallbacks: &mut Vec<Fallback>, fallback: Fallback) {
    if fallbacks.iter().all(|noted| noted.feature != fallback.feature) {
        fallbacks.push(fallback);
    }
}
