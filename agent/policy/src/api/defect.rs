//! Reports about parts of objects that cannot be enforced.

use std::fmt;

/// A part of an API object that cannot be enforced, for an event or a log line.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Defect {
    /// Kind and name of the object, for example `NetworkPolicy shop/web`.
    pub object: String,
    /// Path of the field, for example `spec.ingress[0].from[1].ipBlock`.
    pub field: String,
    /// Reason in words, without the field.
    pub reason: String,
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.object, self.field, self.reason)
    }
}
