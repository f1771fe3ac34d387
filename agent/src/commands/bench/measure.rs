//! The end that measures.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::protocol::{AskError, Counted, Line, PATIENCE, SMALL, Work};

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(3);

/// Who answers, and for how long each measurement goes on.
pub(super) struct Other<'a> {
    pub(super) address: IpAddr,
    pub(super) port: u16,
    pub(super) token: &'a str,
    pub(super) time: Duration,
}

#[derive(Debug, Serialize)]
pub(super) struct Measured {
    pub(super) upload_bits_per_second: f64,
    pub(super) download_bits_per_second: f64,
    pub(super) round_trip_p50_us: f64,
    pub(super) round_trip_p99_us: f64,
    pub(super) udp_sent_per_second: f64,
    pub(super) udp_received_per_second: f64,
    pub(super) udp_lost_percent: f64,
}

impl Measured {
    /// Measurements in it.
    pub(super) const STEPS: u64 = 4;
}

/// One after the other; `step` is told of each.
pub(super) fn measure(other: &Other<'_>, step: impl Fn(&str)) -> Result<Measured, AskError> {
    step("round trip");
    let mut round_trips = other.round_trips()?;
    round_trips.sort();
    let quantile = |part: f64| {
        let at = (round_trips.len().saturating_sub(1) as f64 * part) as usize;
        round_trips.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e6)
    };
    step("TCP to the peer");
    let upload_bits_per_second = other.upload()?;
    step("TCP from the peer");
    let download_bits_per_second = other.download()?;
    step("small datagrams");
    let (sent, counted) = other.datagrams()?;
    let rate = |counted: &Counted| counted.packets as f64 / counted.seconds.max(0.001);
    let lost = sent.packets.saturating_sub(counted.packets) as f64;
    Ok(Measured {
        upload_bits_per_second,
        download_bits_per_second,
        round_trip_p50_us: quantile(0.5),
        round_trip_p99_us: quantile(0.99),
        udp_sent_per_second: rate(&sent),
        udp_received_per_second: rate(&counted),
        udp_lost_percent: 100.0 * lost / sent.packets.max(1) as f64,
    })
}

impl Other<'_> {
    fn ask(&self, work: Work) -> Result<Line, AskError> {
        let address = SocketAddr::new(self.address, self.port);
        let stream = TcpStream::connect_timeout(&address, CONNECT)
            .map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))?;
        let mut line = Line::new(stream)?;
        line.ask(self.token, work)?;
        Ok(line)
    }

    fn round_trips(&self) -> Result<Vec<Duration>, AskError> {
        let mut line = self.ask(Work::Echo)?;
        let (mut message, mut times) = ([0; SMALL], Vec::new());
        let end = Instant::now() + self.time;
        while Instant::now() < end {
            let start = Instant::now();
            line.0.get_mut().write_all(&message)?;
            line.0.read_exact(&mut message)?;
            times.push(start.elapsed());
        }
        Ok(times)
    }

    fn upload(&self) -> Result<f64, AskError> {
        let mut line = self.ask(Work::Upload)?;
        let buffer = vec![0; 256 << 10];
        let end = Instant::now() + self.time;
        while Instant::now() < end {
            line.0.get_mut().write_all(&buffer)?;
        }
        line.stream().shutdown(Shutdown::Write)?;
        let counted: Counted = line.hear()?;
        Ok(8.0 * counted.bytes as f64 / counted.seconds.max(0.001))
    }

    fn download(&self) -> Result<f64, AskError> {
        let ms = u64::try_from(self.time.as_millis()).unwrap_or(u64::MAX);
        let mut line = self.ask(Work::Download { ms })?;
        let (mut buffer, mut bytes, mut first) = (vec![0; 256 << 10], 0, None);
        let mut seconds = 0.0;
        loop {
            match line.0.read(&mut buffer)? {
                0 => return Ok(8.0 * bytes as f64 / f64::max(seconds, 0.001)),
                more => bytes += more as u64,
            }
            seconds = first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
        }
    }

    /// What was sent, and what has arrived.
    fn datagrams(&self) -> Result<(Counted, Counted), AskError> {
        let mut line = self.ask(Work::Datagrams)?;
        let _send: String = line.hear()?;
        let any: IpAddr = match self.address {
            IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((self.address, self.port))?;
        let (mut sent, start) = (Counted::default(), Instant::now());
        while start.elapsed() < self.time {
            match socket.send(&[0; SMALL]) {
                Ok(_) => sent.packets += 1,
                // A full queue of this machine: that one was not sent.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        sent.seconds = start.elapsed().as_secs_f64();
        line.say(&"done")?;
        line.stream().set_read_timeout(Some(2 * PATIENCE))?;
        Ok((sent, line.hear()?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// What a stranger who listens on a port may learn and do.
    #[test]
    fn only_who_knows_the_token_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let answer = || Line::new(listener.accept().unwrap().0).unwrap().asked("right");
            [answer().unwrap(), answer().unwrap()]
        });
        let ask = |token| {
            let time = Duration::ZERO;
            let other = Other { address: address.ip(), port: address.port(), token, time };
            other.ask(Work::Echo).map(drop)
        };
        assert!(ask("right").is_ok());
        assert!(matches!(ask("wrong"), Err(AskError::Refused(why)) if why.contains("token")));
        assert_eq!(server.join().unwrap(), [Some(Work::Echo), None]);
    }
}
