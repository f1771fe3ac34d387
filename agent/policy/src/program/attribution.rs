//! Names of the rules and policies behind a verdict.

use std::fmt;

use crate::model::{Direction, PolicyId};
use crate::name;

/// A rule of a policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleRef {
    /// Policy of the rule.
    pub policy: PolicyId,
    /// Position in the object's list of rules.
    pub index: usize,
    /// Name of the rule; empty if it has none.
    pub name: String,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rule {}", self.policy, self.index)?;
        match self.name.as_str() {
            "" => Ok(()),
            name => write!(f, " ({name})"),
        }
    }
}

/// Reason for a verdict. Each reason has a counter of its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Attribution {
    /// A match of a rule in the list; the list has several entries if rules were merged.
    Rules(Direction, Vec<RuleRef>),
    /// No match of any rule of the policies that isolate the pod.
    Isolated(Direction, Vec<PolicyId>),
}

/// Maximum length of the readable part of a counter's name.
const MAX_SLUG: usize = 40;

impl Attribution {
    /// Returns the name of the counter.
    pub fn counter(&self) -> String {
        let (direction, (policy, kind)) = match self {
            Self::Rules(direction, rules) => {
                let kind = rules.first().map_or(String::new(), |rule| rule.index.to_string());
                (direction, (rules.first().map(|rule| &rule.policy), kind))
            }
            Self::Isolated(direction, policies) => {
                (direction, (policies.first(), "isolated".to_owned()))
            }
        };
        let policy = match policy {
            Some(PolicyId::NetworkPolicy { namespace, name }) => format!("{namespace}_{name}"),
            Some(PolicyId::ClusterNetworkPolicy { name }) => name.clone(),
            None => String::new(),
        };
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let slug: String = policy.chars().map(plain).take(MAX_SLUG).collect();
        let letter = match direction {
            Direction::Ingress => 'i',
            Direction::Egress => 'e',
        };
        name::of_content(&format!("{letter}_{slug}_{kind}_"), self)
    }
}
