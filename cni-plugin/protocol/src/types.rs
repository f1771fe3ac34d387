//! Versions and error codes of the CNI specification 1.1.0.

/// A supported version of the specification. Versions are ordered by age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u8);

impl Version {
    /// All supported versions, oldest first.
    pub const ALL: [Self; 7] = [Self(0), Self(1), Self(2), Self(3), Self(4), Self(5), Self(6)];
    const NAMES: [&'static str; 7] =
        ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
    /// Version of a configuration without `cniVersion`: 0.2.0, as in libcni.
    pub const DEFAULT: Self = Self(1);
    /// Version 0.3.0, which added interfaces to results.
    pub const V0_3_0: Self = Self(2);
    /// Version 0.3.1. The configuration list that the agent writes supports this version and all
    /// later ones.
    pub const V0_3_1: Self = Self(3);
    /// Version 0.4.0, which added CHECK.
    pub const V0_4_0: Self = Self(4);
    /// Version 1.0.0, which removed the field `version` from addresses.
    pub const V1_0_0: Self = Self(5);
    /// Version 1.1.0, which added GC, STATUS, and the MTU of interfaces.
    pub const V1_1_0: Self = Self(6);
    /// Newest supported version, 1.1.0.
    pub const NEWEST: Self = Self(6);

    /// Parses a version such as `1.0.0`. Returns `None` if the version is not supported.
    pub fn parse(text: &str) -> Option<Self> {
        Self::NAMES.iter().position(|name| *name == text).map(|index| Self::ALL[index])
    }

    /// Returns the version in the form `1.0.0`.
    pub fn name(self) -> &'static str {
        Self::NAMES[usize::from(self.0)]
    }

    /// Returns the names of all supported versions, separated by commas.
    pub fn names() -> String {
        Self::NAMES.join(", ")
    }
}

/// Error codes of the specification (section "Error"). Codes of 100 and above are specific to a
/// plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// The plugin does not support the version of the configuration.
    IncompatibleVersion = 1,
    /// The plugin does not support a field of the configuration.
    UnsupportedField = 2,
    /// The container does not exist.
    UnknownContainer = 3,
    /// Environment variables are missing or invalid.
    InvalidEnvironment = 4,
    /// Reading or writing failed.
    Io = 5,
    /// The input cannot be decoded.
    Decoding = 6,
    /// The network configuration is invalid.
    InvalidNetworkConfig = 7,
    /// The namespace in `CNI_NETNS` is invalid, for example the node's own.
    InvalidNetns = 8,
    /// The condition is temporary; the runtime should try again later.
    TryAgainLater = 11,
    /// The plugin cannot serve an ADD (STATUS).
    NotAvailable = 50,
    /// The plugin cannot serve an ADD, and running containers have limited connectivity (STATUS).
    NotAvailableLimited = 51,
}
