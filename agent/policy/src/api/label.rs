//! Labels and label selectors.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::parsed::null_as_default;

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// Label of each namespace whose value is the namespace's name. API servers before 1.21 do not set
/// the label.
pub const METADATA_NAME: &str = "kubernetes.io/metadata.name";

/// A label selector. All conditions must hold; an empty selector matches every object.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelector {
    /// Labels that the object must have, with these values.
    #[serde(default, deserialize_with = "null_as_default")]
    pub match_labels: Labels,
    /// Further conditions, each about one key.
    #[serde(default, deserialize_with = "null_as_default")]
    pub match_expressions: Vec<Requirement>,
}

impl LabelSelector {
    /// Returns whether the selector matches every object.
    pub fn is_empty(&self) -> bool {
        self.match_labels.is_empty() && self.match_expressions.is_empty()
    }
}

/// A condition on the label `key`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawRequirement", into = "RawRequirement")]
pub struct Requirement {
    /// Key of the label.
    pub key: String,
    /// Condition on the label's value.
    pub operator: Operator,
}

/// Condition on the value of a label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    /// The label exists, and its value is one of these.
    In(BTreeSet<String>),
    /// The label does not exist, or has another value than these.
    NotIn(BTreeSet<String>),
    /// The label exists, with any value.
    Exists,
    /// The label does not exist.
    DoesNotExist,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRequirement {
    key: String,
    operator: String,
    #[serde(default, deserialize_with = "null_as_default")]
    values: BTreeSet<String>,
}

/// Reason why a condition on a label cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequirementError {
    /// `In` or `NotIn` without values.
    #[error("operator {operator} of key {key:?} needs values")]
    NeedsValues {
        /// Operator of the condition.
        operator: String,
        /// Key of the label.
        key: String,
    },
    /// `Exists` or `DoesNotExist` with values.
    #[error("operator {operator} of key {key:?} takes no values")]
    TakesNoValues {
        /// Operator of the condition.
        operator: String,
        /// Key of the label.
        key: String,
    },
    /// The operator is not one of the four.
    #[error("operator {operator:?} of key {key:?} is unknown")]
    UnknownOperator {
        /// Operator of the condition.
        operator: String,
        /// Key of the label.
        key: String,
    },
}

impl From<Requirement> for RawRequirement {
    fn from(requirement: Requirement) -> Self {
        let (operator, values) = match requirement.operator {
            Operator::In(values) => ("In", values),
            Operator::NotIn(values) => ("NotIn", values),
            Operator::Exists => ("Exists", BTreeSet::new()),
            Operator::DoesNotExist => ("DoesNotExist", BTreeSet::new()),
        };
        Self { key: requirement.key, operator: operator.to_owned(), values }
    }
}

impl TryFrom<RawRequirement> for Requirement {
    type Error = RequirementError;

    fn try_from(raw: RawRequirement) -> Result<Self, RequirementError> {
        let RawRequirement { key, operator, values } = raw;
        let operator = match (operator.as_str(), values.is_empty()) {
            ("In", false) => Operator::In(values),
            ("NotIn", false) => Operator::NotIn(values),
            ("Exists", true) => Operator::Exists,
            ("DoesNotExist", true) => Operator::DoesNotExist,
            ("In" | "NotIn", true) => {
                return Err(RequirementError::NeedsValues { operator, key });
            }
            ("Exists" | "DoesNotExist", false) => {
                return Err(RequirementError::TakesNoValues { operator, key });
            }
            _ => return Err(RequirementError::UnknownOperator { operator, key }),
        };
        Ok(Self { key, operator })
    }
}
