//! Test that the packet path of `skein_sys` does not allocate memory after its first rounds.

#![allow(missing_docs, clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use skein_core::drop::DropCounts;
use skein_core::wire::ecn::Ecn;
use skein_sys::in_new_network_namespace;
use skein_sys::poll::Poller;
use skein_sys::recv::RecvBatch;
use skein_sys::send::{GsoBatch, GsoState, Position, SendRequest, Sender};
use skein_sys::udp::{UdpOptions, bind_lanes};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// An allocator that counts the allocations of each thread.
struct Counting;

// SAFETY: every call is passed to the system allocator unchanged. The counter is a thread-local
// with a constant initialiser, which does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller of `alloc` meets the requirements of `System.alloc`, which are the
        // same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the block comes from `System.alloc` with the same layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn packet_path_does_not_allocate_after_first_rounds() {
    let allocated = in_new_network_namespace(|| {
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
        assert!(up.unwrap().success());
        let options =
            UdpOptions { receive_buffer: 4 << 20, send_buffer: 4 << 20, gro: true, ecn: true };
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let (lanes, _) = bind_lanes(listen, 1, &options).unwrap();
        let destination = lanes[0].receive.local_addr().unwrap();
        let arena = vec![7; 40 * 1_400];
        let whole = [(0, arena.len())];
        let batch = GsoBatch {
            destination,
            ecn: Ecn::NotEct,
            segment_size: 1_400,
            segments: 40,
            parts: &whole,
        };
        let nowhere = GsoBatch { destination: ([198, 51, 100, 1], 9).into(), ..batch };
        let batches = [batch, nowhere, batch, GsoBatch { segments: 1, ..batch }, batch];

        let mut messages = RecvBatch::new(16);
        let mut poller = Poller::new().unwrap();
        poller.add(lanes[0].receive.as_fd(), 1).unwrap();
        let mut sender = Sender::new();
        let mut drops = DropCounts::default();
        let mut round = |gso: &mut GsoState| {
            let now = Instant::now();
            let socket = lanes[0].send.as_fd();
            let mut request =
                SendRequest { arena: &arena, batches: &batches, from: Position::default() };
            let mut sent = 0;
            // If the send buffer is full, the rest of the batches is sent once a message has
            // arrived.
            let mut more = true;
            let mut received = 0;
            while more || received < sent {
                if more {
                    let outcome = sender.send(socket, &request, gso, &mut drops, now);
                    sent += outcome.datagrams;
                    more = outcome.blocked.is_some();
                    request.from = outcome.blocked.unwrap_or_default();
                }
                let ready = poller.wait(Some(Duration::from_secs(30))).unwrap();
                assert_eq!(ready, [1]);
                for i in 0..messages.recv(lanes[0].receive.as_fd()).unwrap() {
                    received += messages.message(i).segments().count() as u64;
                }
            }
            assert_eq!(sent, 3 * 40 + 1);
        };
        let (mut on, mut off) = (GsoState::new(), GsoState::disabled());
        for _ in 0..3 {
            round(&mut on);
            round(&mut off);
        }
        let before = ALLOCATIONS.with(Cell::get);
        for _ in 0..20 {
            round(&mut on);
            round(&mut off);
        }
        ALLOCATIONS.with(Cell::get) - before
    });
    assert_eq!(allocated.expect("cannot create a network namespace: run the tests as root"), 0);
}
