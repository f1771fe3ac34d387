//! TCP's flags (RFC 9293, section 3.1; RFC 3168), as they lie in byte 13 of its header.

/// No more data.
pub const FIN: u8 = 0x01;
/// Synchronize.
pub const SYN: u8 = 0x02;
/// Reset.
pub const RST: u8 = 0x04;
/// Push.
pub const PSH: u8 = 0x08;
/// The acknowledgement counts.
pub const ACK: u8 = 0x10;
/// The urgent pointer counts.
pub const URG: u8 = 0x20;
/// Congestion was met.
pub const ECE: u8 = 0x40;
/// The congestion window was reduced.
pub const CWR: u8 = 0x80;
