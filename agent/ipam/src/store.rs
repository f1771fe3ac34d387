//! Leases on disk, in a redb database. A transaction is stored completely or not at all.

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

/// The database. Every failed operation closes the database, because the content of the file is not
/// known afterwards; [`Store::open`] reads the content again.
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
    /// Creates a store that is not open yet.
    pub(super) fn new(opener: Opener) -> Self {
        Self { opener, database: None }
    }

    /// Returns whether the database is open. An open database contains all earlier writes, because
    /// a failed write closes the database.
    pub(super) fn is_open(&self) -> bool {
        self.database.is_some()
    }

    /// Closes the database and releases its lock.
    pub(super) fn close(&mut self) {
        self.database = None;
    }

    /// Opens the database and reads its content.
    ///
    /// # Errors
    /// [`StoreError`] if the file cannot be opened or its content is damaged.
    pub(super) fn open(&mut self) -> Result<Contents, StoreError> {
        // The lock is released when the previous database is dropped.
        self.close();
        let (database, contents) = catch_panic(|| {
            let database = (self.opener)()?;
            let contents = read(&database)?;
            Ok((database, contents))
        })?;
        self.database = Some(database);
        Ok(contents)
    }

    /// Commits a change set in one transaction; the data is on disk when the method returns.
    ///
    /// # Errors
    /// [`StoreError`] if the transaction fails. The outcome of the transaction is unknown then. The
    /// store is closed, and [`Store::open`] reads the outcome.
    pub(super) fn write(&mut self, change_set: &ChangeSet) -> Result<(), StoreError> {
        self.with(|database| write(database, change_set))
    }

    /// Writes and removes data in one transaction, to find out whether a lease could be written.
    ///
    /// # Errors
    /// [`StoreError`] if the transaction fails; the store is closed then.
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

/// Runs `work` and converts a panic to an error. redb documents that it may panic if the file was
/// changed while the database was closed. The integrity check at opening finds most such changes.
///
/// # Errors
/// The error of `work`; `Damaged` after a panic.
fn catch_panic<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(StoreError::Damaged("the database has panicked".to_owned())))
}
