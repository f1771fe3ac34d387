//! Leases in a redb database: one table from attachment to lease, each a JSON document.

use std::fmt;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
};
use skein_cni::protocol::AttachmentId;

use super::Lease;
use super::leases::Change;

const LEASES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("leases");
const SCHEMA: TableDefinition<'_, (), u32> = TableDefinition::new("schema");
/// Raised when an older agent could not make sense of the table.
const VERSION: u32 = 1;

/// The database refused; cheap to clone, because several requests may hear of it.
#[derive(Debug, Clone)]
pub struct StoreError(Arc<str>);

impl StoreError {
    pub(super) fn new(what: &str, path: &Path, error: impl fmt::Display) -> Self {
        Self(format!("cannot {what} {}: {error}", path.display()).into())
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StoreError {}

/// The database.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    /// Absent after an error, until it could be opened again: redb answers nothing more then.
    database: Option<Database>,
}

impl Store {
    /// Opens or makes it. One that is damaged is put aside, and where it is now is returned: the
    /// kernel knows the pods too.
    pub(super) fn open(path: &Path) -> Result<(Self, Option<PathBuf>), StoreError> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)
                .and_then(|()| fs::set_permissions(directory, Permissions::from_mode(0o700)))
                .map_err(|error| StoreError::new("make", directory, error))?;
        }
        match Self::open_sound(path) {
            Ok(store) => Ok((store, None)),
            Err(Refusal::Other(error)) => Err(error),
            Err(Refusal::Damaged(error)) => {
                let aside = path.with_extension("redb.damaged");
                tracing::error!(%error, aside = %aside.display(), "the address store is damaged");
                fs::rename(path, &aside)
                    .map_err(|error| StoreError::new("put aside", path, error))?;
                match Self::open_sound(path) {
                    Ok(store) => Ok((store, Some(aside))),
                    Err(Refusal::Damaged(error) | Refusal::Other(error)) => Err(error),
                }
            }
        }
    }

    fn open_sound(path: &Path) -> Result<Self, Refusal> {
        let failed =
            |error: &dyn fmt::Display| StoreError::new("open the address store", path, error);
        let database = Database::create(path).map_err(|error| match &error {
            DatabaseError::DatabaseAlreadyOpen => {
                Refusal::Other(failed(&"another process has it open"))
            }
            DatabaseError::Storage(StorageError::Io(io))
                if io.kind() != std::io::ErrorKind::InvalidData
                    && io.kind() != std::io::ErrorKind::UnexpectedEof =>
            {
                Refusal::Other(failed(&error))
            }
            _ => Refusal::Damaged(failed(&error)),
        })?;
        let store = Self { path: path.to_owned(), database: Some(database) };
        store.prepare().map_err(Refusal::Other)?;
        store.load().map_err(Refusal::Damaged)?;
        Ok(store)
    }

    fn database(&self) -> Result<&Database, redb::Error> {
        let away = || redb::Error::Io(std::io::Error::other("it failed before"));
        self.database.as_ref().ok_or_else(away)
    }

    /// Makes the tables, or checks that they are of this version.
    fn prepare(&self) -> Result<(), StoreError> {
        let _ = fs::set_permissions(&self.path, Permissions::from_mode(0o600));
        let prepare = || -> Result<Option<u32>, redb::Error> {
            let transaction = self.database()?.begin_write()?;
            let found = {
                transaction.open_table(LEASES)?;
                let mut schema = transaction.open_table(SCHEMA)?;
                let found = schema.get(())?.map(|version| version.value());
                if found.is_none() {
                    schema.insert((), VERSION)?;
                }
                found
            };
            transaction.commit()?;
            Ok(found)
        };
        match prepare() {
            Ok(None | Some(VERSION)) => Ok(()),
            Ok(Some(other)) => {
                let text = format!("it is of version {other}, and this agent knows {VERSION}");
                Err(StoreError::new("open the address store", &self.path, text))
            }
            Err(error) => Err(StoreError::new("open the address store", &self.path, error)),
        }
    }

    /// All leases.
    pub(super) fn load(&self) -> Result<Vec<Lease>, StoreError> {
        let load = || -> Result<Vec<Vec<u8>>, redb::Error> {
            let table = self.database()?.begin_read()?.open_table(LEASES)?;
            table.iter()?.map(|entry| Ok(entry?.1.value().to_vec())).collect()
        };
        let failed =
            |error: &dyn fmt::Display| StoreError::new("read the address store", &self.path, error);
        let documents = load().map_err(|error| failed(&error))?;
        documents
            .iter()
            .map(|document| serde_json::from_slice(document).map_err(|error| failed(&error)))
            .collect()
    }

    /// All leases as the disk has them, after an error.
    pub(super) fn reload(&mut self) -> Result<Vec<Lease>, StoreError> {
        // Closed first: it is locked.
        self.database = None;
        match Self::open_sound(&self.path) {
            Ok(store) => self.database = store.database,
            Err(Refusal::Damaged(error) | Refusal::Other(error)) => return Err(error),
        }
        self.load()
    }

    /// Writes changes in one transaction; they are on the disk when this returns.
    pub(super) fn write(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        if self.database.is_none() {
            self.reload()?;
        }
        let write = || -> Result<(), redb::Error> {
            // The default durability is the one that is wanted: fsync before commit returns.
            let transaction = self.database()?.begin_write()?;
            {
                let mut table = transaction.open_table(LEASES)?;
                for change in changes {
                    let key = key(&change.id);
                    match &change.after {
                        Some(lease) => {
                            let document = serde_json::to_vec(lease).unwrap_or_default();
                            table.insert(&*key, &*document)?;
                        }
                        None => {
                            table.remove(&*key)?;
                        }
                    }
                }
            }
            transaction.commit()?;
            Ok(())
        };
        write().map_err(|error| StoreError::new("write the address store", &self.path, error))
    }
}

enum Refusal {
    Damaged(StoreError),
    Other(StoreError),
}

/// Neither part holds a slash: both are checked by the plugin and by the server.
fn key(id: &AttachmentId) -> String {
    format!("{}/{}", id.container_id, id.ifname)
}
