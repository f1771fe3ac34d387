//! The spool: DEL requests that the plugin stores while the agent does not answer, one file per
//! attachment. An entry is on disk before the plugin reports success.
//!
//! The next agent executes the stored requests. It executes the request of an attachment before it
//! creates the attachment again.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::{AttachmentId, Command, Del, Request, VERSION};

/// End of the file name of every complete entry. Other files in the directory are ignored.
const SUFFIX: &str = ".json";

/// Error of reading an entry.
#[derive(Debug, Error)]
pub enum EntryError {
    /// The file cannot be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The content is not a JSON document of a [`Request`].
    #[error("damaged: {0}")]
    Json(#[from] serde_json::Error),
}

/// A stored DEL request.
#[derive(Debug)]
pub struct Entry {
    /// File of the entry, for [`remove`].
    pub path: PathBuf,
    /// Stored request, or the reason why it cannot be read.
    pub request: Result<Request, EntryError>,
}

/// Stores a DEL request for `id` in `directory`, which is created if it is missing. The entry is on
/// disk when the function returns. Idempotent.
///
/// # Errors
/// An I/O error if the directory cannot be created, or if the file cannot be written or
/// synchronised (fsync(2)).
pub fn put(directory: &Path, id: &AttachmentId) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let request = Request { protocol: VERSION, command: Command::Del(Del { id: id.clone() }) };
    let name = name(id);
    // Two plugin processes may store the same request concurrently. Each writes a file of its own
    // and renames it.
    let unfinished = directory.join(format!("{name}.{}", std::process::id()));
    let write = || {
        // A killed plugin process with the same process id may have left a file, and another user
        // may have created a symbolic link.
        let _ = fs::remove_file(&unfinished);
        let mut file = File::create_new(&unfinished)?;
        file.write_all(&serde_json::to_vec(&request)?)?;
        file.sync_all()?;
        fs::rename(&unfinished, directory.join(name + SUFFIX))?;
        File::open(directory)?.sync_all()
    };
    write().inspect_err(|_| {
        // The incomplete file is useless.
        let _ = fs::remove_file(&unfinished);
    })
}

fn name(id: &AttachmentId) -> String {
    format!("{}@{}", id.container_id, id.ifname)
}

/// Returns the path of the entry for `id`. The file need not exist.
pub fn path(directory: &Path, id: &AttachmentId) -> PathBuf {
    directory.join(name(id) + SUFFIX)
}

/// Reads all entries, in no particular order. A missing directory has no entries.
///
/// # Errors
/// An I/O error if the directory cannot be read. An error of one entry is in [`Entry::request`].
pub fn list(directory: &Path) -> io::Result<Vec<Entry>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if !path.to_string_lossy().ends_with(SUFFIX) {
            continue;
        }
        let read = || Ok(serde_json::from_slice(&fs::read(&path)?)?);
        found.push(Entry { request: read(), path });
    }
    Ok(found)
}

/// Removes the entry at `path`. Succeeds if there is no such file.
///
/// # Errors
/// An I/O error if the file cannot be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn entry_is_stored_once_and_damaged_entry_is_an_error() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("a/b");
        assert!(list(&directory).unwrap().is_empty());
        let id = AttachmentId { container_id: "c.1-x_y".into(), ifname: "eth0".into() };
        put(&directory, &id).unwrap();
        put(&directory, &id).unwrap();
        fs::write(directory.join("broken.json"), "{").unwrap();
        fs::write(directory.join("c@eth0.77"), "unfinished").unwrap();
        let mut found = list(&directory).unwrap();
        found.sort_by(|a, b| a.path.cmp(&b.path));
        assert_eq!(found.len(), 2);
        assert!(matches!(found[0].request, Err(EntryError::Json(_))));
        let Ok(Request { command: Command::Del(del), .. }) = &found[1].request else { panic!() };
        assert_eq!(del.id, id);
        for entry in &found {
            remove(&entry.path).unwrap();
            remove(&entry.path).unwrap();
        }
        assert!(list(&directory).unwrap().is_empty());
    }

    #[test]
    fn links_in_the_spool_are_not_followed() {
        let parent = tempfile::tempdir().unwrap();
        let id = AttachmentId { container_id: "c".into(), ifname: "eth0".into() };
        let target = parent.path().join("target");
        let unfinished = parent.path().join(format!("c@eth0.{}", std::process::id()));
        std::os::unix::fs::symlink(&target, &unfinished).unwrap();
        put(parent.path(), &id).unwrap();
        assert!(!target.exists());
        assert_eq!(list(parent.path()).unwrap().len(), 1);
    }
}
