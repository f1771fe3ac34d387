//! Configuration table `[underlay]`: settings of the UDP sockets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use serde::{Deserialize, Deserializer};
use skein_ipc::UnderlaySettings;
use skein_sys::udp::is_family_supported;

use super::{DEFAULT_PORT, Invalid, parse};

/// Range of `receive_buffer` and `send_buffer`, in bytes.
const BUFFER_RANGE: RangeInclusive<usize> = 65_536..=1 << 30;

/// Keys of the table, before validation.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct UnderlayKeys {
    /// Addresses to bind. `None` means the unspecified address of each family of the host.
    #[serde(deserialize_with = "addresses")]
    addresses: Option<Vec<IpAddr>>,
    port: u16,
    receive_buffer: usize,
    send_buffer: usize,
}

impl Default for UnderlayKeys {
    fn default() -> Self {
        Self { addresses: None, port: DEFAULT_PORT, receive_buffer: 8 << 20, send_buffer: 4 << 20 }
    }
}

/// Valid settings, and a note for each default that this host does not support.
pub(super) struct Underlay {
    pub(super) settings: UnderlaySettings,
    pub(super) notes: Vec<String>,
}

impl TryFrom<UnderlayKeys> for Underlay {
    type Error = Invalid;

    fn try_from(keys: UnderlayKeys) -> Result<Self, Invalid> {
        let (addresses, notes) = match keys.addresses {
            None => wildcard(is_family_supported),
            Some(addresses) => (addresses, Vec::new()),
        };
        check_addresses(&addresses)?;
        if keys.port == 0 {
            return Err(Invalid("underlay.port = 0: use 1 to 65535".to_owned()));
        }
        for (key, bytes) in
            [("receive_buffer", keys.receive_buffer), ("send_buffer", keys.send_buffer)]
        {
            if !BUFFER_RANGE.contains(&bytes) {
                let (least, most) = (BUFFER_RANGE.start(), BUFFER_RANGE.end());
                let text = format!("underlay.{key} = {bytes}: use {least} to {most} bytes");
                return Err(Invalid(text));
            }
        }
        let settings = UnderlaySettings {
            addresses,
            port: keys.port,
            receive_buffer: keys.receive_buffer,
            send_buffer: keys.send_buffer,
        };
        Ok(Self { settings, notes })
    }
}

fn check_addresses(addresses: &[IpAddr]) -> Result<(), Invalid> {
    if addresses.is_empty() {
        return Err(Invalid(
            "underlay.addresses is empty. Set an address, or remove the key to listen on all \
             addresses."
                .to_owned(),
        ));
    }
    for (index, address) in addresses.iter().enumerate() {
        let earlier = &addresses[..index];
        if earlier.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            return Err(Invalid(format!(
                "underlay.addresses: {address} is a second address of its family. Use one."
            )));
        }
        if matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
            return Err(Invalid(format!(
                "underlay.addresses: {address} is a link-local address, which cannot be bound. \
                 Use \"::\"."
            )));
        }
    }
    Ok(())
}

fn addresses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<IpAddr>>, D::Error> {
    parse::addresses("underlay.addresses", deserializer).map(Some)
}

/// Returns the unspecified addresses of the families for which `supported` returns true, and a note
/// for each family that is left out. Returns both addresses if no family is supported.
pub(super) fn wildcard(supported: impl Fn(IpAddr) -> bool) -> (Vec<IpAddr>, Vec<String>) {
    let all = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let (addresses, absent): (Vec<_>, Vec<_>) = all.into_iter().partition(|ip| supported(*ip));
    if addresses.is_empty() {
        // The error of binding these addresses names the cause.
        return (all.to_vec(), Vec::new());
    }
    let note = |ip: IpAddr| {
        let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        format!("underlay.addresses: this host has no {family}: {ip} is left out of the default")
    };
    (addresses, absent.into_iter().map(note).collect())
}
