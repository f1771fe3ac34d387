//! The ECN field of IP headers (RFC 3168) and its handling by tunnels (RFC 6040).
//!
//! Encapsulation copies the inner field to the outer header (RFC 6040, section 4.1, normal mode),
//! or sets Not-ECT for a peer that does not decapsulate by these rules (section 4.3). Decapsulation
//! combines both fields ([`Ecn::decapsulate`], section 4.2). The DSCP is not copied.

/// ECN field: the two lowest bits of the IPv4 type of service or the IPv6 traffic class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Ecn {
    /// The transport does not react to congestion marks.
    #[default]
    NotEct = 0b00,
    /// ECN-capable transport, codepoint 1 (RFC 9331 assigns it to L4S).
    Ect1 = 0b01,
    /// ECN-capable transport, codepoint 0.
    Ect0 = 0b10,
    /// Congestion experienced.
    Ce = 0b11,
}

impl Ecn {
    /// Returns the field of a type of service or traffic class; the DSCP bits are ignored.
    #[inline]
    pub const fn from_tos(tos: u8) -> Self {
        match tos & 0b11 {
            0b00 => Self::NotEct,
            0b01 => Self::Ect1,
            0b10 => Self::Ect0,
            _ => Self::Ce,
        }
    }

    /// Returns the field of an IP packet; `NotEct` if the packet has fewer than two bytes.
    #[inline]
    pub fn of(packet: &[u8]) -> Self {
        match *packet {
            [first, second, ..] if first >> 4 == 4 => Self::from_tos(second),
            [_, second, ..] => Self::from_tos(second >> 4),
            _ => Self::NotEct,
        }
    }

    /// Combines this inner field with the `outer` field of the datagram that carried the packet
    /// (RFC 6040, section 4.2, figure 4). Returns `None` if the packet must be dropped: the outer
    /// field says congestion, and the inner transport would not react to a mark.
    #[inline]
    pub const fn decapsulate(self, outer: Self) -> Option<Self> {
        match (self, outer) {
            (Self::NotEct, Self::Ce) => None,
            (Self::Ect0 | Self::Ect1, Self::Ce) => Some(Self::Ce),
            (Self::Ect0, Self::Ect1) => Some(Self::Ect1),
            (inner, _) => Some(inner),
        }
    }

    /// Writes the field into an IP packet and adjusts the IPv4 header checksum by the difference
    /// (RFC 1624), so that a wrong checksum stays wrong. Transport checksums do not cover the
    /// field. Does not change a packet that is shorter than its header.
    pub fn write(self, packet: &mut [u8]) {
        let bits = self as u8;
        match packet {
            [first, tos, rest @ ..] if *first >> 4 == 4 => {
                let Some(checksum) = rest.get_mut(8..10) else { return };
                let before = u16::from_be_bytes([*first, *tos]);
                *tos = *tos & !0b11 | bits;
                let after = u16::from_be_bytes([*first, *tos]);
                let old = u16::from_be_bytes([checksum[0], checksum[1]]);
                let sum = u64::from(!old) + u64::from(!before) + u64::from(after);
                checksum.copy_from_slice(&(!super::checksum::fold(sum)).to_be_bytes());
            }
            [first, second, ..] if *first >> 4 == 6 => {
                *second = *second & !0b0011_0000 | bits << 4;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::wire::checksum;
    use proptest::prelude::*;

    const ALL: [Ecn; 4] = [Ecn::NotEct, Ecn::Ect0, Ecn::Ect1, Ecn::Ce];

    /// The table of RFC 6040, section 4.2, figure 4: one row for each inner field, with the outer
    /// fields in the order of `ALL`.
    #[test]
    fn decapsulation_follows_the_table_of_rfc_6040() {
        let table = [
            [Some(Ecn::NotEct), Some(Ecn::NotEct), Some(Ecn::NotEct), None],
            [Some(Ecn::Ect0), Some(Ecn::Ect0), Some(Ecn::Ect1), Some(Ecn::Ce)],
            [Some(Ecn::Ect1), Some(Ecn::Ect1), Some(Ecn::Ect1), Some(Ecn::Ce)],
            [Some(Ecn::Ce), Some(Ecn::Ce), Some(Ecn::Ce), Some(Ecn::Ce)],
        ];
        for (inner, row) in ALL.into_iter().zip(table) {
            for (outer, expected) in ALL.into_iter().zip(row) {
                assert_eq!(inner.decapsulate(outer), expected, "{inner:?} in {outer:?}");
            }
        }
    }

    #[test]
    fn field_lies_in_the_low_bits_of_tos_and_traffic_class() {
        for (index, ecn) in [Ecn::NotEct, Ecn::Ect1, Ecn::Ect0, Ecn::Ce].into_iter().enumerate() {
            assert_eq!(ecn as usize, index);
            assert_eq!(Ecn::from_tos(0xb8 | ecn as u8), ecn, "the DSCP is ignored");
            assert_eq!(Ecn::of(&[0x45, 0xb8 | ecn as u8]), ecn);
            assert_eq!(Ecn::of(&[0x6b, 0x8f | (ecn as u8) << 4]), ecn);
        }
        assert_eq!(Ecn::of(&[0x45]), Ecn::NotEct);
    }

    #[test]
    fn short_packets_are_left_unchanged() {
        for bytes in [&[][..], &[0x45], &[0x45, 0, 0], &[0x50, 0, 0, 0]] {
            let mut packet = bytes.to_vec();
            Ecn::Ce.write(&mut packet);
            assert_eq!(packet, bytes);
        }
    }

    proptest! {
        #[test]
        fn written_header_keeps_its_checksum_right_or_wrong(
            mut header in prop::collection::vec(any::<u8>(), 20),
            ecn in prop::sample::select(ALL.to_vec()),
            wrong in 0u16..=0xfffe,
        ) {
            header[0] = 0x45;
            header[10..12].fill(0);
            let right = !checksum::sum(&header, 0);
            let stored = right ^ wrong;
            header[10..12].copy_from_slice(&stored.to_be_bytes());
            let before: [u8; 20] = header.clone().try_into().unwrap();
            ecn.write(&mut header);
            let after: [u8; 20] = header.try_into().unwrap();
            prop_assert_eq!(checksum::is_header_valid(&after), checksum::is_header_valid(&before));
            prop_assert_eq!(Ecn::of(&after), ecn);
            prop_assert_eq!((after[1] & 0xfc, &after[2..10]), (before[1] & 0xfc, &before[2..10]));
            prop_assert_eq!(&after[12..], &before[12..]);
        }

        #[test]
        fn ipv6_header_changes_in_two_bits_only(
            mut header in prop::collection::vec(any::<u8>(), 40),
            ecn in prop::sample::select(ALL.to_vec()),
        ) {
            header[0] = 0x60 | header[0] & 0xf;
            let before = header.clone();
            ecn.write(&mut header);
            prop_assert_eq!(Ecn::of(&header), ecn);
            header[1] = header[1] & !0x30 | before[1] & 0x30;
            prop_assert_eq!(header, before);
        }
    }
}
