//! Order of imports between crates, and references in documents.

mod crates;
mod documents;
