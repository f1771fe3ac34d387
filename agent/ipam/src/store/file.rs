//! File of the database: created atomically, accessible to its owner only, and moved aside if it is
//! damaged.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use redb::Database;
use redb::backends::FileBackend;

use super::database::{builder, initialize};
use crate::error::StoreError;

/// Function that opens the database again.
pub(in super::super) type Opener = Box<dyn FnMut() -> Result<Database, StoreError> + Send>;

/// Creates the directory and the file if they do not exist.
///
/// # Errors
/// [`StoreError`] if the directory or the file cannot be created.
pub(in super::super) fn prepare(path: &Path) -> Result<(), StoreError> {
    private_directory(directory(path))?;
    if !path.try_exists()? {
        create(path)?;
    }
    Ok(())
}

/// Returns a function that opens the existing file.
pub(in super::super) fn opener(path: &Path) -> Opener {
    let path = path.to_owned();
    Box::new(move || existing(&path))
}

/// Moves the damaged file at `path` aside: renames it with the suffix `.damaged`. The rename
/// overwrites a damaged file that was moved aside earlier. Returns the new path.
///
/// # Errors
/// The error of rename(2) or fsync(2).
pub(in super::super) fn move_aside(path: &Path) -> io::Result<PathBuf> {
    let aside = beside(path, ".damaged");
    std::fs::rename(path, &aside)?;
    File::open(directory(path))?.sync_all()?;
    Ok(aside)
}

fn existing(path: &Path) -> Result<Database, StoreError> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let metadata = file.metadata()?;
    // The database would initialise an empty file, and the loss of its content would go unnoticed.
    if metadata.len() == 0 {
        return Err(StoreError::Damaged("it is empty".to_owned()));
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    database(file)
}

/// Creates the file under a temporary name first, so that a partial file is never opened.
fn create(path: &Path) -> Result<(), StoreError> {
    let temporary = beside(path, ".new");
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&temporary)?;
    initialize(&database(file)?)?;
    // Unlike rename(2), link(2) does not replace a file that another process has created meanwhile.
    match std::fs::hard_link(&temporary, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    std::fs::remove_file(&temporary)?;
    Ok(File::open(directory(path))?.sync_all()?)
}

fn database(file: File) -> Result<Database, StoreError> {
    Ok(builder().create_with_backend(FileBackend::new(file)?)?)
}

/// Creates the directory, accessible to its owner only.
fn private_directory(path: &Path) -> io::Result<()> {
    if !path.is_dir() {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        File::open(directory(path))?.sync_all()?;
    }
    let mode = std::fs::metadata(path)?.permissions().mode();
    if mode & 0o077 != 0 {
        std::fs::set_permissions(path, Permissions::from_mode(0o700))?;
    }
    Ok(())
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}
