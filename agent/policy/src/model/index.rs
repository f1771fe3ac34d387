//! Index of terms by the labels that they require.

use std::collections::HashMap;

use crate::api::{LabelSelector, Labels, Operator};

use super::selector::{NamespaceScope, PodTerm};

/// Terms with identifiers, found by a pod without evaluation of the terms that require another
/// label or another namespace.
#[derive(Debug, Clone)]
pub(crate) struct TermIndex<I> {
    /// Terms of one namespace, by its name.
    named: HashMap<String, Buckets<I>>,
    /// Terms of labelled namespaces, by the pod's labels.
    pods: Buckets<I>,
    /// Terms of labelled namespaces without a required label of the pod, by the namespace's labels.
    namespaces: Buckets<I>,
}

/// Terms by one label that they require, key first, and terms that require none.
#[derive(Debug, Clone)]
struct Buckets<I> {
    labelled: HashMap<String, HashMap<String, Vec<(PodTerm, I)>>>,
    rest: Vec<(PodTerm, I)>,
}

impl<I> Default for Buckets<I> {
    fn default() -> Self {
        Self { labelled: HashMap::new(), rest: Vec::new() }
    }
}

impl<I> Default for TermIndex<I> {
    fn default() -> Self {
        let (pods, namespaces) = Default::default();
        Self { named: HashMap::new(), pods, namespaces }
    }
}

/// Returns a key and values of which a selected object must have one.
fn required_label(selector: &LabelSelector) -> Option<(&str, Vec<&str>)> {
    if let Some((key, value)) = selector.match_labels.first_key_value() {
        return Some((key, vec![value]));
    }
    selector.match_expressions.iter().find_map(|requirement| match &requirement.operator {
        Operator::In(values) => {
            Some((requirement.key.as_str(), values.iter().map(String::as_str).collect()))
        }
        _ => None,
    })
}

impl<I> Buckets<I> {
    /// Returns the lists that hold terms with this selector.
    fn lists(&mut self, selector: &LabelSelector) -> Vec<&mut Vec<(PodTerm, I)>> {
        let Some((key, values)) = required_label(selector) else {
            return vec![&mut self.rest];
        };
        let by_value = self.labelled.entry(key.to_owned()).or_default();
        for value in &values {
            by_value.entry((*value).to_owned()).or_default();
        }
        let lists = by_value.iter_mut();
        lists.filter_map(|(value, list)| values.contains(&&**value).then_some(list)).collect()
    }

    fn prune(&mut self) {
        for by_value in self.labelled.values_mut() {
            by_value.retain(|_, list| !list.is_empty());
        }
        self.labelled.retain(|_, by_value| !by_value.is_empty());
    }

    fn is_empty(&self) -> bool {
        self.labelled.is_empty() && self.rest.is_empty()
    }

    fn candidates<'a>(&'a self, labels: &'a Labels) -> impl Iterator<Item = &'a (PodTerm, I)> {
        let labelled = labels.iter().filter_map(|(key, value)| self.labelled.get(key)?.get(value));
        labelled.flatten().chain(&self.rest)
    }
}

impl<I: PartialEq> TermIndex<I> {
    /// Adds a term with an identifier.
    pub(crate) fn insert(&mut self, term: &PodTerm, id: I)
    where
        I: Clone,
    {
        let (buckets, selector) = self.place(term);
        for list in buckets.lists(selector) {
            list.push((term.clone(), id.clone()));
        }
    }

    /// Removes a term that was added with the same identifier.
    pub(crate) fn remove(&mut self, term: &PodTerm, id: &I) {
        let (buckets, selector) = self.place(term);
        for list in buckets.lists(selector) {
            if let Some(at) = list.iter().position(|(one, with)| one == term && with == id) {
                list.swap_remove(at);
            }
        }
        buckets.prune();
        self.named.retain(|_, buckets| !buckets.is_empty());
    }

    /// Returns the buckets of a term and the selector by which the buckets are keyed.
    fn place<'a>(&'a mut self, term: &'a PodTerm) -> (&'a mut Buckets<I>, &'a LabelSelector) {
        match &term.namespaces {
            NamespaceScope::Named(name) => {
                (self.named.entry(name.clone()).or_default(), &term.pods)
            }
            NamespaceScope::Labelled(namespaces) => {
                let by_namespace =
                    required_label(&term.pods).is_none() && required_label(namespaces).is_some();
                match by_namespace {
                    true => (&mut self.namespaces, namespaces),
                    false => (&mut self.pods, &term.pods),
                }
            }
        }
    }

    /// Returns the identifiers of all terms that select a pod; an identifier appears once for each
    /// of its terms. Without `namespace_labels`, terms of labelled namespaces select no pod.
    pub(crate) fn matching<'a>(
        &'a self,
        namespace: &'a str,
        namespace_labels: Option<&'a Labels>,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a I> {
        let named = self.named.get(namespace);
        let named = named.into_iter().flat_map(|buckets| buckets.candidates(labels));
        let labelled = namespace_labels.into_iter().flat_map(|namespace_labels| {
            self.pods.candidates(labels).chain(self.namespaces.candidates(namespace_labels))
        });
        let selects = move |term: &PodTerm| term.matches(namespace, namespace_labels, labels);
        named.chain(labelled).filter(move |(term, _)| selects(term)).map(|(_, id)| id)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::api::Requirement;

    fn label() -> impl Strategy<Value = (String, String)> {
        (0..3_u8, 0..3_u8).prop_map(|(key, value)| (format!("k{key}"), format!("v{value}")))
    }

    fn selector() -> impl Strategy<Value = LabelSelector> {
        let values = prop::collection::btree_set((0..3_u8).prop_map(|v| format!("v{v}")), 1..3);
        let operator = (0..4_u8, values).prop_map(|(operator, values)| match operator {
            0 => Operator::In(values),
            1 => Operator::NotIn(values),
            2 => Operator::Exists,
            _ => Operator::DoesNotExist,
        });
        let key = (0..3_u8).prop_map(|key| format!("k{key}"));
        let one = (key, operator).prop_map(|(key, operator)| Requirement { key, operator });
        let labels = prop::collection::btree_map("k[0-2]", "v[0-2]", 0..2);
        (labels, prop::collection::vec(one, 0..2)).prop_map(|(match_labels, match_expressions)| {
            LabelSelector { match_labels, match_expressions }
        })
    }

    fn term() -> impl Strategy<Value = PodTerm> {
        let scope = prop_oneof![
            (0..2_u8).prop_map(|n| NamespaceScope::Named(format!("n{n}"))),
            selector().prop_map(NamespaceScope::Labelled),
        ];
        (scope, selector()).prop_map(|(namespaces, pods)| PodTerm { namespaces, pods })
    }

    proptest! {
        #[test]
        fn index_finds_the_terms_that_match(
            terms in prop::collection::vec((term(), any::<bool>()), 0..12),
            labels in prop::collection::btree_map("k[0-2]", "v[0-2]", 0..3),
            pod in prop::collection::vec(label(), 0..3),
        ) {
            let pod: Labels = pod.into_iter().collect();
            let mut index = TermIndex::default();
            for (id, (term, _)) in terms.iter().enumerate() {
                index.insert(term, id);
            }
            for (id, (term, removed)) in terms.iter().enumerate() {
                if *removed {
                    index.remove(term, &id);
                }
            }
            for namespace_labels in [Some(&labels), None] {
                let found: BTreeSet<_> =
                    index.matching("n1", namespace_labels, &pod).copied().collect();
                let expected = terms.iter().enumerate().filter(|(_, (term, removed))| {
                    !removed && term.matches("n1", namespace_labels, &pod)
                });
                prop_assert_eq!(found, expected.map(|(id, _)| id).collect::<BTreeSet<_>>());
            }
        }
    }
}
