//! Fields that store the error in place of the value if they cannot be read, so that the rest of
//! the object is still read.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// A field of an API object, readable or not.
///
/// An unreadable selector, CIDR or port matches nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed<T> {
    /// The value of a readable field.
    Valid(T),
    /// The reason why the field cannot be read.
    Invalid(String),
}

impl<T> Parsed<T> {
    /// Returns the value of a readable field.
    pub fn valid(&self) -> Option<&T> {
        match self {
            Self::Valid(value) => Some(value),
            Self::Invalid(_) => None,
        }
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Parsed<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Ok(match T::deserialize(&value) {
            Ok(value) => Self::Valid(value),
            Err(error) => Self::Invalid(error.to_string()),
        })
    }
}

/// Reads `null`, which Go programs write for empty lists and maps, as the default.
pub(super) fn null_as_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
