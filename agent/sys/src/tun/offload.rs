//! Offloads of the TUN device (TUNSETOFFLOAD), and the choice of the ones that the kernel supports.

use std::io;

use serde::{Deserialize, Serialize};

use crate::fallback::{Fallback, Feature};

/// Set of offloads of a TUN device (TUNSETOFFLOAD). `tso` and `uso` require `checksum`: without it,
/// the set has no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TunOffload {
    /// Packets with a partial checksum (TUN_F_CSUM).
    pub checksum: bool,
    /// TCP superpackets (TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN).
    pub tso: bool,
    /// UDP superpackets (TUN_F_USO4, TUN_F_USO6; Linux 6.2).
    pub uso: bool,
}

impl TunOffload {
    /// All offloads.
    pub const ALL: Self = Self { checksum: true, tso: true, uso: true };
    /// No offload: each packet is one segment with a complete checksum.
    pub const NONE: Self = Self { checksum: false, tso: false, uso: false };

    /// Returns the argument of TUNSETOFFLOAD.
    pub(super) fn mask(self) -> u32 {
        if !self.checksum {
            return 0;
        }
        let mut mask = libc::TUN_F_CSUM;
        if self.tso {
            mask |= libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        }
        if self.uso {
            // The kernel requires both flags or none (EINVAL).
            mask |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
        }
        mask
    }
}

/// Calls `set` with `allowed`, and after each refusal with one offload less, in the order of
/// [`Feature::TUN`]. Returns the accepted offloads, and the others with their reasons.
pub(super) fn set_best_offload(
    allowed: TunOffload,
    set: impl Fn(TunOffload) -> io::Result<()>,
) -> io::Result<(TunOffload, Vec<Fallback>)> {
    let mut fallbacks = Vec::new();
    let mut offload = allowed;
    if !allowed.checksum {
        offload = TunOffload::NONE;
        fallbacks.push(Fallback::disabled(Feature::TunChecksum));
    }
    for (feature, on) in [(Feature::TunTso, allowed.tso), (Feature::TunUso, allowed.uso)] {
        if !on {
            fallbacks.push(Fallback::disabled(feature));
        } else if !allowed.checksum {
            let reason = "needs tun_checksum, which is off".to_owned();
            fallbacks.push(Fallback { feature, reason });
        }
    }
    loop {
        let Err(error) = set(offload) else { return Ok((offload, fallbacks)) };
        let (feature, flag) = match &mut offload {
            TunOffload { uso: flag @ true, .. } => (Feature::TunUso, flag),
            TunOffload { tso: flag @ true, .. } => (Feature::TunTso, flag),
            TunOffload { checksum: flag @ true, .. } => (Feature::TunChecksum, flag),
            _ => return Err(error),
        };
        *flag = false;
        fallbacks.push(Fallback::refused(feature, &error));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Simulates a kernel that supports only the flags `known`. Also returns the masks of all
    /// attempts.
    fn against(known: u32, allowed: TunOffload) -> (TunOffload, Vec<Fallback>, Vec<u32>) {
        let tried = RefCell::new(Vec::new());
        let (offload, fallbacks) = set_best_offload(allowed, |offload| {
            tried.borrow_mut().push(offload.mask());
            match offload.mask() & !known {
                0 => Ok(()),
                _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            }
        })
        .unwrap();
        (offload, fallbacks, tried.into_inner())
    }

    #[test]
    fn offloads_are_the_most_that_the_kernel_supports() {
        let no_uso = TunOffload { uso: false, ..TunOffload::ALL };
        let checksum = TunOffload { tso: false, ..no_uso };
        let kernels = [TunOffload::ALL, no_uso, checksum, TunOffload::NONE];
        for (i, known) in kernels.iter().enumerate() {
            let (offload, fallbacks, tried) = against(known.mask(), TunOffload::ALL);
            assert_eq!(offload, *known);
            assert_eq!(
                tried,
                kernels[..=i].iter().map(|offload| offload.mask()).collect::<Vec<_>>()
            );
            let lost: Vec<_> = fallbacks.iter().map(|fallback| fallback.feature).collect();
            assert_eq!(lost, Feature::TUN[..i]);
            assert!(fallbacks.iter().all(|fallback| fallback.reason.contains("refused")));
        }
    }

    #[test]
    fn forbidden_offload_is_not_tried() {
        let allowed = TunOffload { tso: false, ..TunOffload::ALL };
        let (offload, fallbacks, tried) = against(u32::MAX, allowed);
        assert_eq!((offload, tried), (allowed, vec![allowed.mask()]));
        assert_eq!(fallbacks, [Fallback::disabled(Feature::TunTso)]);
    }

    #[test]
    fn device_that_refuses_every_mask_is_an_error() {
        let refuse = |_| Err(io::Error::from_raw_os_error(libc::EBADFD));
        let error = set_best_offload(TunOffload::ALL, refuse).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
    }
}
