//! The TUN device: made once and persistent, then attached to queue by queue.
//!
//! The `tun` crate owns every descriptor here and does what it can do with it. It does not know
//! IFF_MULTI_QUEUE, IFF_TUN_EXCL, TUNGETIFF or TUNSETOFFLOAD, and its own read and write know
//! neither `&self` nor gather lists; for those, this module asks the kernel itself
//! (linux/if_tun.h).

use std::ffi::c_ulong;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tun::AbstractDevice;

use super::link::{self, TunLink};

/// Length of the virtio_net_hdr in front of every packet, in bytes.
pub const VNET_HEADER_LEN: usize = 10;

/// The kernel's limit of queues of one device (MAX_TAP_QUEUES).
const MAX_QUEUES: usize = 256;

/// How long a device that was in use may take to be released.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(500);

/// Which offloads are, or may be, in force on a device. Without `checksum` there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TunOffload {
    /// Packets may be read and written with a partial checksum (TUN_F_CSUM).
    pub checksum: bool,
    /// TCP superpackets may be read (TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN).
    pub tso: bool,
    /// UDP superpackets may be read (TUN_F_USO4, TUN_F_USO6; Linux 6.2).
    pub uso: bool,
}

impl TunOffload {
    /// Everything that this version knows.
    pub const ALL: Self = Self { checksum: true, tso: true, uso: true };
    /// Nothing: every packet is one segment with a full checksum.
    pub const NONE: Self = Self { checksum: false, tso: false, uso: false };

    fn mask(self) -> u32 {
        if !self.checksum {
            return 0;
        }
        let mut mask = libc::TUN_F_CSUM;
        if self.tso {
            mask |= libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        }
        if self.uso {
            // One without the other is EINVAL.
            mask |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
        }
        mask
    }
}

/// A rung of the capability ladder that is not in use, and why.
pub type Fallback = (&'static str, String);

/// Names of the kernels that a [`Fallback`] of [`open_queues`] can have.
pub const TUN_OFFLOADS: [&str; 3] = ["tun_uso", "tun_tso", "tun_checksum"];

/// Why a TUN device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The clone device is not there.
    #[error(
        "/dev/net/tun is missing: load the kernel module (modprobe tun) or mount the device into \
         the container"
    )]
    NotFound,
    /// There is no interface of that name.
    #[error("there is no interface {name}: start the control process, which makes it")]
    NoDevice {
        /// The name asked for.
        name: String,
    },
    /// The kernel refused for want of privilege.
    #[error("{context} was refused: run as root or grant CAP_NET_ADMIN (and the device itself)")]
    Permission {
        /// What was tried.
        context: String,
    },
    /// A TUN device of that name exists already.
    #[error(
        "a TUN device {name} exists already: delete it (ip link delete {name}) or choose another name"
    )]
    Exists {
        /// The name asked for.
        name: String,
    },
    /// Another process has queues of the device open.
    #[error(
        "{queues} queue(s) of {name} are open in another process: stop the other data process or \
         choose another interface name"
    )]
    Busy {
        /// The device.
        name: String,
        /// Queues that are open.
        queues: u32,
    },
    /// The name belongs to an interface of another kind.
    #[error("{name} is {kind}, not a TUN device: choose another interface name")]
    NotATun {
        /// The name asked for.
        name: String,
        /// What it is, with its article.
        kind: String,
    },
    /// A TUN device of that name has other properties than ours; it may be another program's.
    #[error(
        "the TUN device {name} is not one of Skein's ({found}): delete it (ip link delete {name}) \
         or choose another interface name"
    )]
    Flags {
        /// The device.
        name: String,
        /// What differs.
        found: String,
    },
    /// Not a possible interface name.
    #[error("\"{name}\" cannot be an interface name: {reason}")]
    Name {
        /// The name asked for.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Any other error.
    #[error("{context}: {source}")]
    Io {
        /// What was tried.
        context: String,
        /// What the kernel said.
        source: io::Error,
    },
}

const FLAGS: i32 = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;

/// Makes a persistent multi-queue TUN device with a virtio_net_hdr and closes it again. It is down
/// and has no address; only this process's user, or CAP_NET_ADMIN, may attach to it. Refuses if any
/// interface of that name exists.
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
        // Somebody made it since we looked.
        Some(libc::EBUSY) => TunError::Exists { name: name.into() },
        _ => failed(format!("making the TUN device {name}"), source),
    })?;
    let mut device = wrap_descriptor(fd, name)?;
    // Without an owner, any user could attach a queue, and read and forge the pods' packets.
    let owner = rustix::process::geteuid().as_raw();
    device
        .user(owner as i32)
        .map_err(|source| failed(format!("setting the owner of {name}"), source.into()))?;
    device.persist().map_err(|source| failed(format!("making {name} persistent"), source.into()))
}

/// Attaches `queues` (1 to [`MAX_QUEUES`]) new queues to the existing device and puts the best
/// offloads in force that the kernel has and `allowed` permits. Returns the queues, what is in
/// force, and why the rest (`tun_uso`, `tun_tso`, `tun_checksum`) is not.
///
/// Refuses a device that is of another kind, has other flags, or is open already (after half a
/// second, for one that is just being closed).
pub fn open_queues(
    name: &str,
    queues: usize,
    allowed: TunOffload,
) -> Result<(Vec<TunQueue>, TunOffload, Vec<Fallback>), TunError> {
    check_name(name)?;
    if !(1..=MAX_QUEUES).contains(&queues) {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "between 1 and 256 are possible");
        return Err(failed(format!("attaching {queues} queues to {name}"), source));
    }
    let index = wait_for_device(name)?;
    let mut open = Vec::with_capacity(queues);
    for _ in 0..queues {
        open.push(attach(name, index)?);
    }
    // Another queue with another mask would change the whole device: the same for all.
    let (offload, fallbacks) = set_best_offload(allowed, |offload| {
        open.iter().try_for_each(|queue| queue.set_offload(offload))
    })
    .map_err(|source| failed(format!("setting the offloads of {name}"), source))?;
    Ok((open, offload, fallbacks))
}

/// A queue that another process has opened and left.
pub fn inherit_queue(fd: OwnedFd, name: &str) -> Result<TunQueue, TunError> {
    Ok(TunQueue { device: wrap_descriptor(fd, name)? })
}

/// Checks that the device is there, ours and unused, and gives its index. TUNSETIFF would make a
/// missing device, and would take over an unused one whatever its flags.
fn wait_for_device(name: &str) -> Result<u32, TunError> {
    let start = Instant::now();
    loop {
        let link = find(name)?.ok_or_else(|| TunError::NoDevice { name: name.into() })?;
        if link.kind.as_deref() != Some("tun") {
            return Err(not_a_tun(name, link.kind.as_deref()));
        }
        match check_flags(name, &link.tun.unwrap_or_default()) {
            // A process that has closed the device may have started a program meanwhile, which
            // holds a copy of the descriptor until it runs.
            Err(TunError::Busy { .. }) if start.elapsed() < RELEASE_TIMEOUT => {
                thread::sleep(Duration::from_millis(5));
            }
            result => return result.map(|()| link.index),
        }
    }
}

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

fn attach(name: &str, index: u32) -> Result<TunQueue, TunError> {
    let fd = open_clone_device()?;
    let mut request = InterfaceRequest::new(name, FLAGS);
    request
        .set_interface(fd.as_fd())
        .map_err(|source| failed(format!("attaching a queue to {name}"), source))?;
    let verify = |source| failed(format!("asking what {name} is"), source);
    let (found_name, found) = InterfaceRequest::query(fd.as_fd()).map_err(verify)?;
    // If the device went since we looked, the kernel has just made one that ends with this queue.
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
    let found_index = device.tun_index().map_err(|source| verify(source.into()))?;
    if u32::try_from(found_index) != Ok(index) {
        let found = format!("its index changed from {index} to {found_index} meanwhile");
        return Err(TunError::Flags { name: name.into(), found });
    }
    Ok(TunQueue { device })
}

/// Hands a configured descriptor to the `tun` crate, which closes it.
fn wrap_descriptor(fd: OwnedFd, name: &str) -> Result<tun::Device, TunError> {
    let mut configuration = tun::Configuration::default();
    configuration.tun_name(name).raw_fd(fd.into_raw_fd()).close_fd_on_drop(true);
    tun::Device::new(&configuration)
        .map_err(|source| failed(format!("taking over the descriptor of {name}"), source.into()))
}

/// Steps down from `allowed` until `set` takes it.
fn set_best_offload(
    allowed: TunOffload,
    set: impl Fn(TunOffload) -> io::Result<()>,
) -> io::Result<(TunOffload, Vec<Fallback>)> {
    let mut fallbacks = Vec::new();
    let configured = || "off in the configuration".to_owned();
    let mut offload = allowed;
    if !allowed.checksum {
        offload = TunOffload::NONE;
        fallbacks.push(("tun_checksum", configured()));
    }
    for (name, on) in [("tun_tso", allowed.tso), ("tun_uso", allowed.uso)] {
        if !on {
            fallbacks.push((name, configured()));
        } else if !allowed.checksum {
            fallbacks.push((name, "needs tun_checksum, which is off".to_owned()));
        }
    }
    loop {
        let Err(error) = set(offload) else { return Ok((offload, fallbacks)) };
        let why = format!("the kernel refused it: {error}");
        if offload.uso {
            offload.uso = false;
            fallbacks.push(("tun_uso", why));
        } else if offload.tso {
            offload.tso = false;
            fallbacks.push(("tun_tso", why));
        } else if offload.checksum {
            offload.checksum = false;
            fallbacks.push(("tun_checksum", why));
        } else {
            return Err(error);
        }
    }
}

/// One queue of the device: nonblocking, a packet with its virtio_net_hdr a call.
pub struct TunQueue {
    device: tun::Device,
}

impl TunQueue {
    /// Reads one packet with its header; WouldBlock when the queue is dry. A packet longer than
    /// `buf` is cut: give [`VNET_HEADER_LEN`] + 65,535 bytes.
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(self, buf)?)
    }

    /// Writes one packet, its header first, from the parts (at most 1,024).
    pub fn writev(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(rustix::io::writev(self, parts)?)
    }

    /// Puts other offloads in force, on the whole device.
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
        // SAFETY: the device owns the descriptor, closes it only when dropped, and outlives the
        // borrow.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }
}

fn check_name(name: &str) -> Result<(), TunError> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() >= libc::IFNAMSIZ {
        "it is longer than 15 bytes"
    } else if name == "." || name == ".." {
        "it is a directory"
    } else if name.bytes().any(|byte| !byte.is_ascii_graphic() || b"/:%".contains(&byte)) {
        // The kernel would take a per cent sign for a pattern and choose a name itself.
        "only printable ASCII characters other than '/', ':' and '%' are possible"
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
        // The file may be there without the module behind it.
        Errno::NOENT | Errno::NODEV | Errno::NXIO => TunError::NotFound,
        _ => failed("opening /dev/net/tun".into(), errno.into()),
    })
}

/// `struct ifreq` with the two fields that the TUN driver uses.
struct InterfaceRequest(libc::ifreq);

impl InterfaceRequest {
    /// `name` has passed [`check_name`]; a longer one would be cut.
    fn new(name: &str, flags: i32) -> Self {
        // SAFETY: ifreq is plain integers, arrays and pointers, for all of which zero is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays zero.
        let room = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        // The upper half of the int is not used: 0x8000 (IFF_TUN_EXCL) is the sign bit.
        request.ifr_ifru.ifru_flags = flags as u16 as i16;
        Self(request)
    }

    fn set_interface(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: TUNSETIFF reads and writes the ifreq, which is borrowed for the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut self.0) })
    }

    /// Name and flags of the device that a descriptor is attached to.
    fn query(fd: BorrowedFd<'_>) -> io::Result<(String, i32)> {
        let mut request = Self::new("", 0);
        // SAFETY: TUNGETIFF writes the ifreq, which is borrowed for the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request.0) })?;
        let name = request.0.ifr_name.iter().map(|&byte| byte as u8);
        let name = name.take_while(|&byte| byte != 0).map(char::from).collect();
        // SAFETY: the driver has written the flags, and the union was zeroed as a whole before.
        let flags = unsafe { request.0.ifr_ifru.ifru_flags };
        Ok((name, i32::from(flags as u16)))
    }
}

fn set_vnet_header_len(fd: BorrowedFd<'_>) -> io::Result<()> {
    let len = VNET_HEADER_LEN as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives across the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })
}

fn set_offload(fd: BorrowedFd<'_>, mask: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(mask)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Descends against a kernel that knows only `known`; gives the masks that were tried, too.
    fn against(known: u32, allowed: TunOffload) -> (TunOffload, Vec<Fallback>, Vec<u32>) {
        let tried = RefCell::new(Vec::new());
        let (offload, fallbacks) = set_best_offload(allowed, |offload| {
            tried.borrow_mut().push(offload.mask());
            match offload.mask() & !known {
                0 => Ok(()),
                _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            }
        })
        .unwrap();
        (offload, fallbacks, tried.into_inner())
    }

    #[test]
    fn each_kernel_gets_the_most_that_it_knows() {
        let no_uso = TunOffload { uso: false, ..TunOffload::ALL };
        let checksum = TunOffload { tso: false, ..no_uso };
        let kernels = [TunOffload::ALL, no_uso, checksum, TunOffload::NONE];
        for (i, known) in kernels.iter().enumerate() {
            let (offload, fallbacks, tried) = against(known.mask(), TunOffload::ALL);
            assert_eq!(offload, *known);
            assert_eq!(
                tried,
                kernels[..=i].iter().map(|offload| offload.mask()).collect::<Vec<_>>()
            );
            let lost: Vec<_> = fallbacks.iter().map(|(name, _)| *name).collect();
            assert_eq!(lost, ["tun_uso", "tun_tso", "tun_checksum"][..i]);
            assert!(fallbacks.iter().all(|(_, why)| why.contains("refused")));
        }
    }

    #[test]
    fn what_the_configuration_forbids_is_not_tried() {
        let allowed = TunOffload { tso: false, ..TunOffload::ALL };
        let (offload, fallbacks, tried) = against(u32::MAX, allowed);
        assert_eq!((offload, tried), (allowed, vec![allowed.mask()]));
        assert_eq!(fallbacks, [("tun_tso", "off in the configuration".to_owned())]);
    }

    #[test]
    fn a_device_that_takes_no_mask_at_all_is_an_error() {
        let refuse = |_| Err(io::Error::from_raw_os_error(libc::EBADFD));
        let error = set_best_offload(TunOffload::ALL, refuse).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
    }
}
