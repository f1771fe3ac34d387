//! TCP flags (RFC 9293, section 3.1; RFC 3168, section 6.1): bits of byte 13 of the TCP header.

/// FIN: the sender has no more data.
pub const FIN: u8 = 0x01;
/// SYN: synchronize sequence numbers.
pub const SYN: u8 = 0x02;
/// RST: reset the connection.
pub const RST: u8 = 0x04;
/// PSH: deliver the data without delay.
pub const PSH: u8 = 0x08;
/// ACK: the acknowledgement field is valid.
pub const ACK: u8 = 0x10;
/// URG: the urgent pointer is valid.
pub const URG: u8 = 0x20;
/// ECE: the receiver has seen a congestion mark.
pub const ECE: u8 = 0x40;
/// CWR: the sender has reduced its congestion window.
pub const CWR: u8 = 0x80;
