//! The end that answers: one measurement at a time, for those who know the token, until the time is over.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::protocol::{Counted, Line, PATIENCE, SMALL, Work, random};
use crate::commands::print;
use crate::failure::Failure;

/// How long somebody may take to say what is to be measured: less than the patience of whoever waits behind.
const HANDSHAKE: Duration = Duration::from_secs(3);
/// The longest that one measurement may take.
const LONGEST: Duration = Duration::from_secs(65);
/// How long datagrams are waited for once the asker has sent the last.
const LATE: Duration = Duration::from_secs(1);
/// How often it is looked whether the time is over.
const LOOK: Duration = Duration::from_millis(100);

/// `overlay`: only who asks for one of these addresses is answered.
pub(super) fn serve(
    node: &str,
    port: u16,
    overlay: Option<Vec<IpAddr>>,
    limit: Duration,
) -> Result<(), Failure> {
    let (tcp, udp) = bind(port).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            Failure::Taken(format!("port {port} is in use: choose another with --port"))
        }
        _ => Failure::io(format!("cannot listen on port {port}"), error),
    })?;
    let token = random().map_err(|error| Failure::io("cannot make a token", error))?;
    let port = if port == 51901 { String::new() } else { format!(" --port {port}") };
    print(&format!(
        "answering for {} s; on the other node:\n  skein-agent bench {node} --token {token}{port}\n",
        limit.as_secs_f64()
    ))?;
    let end = Instant::now() + limit;
    while Instant::now() < end {
        let stream = match tcp.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(LOOK);
                continue;
            }
            Err(error) => return Err(Failure::io("cannot accept a connection", error)),
        };
        let who = stream.peer_addr();
        // Whoever goes away in the middle has seen enough.
        let done = answer(stream, &udp, &token, overlay.as_deref(), end);
        if let (Ok(who), Err(error)) = (who, done) {
            print(&format!("{who}: {error}\n"))?;
        }
    }
    Ok(())
}

/// Both families where there are both.
fn bind(port: u16) -> io::Result<(TcpListener, UdpSocket)> {
    let any: [IpAddr; 2] = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
    let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in any {
        match TcpListener::bind((address, port)).and_then(|tcp| {
            let udp = UdpSocket::bind((address, port))?;
            tcp.set_nonblocking(true)?;
            Ok((tcp, udp))
        }) {
            // Without IPv6 the other will do.
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => failed = error,
            bound => return bound,
        }
    }
    Err(failed)
}

fn answer(
    stream: TcpStream,
    udp: &UdpSocket,
    token: &str,
    overlay: Option<&[IpAddr]>,
    end: Instant,
) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let asked = stream.local_addr()?.ip().to_canonical();
    if overlay.is_some_and(|overlay| !overlay.contains(&asked)) {
        return Err(io::Error::other(format!("asked at {asked}, which is not on the overlay")));
    }
    let mut line = Line::new(stream)?;
    let left = |most: Duration| end.saturating_duration_since(Instant::now()).min(most);
    let asked = line.within(left(HANDSHAKE), |line| line.asked(token))?;
    let work = asked.ok_or_else(|| io::Error::other("it does not know the token"))?;
    let time = left(LONGEST);
    line.within(time, |line| match work {
        Work::Echo => echo(line),
        Work::Upload => upload(line),
        Work::Download { ms } => download(line, time.min(Duration::from_millis(ms))),
        Work::Datagrams => datagrams(line, udp, time),
    })
}

fn echo(line: &mut Line) -> io::Result<()> {
    let mut message = [0; SMALL];
    loop {
        match line.0.read_exact(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        line.0.get_mut().write_all(&message)?;
    }
}

fn upload(line: &mut Line) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let (mut counted, mut first) = (Counted::default(), None);
    loop {
        match line.0.read(&mut buffer)? {
            0 => return line.say(&counted),
            bytes => counted.bytes += bytes as u64,
        }
        counted.seconds = first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
    }
}

fn download(line: &Line, time: Duration) -> io::Result<()> {
    let buffer = vec![0; 256 << 10];
    let end = Instant::now() + time;
    let mut stream = line.stream();
    while Instant::now() < end {
        stream.write_all(&buffer)?;
    }
    stream.shutdown(Shutdown::Write)
}

fn datagrams(line: &mut Line, udp: &UdpSocket, time: Duration) -> io::Result<()> {
    let from = line.stream().peer_addr()?.ip().to_canonical();
    // What an earlier measurement has left.
    let mut buffer = [0; 2048];
    udp.set_nonblocking(true)?;
    let mut end = Instant::now() + time;
    while Instant::now() < end && udp.recv_from(&mut buffer).is_ok() {}
    udp.set_nonblocking(false)?;
    udp.set_read_timeout(Some(Duration::from_millis(200)))?;
    line.say(&"send")?;
    let (mut counted, mut first, mut told) = (Counted::default(), None, false);
    line.stream().set_nonblocking(true)?;
    while Instant::now() < end {
        match udp.recv_from(&mut buffer) {
            Ok((bytes, who)) if who.ip().to_canonical() == from => {
                counted.packets += 1;
                counted.bytes += bytes as u64;
                counted.seconds = first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
            }
            // Nothing more is on its way once the asker has said that it is done.
            Err(_) if told => break,
            // Strangers' datagrams hide that.
            _ if told => {}
            _ => match line.stream().peek(&mut [0]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => {
                    told = true;
                    end = end.min(Instant::now() + LATE);
                }
            },
        }
    }
    line.stream().set_nonblocking(false)?;
    line.stream().set_read_timeout(Some(PATIENCE))?;
    // Unread, it would have the kernel reset the connection before the answer is read.
    let _done: String = line.hear()?;
    line.say(&counted)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Also what somebody asks for who may, and who goes on.
    #[test]
    fn nothing_outlasts_the_serving() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        for work in [Work::Echo, Work::Upload, Work::Download { ms: 60_000 }, Work::Datagrams] {
            let asker = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
            let asker = std::thread::spawn(move || {
                let mut line = Line::new(asker).unwrap();
                line.ask("token", work).unwrap();
                while line.0.get_mut().write_all(b"x").is_ok() {
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let start = Instant::now();
            let end = start + Duration::from_millis(300);
            let done = answer(tcp.accept().unwrap().0, &udp, "token", None, end);
            assert!(start.elapsed() < PATIENCE, "{work:?}: {:?}", start.elapsed());
            assert!(done.is_err(), "{work:?}");
            asker.join().unwrap();
        }
    }
}
