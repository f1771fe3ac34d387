//! Runs fuzz targets with their stored corpora and with mutations of these inputs in ordinary
//! tests. The tests of each crate include this file by its path.

use std::path::{Path, PathBuf};

#[path = "../core/src/fuzzing/vary.rs"]
mod vary;

/// Runs a target with each seed of its corpus, with every truncation of the seed, and with single
/// changed bytes. Then it runs the target with 5000 variations of the seeds; the environment
/// variable SKEIN_VARIATIONS sets another number.
pub(crate) fn run_corpus_and_mutations(target: &str, run: fn(&[u8])) {
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
