//! Server of measurements: one at a time, for clients with the token, until the limit expires.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::protocol::{Connection, IO_TIMEOUT, MESSAGE_BYTES, TrafficCount, Work, random};
use crate::commands::print;
use crate::failure::Failure;

/// Timeout of a request. It is shorter than [`IO_TIMEOUT`], so that the next client does not give
/// up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum duration of a measurement.
const MAX_MEASUREMENT: Duration = Duration::from_secs(65);
/// Time for delayed datagrams after the client has sent the last one.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval at which the limit is checked.
const ACCEPT_INTERVAL: Duration = Duration::from_millis(100);

/// Answers measurements until `limit` expires. With `overlay`, only requests to one of these
/// addresses are answered.
pub(super) fn serve(
    node: &str,
    port: u16,
    overlay: Option<Vec<IpAddr>>,
    limit: Duration,
) -> Result<(), Failure> {
    let (tcp, udp) = bind(port).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            Failure::InUse(format!("port {port} is in use. Choose another with --port."))
        }
        _ => Failure::io(format!("cannot listen on port {port}"), error),
    })?;
    let token = random().map_err(|error| Failure::io("cannot generate a token", error))?;
    let port = if port == 51901 { String::new() } else { format!(" --port {port}") };
    print(&format!(
        "answering for {} s; run on the other node:\n  skein-agent bench {node} --token {token}{port}\n",
        limit.as_secs_f64()
    ))?;
    let end = Instant::now() + limit;
    while Instant::now() < end {
        let stream = match tcp.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(ACCEPT_INTERVAL);
                continue;
            }
            Err(error) => return Err(Failure::io("cannot accept a connection", error)),
        };
        let client = stream.peer_addr();
        // An error ends this measurement only.
        let done = answer(stream, &udp, &token, overlay.as_deref(), end);
        if let (Ok(client), Err(error)) = (client, done) {
            print(&format!("{client}: {error}\n"))?;
        }
    }
    Ok(())
}

/// Binds TCP and UDP sockets for both address families, or for IPv4 if IPv6 is not available.
fn bind(port: u16) -> io::Result<(TcpListener, UdpSocket)> {
    let any: [IpAddr; 2] = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
    let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in any {
        match TcpListener::bind((address, port)).and_then(|tcp| {
            let udp = UdpSocket::bind((address, port))?;
            tcp.set_nonblocking(true)?;
            Ok((tcp, udp))
        }) {
            // Without IPv6, IPv4 is tried next.
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => failed = error,
            bound => return bound,
        }
    }
    Err(failed)
}

/// Answers one request, at most until `end`.
fn answer(
    stream: TcpStream,
    udp: &UdpSocket,
    token: &str,
    overlay: Option<&[IpAddr]>,
    end: Instant,
) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let address = stream.local_addr()?.ip().to_canonical();
    if overlay.is_some_and(|overlay| !overlay.contains(&address)) {
        return Err(io::Error::other(format!(
            "request to {address}, which is not an overlay address of this node"
        )));
    }
    let mut connection = Connection::new(stream)?;
    let left = |most: Duration| end.saturating_duration_since(Instant::now()).min(most);
    let work = connection
        .within(left(HANDSHAKE_TIMEOUT), |connection| connection.accept_request(token))?;
    let work = work.ok_or_else(|| io::Error::other("wrong token"))?;
    let time = left(MAX_MEASUREMENT);
    connection.within(time, |connection| match work {
        Work::Echo => echo(connection),
        Work::Upload => upload(connection),
        Work::Download { ms } => download(connection, time.min(Duration::from_millis(ms))),
        Work::Datagrams => datagrams(connection, udp, time),
    })
}

fn echo(connection: &mut Connection) -> io::Result<()> {
    let mut message = [0; MESSAGE_BYTES];
    loop {
        match connection.0.read_exact(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        connection.0.get_mut().write_all(&message)?;
    }
}

fn upload(connection: &mut Connection) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let (mut counted, mut first) = (TrafficCount::default(), None);
    loop {
        match connection.0.read(&mut buffer)? {
            0 => return connection.send(&counted),
            bytes => counted.bytes += bytes as u64,
        }
        counted.seconds = first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
    }
}

fn download(connection: &Connection, time: Duration) -> io::Result<()> {
    let buffer = vec![0; 256 << 10];
    let end = Instant::now() + time;
    let mut stream = connection.stream();
    while Instant::now() < end {
        stream.write_all(&buffer)?;
    }
    stream.shutdown(Shutdown::Write)
}

fn datagrams(connection: &mut Connection, udp: &UdpSocket, time: Duration) -> io::Result<()> {
    let from = connection.stream().peer_addr()?.ip().to_canonical();
    // Discard datagrams of an earlier measurement.
    let mut buffer = [0; 2048];
    udp.set_nonblocking(true)?;
    let mut end = Instant::now() + time;
    while Instant::now() < end && udp.recv_from(&mut buffer).is_ok() {}
    udp.set_nonblocking(false)?;
    udp.set_read_timeout(Some(Duration::from_millis(200)))?;
    connection.send(&"send")?;
    let (mut counted, mut first, mut all_sent) = (TrafficCount::default(), None, false);
    connection.stream().set_nonblocking(true)?;
    while Instant::now() < end {
        match udp.recv_from(&mut buffer) {
            Ok((bytes, sender)) if sender.ip().to_canonical() == from => {
                counted.packets += 1;
                counted.bytes += bytes as u64;
                counted.seconds = first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
            }
            // The client has sent all datagrams, and no more arrive.
            Err(_) if all_sent => break,
            // A datagram of another sender does not end the wait.
            _ if all_sent => {}
            _ => match connection.stream().peek(&mut [0]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => {
                    all_sent = true;
                    end = end.min(Instant::now() + DRAIN_TIMEOUT);
                }
            },
        }
    }
    connection.stream().set_nonblocking(false)?;
    connection.stream().set_read_timeout(Some(IO_TIMEOUT))?;
    // Unread data would make the kernel reset the connection before the client reads the answer.
    let _done: String = connection.receive()?;
    connection.send(&counted)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn measurement_ends_when_limit_expires() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        for work in [Work::Echo, Work::Upload, Work::Download { ms: 60_000 }, Work::Datagrams] {
            let client = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
            let client = std::thread::spawn(move || {
                let mut connection = Connection::new(client).unwrap();
                connection.request("token", work).unwrap();
                while connection.0.get_mut().write_all(b"x").is_ok() {
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let start = Instant::now();
            let end = start + Duration::from_millis(300);
            let done = answer(tcp.accept().unwrap().0, &udp, "token", None, end);
            assert!(start.elapsed() < IO_TIMEOUT, "{work:?}: {:?}", start.elapsed());
            assert!(done.is_err(), "{work:?}");
            client.join().unwrap();
        }
    }
}
