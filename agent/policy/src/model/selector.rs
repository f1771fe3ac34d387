//! Evaluation of label selectors.

use serde::{Deserialize, Serialize};

use crate::api::{LabelSelector, Labels, METADATA_NAME, Operator};
use crate::model::{Mutation, mutated};

/// A selection of pods by namespace and labels.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodTerm {
    /// Namespaces of the pods.
    pub namespaces: NamespaceScope,
    /// Labels of the pods.
    pub pods: LabelSelector,
}

/// A selection of namespaces.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum NamespaceScope {
    /// The namespace with this name.
    Named(String),
    /// Namespaces with matching labels.
    Labelled(LabelSelector),
}

impl PodTerm {
    /// Returns whether the term selects every pod of every namespace.
    pub fn is_all(&self) -> bool {
        self.is_of_all_namespaces() && self.pods.is_empty()
    }

    /// Returns whether the term selects pods of every namespace.
    pub fn is_of_all_namespaces(&self) -> bool {
        matches!(&self.namespaces, NamespaceScope::Labelled(selector) if selector.is_empty())
    }

    /// Returns the name of the namespace if the term is about one namespace.
    pub fn namespace(&self) -> Option<&str> {
        match &self.namespaces {
            NamespaceScope::Named(name) => Some(name),
            NamespaceScope::Labelled(_) => None,
        }
    }

    /// Returns whether the term selects a pod. `namespace_labels` are the labels of its namespace;
    /// while they are unknown, terms of labelled namespaces do not select the pod.
    pub fn matches(
        &self,
        namespace: &str,
        namespace_labels: Option<&Labels>,
        labels: &Labels,
    ) -> bool {
        self.selects_namespace(namespace, namespace_labels) && matches(&self.pods, labels)
    }

    /// Returns whether the term selects pods of a namespace.
    pub fn selects_namespace(&self, name: &str, labels: Option<&Labels>) -> bool {
        match &self.namespaces {
            NamespaceScope::Named(own) => own == name,
            NamespaceScope::Labelled(selector) => {
                labels.is_some_and(|labels| matches(selector, labels))
            }
        }
    }
}

/// Returns whether a selector selects an object with these labels.
pub(crate) fn matches(selector: &LabelSelector, labels: &Labels) -> bool {
    let equal = |(key, value): (&String, &String)| labels.get(key) == Some(value);
    let holds = |key: &String, operator: &Operator| match (operator, labels.get(key)) {
        (Operator::In(values), Some(value)) => values.contains(value),
        (Operator::NotIn(values), Some(value)) => !values.contains(value),
        (Operator::NotIn(_), None) => !mutated(Mutation::NotInNeedsKey),
        (Operator::Exists, value) => value.is_some(),
        (Operator::DoesNotExist, value) => value.is_none(),
        (Operator::In(_), None) => false,
    };
    selector.match_labels.iter().all(equal)
        && selector.match_expressions.iter().all(|one| holds(&one.key, &one.operator))
}

/// Returns the labels of a namespace, with the label that older API servers do not set.
pub(crate) fn namespace_labels(name: &str, labels: &Labels) -> Labels {
    let mut labels = labels.clone();
    labels.entry(METADATA_NAME.to_owned()).or_insert_with(|| name.to_owned());
    labels
}
