//! The table `[key_rotation]`.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use super::Invalid;

/// Values of `settle_seconds`. A dead watch is noticed within 95 seconds, and a session of the old
/// key lives for 180.
const SETTLE: RangeInclusive<u64> = 300..=86_400;

const DAY: Duration = Duration::from_secs(86_400);

/// When and how this node's key is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KeyRotation {
    /// The age at which it is changed; `None`: when somebody asks for it.
    #[serde(rename(deserialize = "every_days"), deserialize_with = "days")]
    pub every: Option<Duration>,
    /// How long the other nodes are given to read this node's record before the next step.
    #[serde(rename(deserialize = "settle_seconds"), deserialize_with = "seconds")]
    pub settle: Duration,
}

impl Default for KeyRotation {
    fn default() -> Self {
        Self { every: None, settle: Duration::from_secs(*SETTLE.start()) }
    }
}

impl KeyRotation {
    /// Checks the values. `writes_record`: the agent writes this node's record.
    pub(super) fn check(&self, writes_record: bool) -> Result<(), Invalid> {
        if let Some(every) = self.every.filter(|_| !writes_record) {
            return Err(Invalid(format!(
                "key_rotation.every_days = {}: an agent changes its key on its own only where \
                 it writes the node records (kubernetes.enabled): use skein-agent rotate-key",
                every.as_secs() / DAY.as_secs()
            )));
        }
        let settle = self.settle.as_secs();
        if !SETTLE.contains(&settle) {
            let (least, most) = (SETTLE.start(), SETTLE.end());
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
