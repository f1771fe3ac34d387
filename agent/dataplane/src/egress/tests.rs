//! Tests of the sending half of a lane.

#![allow(clippy::unwrap_used)]

use std::net::UdpSocket;

use skein_core::offload::vnet::{GSO_TCPV4, NEEDS_CSUM};

use super::*;
use crate::queue;
use crate::testing::{context, packet, tables};

struct Lab {
    egress: Egress,
    lane: LaneContext,
    tables: Tables,
    /// Socket of the peer. The test does not read it, so the kernel drops what exceeds its
    /// buffer.
    _peer: UdpSocket,
}

impl Lab {
    fn new(age_clock: Duration) -> Self {
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (manager, _) = queue::channel();
        Self {
            egress: Egress::new(true, GsoState::new()),
            lane: context(manager, age_clock),
            tables: tables(peer.local_addr().unwrap()),
            _peer: peer,
        }
    }

    fn route(&mut self, vnet: VnetHeader, mut packet: Vec<u8>) {
        self.egress.route(&self.lane, &self.tables, vnet, &mut packet);
    }

    /// Reads superpackets with segments of `segment` bytes until the run ends. Returns their
    /// number.
    fn run_of_superpackets(&mut self, segment: u16) -> usize {
        let vnet = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: 40,
            gso_size: segment,
            csum_start: 20,
            csum_offset: 16,
        };
        let payload = 65_000 / usize::from(segment) * usize::from(segment);
        let mut read = 0;
        while self.egress.may_read(read) {
            self.route(vnet, packet(0, 1, payload));
            read += 1;
        }
        read
    }
}

#[test]
fn run_of_tiny_segments_ends_after_two_full_batches() {
    let mut lab = Lab::new(Duration::ZERO);
    let read = lab.run_of_superpackets(8);
    assert!(read <= 2, "{read} superpackets of 8,000 segments each hold up the lane.");
    let mut lab = Lab::new(Duration::ZERO);
    assert_eq!(lab.run_of_superpackets(1400), 3, "A run of bulk data fills one batch.");
    assert_eq!(lab.egress.full_batches, 0);
}

#[test]
fn waiting_packets_do_not_end_a_batch() {
    let mut lab = Lab::new(Duration::ZERO);
    lab.route(VnetHeader::default(), packet(0, 1, 10));
    for _ in 0..3 {
        lab.route(VnetHeader::default(), packet(0, 2, 10));
        lab.egress.release_pending(&lab.lane, &lab.tables);
    }
    assert!(lab.egress.has_pending());
    assert!(!lab.egress.batch.is_empty(), "The packet of the first peer waits for more.");
}

#[test]
fn session_ends_after_180_s_without_a_manager() {
    for (age, is_sent) in [(179, true), (180, false)] {
        let mut lab = Lab::new(Duration::from_secs(age));
        lab.route(VnetHeader::default(), packet(0, 1, 10));
        assert_eq!(!lab.egress.batch.is_empty(), is_sent, "{age} s");
        assert_eq!(lab.egress.has_pending(), !is_sent, "{age} s");
    }
}
