//! The files beside that of the key in force which a change of it needs, and what they say of how far it has
//! come.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use skein_ipc::keys::PrivateKey;

use super::super::identity;
use crate::failure::Failure;
use crate::files::sync_beside;
use crate::status::Stage;

/// The key beside the one in force, and the stage that this means.
pub(super) fn read_second(
    path: &Path,
    current: &PrivateKey,
) -> Result<Option<(Stage, PrivateKey)>, Failure> {
    let [at_next, at_previous] = second_key_paths(path);
    let next = identity::load(&at_next)?;
    let mut previous = identity::load(&at_previous)?;
    if previous.as_ref() == Some(current) {
        // The agent ended before the next key took the place of this one.
        remove(&at_previous)?;
        previous = None;
    }
    match (next, previous) {
        (Some(_), Some(_)) => Err(Failure::Usage(format!(
            "there are both {} and {}: remove the one that no node record names",
            at_next.display(),
            at_previous.display()
        ))),
        (Some(next), None) => Ok(Some((Stage::Announced, next))),
        (None, Some(previous)) => Ok(Some((Stage::Changed, previous))),
        (None, None) => Ok(None),
    }
}

/// Where the next key lies, beside the one in force.
pub(super) fn next_path(path: &Path) -> PathBuf {
    with_suffix(path, ".next")
}

/// Where the key before lies.
pub(super) fn previous_path(path: &Path) -> PathBuf {
    with_suffix(path, ".previous")
}

fn with_suffix(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// The files beside a key's that a change of it may leave.
pub(super) fn second_key_paths(path: &Path) -> [PathBuf; 2] {
    [next_path(path), previous_path(path)]
}

fn names(path: &Path) -> [PathBuf; 3] {
    [path.to_owned(), next_path(path), previous_path(path)]
}

/// All files that may hold a private key of the node whose key lies at `path`.
pub fn all(path: &Path) -> Vec<PathBuf> {
    names(path).into_iter().chain(incomplete_files(path)).collect()
}

/// What killed agents have left of those that they were writing: whole ones, too, of which a link was made already.
fn incomplete_files(path: &Path) -> Vec<PathBuf> {
    let names = names(path).map(|path| path.file_name().unwrap_or_default().to_owned());
    let ours = |found: &OsString| {
        names.iter().any(|name| {
            let rest = found.as_encoded_bytes().strip_prefix(name.as_encoded_bytes());
            rest.is_some_and(|rest| rest.starts_with(b".new-"))
        })
    };
    let entries = path.parent().map(std::fs::read_dir).into_iter().flatten().flatten().flatten();
    entries.filter(|entry| ours(&entry.file_name())).map(|entry| entry.path()).collect()
}

/// Removes a file, if it is there.
pub(super) fn remove(path: &Path) -> Result<(), Failure> {
    let removed = match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sync_beside(path),
    };
    removed.map_err(|error| Failure::io(format!("cannot remove {}", path.display()), error))
}

/// Removes what killed agents have left of the files that they were writing.
pub(super) fn remove_incomplete(path: &Path) {
    for path in incomplete_files(path) {
        tracing::warn!(path = %path.display(), "removing a key that was not written to its end");
        let _ = std::fs::remove_file(path);
    }
}
