//! What the fuzzers call: whole input in, nothing out, a panic where a promise is broken.
//!
//! The ordinary tests run each of these over the corpus of its target in `fuzz/corpus`.

pub mod offload;
pub mod tunnel;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) fn run_corpus(target: &str, run: impl Fn(&[u8])) {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files = 0;
    for entry in std::fs::read_dir(&dir).unwrap() {
        run(&std::fs::read(entry.unwrap().path()).unwrap());
        files += 1;
    }
    assert!(files > 0, "no seeds in {}", dir.display());
}
