//! Link emulator between the switch and one node, for kernels without `tc netem`: drops, duplicates
//! and delays UDP datagrams. All other frames pass unchanged.

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

/// Timeout of a receive call while no frame is delayed. A stop request takes effect within this
/// time.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Timeout of a receive call while frames are delayed. A frame leaves at most this much later than
/// its delay requires.
const DELAY_POLL_INTERVAL: Duration = Duration::from_millis(1);

const ETH_P_ALL: u16 = 0x0003;

/// Impairments of UDP datagrams, for each direction. The default has none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Impairments {
    /// Datagrams dropped, percent.
    pub loss_percent: u64,
    /// Datagrams sent twice, percent.
    pub duplicate_percent: u64,
    /// Datagrams delayed, percent.
    pub delay_percent: u64,
    /// Upper bound of the delay, drawn uniformly.
    pub max_delay: Duration,
}

/// Counters of UDP datagrams, both directions together.
#[derive(Debug, Default)]
pub struct Counts {
    /// Datagrams received.
    pub seen: AtomicU64,
    /// Datagrams dropped.
    pub lost: AtomicU64,
    /// Datagrams sent twice.
    pub duplicated: AtomicU64,
    /// Datagrams delayed.
    pub delayed: AtomicU64,
}

/// A running link emulator. It has no impairments until [`Relay::set`].
pub struct Relay {
    impairments: Arc<Mutex<Impairments>>,
    counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
    directions: Vec<Task<()>>,
}

impl Relay {
    /// Inserts a link emulator between the switch and a node. Turns off checksum offload on all
    /// nodes, because no hardware completes partial checksums of frames that pass a packet socket.
    ///
    /// # Errors
    /// If the laboratory has no switch, or if an interface or a packet socket cannot be set up.
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
            impairments: Arc::default(),
            counts: Arc::default(),
            stop: Arc::default(),
            directions: vec![],
        };
        for (number, (from, to)) in [(&*port, inner), (inner, &*port)].into_iter().enumerate() {
            let direction = Direction {
                from: open(switch, from)?,
                to: open(switch, to)?,
                random: Pattern::new(number as u64 + 1),
                delayed: BTreeMap::new(),
                sequence: 0,
                impairments: relay.impairments.clone(),
                counts: relay.counts.clone(),
            };
            let stop = relay.stop.clone();
            relay.directions.push(switch.spawn(move || direction.pass(&stop)));
        }
        Ok(relay)
    }

    /// Sets the impairments of datagrams that are received from now on.
    pub fn set(&self, impairments: Impairments) {
        *self.impairments.lock().unwrap_or_else(PoisonError::into_inner) = impairments;
    }

    /// Returns the counters, which continue to change.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Stops both directions. The node is disconnected afterwards.
    ///
    /// # Errors
    /// If a direction failed while it ran.
    pub fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        mem::take(&mut self.directions).into_iter().try_for_each(Task::join)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for direction in mem::take(&mut self.directions) {
            let _ = direction.join();
        }
    }
}

/// Forwarder of one direction of the link.
struct Direction {
    from: Socket,
    to: Socket,
    random: Pattern,
    /// Delayed frames by their time of sending and a sequence number.
    delayed: BTreeMap<(Instant, u64), Vec<u8>>,
    sequence: u64,
    impairments: Arc<Mutex<Impairments>>,
    counts: Arc<Counts>,
}

impl Direction {
    fn pass(mut self, stop: &AtomicBool) -> Result<()> {
        let mut buffer = vec![0; 1 << 16];
        let mut timeout = None;
        while !stop.load(Ordering::Relaxed) {
            let wanted = Some(if self.delayed.is_empty() {
                STOP_POLL_INTERVAL
            } else {
                DELAY_POLL_INTERVAL
            });
            if timeout != wanted {
                self.from.set_read_timeout(wanted)?;
                timeout = wanted;
            }
            match self.from.read(&mut buffer) {
                Ok(length) => self.forward(&buffer[..length])?,
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error).context("reading a frame"),
            }
            while let Some(first) = self.delayed.first_entry()
                && first.key().0 <= Instant::now()
            {
                let frame = first.remove();
                self.send(&frame)?;
            }
        }
        Ok(())
    }

    fn forward(&mut self, bytes: &[u8]) -> Result<()> {
        let frame = Frame { bytes: bytes.to_vec() };
        if frame.udp().is_none() {
            return self.send(bytes);
        }
        let impairments = *self.impairments.lock().unwrap_or_else(PoisonError::into_inner);
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        count(&self.counts.seen);
        if self.chance(impairments.loss_percent) {
            count(&self.counts.lost);
            return Ok(());
        }
        if self.chance(impairments.duplicate_percent) {
            count(&self.counts.duplicated);
            self.send(bytes)?;
        }
        if self.chance(impairments.delay_percent) {
            count(&self.counts.delayed);
            let by = impairments.max_delay.mul_f64(self.percent() as f64 / 100.0);
            self.sequence += 1;
            self.delayed.insert((Instant::now() + by, self.sequence), frame.bytes);
            return Ok(());
        }
        self.send(bytes)
    }

    fn send(&mut self, frame: &[u8]) -> Result<()> {
        match self.to.write(frame) {
            Err(error) if !is_transient(&error) => Err(error).context("sending a frame"),
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

/// Returns whether an error is temporary: no frame, a full queue, an interface that is down.
fn is_transient(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let codes = [Errno::NOBUFS, Errno::NETDOWN, Errno::INTR].map(Errno::raw_os_error);
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
        || error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

/// Opens a packet socket for the frames of one interface, without the frames that it sends.
fn open(ns: &Netns, interface: &str) -> Result<Socket> {
    let index = ns.sh(&format!("cat /sys/class/net/{interface}/ifindex"))?;
    let index: i32 = index.trim().parse().context("no index")?;
    ns.run(|| {
        // Protocol 0: the socket receives nothing before it is bound.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        let on: libc::c_int = 1;
        // SAFETY: PACKET_IGNORE_OUTGOING takes an int (packet(7)). The pointer and the length are
        // those of `on`, which lives until the call returns.
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
        // SAFETY: a sockaddr_storage has size and alignment for every kind of address. The fields
        // that are set make a valid sockaddr_ll, all others are zero, and the length is that of a
        // sockaddr_ll.
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
