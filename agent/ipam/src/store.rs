//! Leases on the disk: a redb database, in which a transaction is there whole or not at all.

mod database;
mod file;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use redb::Database;

use super::change_set::ChangeSet;
use super::error::StoreError;

use self::database::{probe, read, write};

pub(super) use self::database::Contents;
#[cfg(test)]
pub(super) use self::database::{builder, initialize};
pub(super) use self::file::{Opener, move_aside, opener, prepare};

/// The database, or the lack of one after a failure.
pub(super) struct Store {
    opener: Opener,
    database: Option<Database>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("database", &self.database).finish_non_exhaustive()
    }
}

impl Store {
    /// Nothing is opened yet.
    pub(super) fn new(opener: Opener) -> Self {
        Self { opener, database: None }
    }

    /// Whether what was written last is known to be on the disk.
    pub(super) fn is_open(&self) -> bool {
        self.database.is_some()
    }

    /// Lets go of it.
    pub(super) fn close(&mut self) {
        self.database = None;
    }

    /// Opens it and reads all of it.
    pub(super) fn open(&mut self) -> Result<Contents, StoreError> {
        // One at a time: the lock is let go with the last one.
        self.close();
        let (database, contents) = catch_panic(|| {
            let database = (self.opener)()?;
            let contents = read(&database)?;
            Ok((database, contents))
        })?;
        self.database = Some(database);
        Ok(contents)
    }

    /// Writes a change_set in one transaction, which is on the disk when this returns. After a
    /// failure it may be or not: the store is closed, and only reading it again tells.
    pub(super) fn write(&mut self, change_set: &ChangeSet) -> Result<(), StoreError> {
        self.with(|database| write(database, change_set))
    }

    /// Writes what takes as much room as a lease, and takes it out in the same transaction.
    pub(super) fn probe(&mut self) -> Result<(), StoreError> {
        self.with(probe)
    }

    fn with(
        &mut self,
        work: impl FnOnce(&Database) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let Some(database) = self.database.take() else {
            return Err(StoreError::Io(std::io::ErrorKind::NotConnected.into()));
        };
        let database = catch_panic(|| {
            work(&database)?;
            Ok(database)
        })?;
        self.database = Some(database);
        Ok(())
    }
}

/// The database says of itself that it may panic where a file was altered while it was closed, and
/// checks on opening against that; the agent outlives what it overlooks.
fn catch_panic<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(StoreError::Damaged("the database gave up".to_owned())))
}
