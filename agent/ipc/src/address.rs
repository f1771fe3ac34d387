//! Deserialization of addresses in messages and files. An IPv4-mapped IPv6 address becomes the IPv4
//! address that it represents ([`Canonical`]).

use serde::{Deserialize, Deserializer};
use skein_core::address::Canonical;

/// Deserializes addresses in their canonical form, for `#[serde(deserialize_with)]`.
///
/// # Errors
/// The deserializer's error if the value is not a valid `T`.
pub fn canonical<'de, D: Deserializer<'de>, T: Deserialize<'de> + Canonical>(
    deserializer: D,
) -> Result<T, D::Error> {
    T::deserialize(deserializer).map(T::canonical)
}
