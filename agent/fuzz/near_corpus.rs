//! Runs fuzz targets near their stored corpus in ordinary tests. The tests of each crate include
//! this file by its path.

use std::path::{Path, PathBuf};

#[path = "../core/src/fuzzing/vary.rs"]
mod vary;

/// Runs a target over each seed of its corpus: whole, cut at any byte, with any byte changed, and
/// over variations of the seeds (5000, or as many as the environment variable SKEIN_VARIATIONS
/// has).
pub(crate) fn run_near_corpus(target: &str, run: fn(&[u8])) {
    let variations = std::env::var("SKEIN_VARIATIONS").ok().map(|count| count.parse().unwrap());
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpora = [root.join("fuzz/corpus"), root.join("../fuzz/corpus")];
    let corpus = corpora.iter().find(|path| path.is_dir()).unwrap().join(target);
    let entries = std::fs::read_dir(corpus).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let seeds: Vec<_> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(!seeds.is_empty(), "The target {target} has no seeds.");
    vary::vary(&seeds, variations.unwrap_or(5_000), run);
    for seed in seeds {
        run(&seed);
        for index in 0..seed.len() {
            run(&seed[..index]);
            for change in [1, 0x80, 0xff] {
                let mut changed = seed.clone();
                changed[index] ^= change;
                run(&changed);
            }
        }
    }
}
