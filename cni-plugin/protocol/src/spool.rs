//! Deletions that found no agent: a file each, on the disk before the plugin says that it is done.
//!
//! Whoever has the agent's place next does them, and before an attachment of the same name is made
//! again.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::{AttachmentId, Command, Del, Request, VERSION};

/// What every entry's name ends with; anything else in the directory is unfinished or a stranger's.
const SUFFIX: &str = ".json";

/// An entry that cannot be read.
#[derive(Debug, Error)]
pub enum EntryError {
    /// The file.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Its contents.
    #[error("damaged: {0}")]
    Json(#[from] serde_json::Error),
}

/// A deletion that waits.
#[derive(Debug)]
pub struct Entry {
    /// Its file.
    pub path: PathBuf,
    /// What is to be done.
    pub request: Result<Request, EntryError>,
}

/// Keeps the deletion of `id`; the same again changes nothing. It is on the disk when this returns.
pub fn put(directory: &Path, id: &AttachmentId) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let request = Request { protocol: VERSION, command: Command::Del(Del { id: id.clone() }) };
    let name = name(id);
    // Two plugins may do the same at once: each has a file of its own until it is renamed.
    let unfinished = directory.join(format!("{name}.{}", std::process::id()));
    let write = || {
        // A plugin that was killed may have left a file, another user a link.
        let _ = fs::remove_file(&unfinished);
        let mut file = File::create_new(&unfinished)?;
        file.write_all(&serde_json::to_vec(&request)?)?;
        file.sync_all()?;
        fs::rename(&unfinished, directory.join(name + SUFFIX))?;
        File::open(directory)?.sync_all()
    };
    write().inspect_err(|_| {
        // What is left of a failed try helps nobody.
        let _ = fs::remove_file(&unfinished);
    })
}

fn name(id: &AttachmentId) -> String {
    format!("{}@{}", id.container_id, id.ifname)
}

/// Where the deletion of `id` waits, if it does.
pub fn path(directory: &Path, id: &AttachmentId) -> PathBuf {
    directory.join(name(id) + SUFFIX)
}

/// What waits; nothing where there is no directory.
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

/// Forgets an entry.
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
    fn entries_are_kept_once_and_damaged_ones_are_told_apart() {
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
