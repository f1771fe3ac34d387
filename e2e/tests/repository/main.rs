//! Order of imports between crates, references in documents, and lists of names in documents.

mod crates;
mod documents;
mod lists;
