//! Entry points of the fuzz targets. Each takes the whole input and panics if a promise is broken.
//!
//! The unit tests run each entry point over the corpus of its target in `fuzz/corpus`.

pub(crate) mod merged;
pub mod offload;
pub mod tunnel;
#[cfg(test)]
mod vary;

/// Runs an entry point over the corpus of its target.
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

/// Runs an entry point over variations of the corpus of its target.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) fn run_variations(target: &str, count: usize, run: impl Fn(&[u8])) {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    let seeds: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    vary::vary(&seeds, count, run);
}
