//! Probes by ICMP, TCP and UDP, and what answers them.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use skein_core::wire::checksum;
use skein_core::wire::ip::MIN_IPV6_MTU;
use socket2::{Domain, Protocol as Number, Socket, Type};

use super::matrix::{Cell, Outcome, Protocol, Target, row};
use crate::failure::Failure;

/// How long an answer may take: a handshake may come before it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a probe is tried.
const TRIES: usize = 3;
/// Probes at once.
const TOGETHER: usize = 16;
/// Payload of a small probe, and of one by TCP that fills several packets.
const SMALL: usize = 56;
const STREAM: usize = 32 << 10;
/// ICMP and UDP have headers of the same length.
const HEADER: usize = 8;

/// Probes every target, with what time there is until `end`: a row of the matrix.
pub(super) fn all(targets: &[Target], end: Instant) -> Result<Vec<Cell>, Failure> {
    // Better here than in every cell of the matrix.
    icmp_socket(Ipv4Addr::LOCALHOST.into()).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => {
            Failure::Privilege(format!("ICMP needs CAP_NET_RAW: {error}: run as root"))
        }
        _ => Failure::io("cannot open an ICMP socket", error),
    })?;
    // Where all probe all, not everybody is to begin with the same one.
    let first = super::rand() as usize % targets.len().max(1);
    let works = targets[first..].iter().chain(&targets[..first]).flat_map(|target| {
        let ip = if target.address.is_ipv4() { 20 } else { 40 };
        let full = mtu(target.address).unwrap_or(MIN_IPV6_MTU.into()).saturating_sub(ip + HEADER);
        let icmp = [SMALL, full].map(|payload| (target, Protocol::Icmp, payload, ip + HEADER));
        let more = [
            (target, Protocol::Udp, SMALL, ip + HEADER),
            (target, Protocol::Udp, full, ip + HEADER),
            (target, Protocol::Tcp, STREAM, 0),
        ];
        icmp.into_iter().chain(more.into_iter().filter(|_| target.port.is_some()))
    });
    let (works, outcomes) = (Mutex::new(works), Mutex::new(Vec::new()));
    let take = || works.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..TOGETHER {
            scope.spawn(|| {
                while let Some((target, protocol, payload, headers)) = take() {
                    let result = tries(target, protocol, payload, end);
                    let outcome = Outcome {
                        address: target.address,
                        protocol,
                        bytes: payload + headers,
                        round_trip_us: result.as_ref().ok().map(|time| time.as_micros() as u64),
                        error: result.err(),
                    };
                    let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
                    outcomes.push((target.name.as_str(), outcome));
                }
            });
        }
    });
    Ok(row(outcomes.into_inner().unwrap_or_else(PoisonError::into_inner)))
}

/// The time of the first that is answered; where none is, why the last was not.
fn tries(
    target: &Target,
    protocol: Protocol,
    payload: usize,
    end: Instant,
) -> Result<Duration, String> {
    let address = SocketAddr::new(target.address, target.port.unwrap_or_default());
    let (begin, mut last) = (Instant::now(), None);
    for tries in 1..=TRIES {
        let start = Instant::now();
        let patience = PATIENCE.min(end.saturating_duration_since(start));
        if patience.is_zero() {
            break;
        }
        match match protocol {
            Protocol::Icmp => icmp(target.address, payload, patience),
            Protocol::Udp => udp(address, payload, patience),
            Protocol::Tcp => tcp(address, payload, patience),
        } {
            Ok(()) => return Ok(start.elapsed()),
            Err(error) => last = Some((error, tries)),
        }
    }
    Err(shown(last, begin.elapsed(), Instant::now() >= end))
}

/// What came of so many tries in that time, which may have been all there was.
fn shown(last: Option<(io::Error, usize)>, took: Duration, over: bool) -> String {
    const OVER: &str = "the time for the test is over";
    let Some((error, tries)) = last else { return OVER.to_owned() };
    let text = match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "no answer".to_owned(),
        _ => error.to_string(),
    };
    let end = if over { format!("; {OVER}") } else { String::new() };
    let word = if tries == 1 { "try" } else { "tries" };
    format!("{text}, {tries} {word} in {:.1} s{end}", took.as_secs_f64())
}

fn icmp_socket(address: IpAddr) -> io::Result<Socket> {
    let (domain, protocol) = match address {
        IpAddr::V4(_) => (Domain::IPV4, Number::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Number::ICMPV6),
    };
    Socket::new(domain, Type::RAW, Some(protocol))
}

/// An echo, which the kernel sends with DF set while it knows of no lesser path MTU.
fn icmp(address: IpAddr, payload: usize, patience: Duration) -> io::Result<()> {
    let mut socket = icmp_socket(address)?;
    socket.connect(&SocketAddr::new(address, 0).into())?;
    socket.set_read_timeout(Some(patience))?;
    let mut mark = [0; 4];
    aws_lc_rs::rand::fill(&mut mark).map_err(|_| io::Error::other("no random numbers"))?;
    let (request, reply) = if address.is_ipv4() { (8, 0) } else { (128, 129) };
    // Type, code, checksum, identifier and number; the kernel computes ICMPv6's checksum.
    let mut message = vec![request, 0, 0, 0, mark[0], mark[1], mark[2], mark[3]];
    message.resize(HEADER + payload, 0x5a);
    if address.is_ipv4() {
        let sum = !checksum::sum(&message, 0);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    socket.write_all(&message)?;
    let (mut buffer, end) = (vec![0; 65_536], Instant::now() + patience);
    while Instant::now() < end {
        let length = socket.read(&mut buffer)?;
        // Of IPv4 a raw socket gives the IP header, too.
        let header = if address.is_ipv4() { usize::from(buffer[0] & 15) * 4 } else { 0 };
        let answer = buffer.get(header..length).unwrap_or_default();
        let same = answer.first() == Some(&reply) && answer.get(4..8) == Some(&mark);
        if same && answer.get(8..) == message.get(8..) {
            return Ok(());
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn udp(address: SocketAddr, payload: usize, patience: Duration) -> io::Result<()> {
    let socket = UdpSocket::bind((unspecified(address.ip()), 0))?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(patience))?;
    let message = vec![0x5a; payload];
    socket.send(&message)?;
    let mut buffer = vec![0; 65_536];
    match socket.recv(&mut buffer)? {
        length if buffer[..length] == message => Ok(()),
        length => Err(io::Error::other(format!("{length} other bytes came back"))),
    }
}

fn tcp(address: SocketAddr, payload: usize, patience: Duration) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let message = vec![0x5a; payload];
    stream.write_all(&message)?;
    let mut answer = vec![0; payload];
    stream.read_exact(&mut answer)?;
    match answer == message {
        true => Ok(()),
        false => Err(io::Error::other("other bytes came back")),
    }
}

fn unspecified(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The longest packet in bytes that the kernel sends that way: the MTU of the route, or of its interface.
fn mtu(address: IpAddr) -> io::Result<usize> {
    let socket = UdpSocket::bind((unspecified(address), 0))?;
    // Nothing is sent; any port will do.
    socket.connect((address, 9))?;
    let mtu = match address {
        IpAddr::V4(_) => sockopt::ip_mtu(&socket)?,
        IpAddr::V6(_) => sockopt::ipv6_mtu(&socket)?,
    };
    // The loopback's is more than a packet can have.
    Ok(u16::try_from(mtu).unwrap_or(u16::MAX).into())
}

/// Answers probes until this process is ended.
pub(super) fn answer(port: u16) -> anyhow::Result<()> {
    let any: [IpAddr; 2] = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
    let bind = |any: &IpAddr| {
        Ok::<_, io::Error>((TcpListener::bind((*any, port))?, UdpSocket::bind((*any, port))?))
    };
    let bound = any.iter().find_map(|any| bind(any).ok());
    let (tcp, udp) =
        bound.ok_or_else(|| anyhow::anyhow!("cannot listen on port {port} by TCP and UDP"))?;
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        loop {
            // An error is one of an earlier answer that did not get through.
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
    stream.set_read_timeout(Some(2 * PATIENCE))?;
    stream.set_write_timeout(Some(2 * PATIENCE))?;
    let mut buffer = vec![0; STREAM];
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
    fn what_answers_is_reached_by_tcp_and_udp_and_what_does_not_is_not() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(tcp(free, 10, PATIENCE).is_err(), "nobody answers yet");
        std::thread::spawn(move || answer(free.port()));
        let end = Instant::now() + Duration::from_secs(30);
        while tcp(free, STREAM, PATIENCE).is_err() {
            assert!(Instant::now() < end, "nobody answers");
        }
        udp(free, 1000, PATIENCE).unwrap();
        tcp(free, 0, PATIENCE).unwrap();
    }

    #[test]
    fn full_packets_are_as_long_as_the_way_to_the_target_lets_them_be() {
        assert_eq!(mtu(Ipv4Addr::LOCALHOST.into()).unwrap(), usize::from(u16::MAX));
        let any = UdpSocket::bind("127.0.0.1:0").unwrap();
        let free = any.local_addr().unwrap();
        any.set_read_timeout(Some(PATIENCE)).unwrap();
        let echo = std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            let (length, from) = any.recv_from(&mut buffer).unwrap();
            any.send_to(&buffer[..length], from).unwrap();
        });
        udp(free, usize::from(u16::MAX) - 20 - HEADER, PATIENCE).unwrap();
        echo.join().unwrap();
    }

    #[test]
    fn nothing_is_probed_when_the_time_is_over() {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        let target =
            Target { name: "b".to_owned(), address: address.ip(), port: Some(address.port()) };
        let error = tries(&target, Protocol::Udp, SMALL, Instant::now()).unwrap_err();
        assert_eq!(error, "the time for the test is over");
        let start = Instant::now();
        tries(&target, Protocol::Udp, SMALL, start + Duration::from_millis(50)).unwrap_err();
        assert!(start.elapsed() < PATIENCE);
    }

    #[test]
    fn what_was_tried_is_told() {
        let silent = || io::Error::from(io::ErrorKind::WouldBlock);
        let shown =
            |error, tries, ms, over| shown(Some((error, tries)), Duration::from_millis(ms), over);
        assert_eq!(shown(silent(), 3, 6_020, false), "no answer, 3 tries in 6.0 s");
        let cut = "no answer, 1 try in 0.3 s; the time for the test is over";
        assert_eq!(shown(silent(), 1, 300, true), cut);
        let refused = shown(io::Error::other("refused"), 3, 1, false);
        assert_eq!(refused, "refused, 3 tries in 0.0 s");
    }
}
