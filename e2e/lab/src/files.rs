//! Files that running programs read.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

/// Replaces the contents of a file by a rename, so that a program never reads half of them.
///
/// # Errors
/// If the file cannot be written or renamed.
pub fn replace(path: &Path, contents: impl AsRef<[u8]>) -> Result<()> {
    let new = path.with_extension("new");
    let written = fs::write(&new, contents).and_then(|()| fs::rename(&new, path));
    written.with_context(|| format!("writing {}", path.display()))
}
