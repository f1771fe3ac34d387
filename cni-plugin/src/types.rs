//! Documents of the CNI specification 1.1.0 that only the plugin reads and writes.

use serde::{Deserialize, Serialize};
use skein_cni_protocol::excerpt::message_excerpt;
use skein_cni_protocol::names::NameError;
use skein_cni_protocol::types::ErrorCode;

/// Name resolution, as in resolv.conf.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Servers in the order of their preference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Domains to search.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Options of the resolver.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Why a run of the plugin failed: what its error document says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginError {
    /// See [`ErrorCode`].
    pub code: u32,
    /// One line.
    pub msg: String,
    /// More of it.
    pub details: String,
}

impl PluginError {
    /// Without details.
    pub fn new(code: ErrorCode, msg: impl Into<String>) -> Self {
        Self { code: code as u32, msg: msg.into(), details: String::new() }
    }

    /// With details, of which a bounded part is kept.
    #[must_use]
    pub fn with_details(self, details: impl ToString) -> Self {
        Self { details: message_excerpt(&details.to_string()).into_owned(), ..self }
    }
}

impl From<NameError> for PluginError {
    fn from(error: NameError) -> Self {
        Self::new(ErrorCode::InvalidEnvironment, error.to_string())
    }
}
