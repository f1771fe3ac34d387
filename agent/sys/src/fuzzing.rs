//! Entry point of the fuzz target for answers of the kernel.

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "../../fuzz/near_corpus.rs"]
mod near_corpus;

/// Reads the kernel's answer about a link.
pub fn link_answers(data: &[u8]) {
    let _ = crate::link::parse(data);
}

#[cfg(test)]
mod tests {
    use super::near_corpus::run_near_corpus;
    use super::*;

    #[test]
    fn inputs_near_the_corpus_fail_no_assertion() {
        run_near_corpus("link_answers", link_answers);
    }
}
