//! Selection of the files to check.

use std::fs;
use std::path::Path;

use anyhow::Context;
use walkdir::{DirEntry, WalkDir};

/// A Rust source file of the workspace.
#[derive(Debug)]
pub(crate) struct RustFile {
    /// Path below the root of the tree.
    pub(crate) name: String,
    /// Directory of the crate, below the root.
    pub(crate) package: String,
    /// Contents of the file.
    pub(crate) text: String,
    /// True for a file that holds unit tests only, such as `src/tests.rs` or `src/tests/loss.rs`.
    pub(crate) unit_tests: bool,
}

/// Reads all Rust files below `root`; build output and hidden directories are left out.
///
/// # Errors
/// Returns an error if a directory or a file cannot be read.
pub(crate) fn rust(root: &Path) -> anyhow::Result<Vec<RustFile>> {
    let mut files = Vec::new();
    for (name, text) in read(root, "rs")? {
        let package = package_of(root, &name);
        let inside = name.strip_prefix(&package).unwrap_or(&name).trim_start_matches('/');
        let unit_tests = inside.starts_with("src/")
            && (inside.ends_with("tests.rs") || inside.split('/').any(|part| part == "tests"));
        files.push(RustFile { name, package, text, unit_tests });
    }
    Ok(files)
}

/// Reads all Markdown files below `root` as pairs of path and contents.
///
/// # Errors
/// Returns an error if a directory or a file cannot be read.
pub(crate) fn markdown(root: &Path) -> anyhow::Result<Vec<(String, String)>> {
    read(root, "md")
}

fn read(root: &Path, extension: &str) -> anyhow::Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for entry in WalkDir::new(root).sort_by_file_name().into_iter().filter_entry(is_source) {
        let entry = entry?;
        if entry.path().extension().is_none_or(|found| found != extension) {
            continue;
        }
        let name = entry.path().strip_prefix(root)?.to_string_lossy().into_owned();
        let text =
            fs::read_to_string(entry.path()).with_context(|| format!("cannot read {name}"))?;
        files.push((name, text));
    }
    Ok(files)
}

fn is_source(entry: &DirEntry) -> bool {
    let name = entry.file_name().to_string_lossy();
    entry.depth() == 0 || !(name.starts_with('.') || name == "target")
}

/// Returns the nearest directory above the file that holds a Cargo.toml.
fn package_of(root: &Path, name: &str) -> String {
    Path::new(name)
        .ancestors()
        .skip(1)
        .find(|directory| root.join(directory).join("Cargo.toml").exists())
        .map(|directory| directory.to_string_lossy().into_owned())
        .unwrap_or_default()
}
