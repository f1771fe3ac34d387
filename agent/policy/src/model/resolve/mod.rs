//! Conversion of API objects to [`Policy`](super::Policy), with reports of unreadable parts.

mod cluster;
mod network;

use crate::api::{Defect, LabelSelector, Parsed};

use super::policy::{PolicyId, PortSpec, Ports};
use super::selector::{NamespaceScope, PodTerm};

pub use cluster::resolve_cluster_policy;
pub use network::resolve_network_policy;

/// Collector of defects of one object.
struct Reader {
    id: PolicyId,
    /// Namespace of the object; empty if it has none.
    namespace: String,
    defects: Vec<Defect>,
}

/// A readable entry of a list.
struct Entry<'a, T> {
    /// Position in the list.
    index: usize,
    /// Path of the field.
    field: String,
    /// Parsed value.
    value: &'a T,
}

impl Reader {
    fn report(&mut self, field: &str, reason: impl Into<String>) {
        let object = self.id.to_string();
        self.defects.push(Defect { object, field: field.to_owned(), reason: reason.into() });
    }

    /// Returns a readable value; reports another.
    fn read<'a, T>(&mut self, field: &str, parsed: &'a Parsed<T>) -> Option<&'a T> {
        match parsed {
            Parsed::Valid(value) => Some(value),
            Parsed::Invalid(reason) => {
                self.report(field, reason);
                None
            }
        }
    }

    /// Returns the readable entries of a list.
    fn entries<'a, T>(&mut self, field: &str, list: &'a [Parsed<T>]) -> Vec<Entry<'a, T>> {
        let mut entries = Vec::with_capacity(list.len());
        for (index, entry) in list.iter().enumerate() {
            let field = format!("{field}[{index}]");
            if let Some(value) = self.read(&field, entry) {
                entries.push(Entry { index, field, value });
            }
        }
        entries
    }
}

fn labelled(namespaces: LabelSelector, pods: LabelSelector) -> PodTerm {
    PodTerm { namespaces: NamespaceScope::Labelled(namespaces), pods }
}

fn port_list(mut entries: Vec<PortSpec>) -> Ports {
    entries.sort_unstable();
    entries.dedup();
    Ports::List(entries)
}
