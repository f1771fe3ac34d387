//! Files that no other user can redirect, and whose content no other user receives.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::socket::is_trusted;

/// Creates a file with the permission bits `mode`.
///
/// # Errors
/// An I/O error, `AlreadyExists` also if `path` is a symbolic link.
pub fn create_new(path: &Path, mode: u32) -> io::Result<File> {
    File::options().write(true).create_new(true).mode(mode).open(path)
}

/// Creates a file with the permission bits `mode` in place of an earlier file of this process's
/// user or of root. A process that has opened the earlier file sees nothing of the new one.
///
/// # Errors
/// An I/O error, also if `path` is not a regular file or belongs to another user.
pub fn recreate(path: &Path, mode: u32) -> io::Result<File> {
    match create_new(path, mode) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        created => return created,
    }
    let found = fs::symlink_metadata(path)?;
    let refused = |why: &str| Err(io::Error::other(format!("{why}: name another file")));
    if !found.is_file() {
        return refused("there is something that is not a regular file");
    }
    if !is_trusted(found.uid()) {
        return refused("the file belongs to another user");
    }
    fs::remove_file(path)?;
    create_new(path, mode)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    #[test]
    fn file_of_this_user_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        recreate(&path, 0o600).unwrap().write_all(b"old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let mut reader = File::open(&path).unwrap();
        recreate(&path, 0o600).unwrap().write_all(b"new").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read(&path).unwrap(), b"new");
        let mut seen = Vec::new();
        reader.read_to_end(&mut seen).unwrap();
        assert_eq!(seen, b"old", "The reader of the earlier file sees nothing of the new one.");
    }

    #[test]
    fn file_of_another_user_and_links_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("theirs"), "kept").unwrap();
        chown(at("theirs"), Some(65_534), None).expect("this test needs root");
        symlink(at("target"), at("dangling")).unwrap();
        symlink(at("theirs"), at("link")).unwrap();
        fs::create_dir(at("directory")).unwrap();
        for name in ["theirs", "dangling", "link", "directory"] {
            assert!(recreate(&at(name), 0o600).is_err(), "{name}");
            assert!(create_new(&at(name), 0o600).is_err(), "{name}");
        }
        assert_eq!(fs::read(at("theirs")).unwrap(), b"kept");
        assert!(!at("target").exists());
    }
}
