//! Configuration table `[key_rotation]`: schedule of key rotations.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use super::Invalid;

/// Range of `settle_seconds`. The minimum is longer than the detection of a dead watch (95 s) and
/// the lifetime of a session with the old key (180 s) together.
const SETTLE_RANGE: RangeInclusive<u64> = 300..=86_400;

const DAY: Duration = Duration::from_secs(86_400);

/// Schedule of this node's key rotations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KeyRotation {
    /// Age at which the key is rotated. With `None`, only `skein-agent rotate-key` starts a
    /// rotation.
    #[serde(rename(deserialize = "every_days"), deserialize_with = "days")]
    pub every: Option<Duration>,
    /// Time that other nodes get to read this node's record before the next stage.
    #[serde(rename(deserialize = "settle_seconds"), deserialize_with = "seconds")]
    pub settle: Duration,
}

impl Default for KeyRotation {
    fn default() -> Self {
        Self { every: None, settle: Duration::from_secs(*SETTLE_RANGE.start()) }
    }
}

impl KeyRotation {
    /// Checks the values. `writes_record` tells whether the agent writes this node's record.
    pub(super) fn check(&self, writes_record: bool) -> Result<(), Invalid> {
        if let Some(every) = self.every.filter(|_| !writes_record) {
            return Err(Invalid(format!(
                "key_rotation.every_days = {}: scheduled rotations require an agent that writes its node \
                 record (kubernetes.enabled). Use skein-agent rotate-key.",
                every.as_secs() / DAY.as_secs()
            )));
        }
        let settle = self.settle.as_secs();
        if !SETTLE_RANGE.contains(&settle) {
            let (least, most) = (SETTLE_RANGE.start(), SETTLE_RANGE.end());
            return Err(Invalid(format!(
                "key_rotation.settle_seconds = {settle}: use {least} to {most}"
            )));
        }
        Ok(())
    }
}

/// Parses a number of days; 0 means `None`.
fn days<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let days = u32::deserialize(deserializer)?;
    Ok((days > 0).then(|| DAY * days))
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    Ok(Duration::from_secs(u32::deserialize(deserializer)?.into()))
}
