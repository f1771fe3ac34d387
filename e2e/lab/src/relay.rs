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
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(20);
const DELAY_POLL_INTERVAL: Duration = Duration::from_millis(1);

const ETH_P_ALL: u16 = 0x0003;

/// What becomes of datagrams; other frames (neighbours' questions) all pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct Impairments {
    /// Of a hundred, so many are lost…
    pub loss_percent: u64,
    /// …so many come twice…
    pub duplicate_percent: u64,
    /// …and so many come late,
    pub delay_percent: u64,
    /// by up to this.
    pub max_delay: Duration,
}

/// What has become of datagrams, both directions together.
#[derive(Debug, Default)]
pub struct Counts {
    /// That came to the cable.
    pub seen: AtomicU64,
    /// That did not leave it.
    pub lost: AtomicU64,
    /// That left it twice.
    pub duplicated: AtomicU64,
    /// That left it behind later ones.
    pub delayed: AtomicU64,
}

/// A cable at work; as good as any until there is [`Impairments`].
pub struct Relay {
    impairments: Arc<Mutex<Impairments>>,
    counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
    directions: Vec<Task<()>>,
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

    /// Has other impairments from now on.
    pub fn set(&self, impairments: Impairments) {
        *self.impairments.lock().unwrap_or_else(PoisonError::into_inner) = impairments;
    }

    /// What has become of datagrams so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Takes it out of use; an error where it has failed.
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

/// One direction.
struct Direction {
    from: Socket,
    to: Socket,
    random: Pattern,
    /// Frames that come late, by their time.
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

/// No frame, a full queue, or a cable that is out at the moment.
fn is_transient(error: &std::io::Error) -> bool {
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
