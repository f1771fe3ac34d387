//! Detection of a cloned or restored virtual machine. Two machines that continue from one snapshot
//! would use the same keys with the same counters, so all sessions end.
//!
//! The kernel announces a new generation by the uevent `NEW_VMGENID` (drivers/virt/vmgenid.c).
//! Without an announcement, the wall clock shows the restore, because a time server corrects it,
//! whereas CLOCK_BOOTTIME does not include the time since the snapshot.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recvfrom, socket_with};
use skein_core::time::Time;

use super::queue::{ToManager, ToManagerQueue};

/// Multicast group of the kernel's own uevents; the other group is udev's.
const KERNEL_GROUP: u32 = 1;
/// Length of the receive buffer, bytes. The kernel's messages have at most 2048 bytes of variables
/// (UEVENT_BUFFER_SIZE) after the path.
const MESSAGE_LEN: usize = 8192;
/// Jump of the wall clock ahead of CLOCK_BOOTTIME beyond which sessions end.
const MAX_CLOCK_JUMP: Duration = Duration::from_secs(10);

/// Subscription to the kernel's uevents.
#[derive(Debug)]
pub(super) struct Uevents(OwnedFd);

impl Uevents {
    /// Subscribes to the uevents of the kernel.
    ///
    /// # Errors
    /// The kernel's error if it has no uevents in this network namespace, or refuses the socket.
    pub(super) fn subscribe() -> io::Result<Self> {
        let protocol = Some(netlink::KOBJECT_UEVENT);
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Self(socket))
    }

    /// Notifies the manager of each new generation of the virtual machine, in a thread of its own.
    ///
    /// # Errors
    /// The kernel's error if the thread cannot be started.
    pub(super) fn watch(self, manager: ToManagerQueue) -> io::Result<()> {
        let watch = move || {
            let mut buffer = vec![0; MESSAGE_LEN];
            loop {
                let reason = match self.receive(&mut buffer) {
                    Ok(message) if is_new_generation(message) => {
                        "the virtual machine has a new generation"
                    }
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                        "uevents were lost, possibly that of a new generation"
                    }
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                        return tracing::error!(%error, "cannot receive uevents");
                    }
                    _ => continue,
                };
                if manager.send(ToManager::EndSessions { reason }).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("vm-generation".to_owned()).spawn(watch).map(drop)
    }

    /// Receives a message of the kernel; empty if the sender is a process.
    ///
    /// # Errors
    /// The error of recvfrom(2); ENOBUFS if messages were lost.
    fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let (message, _, sender) = recvfrom(&self.0, &mut *buffer, RecvFlags::empty())?;
        let sender = sender.and_then(|sender| SocketAddrNetlink::try_from(sender).ok());
        let is_kernel = sender.is_some_and(|sender| sender.pid() == 0);
        Ok(buffer.get(..if is_kernel { message } else { 0 }).unwrap_or_default())
    }
}

/// Returns whether a uevent (`ACTION@PATH`, then `KEY=VALUE`, each with a final zero) announces a
/// new generation of the virtual machine. A uevent that a process has requested by a write to
/// `uevent` in sysfs has other keys (`SYNTH_ARG_…`).
pub(crate) fn is_new_generation(message: &[u8]) -> bool {
    let mut fields = message.split(|byte| *byte == 0);
    let is_uevent = fields.next().is_some_and(|first| first.contains(&b'@'));
    is_uevent && fields.any(|field| field == b"NEW_VMGENID=1")
}

/// Comparison of the wall clock with CLOCK_BOOTTIME.
#[derive(Debug, Default)]
pub(super) struct ClockWatch {
    last: Option<Time>,
}

impl ClockWatch {
    /// Returns whether the wall clock has advanced by more than [`MAX_CLOCK_JUMP`] beyond
    /// CLOCK_BOOTTIME since the previous call.
    pub(super) fn has_jumped(&mut self, now: Time) -> bool {
        let Some(last) = self.last.replace(now) else { return false };
        let expected = last.wall.saturating_add(now.mono.saturating_sub(last.mono));
        now.wall.saturating_sub(expected) > MAX_CLOCK_JUMP
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A uevent of the device `vmgenid` as Linux 6.18 sends it (recorded), with `extra` where the
    /// kernel puts the variables of the driver.
    fn uevent(extra: &str) -> Vec<u8> {
        format!(
            "change@/devices/platform/VMGENCTR:00\0ACTION=change\0\
             DEVPATH=/devices/platform/VMGENCTR:00\0SUBSYSTEM=platform\0{extra}DRIVER=vmgenid\0\
             MODALIAS=acpi:VMGENCTR:VM_GEN_COUNTER:\0SEQNUM=820\0"
        )
        .into_bytes()
    }

    #[test]
    fn new_generation_is_recognised() {
        assert!(is_new_generation(&uevent("NEW_VMGENID=1\0")));
        for other in [
            uevent("SYNTH_UUID=0\0"),
            uevent("SYNTH_ARG_NEW_VMGENID=1\0"),
            uevent("NEW_VMGENID=12\0"),
            b"NEW_VMGENID=1\0".to_vec(),
            b"libudev\0NEW_VMGENID=1\0".to_vec(),
            Vec::new(),
        ] {
            assert!(!is_new_generation(&other), "{:?}", String::from_utf8_lossy(&other));
        }
    }

    #[test]
    fn clock_ahead_by_more_than_10_seconds_is_a_jump() {
        let at = |mono: u64, wall: u64| Time {
            mono: Duration::from_secs(mono),
            wall: Duration::from_secs(wall),
        };
        let mut watch = ClockWatch::default();
        assert!(!watch.has_jumped(at(100, 1_000_000)), "The first reading cannot be a jump.");
        assert!(!watch.has_jumped(at(4000, 1_003_900)), "Both clocks have advanced by 3900 s.");
        assert!(!watch.has_jumped(at(4001, 1_003_911)), "A difference of 10 s is not a jump.");
        assert!(watch.has_jumped(at(4002, 1_003_923)), "A difference of 11 s is a jump.");
        assert!(!watch.has_jumped(at(4003, 1_003_924)), "A jump must count once.");
        assert!(!watch.has_jumped(at(4004, 5)), "A clock that is set back is not a jump.");
        assert!(watch.has_jumped(at(4005, 1_003_924)));
    }

    /// The kernel delivers uevents to this process. A process cannot make the kernel announce a new
    /// generation, so a uevent of the loopback interface stands in for the announcement.
    #[test]
    fn uevents_of_the_kernel_are_received() {
        let uevents = Uevents::subscribe().unwrap();
        std::fs::write("/sys/class/net/lo/uevent", "change").unwrap();
        let mut buffer = vec![0; MESSAGE_LEN];
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            let message = uevents.receive(&mut buffer).unwrap();
            assert!(!is_new_generation(message));
            if message.starts_with(b"change@/devices/virtual/net/lo\0") {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "The uevent must arrive within 10 s.");
        }
    }
}
