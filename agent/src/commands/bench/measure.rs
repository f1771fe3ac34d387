//! Client of a measurement.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::protocol::{Connection, IO_TIMEOUT, MESSAGE_BYTES, RequestError, TrafficCount, Work};

/// Timeout of a connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Peer that answers measurements (`bench --serve`), and the duration of each measurement.
pub(super) struct Server<'a> {
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
    /// Number of measurements, for the progress bar.
    pub(super) const STEPS: u64 = 4;
}

/// Runs the measurements one after the other. Calls `step` with the name of each before its start.
pub(super) fn measure(server: &Server<'_>, step: impl Fn(&str)) -> Result<Measured, RequestError> {
    step("round-trip time");
    let mut round_trips = server.round_trips()?;
    round_trips.sort();
    let quantile = |part: f64| {
        let at = (round_trips.len().saturating_sub(1) as f64 * part) as usize;
        round_trips.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e6)
    };
    step("TCP to the peer");
    let upload_bits_per_second = server.upload()?;
    step("TCP from the peer");
    let download_bits_per_second = server.download()?;
    step("small datagrams");
    let (sent, counted) = server.datagrams()?;
    let rate = |counted: &TrafficCount| counted.packets as f64 / counted.seconds.max(0.001);
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

impl Server<'_> {
    fn request(&self, work: Work) -> Result<Connection, RequestError> {
        let address = SocketAddr::new(self.address, self.port);
        let stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)
            .map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))?;
        let mut connection = Connection::new(stream)?;
        connection.request(self.token, work)?;
        Ok(connection)
    }

    fn round_trips(&self) -> Result<Vec<Duration>, RequestError> {
        let mut connection = self.request(Work::Echo)?;
        let (mut message, mut times) = ([0; MESSAGE_BYTES], Vec::new());
        let end = Instant::now() + self.time;
        while Instant::now() < end {
            let start = Instant::now();
            connection.0.get_mut().write_all(&message)?;
            connection.0.read_exact(&mut message)?;
            times.push(start.elapsed());
        }
        Ok(times)
    }

    fn upload(&self) -> Result<f64, RequestError> {
        let mut connection = self.request(Work::Upload)?;
        let buffer = vec![0; 256 << 10];
        let end = Instant::now() + self.time;
        while Instant::now() < end {
            connection.0.get_mut().write_all(&buffer)?;
        }
        connection.stream().shutdown(Shutdown::Write)?;
        let counted: TrafficCount = connection.receive()?;
        Ok(8.0 * counted.bytes as f64 / counted.seconds.max(0.001))
    }

    fn download(&self) -> Result<f64, RequestError> {
        let ms = u64::try_from(self.time.as_millis()).unwrap_or(u64::MAX);
        let mut connection = self.request(Work::Download { ms })?;
        let (mut buffer, mut bytes, mut first) = (vec![0; 256 << 10], 0, None);
        let mut seconds = 0.0;
        loop {
            match connection.0.read(&mut buffer)? {
                0 => return Ok(8.0 * bytes as f64 / f64::max(seconds, 0.001)),
                more => bytes += more as u64,
            }
            seconds = first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
        }
    }

    /// Sends datagrams and returns what was sent and what the peer received.
    fn datagrams(&self) -> Result<(TrafficCount, TrafficCount), RequestError> {
        let mut connection = self.request(Work::Datagrams)?;
        let _send: String = connection.receive()?;
        let any: IpAddr = match self.address {
            IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((self.address, self.port))?;
        let (mut sent, start) = (TrafficCount::default(), Instant::now());
        while start.elapsed() < self.time {
            match socket.send(&[0; MESSAGE_BYTES]) {
                Ok(_) => sent.packets += 1,
                // A queue of this machine is full, so that the datagram was not sent.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        sent.seconds = start.elapsed().as_secs_f64();
        connection.send(&"done")?;
        connection.stream().set_read_timeout(Some(2 * IO_TIMEOUT))?;
        Ok((sent, connection.receive()?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn request_with_wrong_token_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let answer =
                || Connection::new(listener.accept().unwrap().0).unwrap().accept_request("right");
            [answer().unwrap(), answer().unwrap()]
        });
        let request = |token| {
            let time = Duration::ZERO;
            let server = Server { address: address.ip(), port: address.port(), token, time };
            server.request(Work::Echo).map(drop)
        };
        assert!(request("right").is_ok());
        assert!(
            matches!(request("wrong"), Err(RequestError::Refused(why)) if why.contains("token"))
        );
        assert_eq!(server.join().unwrap(), [Some(Work::Echo), None]);
    }
}
