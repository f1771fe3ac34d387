//! Ladder of the data plane: state of each offload capability, with the reason if it is not on.

use std::io;

use skein_ipc::{Capability, CapabilityName, CapabilityState, OffloadSettings};
use skein_sys::fallback::{Fallback, Feature};

pub(super) fn capabilities(settings: OffloadSettings, fallbacks: &[Fallback]) -> Vec<Capability> {
    let known = [
        (CapabilityName::TunUso, Feature::TunUso, settings.tun_uso),
        (CapabilityName::TunTso, Feature::TunTso, settings.tun_tso),
        (CapabilityName::TunChecksum, Feature::TunChecksum, settings.tun_checksum),
        (CapabilityName::UdpGso, Feature::UdpGso, settings.udp_gso),
        (CapabilityName::UdpGro, Feature::UdpGro, settings.udp_gro),
        (CapabilityName::UdpEcn, Feature::UdpEcn, settings.udp_ecn),
        (CapabilityName::ReuseportSteering, Feature::ReuseportSteering, true),
    ];
    known
        .into_iter()
        .map(|(name, feature, wanted)| {
            let fallback = fallbacks.iter().find(|fallback| fallback.feature == feature);
            let (state, reason) = match (wanted, fallback) {
                (false, _) => (
                    CapabilityState::ForcedOff,
                    Some("switched off in the configuration".to_owned()),
                ),
                (true, Some(missing)) => {
                    (CapabilityState::Unsupported, Some(missing.reason.clone()))
                }
                (true, None) => (CapabilityState::On, None),
            };
            Capability { name: name.into(), state: state.into(), reason }
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
    let refused = enabled.err().map(|error| Fallback::refused(Feature::UdpEcn, &error));
    let is_ecn = |capability: &Capability| capability.name == CapabilityName::UdpEcn;
    inherited.retain(|capability| !is_ecn(capability));
    inherited.extend(capabilities(settings, refused.as_slice()).into_iter().filter(is_ecn));
    inherited
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_that_is_off_has_a_reason() {
        let settings = OffloadSettings { udp_gso: false, ..OffloadSettings::ALL };
        let reason = "kernel too old".to_owned();
        let all = capabilities(settings, &[Fallback { feature: Feature::TunUso, reason }]);
        let state = |name: CapabilityName| {
            all.iter().find(|c| c.name == name).and_then(|c| c.state.known())
        };
        assert_eq!(state(CapabilityName::TunUso), Some(CapabilityState::Unsupported));
        assert_eq!(state(CapabilityName::UdpGso), Some(CapabilityState::ForcedOff));
        assert_eq!(state(CapabilityName::UdpGro), Some(CapabilityState::On));
        assert!(all.iter().all(|c| (c.state == CapabilityState::On) == c.reason.is_none()));
    }
}
