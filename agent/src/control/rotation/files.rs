//! Files of the second key during a rotation, from which the stage of the rotation follows.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use skein_ipc::keys::PrivateKey;

use super::super::identity;
use crate::failure::Failure;
use crate::files::sync_beside;
use crate::status::Stage;

/// Reads the second key next to the active key at `path`; returns it with the stage that it
/// implies.
///
/// # Errors
/// [`Failure`] if both a next and a previous key exist, or if a key file cannot be read or removed.
pub(super) fn read_second(
    path: &Path,
    current: &PrivateKey,
) -> Result<Option<(Stage, PrivateKey)>, Failure> {
    let [at_next, at_previous] = second_key_paths(path);
    let next = identity::load(&at_next)?;
    let mut previous = identity::load(&at_previous)?;
    if previous.as_ref() == Some(current) {
        // An earlier agent ended after it had stored the previous key, before it activated the next
        // one.
        remove(&at_previous)?;
        previous = None;
    }
    match (next, previous) {
        (Some(_), Some(_)) => Err(Failure::Usage(format!(
            "there are two second keys, {} and {}. Remove the one that no node record names.",
            at_next.display(),
            at_previous.display()
        ))),
        (Some(next), None) => Ok(Some((Stage::Announced, next))),
        (None, Some(previous)) => Ok(Some((Stage::Changed, previous))),
        (None, None) => Ok(None),
    }
}

/// Returns the path of the next key; `path` is that of the active key.
pub(super) fn next_path(path: &Path) -> PathBuf {
    with_suffix(path, ".next")
}

/// Returns the path of the previous key; `path` is that of the active key.
pub(super) fn previous_path(path: &Path) -> PathBuf {
    with_suffix(path, ".previous")
}

fn with_suffix(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Returns the paths of the next and the previous key; `path` is that of the active key.
pub(super) fn second_key_paths(path: &Path) -> [PathBuf; 2] {
    [next_path(path), previous_path(path)]
}

fn names(path: &Path) -> [PathBuf; 3] {
    [path.to_owned(), next_path(path), previous_path(path)]
}

/// Returns all files that may contain a private key of the node; `path` is that of the active key.
pub fn all(path: &Path) -> Vec<PathBuf> {
    names(path).into_iter().chain(incomplete_files(path)).collect()
}

/// Returns the temporary key files that killed agents have left. They may be complete, because a
/// key file is linked before its temporary file is removed.
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

/// Removes a file if it exists.
///
/// # Errors
/// [`Failure`] if the file cannot be removed or its directory cannot be synced.
pub(super) fn remove(path: &Path) -> Result<(), Failure> {
    let removed = match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sync_beside(path),
    };
    removed.map_err(|error| Failure::io(format!("cannot remove {}", path.display()), error))
}

/// Removes the temporary key files that killed agents have left.
pub(super) fn remove_incomplete(path: &Path) {
    for path in incomplete_files(path) {
        tracing::warn!(path = %path.display(), "removing temporary key file of a killed agent");
        let _ = std::fs::remove_file(path);
    }
}
