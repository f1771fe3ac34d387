//! Durable replacement of whole files.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use skein_sys::files::recreate;

/// Replaces a file durably: writes `bytes` to `<path>.new`, and renames that file once its contents
/// are on the disk. A power failure leaves either the old contents or the new ones.
///
/// # Errors
/// The error of the first system call that fails.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    replace_by(temporary.as_ref(), path, bytes, None)
}

/// Replaces a file as [`replace`] does, but writes to `temporary`, which must be in the same
/// directory.
/// `mode` are the permission bits of the file; `None` means 0600.
///
/// # Errors
/// The error of the first system call that fails.
pub(crate) fn replace_by(
    temporary: &Path,
    path: &Path,
    bytes: &[u8],
    mode: Option<u32>,
) -> io::Result<()> {
    let mut file = recreate(temporary, 0o600)?;
    if let Some(mode) = mode {
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    sync_beside(path)
}

/// Synchronizes the directory of `path`, so that a creation, rename or removal of `path` is
/// durable.
///
/// # Errors
/// The directory cannot be opened or synchronized.
pub(crate) fn sync_beside(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn file_is_replaced_with_mode_and_without_rest() {
        let directory = tempfile::tempdir().unwrap();
        let (path, temporary) = (directory.path().join("a"), directory.path().join(".a"));
        replace(&path, b"old").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        replace_by(&temporary, &path, b"new", Some(0o640)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn replacing_a_file_follows_no_link() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        replace(&at("file"), b"one").unwrap();
        std::os::unix::fs::symlink(at("target"), at("file.new")).unwrap();
        assert!(replace(&at("file"), b"two").is_err());
        assert!(!at("target").exists());
        fs::remove_file(at("file.new")).unwrap();
        // A process that was killed can leave this file.
        fs::write(at("file.new"), "half").unwrap();
        replace(&at("file"), b"two").unwrap();
        assert_eq!(fs::read(at("file")).unwrap(), b"two");
    }
}
