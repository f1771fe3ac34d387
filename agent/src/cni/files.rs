//! Installation, repair and removal of files in the directories of the container runtime.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::files::replace_by;

/// Failure to install, repair or remove a file.
#[derive(Debug, Error)]
#[error("cannot {what} {}: {source}{}", path.display(), remedy(source))]
pub(super) struct InstallError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl InstallError {
    pub(super) fn new(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { what, path: path.to_owned(), source }
    }
}

/// Returns the remedy of an error in a directory of the runtime, with the punctuation before it;
/// empty if no general remedy exists.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        // EACCES, EPERM: root without CAP_DAC_OVERRIDE in a directory of another user, or an
        // immutable file.
        io::ErrorKind::PermissionDenied => {
            ". Give the directory to root (chown root), or the agent the capability DAC_OVERRIDE \
             (the chart's capabilities.agent)"
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            ". Set cni.bin_dir and cni.conf_dir (the chart's cni.binDir and cni.confDir) to \
             directories of the runtime that can be written"
        }
        _ => "",
    }
}

/// Permission bits of an installed file. A stricter mode that an administrator set stays.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mode {
    /// Bits of a new file, and the most that a file may have.
    most: u32,
    /// Bits without which the runtime cannot use the file.
    least: u32,
}

impl Mode {
    pub(super) const PROGRAM: Self = Self { most: 0o755, least: 0o500 };
    pub(super) const CONFIGURATION: Self = Self { most: 0o644, least: 0o400 };

    /// Returns the mode that a file with the mode `present` should have; `None`: the file does not
    /// exist.
    fn wanted(self, present: Option<u32>) -> u32 {
        let good = |mode: &u32| mode & !self.most == 0 && mode & self.least == self.least;
        present.filter(good).unwrap_or(self.most)
    }
}

/// Installs a file unless contents and mode are correct; returns whether it was written. The file
/// is written under a temporary name and renamed, because the runtime watches the directory for
/// renames within it.
///
/// # Errors
/// [`InstallError`] if the directory cannot be created or the file cannot be written.
pub(super) fn place(
    directory: &Path,
    name: &Path,
    contents: &[u8],
    mode: Mode,
) -> Result<bool, InstallError> {
    let path = directory.join(name);
    let present = fs::metadata(&path).ok().map(|file| file.permissions().mode() & 0o7777);
    let mode = mode.wanted(present);
    if present == Some(mode) && fs::read(&path).is_ok_and(|present| present == contents) {
        return Ok(false);
    }
    fs::create_dir_all(directory).map_err(InstallError::new("create the directory", directory))?;
    // No runtime reads this suffix, and the next attempt overwrites the same name.
    let temporary = directory.join(format!(".{}.new", name.display()));
    replace_by(&temporary, &path, contents, Some(mode)).map_err(|error| {
        // An incomplete file is of no use.
        let _ = fs::remove_file(&temporary);
        InstallError::new("write", &path)(error)
    })?;
    Ok(true)
}

/// Returns the contents of the file at `path`; empty if there is no file.
///
/// # Errors
/// [`InstallError`] if the file exists and cannot be read.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, InstallError> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(InstallError::new("read", path)),
    }
}

/// Changes the mode of the file at `path` if `mode` does not allow it; returns `true` if the mode
/// was changed. The contents are not written.
///
/// # Errors
/// [`InstallError`] if the file does not exist, or if its mode cannot be changed.
pub(super) fn repair_mode(path: &Path, mode: Mode) -> Result<bool, InstallError> {
    let metadata = fs::metadata(path).map_err(InstallError::new("read", path))?;
    let present = metadata.permissions().mode() & 0o7777;
    let wanted = mode.wanted(Some(present));
    if wanted == present {
        return Ok(false);
    }
    let changed = fs::set_permissions(path, Permissions::from_mode(wanted));
    changed.map(|()| true).map_err(InstallError::new("change the mode of", path))
}

/// Removes the file at `path`; returns whether it existed. `None` stands for a file that the agent
/// does not manage.
///
/// # Errors
/// [`InstallError`] if the file exists and cannot be removed.
pub(super) fn remove(path: Option<PathBuf>) -> Result<bool, InstallError> {
    let Some(path) = path else { return Ok(false) };
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(InstallError::new("remove", &path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn denied_access_names_the_remedy() {
        let error = |kind| InstallError::new("write", Path::new("/x"))(io::Error::from(kind));
        let denied = error(io::ErrorKind::PermissionDenied).to_string();
        assert!(denied.contains("DAC_OVERRIDE") && denied.contains("chown root"), "{denied}");
        let read_only = error(io::ErrorKind::ReadOnlyFilesystem).to_string();
        assert!(read_only.contains("cni.bin_dir"), "{read_only}");
        assert_eq!(error(io::ErrorKind::StorageFull).to_string().matches(". ").count(), 0);
    }
}
