//! The node's private key: made once, kept in a file of mode 0600, refused when others can read it.

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

/// The key of the configured node. One in the state directory is made on the first start; one that
/// the configuration names must be there, or a node would get a new identity by a wrong mount.
pub fn for_node(config: &Config) -> Result<PrivateKey, Failure> {
    let path = config.key_path();
    if config.private_key_file.is_none() {
        return load_or_create(&path);
    }
    load(&path)?.ok_or_else(|| {
        Failure::Usage(format!(
            "private_key_file {} is missing: make it (skein-agent keygen --out {0}), or leave \
             private_key_file out",
            path.display()
        ))
    })
}

/// Reads the key; makes one where there is none.
pub fn load_or_create(path: &Path) -> Result<PrivateKey, Failure> {
    match load(path)? {
        Some(key) => Ok(key),
        None => {
            let key = PrivateKey::generate()
                .map_err(|error| anyhow::anyhow!("cannot make a private key: {error}"))?;
            store(path, &key)?;
            tracing::info!(path = %path.display(), "made this node's private key");
            Ok(key)
        }
    }
}

/// Reads the key; `None` where there is no file.
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
            "the private key {shown} belongs to user {}, who knows it and can change it: make a new \
             key (skein-agent keygen), or chown root the file if only root has ever written it",
            found.uid()
        )));
    }
    let mode = found.mode();
    if mode & 0o077 != 0 {
        return Err(Failure::Usage(format!(
            "the private key {shown} can be read by others (mode {:03o}): chmod 600 it, and make a \
             new key if somebody may have read it",
            mode & 0o777
        )));
    }
    let key = text.parse::<PrivateKey>().map_err(|error| {
        Failure::Usage(format!(
            "the private key {shown} is no key: {error}: make one with skein-agent keygen"
        ))
    })?;
    Ok(Some(key))
}

/// Writes the key: never over another, never half.
pub fn store(path: &Path, key: &PrivateKey) -> Result<(), Failure> {
    let mut text = key.to_base64();
    text.push('\n');
    create(path, text.as_bytes()).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Failure::Taken(format!(
            "{} exists already: remove it first if its key is not needed any more",
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

/// Makes a directory that only its owner can enter; one that exists stays as it is.
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
    fn a_key_is_made_once_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state/node.key");
        let key = load_or_create(&path).unwrap();
        assert_eq!(load_or_create(&path).unwrap(), key);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let left: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "no temporary file stays");
    }

    #[test]
    fn a_key_is_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.key");
        let key = load_or_create(&path).unwrap();
        let other = PrivateKey::generate().unwrap();
        assert!(matches!(store(&path, &other), Err(Failure::Taken(_))));
        assert_eq!(load(&path).unwrap(), Some(key));
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
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
    fn a_file_without_a_key_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.key");
        write_new(&path, b"short").unwrap();
        let error = load(&path).unwrap_err();
        assert!(error.to_string().contains("node.key"), "{error}");
        assert!(matches!(error, Failure::Usage(_)));
    }
}
