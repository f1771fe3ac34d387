//! A bad cable: passes a node's frames on with losses, doubles and some that come late, as a kernel with
//! netem would. Whole frames go through, so that neither end can tell it from a network.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::mem;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use socket2::{Domain, SockAddr, Socket, Type};

use super::{Lab, Netns, Task, UNDERLAY, link};
use crate::load::capture::Frame;
use crate::load::pattern::Pattern;

/// How often it looks whether it is to stop, and how late a frame that waits may be sent.
const IDLE: Duration = Duration::from_millis(20);
const BUSY: Duration = Duration::from_millis(1);

const ETH_P_ALL: u16 = 0x0003;

/// What becomes of datagrams; other frames (neighbours' questions) all pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    /// Of a hundred, so many are lost…
    pub loss: u64,
    /// …so many come twice…
    pub doubles: u64,
    /// …and so many come late,
    pub late: u64,
    /// by up to this.
    pub late_by: Duration,
}

/// What has become of datagrams, both ways together.
#[derive(Debug, Default)]
pub struct Counts {
    /// That came to the cable.
    pub seen: AtomicU64,
    /// That did not leave it.
    pub lost: AtomicU64,
    /// That left it twice.
    pub doubled: AtomicU64,
    /// That left it behind later ones.
    pub late: AtomicU64,
}

/// A cable at work; as good as any until there is [`Weather`].
pub struct Relay {
    weather: Arc<Mutex<Weather>>,
    counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
    ways: Vec<Task<()>>,
}

impl Relay {
    /// Puts it between the switch and a node. All nodes send whole checksums from now on: the cable has no
    /// hardware that completes them.
    pub fn start(lab: &Lab, node: usize) -> Result<Self> {
        let switch = lab.switch()?;
        let (port, inner, outer) = (lab.nodes[node].port(), "cable0", "cable1");
        for node in &lab.nodes {
            node.ns.sh(&format!("ethtool -K {UNDERLAY} tx off"))?;
        }
        switch.ip(&format!("link set {port} nomaster"))?;
        link::veth((switch, inner), (switch, outer), 1500)?;
        link::enslave(switch, outer, "br0")?;
        let mut relay = Self {
            weather: Arc::default(),
            counts: Arc::default(),
            stop: Arc::default(),
            ways: vec![],
        };
        for (number, (from, to)) in [(&*port, inner), (inner, &*port)].into_iter().enumerate() {
            let way = Way {
                from: open(switch, from)?,
                to: open(switch, to)?,
                random: Pattern::new(number as u64 + 1),
                waiting: BTreeMap::new(),
                sequence: 0,
                weather: relay.weather.clone(),
                counts: relay.counts.clone(),
            };
            let stop = relay.stop.clone();
            relay.ways.push(switch.spawn(move || way.pass(&stop)));
        }
        Ok(relay)
    }

    /// Has other weather from now on.
    pub fn set(&self, weather: Weather) {
        *self.weather.lock().unwrap_or_else(PoisonError::into_inner) = weather;
    }

    /// What has become of datagrams so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Takes it out of use; an error where it has failed.
    pub fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        mem::take(&mut self.ways).into_iter().try_for_each(Task::join)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for way in mem::take(&mut self.ways) {
            let _ = way.join();
        }
    }
}

/// One direction.
struct Way {
    from: Socket,
    to: Socket,
    random: Pattern,
    /// Frames that come late, by their time.
    waiting: BTreeMap<(Instant, u64), Vec<u8>>,
    sequence: u64,
    weather: Arc<Mutex<Weather>>,
    counts: Arc<Counts>,
}

impl Way {
    fn pass(mut self, stop: &AtomicBool) -> Result<()> {
        let mut buffer = vec![0; 1 << 16];
        let mut timeout = None;
        while !stop.load(Ordering::Relaxed) {
            let wanted = Some(if self.waiting.is_empty() { IDLE } else { BUSY });
            if timeout != wanted {
                self.from.set_read_timeout(wanted)?;
                timeout = wanted;
            }
            match self.from.read(&mut buffer) {
                Ok(length) => self.take(&buffer[..length])?,
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error).context("reading a frame"),
            }
            while let Some(first) = self.waiting.first_entry()
                && first.key().0 <= Instant::now()
            {
                let frame = first.remove();
                self.send(&frame)?;
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        let frame = Frame { bytes: bytes.to_vec() };
        if frame.udp().is_none() {
            return self.send(bytes);
        }
        let weather = *self.weather.lock().unwrap_or_else(PoisonError::into_inner);
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        count(&self.counts.seen);
        if self.chance(weather.loss) {
            count(&self.counts.lost);
            return Ok(());
        }
        if self.chance(weather.doubles) {
            count(&self.counts.doubled);
            self.send(bytes)?;
        }
        if self.chance(weather.late) {
            count(&self.counts.late);
            let by = weather.late_by.mul_f64(self.percent() as f64 / 100.0);
            self.sequence += 1;
            self.waiting.insert((Instant::now() + by, self.sequence), frame.bytes);
            return Ok(());
        }
        self.send(bytes)
    }

    fn send(&mut self, frame: &[u8]) -> Result<()> {
        match self.to.write(frame) {
            Err(error) if !is_passing(&error) => Err(error).context("sending a frame"),
            _ => Ok(()),
        }
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.percent() < percent
    }

    fn percent(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.random.fill(&mut bytes);
        (u64::from_le_bytes(bytes) >> 16) % 100
    }
}

/// No frame, a full queue, or a cable that is out at the moment.
fn is_passing(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let codes = [Errno::NOBUFS, Errno::NETDOWN, Errno::INTR].map(Errno::raw_os_error);
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
        || error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

/// A socket that receives and sends the frames of one interface.
fn open(ns: &Netns, interface: &str) -> Result<Socket> {
    let index = ns.sh(&format!("cat /sys/class/net/{interface}/ifindex"))?;
    let index: i32 = index.trim().parse().context("no index")?;
    ns.run(|| {
        // Nothing is received before it is bound.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        let on: libc::c_int = 1;
        // SAFETY: the option takes an int by pointer and length (packet(7)), which outlives the call.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_IGNORE_OUTGOING,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        if done != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: a sockaddr_storage has room and alignment for every kind of address; the fields that are
        // set make a valid sockaddr_ll, all others are zero, and the length is that of one.
        let ((), address) = unsafe {
            SockAddr::try_init(|storage, length| {
                let address = &mut *storage.cast::<libc::sockaddr_ll>();
                address.sll_family = libc::AF_PACKET as libc::sa_family_t;
                address.sll_protocol = ETH_P_ALL.to_be();
                address.sll_ifindex = index;
                *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
                Ok(())
            })
        }?;
        socket.bind(&address)?;
        set_socket_recv_buffer_size_force(&socket, 16 << 20)?;
        Ok(socket)
    })?
    .with_context(|| format!("opening a packet socket on {interface}"))
}
