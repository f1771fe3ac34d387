//! Ladder of the data plane: state of each offload capability, with the reason if it is not on.

use std::io;

use skein_ipc::{Capability, CapabilityState, OffloadSettings};

/// Name of the capability that carries the ECN field between inner and outer headers (RFC 6040).
pub(super) const ECN_CAPABILITY: &str = "udp_ecn";

pub(super) fn capabilities(
    settings: OffloadSettings,
    notes: &[(&'static str, String)],
) -> Vec<Capability> {
    let known = [
        ("tun_uso", settings.tun_uso),
        ("tun_tso", settings.tun_tso),
        ("tun_checksum", settings.tun_checksum),
        ("udp_gso", settings.udp_gso),
        ("udp_gro", settings.udp_gro),
        (ECN_CAPABILITY, settings.udp_ecn),
        ("reuseport_steering", true),
    ];
    known
        .into_iter()
        .map(|(name, wanted)| {
            let note = notes.iter().find(|(noted, _)| *noted == name).map(|(_, why)| why.clone());
            let (state, reason) = match (wanted, note) {
                (false, _) => (
                    CapabilityState::ForcedOff,
                    Some("switched off in the configuration".to_owned()),
                ),
                (true, Some(why)) => (CapabilityState::Unsupported, Some(why)),
                (true, None) => (CapabilityState::On, None),
            };
            Capability { name: name.to_owned(), state, reason }
        })
        .collect()
}

/// Returns the capabilities of inherited sockets with the current state of the ECN field. A data
/// process of an earlier release does not know the field and does not enable its reports.
pub(super) fn with_ecn(
    mut inherited: Vec<Capability>,
    settings: OffloadSettings,
    enabled: io::Result<()>,
) -> Vec<Capability> {
    let refused =
        enabled.err().map(|error| (ECN_CAPABILITY, format!("the kernel refused it: {error}")));
    let notes: Vec<_> = refused.into_iter().collect();
    inherited.retain(|capability| capability.name != ECN_CAPABILITY);
    inherited
        .extend(capabilities(settings, &notes).into_iter().filter(|c| c.name == ECN_CAPABILITY));
    inherited
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_that_is_off_has_a_reason() {
        let settings = OffloadSettings { udp_gso: false, ..OffloadSettings::ALL };
        let notes = [("tun_uso", "kernel too old".to_owned())];
        let all = capabilities(settings, &notes);
        let state = |name: &str| all.iter().find(|c| c.name == name).map(|c| c.state);
        assert_eq!(state("tun_uso"), Some(CapabilityState::Unsupported));
        assert_eq!(state("udp_gso"), Some(CapabilityState::ForcedOff));
        assert_eq!(state("udp_gro"), Some(CapabilityState::On));
        assert!(all.iter().all(|c| (c.state == CapabilityState::On) == c.reason.is_none()));
    }
}
