//! The TUN device (linux/Documentation/networking/tuntap.rst): creation of a persistent device, its
//! queues, and their offloads.
//!
//! The `tun` crate owns each descriptor. It does not support IFF_MULTI_QUEUE, IFF_TUN_EXCL,
//! TUNGETIFF and TUNSETOFFLOAD, and its read and write functions need `&mut self` and have no
//! gather lists. This module makes these system calls itself (linux/if_tun.h).

use std::ffi::c_ulong;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tun::AbstractDevice;

use super::fallback::Fallback;
use super::link::{self, TunLink};

mod offload;

pub use offload::TunOffload;
use offload::set_best_offload;

/// Length of the virtio_net_hdr before every packet in bytes (linux/virtio_net.h).
pub const VNET_HEADER_LEN: usize = 10;

/// Maximum number of queues of one device, as in the kernel (MAX_TAP_QUEUES).
const MAX_QUEUES: usize = 256;

/// Maximum time to wait for the queues of another process to close.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(500);

/// Error of creating a TUN device or attaching to it.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The device file `/dev/net/tun` or the kernel module is missing.
    #[error(
        "/dev/net/tun is missing: load the kernel module (modprobe tun) or mount the device into \
         the container"
    )]
    NotFound,
    /// The interface does not exist.
    #[error("interface {name} does not exist: start the control process, which creates it")]
    NoDevice {
        /// Requested interface name.
        name: String,
    },
    /// The process lacks a privilege (EPERM, EACCES).
    #[error(
        "{context} is not permitted: run as root, or grant CAP_NET_ADMIN and access to /dev/net/tun"
    )]
    Permission {
        /// Failed action, for example "attaching a queue to skein0".
        context: String,
    },
    /// A TUN or TAP device of that name already exists.
    #[error(
        "TUN device {name} already exists: delete it (ip link delete {name}) or choose another name"
    )]
    Exists {
        /// Requested interface name.
        name: String,
    },
    /// The device has queues of another process.
    #[error(
        "another process uses TUN device {name} (attached queues: {queues}): stop the other data \
         process or choose another interface name"
    )]
    Busy {
        /// Interface name.
        name: String,
        /// Number of attached queues.
        queues: u32,
    },
    /// The interface is not a TUN or TAP device.
    #[error("{name} is {kind}, not a TUN device: choose another interface name")]
    NotATun {
        /// Requested interface name.
        name: String,
        /// Kind of the interface with an article, for example "a veth interface".
        kind: String,
    },
    /// The device has other properties than a device of Skein, and may belong to another program.
    #[error(
        "TUN device {name} was not created by Skein ({found}): delete it (ip link delete {name}) \
         or choose another interface name"
    )]
    Flags {
        /// Interface name.
        name: String,
        /// Differences, for users.
        found: String,
    },
    /// The kernel does not accept the interface name.
    #[error("\"{name}\" is not a valid interface name: {reason}")]
    Name {
        /// Requested interface name.
        name: String,
        /// Violated rule.
        reason: &'static str,
    },
    /// Any other error of a system call.
    #[error("{context}: {source}")]
    Io {
        /// Failed action, for example "setting the offloads of skein0".
        context: String,
        /// Error of the system call.
        source: io::Error,
    },
}

/// Flags of a device of Skein (TUNSETIFF).
const FLAGS: i32 = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;

/// Creates a persistent multi-queue TUN device with a virtio_net_hdr and closes its descriptor. The
/// device is down and has no address. Only the effective user of this process, or a process with
/// CAP_NET_ADMIN, can attach to the device.
///
/// # Errors
/// [`TunError::Exists`] or [`TunError::NotATun`] if an interface of that name exists;
/// [`TunError::Name`] if the name is invalid; [`TunError::NotFound`] if `/dev/net/tun` or its
/// kernel module is missing; [`TunError::Permission`] for EPERM and EACCES; [`TunError::Io`] for
/// all other errors.
pub fn create_persistent(name: &str) -> Result<(), TunError> {
    check_name(name)?;
    if let Some(link) = find(name)? {
        return Err(match link.kind.as_deref() {
            Some("tun") => TunError::Exists { name: name.into() },
            kind => not_a_tun(name, kind),
        });
    }
    let mut request = InterfaceRequest::new(name, FLAGS | libc::IFF_TUN_EXCL);
    let fd = open_clone_device()?;
    request.set_interface(fd.as_fd()).map_err(|source| match source.raw_os_error() {
        // Another process created the device after the look-up.
        Some(libc::EBUSY) => TunError::Exists { name: name.into() },
        _ => failed(format!("creating TUN device {name}"), source),
    })?;
    let mut device = wrap_descriptor(fd, name)?;
    // Without an owner, every user could attach a queue, and read and spoof packets of pods.
    let owner = rustix::process::geteuid().as_raw();
    device
        .user(owner as i32)
        .map_err(|source| failed(format!("setting the owner of {name}"), source.into()))?;
    device.persist().map_err(|source| failed(format!("making {name} persistent"), source.into()))
}

/// Queues of a TUN device, with the result of the choice of its offloads.
#[derive(Debug)]
pub struct OpenQueues {
    /// Attached queues.
    pub queues: Vec<TunQueue>,
    /// Enabled offloads of the device.
    pub offload: TunOffload,
    /// Disabled offloads ([`Feature::TUN`](crate::fallback::Feature::TUN)) with their reasons.
    pub fallbacks: Vec<Fallback>,
}

/// Attaches `queues` (1 to 256) new queues to an existing device, and enables the offloads that
/// `allowed` permits and the kernel supports.
///
/// A device that another process uses is tried again for 500 ms, because the process may be closing
/// it.
///
/// # Errors
/// [`TunError::NoDevice`] if the device does not exist; [`TunError::NotATun`] or
/// [`TunError::Flags`] if it was not created by [`create_persistent`]; [`TunError::Busy`] if
/// another process uses it; [`TunError::Name`] if the name is invalid; [`TunError::NotFound`] if
/// `/dev/net/tun` or its kernel module is missing; [`TunError::Permission`] for EPERM and EACCES;
/// [`TunError::Io`] for a number of queues outside 1 to 256, and for all other errors.
pub fn open_queues(name: &str, queues: usize, allowed: TunOffload) -> Result<OpenQueues, TunError> {
    check_name(name)?;
    if !(1..=MAX_QUEUES).contains(&queues) {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "1 to 256 queues are allowed");
        return Err(failed(format!("attaching {queues} queues to {name}"), source));
    }
    let index = wait_until_unused(name)?;
    let queues = (0..queues).map(|_| attach(name, index)).collect::<Result<Vec<_>, _>>()?;
    // The mask of the last queue applies to the whole device, so that all queues get the same mask.
    let (offload, fallbacks) = set_best_offload(allowed, |offload| {
        queues.iter().try_for_each(|queue| queue.set_offload(offload))
    })
    .map_err(|source| failed(format!("setting the offloads of {name}"), source))?;
    Ok(OpenQueues { queues, offload, fallbacks })
}

/// Returns the queue of a descriptor that another process opened and passed to this process. `name`
/// is used in errors and not checked.
///
/// # Errors
/// [`TunError::Io`] if the `tun` crate refuses the descriptor.
pub fn inherit_queue(fd: OwnedFd, name: &str) -> Result<TunQueue, TunError> {
    Ok(TunQueue { device: wrap_descriptor(fd, name)? })
}

/// Waits until no other process uses the device, at most [`RELEASE_TIMEOUT`]. Fails at once if the
/// device does not exist or does not have the flags of a device of Skein. Returns its interface
/// index. TUNSETIFF itself would create a missing device, and would attach to an unused
/// device with other flags.
fn wait_until_unused(name: &str) -> Result<u32, TunError> {
    let start = Instant::now();
    loop {
        let link = find(name)?.ok_or_else(|| TunError::NoDevice { name: name.into() })?;
        if link.kind.as_deref() != Some("tun") {
            return Err(not_a_tun(name, link.kind.as_deref()));
        }
        match check_flags(name, &link.tun.unwrap_or_default()) {
            // A child of the process that closed the device has a copy of the descriptor between
            // fork and exec.
            Err(TunError::Busy { .. }) if start.elapsed() < RELEASE_TIMEOUT => {
                thread::sleep(Duration::from_millis(5));
            }
            result => return result.map(|()| link.index),
        }
    }
}

/// Compares the properties of a device with those of a device of Skein without queues.
fn check_flags(name: &str, tun: &TunLink) -> Result<(), TunError> {
    let wanted = TunLink {
        tap: false,
        packet_information: false,
        vnet_header: true,
        persistent: true,
        multi_queue: true,
        queues: tun.queues,
    };
    if *tun != wanted {
        let differences = [
            (tun.tap, "it is a TAP device"),
            (tun.packet_information, "it has packet information"),
            (!tun.vnet_header, "it has no vnet header"),
            (!tun.persistent, "it is not persistent"),
            (!tun.multi_queue, "it has a single queue"),
        ];
        let found = differences.iter().filter(|(differs, _)| *differs).map(|(_, what)| *what);
        let found = found.collect::<Vec<_>>().join(", ");
        return Err(TunError::Flags { name: name.into(), found });
    }
    if tun.queues > 0 {
        return Err(TunError::Busy { name: name.into(), queues: tun.queues });
    }
    Ok(())
}

/// Attaches one queue to the device with the given interface index.
fn attach(name: &str, index: u32) -> Result<TunQueue, TunError> {
    let fd = open_clone_device()?;
    let mut request = InterfaceRequest::new(name, FLAGS);
    request
        .set_interface(fd.as_fd())
        .map_err(|source| failed(format!("attaching a queue to {name}"), source))?;
    let query_error = |source| failed(format!("reading the properties of {name}"), source);
    let (found_name, found) = InterfaceRequest::query(fd.as_fd()).map_err(query_error)?;
    // If the device was deleted after the look-up, TUNSETIFF created a new one, which is not
    // persistent.
    if found & libc::IFF_PERSIST == 0 {
        return Err(TunError::NoDevice { name: name.into() });
    }
    if found & FLAGS != FLAGS || found_name != name {
        let found = format!("{found_name} with flags {found:#06x}");
        return Err(TunError::Flags { name: name.into(), found });
    }
    set_vnet_header_len(fd.as_fd())
        .map_err(|source| failed(format!("setting the vnet header of {name}"), source))?;
    let device = wrap_descriptor(fd, name)?;
    let found_index = device.tun_index().map_err(|source| query_error(source.into()))?;
    if u32::try_from(found_index) != Ok(index) {
        let found = format!("its index changed from {index} to {found_index}");
        return Err(TunError::Flags { name: name.into(), found });
    }
    Ok(TunQueue { device })
}

/// Passes a configured descriptor to the `tun` crate, which closes it on drop.
fn wrap_descriptor(fd: OwnedFd, name: &str) -> Result<tun::Device, TunError> {
    let mut configuration = tun::Configuration::default();
    configuration.tun_name(name).raw_fd(fd.into_raw_fd()).close_fd_on_drop(true);
    tun::Device::new(&configuration)
        .map_err(|source| failed(format!("using the descriptor of {name}"), source.into()))
}

/// Nonblocking queue of a TUN device. Each read and write transfers one packet with its
/// virtio_net_hdr.
pub struct TunQueue {
    device: tun::Device,
}

impl TunQueue {
    /// Reads one packet and returns its length with the header in bytes. The kernel cuts a packet
    /// that is longer than `buf`; [`VNET_HEADER_LEN`] + 65,535 bytes suffice for every packet.
    ///
    /// # Errors
    /// `WouldBlock` if no packet is queued; other errors of read(2).
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(self, buf)?)
    }

    /// Writes one packet, header first, from at most 1,024 parts (IOV_MAX). Returns the number of
    /// written bytes.
    ///
    /// # Errors
    /// The error of writev(2), for example EINVAL for an invalid header.
    pub fn writev(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(rustix::io::writev(self, parts)?)
    }

    /// Sets the offloads of the whole device, for all of its queues.
    ///
    /// # Errors
    /// EINVAL if the kernel does not support one of the offloads; other errors of ioctl(2).
    pub fn set_offload(&self, offload: TunOffload) -> io::Result<()> {
        set_offload(self.as_fd(), offload.mask())
    }
}

impl std::fmt::Debug for TunQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TunQueue").field("fd", &self.device.as_raw_fd()).finish_non_exhaustive()
    }
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the device owns the descriptor, closes it only on drop, and outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }
}

/// Checks the rules of the kernel for interface names (`dev_valid_name`), and accepts printable
/// ASCII characters only.
fn check_name(name: &str) -> Result<(), TunError> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() >= libc::IFNAMSIZ {
        "it is longer than 15 bytes"
    } else if name == "." || name == ".." {
        "it is the name of a directory"
    } else if name.bytes().any(|byte| !byte.is_ascii_graphic() || b"/:%".contains(&byte)) {
        // The kernel treats a name with '%' as a pattern and chooses a name itself.
        "only printable ASCII characters except '/', ':' and '%' are allowed"
    } else {
        return Ok(());
    };
    Err(TunError::Name { name: name.into(), reason })
}

fn find(name: &str) -> Result<Option<link::Link>, TunError> {
    link::find(name).map_err(|source| failed(format!("looking up the interface {name}"), source))
}

fn not_a_tun(name: &str, kind: Option<&str>) -> TunError {
    let kind = kind
        .map_or("a hardware or loopback interface".into(), |kind| format!("a {kind} interface"));
    TunError::NotATun { name: name.into(), kind }
}

fn failed(context: String, source: io::Error) -> TunError {
    match source.kind() {
        io::ErrorKind::PermissionDenied => TunError::Permission { context },
        _ => TunError::Io { context, source },
    }
}

fn open_clone_device() -> Result<OwnedFd, TunError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open("/dev/net/tun", flags, Mode::empty()).map_err(|errno| match errno {
        // The device file may exist without the kernel module.
        Errno::NOENT | Errno::NODEV | Errno::NXIO => TunError::NotFound,
        _ => failed("opening /dev/net/tun".into(), errno.into()),
    })
}

/// `struct ifreq` with the two fields that the TUN driver uses.
struct InterfaceRequest(libc::ifreq);

impl InterfaceRequest {
    /// Returns a request with a name that [`check_name`] accepts; a longer name is cut.
    fn new(name: &str, flags: i32) -> Self {
        // SAFETY: ifreq consists of integers, arrays and pointers, for which zero is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays zero.
        let room = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        // The field has 16 bits. IFF_TUN_EXCL (0x8000) is its sign bit.
        request.ifr_ifru.ifru_flags = flags as u16 as i16;
        Self(request)
    }

    fn set_interface(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: TUNSETIFF reads and writes the ifreq, which is borrowed for the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut self.0) })
    }

    /// Returns name and flags of the device to which a descriptor is attached (TUNGETIFF).
    fn query(fd: BorrowedFd<'_>) -> io::Result<(String, i32)> {
        let mut request = Self::new("", 0);
        // SAFETY: TUNGETIFF writes the ifreq, which is borrowed for the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request.0) })?;
        let name = request.0.ifr_name.iter().map(|&byte| byte as u8);
        let name = name.take_while(|&byte| byte != 0).map(char::from).collect();
        // SAFETY: the whole union was zeroed, so that every field is initialised; TUNGETIFF wrote
        // the flags.
        let flags = unsafe { request.0.ifr_ifru.ifru_flags };
        Ok((name, i32::from(flags as u16)))
    }
}

fn set_vnet_header_len(fd: BorrowedFd<'_>) -> io::Result<()> {
    let len = VNET_HEADER_LEN as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which is borrowed for the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })
}

fn set_offload(fd: BorrowedFd<'_>, mask: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value and accesses no memory of this process.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(mask)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
