//! File of the node's private key: created once with mode 0600, refused if other users can read it.

use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use skein_ipc::keys::PrivateKey;
use skein_sys::files;
use skein_sys::socket::is_trusted;
use zeroize::Zeroizing;

use crate::config::Config;
use crate::failure::Failure;
use crate::files::sync_beside;

/// Returns the private key of the configured node. A key in the state directory is created at the
/// first start. A key that `private_key_file` names must exist, because a missing mount must not
/// change the node's identity.
///
/// # Errors
/// [`Failure::Usage`] if `private_key_file` is missing; otherwise as [`load_or_create`].
pub fn for_node(config: &Config) -> Result<PrivateKey, Failure> {
    let path = config.key_path();
    if config.private_key_file.is_none() {
        return load_or_create(&path);
    }
    load(&path)?.ok_or_else(|| {
        Failure::Usage(format!(
            "private_key_file {} is missing. Create it (skein-agent keygen --out {0}), or remove \
             private_key_file from the configuration.",
            path.display()
        ))
    })
}

/// Reads the key; creates one if the file does not exist.
///
/// # Errors
/// [`Failure`] if the file cannot be read or written, or as [`load`] if its contents are refused.
pub fn load_or_create(path: &Path) -> Result<PrivateKey, Failure> {
    match load(path)? {
        Some(key) => Ok(key),
        None => {
            let key = PrivateKey::generate()
                .map_err(|error| anyhow::anyhow!("cannot generate a private key: {error}"))?;
            store(path, &key)?;
            tracing::info!(path = %path.display(), "private key of this node created");
            Ok(key)
        }
    }
}

/// Reads the key; `None` if the file does not exist.
///
/// # Errors
/// [`Failure::Usage`] if the file belongs to an untrusted user, if other users can read it, or if
/// it contains no valid key. Another [`Failure`] if it cannot be read.
pub fn load(path: &Path) -> Result<Option<PrivateKey>, Failure> {
    let shown = path.display();
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(Failure::io(format!("cannot open the private key {shown}"), error));
        }
    };
    let read = |file: &mut File| {
        let found = file.metadata()?;
        let mut text = Zeroizing::new(String::with_capacity(64));
        file.take(1024).read_to_string(&mut text)?;
        Ok((found, text))
    };
    let (found, text) = read(&mut file)
        .map_err(|error| Failure::io(format!("cannot read the private key {shown}"), error))?;
    if !is_trusted(found.uid()) {
        return Err(Failure::Usage(format!(
            "the private key {shown} belongs to user {}, who can read and change it. Create a new key \
             (skein-agent keygen), or chown root the file if only root has ever written it.",
            found.uid()
        )));
    }
    let mode = found.mode();
    if mode & 0o077 != 0 {
        return Err(Failure::Usage(format!(
            "the private key {shown} can be read by other users (mode {:03o}). Run chmod 600 on the \
             file, and create a new key if another user may have read it.",
            mode & 0o777
        )));
    }
    let key = text.parse::<PrivateKey>().map_err(|error| {
        Failure::Usage(format!(
            "the file {shown} contains no valid private key: {error}. Create a key with skein-agent \
             keygen."
        ))
    })?;
    Ok(Some(key))
}

/// Writes the key atomically. An existing file is never replaced.
///
/// # Errors
/// [`Failure::InUse`] if the file exists; another [`Failure`] if it cannot be written.
pub fn store(path: &Path, key: &PrivateKey) -> Result<(), Failure> {
    let mut text = key.to_base64();
    text.push('\n');
    create(path, text.as_bytes()).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Failure::InUse(format!(
            "{} already exists. Remove it first if its key is no longer needed.",
            path.display()
        )),
        _ => Failure::io(format!("cannot write the private key {}", path.display()), error),
    })
}

fn create(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(directory) = directory {
        create_private_dir(directory)?;
    }
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = write_new(&temporary, bytes).and_then(|()| {
        // Unlike a rename, a link does not replace what another process made meanwhile.
        std::fs::hard_link(&temporary, path)?;
        sync_beside(path)
    });
    let removed = std::fs::remove_file(&temporary);
    written.and(removed)
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = files::create_new(path, 0o600)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Creates a directory with mode 0700; an existing directory is left unchanged.
///
/// # Errors
/// An I/O error if the directory cannot be created.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o700))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn key_is_created_once_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state/node.key");
        let key = load_or_create(&path).unwrap();
        assert_eq!(load_or_create(&path).unwrap(), key);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let left: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "no temporary file stays");
    }

    #[test]
    fn existing_key_is_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.key");
        let key = load_or_create(&path).unwrap();
        let other = PrivateKey::generate().unwrap();
        assert!(matches!(store(&path, &other), Err(Failure::InUse(_))));
        assert_eq!(load(&path).unwrap(), Some(key));
    }

    #[test]
    fn key_readable_by_others_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.key");
        load_or_create(&path).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let error = load(&path).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn key_of_another_user_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.key");
        let key = load_or_create(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(65_534), None).expect("this test needs root");
        let error = load(&path).unwrap_err();
        assert!(matches!(error, Failure::Usage(_)));
        assert!(error.to_string().contains("belongs to user 65534"), "{error}");
        assert!(error.to_string().contains("chown root"), "{error}");
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        assert_eq!(load(&path).unwrap(), Some(key));
    }

    #[test]
    fn error_of_invalid_key_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.key");
        write_new(&path, b"short").unwrap();
        let error = load(&path).unwrap_err();
        assert!(error.to_string().contains("node.key"), "{error}");
        assert!(matches!(error, Failure::Usage(_)));
    }
}
