//! Addresses in messages and kept files, in their canonical form.

use serde::{Deserialize, Deserializer};
use skein_core::address::Canonical;

/// Deserializes addresses in their canonical form, for `#[serde(deserialize_with)]`.
///
/// # Errors
/// The error of `T` if the value is not a valid `T`.
pub fn canonical<'de, D: Deserializer<'de>, T: Deserialize<'de> + Canonical>(
    deserializer: D,
) -> Result<T, D::Error> {
    T::deserialize(deserializer).map(T::canonical)
}
