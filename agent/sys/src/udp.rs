//! UDP sockets of the underlay.
//!
//! A lane receives on a socket of the port's SO_REUSEPORT group and sends from a socket of its
//! own, whose ephemeral port makes its traffic a flow of its own to NICs and routers on the way.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use super::sockopt;
use super::tun::Fallback;

/// Where the lane number lies in a datagram, counted from the start of the UDP payload.
const LANE_OFFSET: u32 = 2;

/// Sizes and switches of the sockets.
#[derive(Debug, Clone, Copy)]
pub struct UdpOptions {
    /// Receive buffer in bytes, as SO_RCVBUF counts them (the kernel doubles it for its overhead).
    pub receive_buffer: usize,
    /// Send buffer in bytes, likewise.
    pub send_buffer: usize,
    /// Receive runs of datagrams as one (UDP_GRO).
    pub gro: bool,
    /// True to report the ECN field of received datagrams (IP_RECVTOS, IPV6_RECVTCLASS).
    pub ecn: bool,
}

/// The sockets of one lane at one address.
#[derive(Debug)]
pub struct LaneSockets {
    /// Bound to the listening port; nonblocking.
    pub receive: UdpSocket,
    /// Bound to a port of its own; nonblocking. Receives nothing.
    pub send: UdpSocket,
    /// Whether `receive` gives runs of datagrams.
    pub gro: bool,
}

/// Longest UDP payload that a route of this host carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LongestPayload {
    /// The kernel sent the payload that it had refused before.
    Carries,
    /// Longest payload in bytes by the MTU that the kernel reported with its refusal.
    Limit(usize),
    /// The kernel refused the payload and reported no MTU.
    Unknown,
}

/// Why a socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum UdpError {
    /// Some program has the port.
    #[error(
        "UDP port {} is in use at {}: stop the program that has it (ss -lnup 'sport = {}') or \
         set another underlay.port",
        address.port(), address.ip(), address.port()
    )]
    AddrInUse {
        /// What was to be bound.
        address: SocketAddr,
    },
    /// The address is not one of this host's.
    #[error("{} is not an address of this host: correct underlay.addresses", address.ip())]
    AddrNotAvailable {
        /// What was to be bound.
        address: SocketAddr,
    },
    /// The host has no IPv6 (or no IPv4).
    #[error("this host has no {}: leave {} out of underlay.addresses",
        if address.is_ipv4() { "IPv4" } else { "IPv6" }, address.ip())]
    NoFamily {
        /// What was to be bound.
        address: SocketAddr,
    },
    /// The kernel refused for want of privilege.
    #[error("binding UDP {address} was refused: ports below 1024 need CAP_NET_BIND_SERVICE")]
    Permission {
        /// What was to be bound.
        address: SocketAddr,
    },
    /// Any other error.
    #[error("{context} (UDP {address}): {source}")]
    Io {
        /// What was tried.
        context: &'static str,
        /// For which address.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Binds the sockets of `lanes` lanes to one address: datagrams come to the lane that their third
/// byte names, modulo `lanes`. Returns what the kernel would not do as fallbacks (`udp_gro`,
/// `udp_ecn`, `reuseport_steering`, `receive_buffer`, `send_buffer`).
///
/// A port that any other socket has, in this process or another, is [`UdpError::AddrInUse`].
pub fn bind_lanes(
    address: SocketAddr,
    lanes: usize,
    options: &UdpOptions,
) -> Result<(Vec<LaneSockets>, Vec<Fallback>), UdpError> {
    let failed = |context| move |source| failed(context, address, source);
    let mut fallbacks = Vec::new();

    // The first socket is bound without SO_REUSEPORT, so that it fails if anybody has the port,
    // even a program of this user that would share it (a second agent). Once it is bound, it
    // opens the group; a second agent's first socket does not get in, for the same reason.
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
        push_fallback(
            &mut fallbacks,
            "reuseport_steering",
            format!("the kernel refused it: {error}"),
        );
    }

    let mut sockets = Vec::with_capacity(group.len());
    for receive in group {
        receive.set_nonblocking(true).map_err(failed("setting O_NONBLOCK"))?;
        // Only counts what was lost; older kernels than any with UDP_GRO have it.
        let _ = sockopt::set_int(receive.as_fd(), libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1);
        let gro = enable_gro(receive.as_fd(), options.gro, &mut fallbacks);
        match options.ecn {
            true => {
                if let Err(error) = report_ecn(receive.as_fd(), address.is_ipv4(), true) {
                    push_fallback(
                        &mut fallbacks,
                        "udp_ecn",
                        format!("the kernel refused it: {error}"),
                    );
                }
            }
            false => push_fallback(&mut fallbacks, "udp_ecn", "off in the configuration".into()),
        }
        set_buffer_size(&receive, Buffer::Receive, options.receive_buffer, &mut fallbacks);

        let send = bind_sender(address, options, &mut fallbacks)?;
        sockets.push(LaneSockets { receive: receive.into(), send: send.into(), gro });
    }
    Ok((sockets, fallbacks))
}

/// Binds a socket to a port of its own at the address (whose port is not used), for the few
/// datagrams that belong to no lane. Nonblocking.
pub fn bind_manager(address: SocketAddr, options: &UdpOptions) -> Result<UdpSocket, UdpError> {
    Ok(bind_sender(address, options, &mut Vec::new())?.into())
}

/// Whether sockets of this host have UDP_SEGMENT at all; the error says why not.
pub fn probe_gso() -> Result<(), String> {
    probe_option(libc::UDP_SEGMENT, 1_200)
}

/// Whether sockets of this host have UDP_GRO; the error says why not.
pub fn probe_gro() -> Result<(), String> {
    probe_option(libc::UDP_GRO, 1)
}

/// Returns whether this host has the address family of `ip`. A kernel may be built or started
/// without one (`ipv6.disable=1`).
pub fn is_family_supported(ip: IpAddr) -> bool {
    let domain = Domain::for_address(SocketAddr::new(ip, 0));
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP));
    // Any other error does not concern the address family.
    !matches!(socket, Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT))
}

/// Returns the longest UDP payload that this host's route to `destination` carries. `from` is the
/// source address. The function sends a datagram of `refused` bytes, which a socket with the lanes'
/// options has refused (EMSGSIZE), and reads the MTU that the kernel reports. ICMP messages have no
/// influence.
///
/// # Errors
/// The error of the failed system call, also if the destination is unreachable.
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

fn probe_option(option: i32, value: i32) -> Result<(), String> {
    Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))
        .or_else(|_| Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)))
        .and_then(|socket| sockopt::set_int(socket.as_fd(), libc::SOL_UDP, option, value))
        .map_err(|error| format!("the kernel refused it: {error}"))
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
    // Nobody talks to this port; what strangers send must not fill memory.
    let nothing = [SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0)];
    socket
        .attach_filter(&nothing)
        .map_err(|source| failed("attaching a filter", address, source))?;
    Ok(socket)
}

fn new_socket(address: SocketAddr) -> Result<Socket, UdpError> {
    let failed = |context| move |source| failed(context, address, source);
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))
        .map_err(failed("making a socket"))?;
    // PROBE: never fragment, and never believe an ICMP message about the path's MTU (anybody can
    // send one). IP_RECVERR stays off: with it, one peer's ICMP errors would fail other sends.
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

/// The socket of a datagram is the one of index `payload[2] % lanes`. A datagram too short to have
/// the byte goes to the first.
fn steer_by_lane(first: BorrowedFd<'_>, lanes: usize) -> io::Result<()> {
    let lanes = u32::try_from(lanes).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut program = [
        instruction(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, LANE_OFFSET),
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
        push_fallback(fallbacks, "udp_gro", "off in the configuration".into());
        return false;
    }
    match sockopt::set_int(socket, libc::SOL_UDP, libc::UDP_GRO, 1) {
        Ok(()) => true,
        Err(error) => {
            push_fallback(fallbacks, "udp_gro", format!("the kernel refused it: {error}"));
            false
        }
    }
}

/// Switches reports of the ECN field of received datagrams on or off. The kernel reads the field
/// from each datagram when the process receives it, so that the reports cover datagrams that
/// already wait in the socket.
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

/// A buffer smaller than asked for is a note, not an error.
fn set_buffer_size(socket: &Socket, buffer: Buffer, size: usize, fallbacks: &mut Vec<Fallback>) {
    let (name, force, sysctl) = match buffer {
        Buffer::Receive => ("receive_buffer", libc::SO_RCVBUFFORCE, "net.core.rmem_max"),
        Buffer::Send => ("send_buffer", libc::SO_SNDBUFFORCE, "net.core.wmem_max"),
    };
    // The kernel doubles the value, in an int.
    let size = i32::try_from(size).unwrap_or(i32::MAX).min(i32::MAX / 2);
    if sockopt::set_int(socket.as_fd(), libc::SOL_SOCKET, force, size).is_ok() {
        return;
    }
    // Without CAP_NET_ADMIN the system's limit holds.
    let effective = match buffer {
        Buffer::Receive => {
            socket.set_recv_buffer_size(size as usize).and_then(|()| socket.recv_buffer_size())
        }
        Buffer::Send => {
            socket.set_send_buffer_size(size as usize).and_then(|()| socket.send_buffer_size())
        }
    };
    match effective {
        Ok(bytes) if bytes / 2 >= size as usize => {}
        Ok(bytes) => {
            let got = bytes / 2;
            let text =
                format!("{got} bytes instead of {size}: raise {sysctl} or grant CAP_NET_ADMIN");
            push_fallback(fallbacks, name, text);
        }
        Err(error) => push_fallback(fallbacks, name, format!("cannot be set: {error}")),
    }
}

/// Once a name: every socket of a kind meets the same kernel.
fn push_fallback(fallbacks: &mut Vec<Fallback>, name: &'static str, why: String) {
    if fallbacks.iter().all(|(noted, _)| *noted != name) {
        fallbacks.push((name, why));
    }
}
