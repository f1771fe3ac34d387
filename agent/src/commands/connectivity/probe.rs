//! ICMP, TCP and UDP probes, and the server that answers them.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use skein_core::wire::checksum;
use skein_core::wire::ip::MIN_IPV6_MTU;
use socket2::{Domain, Protocol as Number, Socket, Type};

use super::matrix::{Cell, ProbeResult, Protocol, Target, row};
use crate::failure::Failure;

/// Timeout of an answer. The first packet may have to wait for a handshake.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of attempts of a probe.
const MAX_ATTEMPTS: usize = 3;
/// Number of probes that run in parallel.
const PARALLEL_PROBES: usize = 16;
/// Payload of a small ICMP or UDP probe in bytes.
const SMALL_PAYLOAD: usize = 56;
/// Bytes of a TCP probe, which fill several packets.
const TCP_PAYLOAD: usize = 32 << 10;
/// Length of an ICMP echo header and of a UDP header in bytes.
const HEADER_BYTES: usize = 8;

/// Probes all targets until `end` and returns the row of the matrix. Probes that have no time left
/// fail.
pub(super) fn all(targets: &[Target], end: Instant) -> Result<Vec<Cell>, Failure> {
    // A missing privilege is reported once, not in every cell of the matrix.
    icmp_socket(Ipv4Addr::LOCALHOST.into()).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => Failure::Privilege(format!(
            "cannot open an ICMP socket: {error}. Run the command as root (CAP_NET_RAW)."
        )),
        _ => Failure::io("cannot open an ICMP socket", error),
    })?;
    // Many nodes probe at the same time, so each one starts with another target.
    let first = super::rand() as usize % targets.len().max(1);
    let jobs = targets[first..].iter().chain(&targets[..first]).flat_map(|target| {
        let ip = if target.address.is_ipv4() { 20 } else { 40 };
        let full =
            mtu(target.address).unwrap_or(MIN_IPV6_MTU.into()).saturating_sub(ip + HEADER_BYTES);
        let icmp = [SMALL_PAYLOAD, full]
            .map(|payload| (target, Protocol::Icmp, payload, ip + HEADER_BYTES));
        let more = [
            (target, Protocol::Udp, SMALL_PAYLOAD, ip + HEADER_BYTES),
            (target, Protocol::Udp, full, ip + HEADER_BYTES),
            (target, Protocol::Tcp, TCP_PAYLOAD, 0),
        ];
        icmp.into_iter().chain(more.into_iter().filter(|_| target.port.is_some()))
    });
    let (jobs, results) = (Mutex::new(jobs), Mutex::new(Vec::new()));
    let next_job = || jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..PARALLEL_PROBES {
            scope.spawn(|| {
                while let Some((target, protocol, payload, headers)) = next_job() {
                    let result = try_probe(target, protocol, payload, end);
                    let probe = ProbeResult {
                        address: target.address,
                        protocol,
                        bytes: payload + headers,
                        round_trip_us: result.as_ref().ok().map(|time| time.as_micros() as u64),
                        error: result.err().map(|failure| failure.to_string()),
                    };
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    results.push((target.name.as_str(), probe));
                }
            });
        }
    });
    Ok(row(results.into_inner().unwrap_or_else(PoisonError::into_inner)))
}

/// Returns the round-trip time of the first successful attempt, or the error of the last attempt.
fn try_probe(
    target: &Target,
    protocol: Protocol,
    payload: usize,
    end: Instant,
) -> Result<Duration, ProbeFailure> {
    let address = SocketAddr::new(target.address, target.port.unwrap_or_default());
    let (begin, mut last) = (Instant::now(), None);
    for attempts in 1..=MAX_ATTEMPTS {
        let start = Instant::now();
        let timeout = ANSWER_TIMEOUT.min(end.saturating_duration_since(start));
        if timeout.is_zero() {
            break;
        }
        match match protocol {
            Protocol::Icmp => icmp(target.address, payload, timeout),
            Protocol::Udp => udp(address, payload, timeout),
            Protocol::Tcp => tcp(address, payload, timeout),
        } {
            Ok(()) => return Ok(start.elapsed()),
            Err(error) => last = Some((error, attempts)),
        }
    }
    let (took, is_over) = (begin.elapsed(), Instant::now() >= end);
    Err(last.map_or(ProbeFailure::NoTime, |(error, attempts)| ProbeFailure::Attempts {
        error,
        attempts,
        took,
        is_over,
    }))
}

/// Reason why a probe has no round-trip time.
#[derive(Debug)]
enum ProbeFailure {
    /// The time of the test was over before the first attempt.
    NoTime,
    /// All attempts failed.
    Attempts {
        /// Error of the last attempt.
        error: io::Error,
        attempts: usize,
        /// Time of all attempts.
        took: Duration,
        /// True if the time of the test is over.
        is_over: bool,
    },
}

impl fmt::Display for ProbeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const OVER: &str = "the timeout of the test expired";
        let Self::Attempts { error, attempts, took, is_over } = self else {
            return f.write_str(OVER);
        };
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => f.write_str("no answer")?,
            _ => error.fmt(f)?,
        }
        let word = if *attempts == 1 { "attempt" } else { "attempts" };
        write!(f, ", {attempts} {word} in {:.1} s", took.as_secs_f64())?;
        if *is_over { write!(f, "; {OVER}") } else { Ok(()) }
    }
}

fn icmp_socket(address: IpAddr) -> io::Result<Socket> {
    let (domain, protocol) = match address {
        IpAddr::V4(_) => (Domain::IPV4, Number::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Number::ICMPV6),
    };
    Socket::new(domain, Type::RAW, Some(protocol))
}

/// Sends an ICMP echo request and waits for the reply. The kernel sets DF unless it knows a lower
/// path MTU.
fn icmp(address: IpAddr, payload: usize, timeout: Duration) -> io::Result<()> {
    let mut socket = icmp_socket(address)?;
    socket.connect(&SocketAddr::new(address, 0).into())?;
    socket.set_read_timeout(Some(timeout))?;
    let mut identifier = [0; 4];
    aws_lc_rs::rand::fill(&mut identifier).map_err(|_| io::Error::other("no random numbers"))?;
    let (request, reply) = if address.is_ipv4() { (8, 0) } else { (128, 129) };
    // Type, code, checksum, identifier and sequence number. The kernel computes the ICMPv6
    // checksum.
    let mut message = vec![request, 0, 0, 0];
    message.extend(identifier);
    message.resize(HEADER_BYTES + payload, 0x5a);
    if address.is_ipv4() {
        let sum = !checksum::sum(&message, 0);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    socket.write_all(&message)?;
    let (mut buffer, end) = (vec![0; 65_536], Instant::now() + timeout);
    while Instant::now() < end {
        let length = socket.read(&mut buffer)?;
        // A raw IPv4 socket receives the IP header, too.
        let header = if address.is_ipv4() { usize::from(buffer[0] & 15) * 4 } else { 0 };
        let answer = buffer.get(header..length).unwrap_or_default();
        let same = answer.first() == Some(&reply) && answer.get(4..8) == Some(&identifier);
        if same && answer.get(8..) == message.get(8..) {
            return Ok(());
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn udp(address: SocketAddr, payload: usize, timeout: Duration) -> io::Result<()> {
    let socket = UdpSocket::bind((unspecified(address.ip()), 0))?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(timeout))?;
    let message = vec![0x5a; payload];
    socket.send(&message)?;
    let mut buffer = vec![0; 65_536];
    match socket.recv(&mut buffer)? {
        length if buffer[..length] == message => Ok(()),
        length => {
            Err(io::Error::other(format!("received {length} bytes that differ from the request")))
        }
    }
}

fn tcp(address: SocketAddr, payload: usize, timeout: Duration) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    let message = vec![0x5a; payload];
    stream.write_all(&message)?;
    let mut answer = vec![0; payload];
    stream.read_exact(&mut answer)?;
    match answer == message {
        true => Ok(()),
        false => Err(io::Error::other("received bytes that differ from the request")),
    }
}

fn unspecified(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Returns the maximum length in bytes of a packet to `address`: the MTU of the route or of its
/// interface, at most 65,535.
fn mtu(address: IpAddr) -> io::Result<usize> {
    let socket = UdpSocket::bind((unspecified(address), 0))?;
    // No packet is sent, so the port does not matter.
    socket.connect((address, 9))?;
    let mtu = match address {
        IpAddr::V4(_) => sockopt::ip_mtu(&socket)?,
        IpAddr::V6(_) => sockopt::ipv6_mtu(&socket)?,
    };
    // The MTU of the loopback interface exceeds the maximum length of a packet.
    Ok(u16::try_from(mtu).unwrap_or(u16::MAX).into())
}

/// Answers probes on `port` until the process is killed.
///
/// # Errors
/// The port is in use for both address families.
pub(super) fn answer(port: u16) -> anyhow::Result<()> {
    let any: [IpAddr; 2] = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
    let bind = |any: &IpAddr| {
        Ok::<_, io::Error>((TcpListener::bind((*any, port))?, UdpSocket::bind((*any, port))?))
    };
    let bound = any.iter().find_map(|any| bind(any).ok());
    let (tcp, udp) =
        bound.ok_or_else(|| anyhow::anyhow!("cannot listen on TCP and UDP port {port}"))?;
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        loop {
            // An error belongs to an earlier answer (ICMP error), so the next datagram is received.
            if let Ok((length, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(&buffer[..length], from);
            }
        }
    });
    for stream in tcp.incoming().flatten() {
        std::thread::spawn(move || echo(stream));
    }
    Ok(())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(2 * ANSWER_TIMEOUT))?;
    stream.set_write_timeout(Some(2 * ANSWER_TIMEOUT))?;
    let mut buffer = vec![0; TCP_PAYLOAD];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn probes_reach_server_after_its_start() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(tcp(free, 10, ANSWER_TIMEOUT).is_err(), "No server must answer before the start.");
        std::thread::spawn(move || answer(free.port()));
        let end = Instant::now() + Duration::from_secs(30);
        while tcp(free, TCP_PAYLOAD, ANSWER_TIMEOUT).is_err() {
            assert!(Instant::now() < end, "The server does not answer.");
        }
        udp(free, 1000, ANSWER_TIMEOUT).unwrap();
        tcp(free, 0, ANSWER_TIMEOUT).unwrap();
    }

    #[test]
    fn packet_of_route_mtu_is_answered() {
        assert_eq!(mtu(Ipv4Addr::LOCALHOST.into()).unwrap(), usize::from(u16::MAX));
        let any = UdpSocket::bind("127.0.0.1:0").unwrap();
        let free = any.local_addr().unwrap();
        any.set_read_timeout(Some(ANSWER_TIMEOUT)).unwrap();
        let echo = std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            let (length, from) = any.recv_from(&mut buffer).unwrap();
            any.send_to(&buffer[..length], from).unwrap();
        });
        udp(free, usize::from(u16::MAX) - 20 - HEADER_BYTES, ANSWER_TIMEOUT).unwrap();
        echo.join().unwrap();
    }

    #[test]
    fn probe_fails_when_test_timeout_expired() {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        let target =
            Target { name: "b".to_owned(), address: address.ip(), port: Some(address.port()) };
        let error = try_probe(&target, Protocol::Udp, SMALL_PAYLOAD, Instant::now()).unwrap_err();
        assert_eq!(error.to_string(), "the timeout of the test expired");
        let start = Instant::now();
        try_probe(&target, Protocol::Udp, SMALL_PAYLOAD, start + Duration::from_millis(50))
            .unwrap_err();
        assert!(start.elapsed() < ANSWER_TIMEOUT);
    }

    #[test]
    fn failure_lists_attempts_and_time() {
        let silent = || io::Error::from(io::ErrorKind::WouldBlock);
        let shown = |error, attempts, ms, is_over| {
            let took = Duration::from_millis(ms);
            ProbeFailure::Attempts { error, attempts, took, is_over }.to_string()
        };
        assert_eq!(shown(silent(), 3, 6_020, false), "no answer, 3 attempts in 6.0 s");
        let cut = "no answer, 1 attempt in 0.3 s; the timeout of the test expired";
        assert_eq!(shown(silent(), 1, 300, true), cut);
        let refused = shown(io::Error::other("refused"), 3, 1, false);
        assert_eq!(refused, "refused, 3 attempts in 0.0 s");
    }
}
