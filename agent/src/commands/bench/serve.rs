//! The end that answers: one measurement at a time, for those who know the token, until the time is over.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::protocol::{Counted, Line, PATIENCE, SMALL, Work, random};
use crate::commands::print;
use crate::failure::Failure;

/// The longest that one measurement may take.
const LONGEST: Duration = Duration::from_secs(65);
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
        limit.as_secs()
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
        let done = answer(stream, &udp, &token, overlay.as_deref());
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
) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let asked = stream.local_addr()?.ip().to_canonical();
    if overlay.is_some_and(|overlay| !overlay.contains(&asked)) {
        return Err(io::Error::other(format!("asked at {asked}, which is not on the overlay")));
    }
    let mut line = Line::new(stream)?;
    match line.asked(token)? {
        None => Err(io::Error::other("it does not know the token")),
        Some(Work::Echo) => echo(&mut line),
        Some(Work::Upload) => upload(&mut line),
        Some(Work::Download { ms }) => download(&line, Duration::from_millis(ms)),
        Some(Work::Datagrams) => datagrams(&mut line, udp),
    }
}

fn echo(line: &mut Line) -> io::Result<()> {
    let mut message = [0; SMALL];
    let end = Instant::now() + LONGEST;
    while Instant::now() < end {
        match line.0.read_exact(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        line.0.get_mut().write_all(&message)?;
    }
    Ok(())
}

fn upload(line: &mut Line) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let (mut counted, mut first) = (Counted::default(), None);
    let end = Instant::now() + LONGEST;
    while Instant::now() < end {
        match line.0.read(&mut buffer)? {
            0 => break,
            bytes => counted.bytes += bytes as u64,
        }
        counted.seconds = first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
    }
    line.say(&counted)
}

fn download(line: &Line, time: Duration) -> io::Result<()> {
    let buffer = vec![0; 256 << 10];
    let end = Instant::now() + time.min(LONGEST);
    let mut stream = line.stream();
    while Instant::now() < end {
        stream.write_all(&buffer)?;
    }
    stream.shutdown(Shutdown::Write)
}

fn datagrams(line: &mut Line, udp: &UdpSocket) -> io::Result<()> {
    let from = line.stream().peer_addr()?.ip().to_canonical();
    // What an earlier measurement has left.
    let mut buffer = [0; 2048];
    udp.set_nonblocking(true)?;
    while udp.recv_from(&mut buffer).is_ok() {}
    udp.set_nonblocking(false)?;
    udp.set_read_timeout(Some(Duration::from_millis(200)))?;
    line.say(&"send")?;
    let (mut counted, mut first, mut told) = (Counted::default(), None, false);
    line.stream().set_nonblocking(true)?;
    let end = Instant::now() + LONGEST;
    while Instant::now() < end {
        match udp.recv_from(&mut buffer) {
            Ok((bytes, who)) if who.ip().to_canonical() == from => {
                counted.packets += 1;
                counted.bytes += bytes as u64;
                counted.seconds = first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
            }
            Ok(_) => {}
            // Nothing more is on its way once the asker has said that it is done.
            Err(_) if told => break,
            Err(_) => match line.stream().peek(&mut [0]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => told = true,
            },
        }
    }
    line.stream().set_nonblocking(false)?;
    line.stream().set_read_timeout(Some(PATIENCE))?;
    // Unread, it would have the kernel reset the connection before the answer is read.
    let _done: String = line.hear()?;
    line.say(&counted)
}
