//! Receivers that discard a flood: the lower bound of the cost of any program that receives it.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};

use crate::{Netns, Task};

/// Messages of one recvmmsg(2), as many as a lane of the data process receives.
const MESSAGES: usize = 16;
/// Buffer of each message in bytes, as long as a lane's.
const BUFFER_LEN: usize = 65_536;
/// Receive buffer of the socket in bytes, the default of `underlay.receive_buffer`.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Interval at which the receiver checks whether it must stop.
const STOP_INTERVAL: Duration = Duration::from_millis(50);

/// Binds a socket with the smallest receive buffer. Nothing reads the socket, so that the kernel
/// drops a flood.
///
/// # Errors
/// The address cannot be bound in the namespace.
pub fn unread(netns: &Netns, at: SocketAddr) -> Result<UdpSocket> {
    let socket = netns.run(|| UdpSocket::bind(at))?.with_context(|| format!("bind {at}"))?;
    set_socket_recv_buffer_size(&socket, 1).context("SO_RCVBUF")?;
    Ok(socket)
}

/// A thread that receives with recvmmsg(2) and UDP_GRO, as a lane of the data process does, and
/// reads nothing of what it receives.
pub struct Sink {
    stop: Arc<AtomicBool>,
    reader: Task<u64>,
}

impl Sink {
    /// Binds `at` in the namespace and starts the thread.
    ///
    /// # Errors
    /// The address cannot be bound in the namespace, or the kernel refuses a socket option.
    pub fn start(netns: &Netns, at: SocketAddr) -> Result<Self> {
        let socket = netns.run(|| UdpSocket::bind(at))?.with_context(|| format!("bind {at}"))?;
        set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER).context("SO_RCVBUFFORCE")?;
        set_gro(&socket).context("UDP_GRO")?;
        socket.set_read_timeout(Some(STOP_INTERVAL))?;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let reader = netns.spawn(move || Ok(discard(&socket, &flag)));
        Ok(Self { stop, reader })
    }

    /// Stops the thread and returns the number of received messages.
    ///
    /// # Errors
    /// The thread has panicked.
    pub fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.reader.join()
    }
}

fn set_gro(socket: &UdpSocket) -> std::io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: UDP_GRO takes an int of the length given, which lives until the call ends.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_GRO,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Receives until `stop` is set. Returns the number of received messages.
fn discard(socket: &UdpSocket, stop: &AtomicBool) -> u64 {
    let mut arena = vec![0_u8; MESSAGES * BUFFER_LEN];
    let mut buffers: Vec<_> = arena
        .chunks_exact_mut(BUFFER_LEN)
        .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() })
        .collect();
    let mut messages: Vec<_> = buffers
        .iter_mut()
        .map(|buffer| {
            // SAFETY: mmsghdr is integers and pointers, for which zero is valid.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_iov = buffer;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    let mut received = 0;
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: each header points at an iovec of its own, and each iovec at a part of `arena` of
        // its own; all live until the end of this function. A null timeout is allowed.
        let result = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr(),
                messages.len() as libc::c_uint,
                libc::MSG_WAITFORONE,
                ptr::null_mut(),
            )
        };
        received += u64::try_from(result).unwrap_or(0);
    }
    received
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sink_receives_until_it_is_stopped() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_read_timeout(Some(STOP_INTERVAL)).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..100 {
            sender.send_to(b"flood", receiver.local_addr().unwrap()).unwrap();
        }
        let stop = AtomicBool::new(false);
        let received = std::thread::scope(|scope| {
            let reader = scope.spawn(|| discard(&receiver, &stop));
            std::thread::sleep(4 * STOP_INTERVAL);
            stop.store(true, Ordering::Relaxed);
            reader.join().unwrap()
        });
        assert_eq!(received, 100);
    }
}
