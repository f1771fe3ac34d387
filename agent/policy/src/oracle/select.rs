//! Evaluation of label selectors.

use crate::api::{LabelSelector, Labels, METADATA_NAME, Namespace, Operator, Pod};

use super::World;

/// Returns whether a selector selects labels.
pub(super) fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    for (key, value) in &selector.match_labels {
        if labels.get(key) != Some(value) {
            return false;
        }
    }
    for requirement in &selector.match_expressions {
        let value = labels.get(&requirement.key);
        let holds = match &requirement.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => !value.is_some_and(|value| values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        };
        if !holds {
            return false;
        }
    }
    true
}

/// Returns whether a selector selects a namespace.
pub(super) fn selects_namespace(selector: &LabelSelector, namespace: &Namespace) -> bool {
    let mut labels = namespace.metadata.labels.clone();
    if !labels.contains_key(METADATA_NAME) {
        labels.insert(METADATA_NAME.to_owned(), namespace.metadata.name.clone());
    }
    selects(selector, &labels)
}

/// Returns whether selectors of namespace and pod select a pod.
pub(super) fn selects_pod(
    world: &World<'_>,
    namespaces: &LabelSelector,
    pods: &LabelSelector,
    pod: &Pod,
) -> bool {
    let namespace = world.namespace_of(pod);
    namespace.is_some_and(|namespace| selects_namespace(namespaces, namespace))
        && selects(pods, &pod.metadata.labels)
}
