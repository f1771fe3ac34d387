//! Versions and error codes of the CNI specification 1.1.0.

/// A version of the specification that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u8);

impl Version {
    /// All, oldest first.
    pub const ALL: [Self; 7] = [Self(0), Self(1), Self(2), Self(3), Self(4), Self(5), Self(6)];
    const NAMES: [&'static str; 7] =
        ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
    /// What a configuration without a version means.
    pub const DEFAULT: Self = Self(1);
    /// Results have interfaces.
    pub const V0_3_0: Self = Self(2);
    /// The oldest version that the agent's network configuration offers.
    pub const V0_3_1: Self = Self(3);
    /// CHECK.
    pub const V0_4_0: Self = Self(4);
    /// Addresses without a version.
    pub const V1_0_0: Self = Self(5);
    /// GC, STATUS, the MTU of interfaces.
    pub const V1_1_0: Self = Self(6);
    /// The newest.
    pub const NEWEST: Self = Self(6);

    /// From its name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::NAMES.iter().position(|name| *name == text).map(|index| Self::ALL[index])
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES[usize::from(self.0)]
    }

    /// All names, for people.
    pub fn names() -> String {
        Self::NAMES.join(", ")
    }
}

/// Well-known error codes (section "Error" of the specification); 100 and above are a plugin's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// The version of the configuration is not supported.
    IncompatibleVersion = 1,
    /// A field of the configuration is not supported.
    UnsupportedField = 2,
    /// The container is unknown or does not exist.
    UnknownContainer = 3,
    /// Environment variables are missing or invalid.
    InvalidEnvironment = 4,
    /// Reading or writing failed.
    Io = 5,
    /// The input could not be decoded.
    Decoding = 6,
    /// The network configuration is invalid.
    InvalidNetworkConfig = 7,
    /// The namespace is not one for containers.
    InvalidNetns = 8,
    /// Try again later.
    TryAgainLater = 11,
    /// The plugin cannot serve an ADD (STATUS).
    NotAvailable = 50,
    /// The plugin cannot serve an ADD, and running containers have limited connectivity (STATUS).
    NotAvailableLimited = 51,
}
