//! Parts of CNI documents that only the plugin reads and writes: DNS settings and the error
//! document.

use serde::{Deserialize, Serialize};
use skein_cni_protocol::excerpt::message_excerpt;
use skein_cni_protocol::names::NameError;
use skein_cni_protocol::types::ErrorCode;

/// DNS settings of a configuration or a result (resolv.conf(5)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Addresses of the name servers in the order of preference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// Local domain for lookups of short names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Search domains in the order of preference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Options of the resolver, such as `ndots:5`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    /// Returns true if no field is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Error of a call of the plugin, in the form of its error document (CNI specification 1.1.0,
/// section 5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginError {
    /// Code of [`ErrorCode`], or a code of Skein, 100 and above.
    pub code: u32,
    /// Error message of one line.
    pub msg: String,
    /// Details of the error; may be empty.
    pub details: String,
}

impl PluginError {
    /// Returns an error without details.
    pub fn new(code: ErrorCode, msg: impl Into<String>) -> Self {
        Self { code: code as u32, msg: msg.into(), details: String::new() }
    }

    /// Returns the error with an excerpt of `details`, at most 1,000 bytes.
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
