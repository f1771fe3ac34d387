//! Entry point of the fuzz target for answers of the kernel.

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "../../fuzz/corpus_mutations.rs"]
mod corpus_mutations;

/// Reads the kernel's answer about a link.
pub fn link_answers(data: &[u8]) {
    let _ = crate::link::parse(data);
}

#[cfg(test)]
mod tests {
    use super::corpus_mutations::run_corpus_and_mutations;
    use super::*;

    #[test]
    fn fuzz_targets_accept_corpora_and_mutations() {
        run_corpus_and_mutations("link_answers", link_answers);
    }
}
