//! Creation of files in directories that other users can change. The functions never follow a
//! symbolic link at the path, and never write to a file of another user.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::socket::is_trusted;

/// Creates a file with the permission bits `mode`, reduced by the umask, and opens it for writing.
///
/// # Errors
/// The error of open(2) with O_EXCL: `AlreadyExists` if `path` exists, even if it is a symbolic
/// link.
pub fn create_new(path: &Path, mode: u32) -> io::Result<File> {
    File::options().write(true).create_new(true).mode(mode).open(path)
}

/// Creates a file with the permission bits `mode`. An existing file of root or of this process's
/// user is deleted first, so that a process that has it open does not see the new content.
///
/// # Errors
/// An error with the remedy if `path` exists and is not a regular file, or belongs to another user;
/// the error of unlink(2) or [`create_new`].
pub fn recreate(path: &Path, mode: u32) -> io::Result<File> {
    match create_new(path, mode) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        created => return created,
    }
    let found = fs::symlink_metadata(path)?;
    let refused = |why: &str| Err(io::Error::other(format!("{why}: choose another path")));
    if !found.is_file() {
        return refused("the path is not a regular file");
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
    fn recreate_replaces_file_and_its_mode() {
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
        assert_eq!(seen, b"old", "a reader of the old file must not see the new content");
    }

    #[test]
    fn files_of_other_users_links_and_directories_are_refused() {
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
