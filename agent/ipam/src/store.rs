//! Leases on the disk: a redb database, in which a transaction is there whole or not at all.

mod file;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::SystemTime;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use skein_cni_protocol::AttachmentId;

use super::error::StoreError;
use super::journal::Journal;
use super::lease::{Lease, millis};
use super::space::Family;

pub(super) use file::{move_aside, opener, prepare};

/// Raised when what is stored changes in a way that an older agent would misunderstand.
const SCHEMA: u64 = 1;

/// Memory for pages of the database, in bytes: all of it for 10,000 leases.
const CACHE: usize = 8 << 20;

/// `schema`.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Container id and interface name to a [`Lease`] in JSON.
const LEASES: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("leases");
/// Address (4 or 16 bytes) to when it was freed, in milliseconds since 1970.
const RESTING: TableDefinition<'_, &[u8], u64> = TableDefinition::new("resting");
/// Family (4 or 6) to the number of the address that was given last.
const CURSORS: TableDefinition<'_, u8, u128> = TableDefinition::new("cursors");

/// What is stored.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) leases: BTreeMap<AttachmentId, Lease>,
    pub(super) resting: BTreeMap<IpAddr, SystemTime>,
    pub(super) cursors: BTreeMap<Family, u128>,
}

/// Opens the database once more.
pub(super) type Opener = Box<dyn FnMut() -> Result<Database, StoreError> + Send>;

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
        let (database, contents) = unpanicked(|| {
            let database = (self.opener)()?;
            let contents = read(&database)?;
            Ok((database, contents))
        })?;
        self.database = Some(database);
        Ok(contents)
    }

    /// Writes a journal in one transaction, which is on the disk when this returns. After a
    /// failure it may be or not: the store is closed, and only reading it again tells.
    pub(super) fn write(&mut self, journal: &Journal) -> Result<(), StoreError> {
        self.with(|database| write(database, journal))
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
        let database = unpanicked(|| {
            work(&database)?;
            Ok(database)
        })?;
        self.database = Some(database);
        Ok(())
    }
}

/// The database says of itself that it may panic where a file was altered while it was closed, and
/// checks on opening against that; the agent outlives what it overlooks.
fn unpanicked<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(StoreError::Damaged("the database gave up".to_owned())))
}

/// How every database is opened: with the checksum of each page compared first.
pub(super) fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
    builder
}

/// Makes the tables of a new database.
pub(super) fn initialize(database: &Database) -> Result<(), StoreError> {
    let transaction = database.begin_write()?;
    transaction.open_table(META)?.insert("schema", SCHEMA)?;
    transaction.open_table(LEASES)?;
    transaction.open_table(RESTING)?;
    transaction.open_table(CURSORS)?;
    Ok(transaction.commit()?)
}

fn read(database: &Database) -> Result<Contents, StoreError> {
    let damaged = |what: &str| StoreError::Damaged(what.to_owned());
    let mut contents = Contents::default();
    let transaction = database.begin_read()?;
    match transaction.open_table(META)?.get("schema")?.map(|schema| schema.value()) {
        Some(found) if found > SCHEMA => return Err(StoreError::Newer { found, known: SCHEMA }),
        Some(_) => {}
        None => return Err(damaged("it has no schema")),
    }
    for row in transaction.open_table(LEASES)?.iter()? {
        let (key, value) = row?;
        let lease: Lease = serde_json::from_slice(value.value())
            .map_err(|error| StoreError::Damaged(format!("a lease cannot be read: {error}")))?;
        if key.value() != (lease.id.container_id.as_str(), lease.id.ifname.as_str()) {
            return Err(damaged("a lease is another's"));
        }
        contents.leases.insert(lease.id.clone(), lease);
    }
    for row in transaction.open_table(RESTING)?.iter()? {
        let (key, value) = row?;
        let ip = address(key.value()).ok_or_else(|| damaged("an address has a strange length"))?;
        contents.resting.insert(ip, millis::to_time(value.value()));
    }
    for row in transaction.open_table(CURSORS)?.iter()? {
        let (key, value) = row?;
        let family = match key.value() {
            4 => Family::V4,
            6 => Family::V6,
            _ => return Err(damaged("a family is neither IPv4 nor IPv6")),
        };
        contents.cursors.insert(family, value.value());
    }
    Ok(contents)
}

fn write(database: &Database, journal: &Journal) -> Result<(), StoreError> {
    // Its commit is durable: that is the default of the database.
    let transaction = database.begin_write()?;
    {
        let mut leases = transaction.open_table(LEASES)?;
        for (id, step) in &journal.leases {
            let key = (id.container_id.as_str(), id.ifname.as_str());
            match &step.after {
                Some(lease) => {
                    let value = serde_json::to_vec(lease).map_err(std::io::Error::from)?;
                    leases.insert(key, value.as_slice())?;
                }
                None => drop(leases.remove(key)?),
            }
        }
        let mut resting = transaction.open_table(RESTING)?;
        for (ip, step) in &journal.resting {
            let key = octets(*ip);
            match step.after {
                Some(time) => drop(resting.insert(key.as_slice(), millis::of(time))?),
                None => drop(resting.remove(key.as_slice())?),
            }
        }
        let mut cursors = transaction.open_table(CURSORS)?;
        for (family, step) in &journal.cursors {
            let key = if *family == Family::V4 { 4 } else { 6 };
            match step.after {
                Some(number) => drop(cursors.insert(key, number)?),
                None => drop(cursors.remove(key)?),
            }
        }
    }
    Ok(transaction.commit()?)
}

fn probe(database: &Database) -> Result<(), StoreError> {
    let transaction = database.begin_write()?;
    {
        // No attachment, address or family is called that.
        let mut leases = transaction.open_table(LEASES)?;
        leases.insert(("", ""), &[0; 512][..])?;
        leases.remove(("", ""))?;
        let mut resting = transaction.open_table(RESTING)?;
        resting.insert(&[][..], 0)?;
        resting.remove(&[][..])?;
        let mut cursors = transaction.open_table(CURSORS)?;
        cursors.insert(0, 0)?;
        cursors.remove(0)?;
    }
    Ok(transaction.commit()?)
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn address(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok()
}
