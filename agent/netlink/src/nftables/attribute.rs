//! Attributes of netlink messages that the kernel has sent.

use rtnetlink::packet_core::NlasIterator;

/// Bytes of the header of an attribute (struct nlattr).
const HEADER_LENGTH: usize = 4;

/// Returns the attributes in `bytes` with their types, up to the first malformed one.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).flatten().filter_map(|attribute| {
        let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
        Some((kind, attribute.into_inner().get(HEADER_LENGTH..length)?))
    })
}

/// Returns the value of the first attribute of a type.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(found, value)| (found == kind).then_some(value))
}

/// Returns a text that ends with a zero byte.
pub(super) fn text(value: &[u8]) -> Option<&str> {
    std::str::from_utf8(value.strip_suffix(&[0])?).ok()
}

/// Returns an unsigned number of 32 bits, big-endian.
pub(super) fn number(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

/// Returns an unsigned number of 64 bits, big-endian.
pub(super) fn long_number(value: &[u8]) -> Option<u64> {
    value.try_into().ok().map(u64::from_be_bytes)
}
