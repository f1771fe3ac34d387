//! Offloads of the TUN device (TUNSETOFFLOAD), and the choice of the ones that the kernel supports.

use std::io;

use serde::{Deserialize, Serialize};

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

/// An offload capability that is not in use, or a socket buffer that is smaller than requested:
/// name and reason, for reports.
pub type Fallback = (&'static str, String);

/// Names that a [`Fallback`] of [`open_queues`](super::open_queues) can have.
pub const TUN_OFFLOADS: [&str; 3] = ["tun_uso", "tun_tso", "tun_checksum"];

/// Calls `set` with `allowed`, and after each refusal with one offload less, in the order of
/// [`TUN_OFFLOADS`]. Returns the accepted offloads, and the others with their reasons.
pub(super) fn set_best_offload(
    allowed: TunOffload,
    set: impl Fn(TunOffload) -> io::Result<()>,
) -> io::Result<(TunOffload, Vec<Fallback>)> {
    let mut fallbacks = Vec::new();
    let configured = || "off in the configuration".to_owned();
    let mut offload = allowed;
    if !allowed.checksum {
        offload = TunOffload::NONE;
        fallbacks.push(("tun_checksum", configured()));
    }
    for (name, on) in [("tun_tso", allowed.tso), ("tun_uso", allowed.uso)] {
        if !on {
            fallbacks.push((name, configured()));
        } else if !allowed.checksum {
            fallbacks.push((name, "needs tun_checksum, which is off".to_owned()));
        }
    }
    loop {
        let Err(error) = set(offload) else { return Ok((offload, fallbacks)) };
        let why = format!("the kernel refused it: {error}");
        if offload.uso {
            offload.uso = false;
            fallbacks.push(("tun_uso", why));
        } else if offload.tso {
            offload.tso = false;
            fallbacks.push(("tun_tso", why));
        } else if offload.checksum {
            offload.checksum = false;
            fallbacks.push(("tun_checksum", why));
        } else {
            return Err(error);
        }
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
            let lost: Vec<_> = fallbacks.iter().map(|(name, _)| *name).collect();
            assert_eq!(lost, ["tun_uso", "tun_tso", "tun_checksum"][..i]);
            assert!(fallbacks.iter().all(|(_, why)| why.contains("refused")));
        }
    }

    #[test]
    fn forbidden_offload_is_not_tried() {
        let allowed = TunOffload { tso: false, ..TunOffload::ALL };
        let (offload, fallbacks, tried) = against(u32::MAX, allowed);
        assert_eq!((offload, tried), (allowed, vec![allowed.mask()]));
        assert_eq!(fallbacks, [("tun_tso", "off in the configuration".to_owned())]);
    }

    #[test]
    fn device_that_refuses_every_mask_is_an_error() {
        let refuse = |_| Err(io::Error::from_raw_os_error(libc::EBADFD));
        let error = set_best_offload(TunOffload::ALL, refuse).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
    }
}
