//! Tables of the database and transactions on them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::SystemTime;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use skein_cni_protocol::AttachmentId;

use crate::change_set::ChangeSet;
use crate::error::StoreError;
use crate::family::Family;
use crate::lease::{Lease, millis};

/// Schema version. It is incremented when stored data changes in a way that an older agent would
/// misread.
const SCHEMA: u64 = 1;

/// Size of the page cache in bytes; the database of 10,000 leases fits.
const CACHE_SIZE: usize = 8 << 20;

/// Table of the schema version. The only key is `schema`.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Table of the leases. Key: container id and interface name. Value: a [`Lease`] in JSON.
const LEASES: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("leases");
/// Table of the quarantined addresses. Key: address (4 or 16 bytes). Value: time of its release in
/// milliseconds since 1970. Earlier releases named the table `resting`; the name must not change.
const QUARANTINED: TableDefinition<'_, &[u8], u64> = TableDefinition::new("resting");
/// Table of the search positions. Key: family (4 or 6). Value: the last allocated address, as an
/// integer.
const CURSORS: TableDefinition<'_, u8, u128> = TableDefinition::new("cursors");

/// Content of the database.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Contents {
    pub(in super::super) leases: BTreeMap<AttachmentId, Lease>,
    pub(in super::super) quarantined: BTreeMap<IpAddr, SystemTime>,
    pub(in super::super) cursors: BTreeMap<Family, u128>,
}

/// Returns the settings with which every database is opened, including the check of all page
/// checksums.
pub(in super::super) fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_SIZE).set_check_integrity_on_open(true);
    builder
}

/// Creates the tables of a new database.
///
/// # Errors
/// [`StoreError`] if the transaction fails.
pub(in super::super) fn initialize(database: &Database) -> Result<(), StoreError> {
    let transaction = database.begin_write()?;
    transaction.open_table(META)?.insert("schema", SCHEMA)?;
    transaction.open_table(LEASES)?;
    transaction.open_table(QUARANTINED)?;
    transaction.open_table(CURSORS)?;
    Ok(transaction.commit()?)
}

/// Reads the content of the database.
///
/// # Errors
/// `Newer` if a newer version has written it, `Damaged` if it is inconsistent.
pub(super) fn read(database: &Database) -> Result<Contents, StoreError> {
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
            return Err(damaged("the key of a lease names another attachment"));
        }
        contents.leases.insert(lease.id.clone(), lease);
    }
    for row in transaction.open_table(QUARANTINED)?.iter()? {
        let (key, value) = row?;
        let ip = address(key.value())
            .ok_or_else(|| damaged("an address is neither 4 nor 16 bytes long"))?;
        contents.quarantined.insert(ip, millis::to_time(value.value()));
    }
    for row in transaction.open_table(CURSORS)?.iter()? {
        let (key, value) = row?;
        let family = match key.value() {
            4 => Family::V4,
            6 => Family::V6,
            _ => return Err(damaged("the family of a cursor is neither 4 nor 6")),
        };
        contents.cursors.insert(family, value.value());
    }
    Ok(contents)
}

/// Writes a change set in one transaction.
///
/// # Errors
/// [`StoreError`] if the transaction fails.
pub(super) fn write(database: &Database, change_set: &ChangeSet) -> Result<(), StoreError> {
    // A commit of redb is durable by default.
    let transaction = database.begin_write()?;
    {
        let mut leases = transaction.open_table(LEASES)?;
        for (id, step) in &change_set.leases {
            let key = (id.container_id.as_str(), id.ifname.as_str());
            match &step.after {
                Some(lease) => {
                    let value = serde_json::to_vec(lease).map_err(std::io::Error::from)?;
                    leases.insert(key, value.as_slice())?;
                }
                None => drop(leases.remove(key)?),
            }
        }
        let mut quarantined = transaction.open_table(QUARANTINED)?;
        for (ip, step) in &change_set.quarantined {
            let key = octets(*ip);
            match step.after {
                Some(time) => drop(quarantined.insert(key.as_slice(), millis::of(time))?),
                None => drop(quarantined.remove(key.as_slice())?),
            }
        }
        let mut cursors = transaction.open_table(CURSORS)?;
        for (family, step) in &change_set.cursors {
            let key = if *family == Family::V4 { 4 } else { 6 };
            match step.after {
                Some(number) => drop(cursors.insert(key, number)?),
                None => drop(cursors.remove(key)?),
            }
        }
    }
    Ok(transaction.commit()?)
}

/// Writes an entry to each table and removes it in the same transaction.
///
/// # Errors
/// [`StoreError`] if the transaction fails.
pub(super) fn probe(database: &Database) -> Result<(), StoreError> {
    let transaction = database.begin_write()?;
    {
        // No attachment, address or family has these keys.
        let mut leases = transaction.open_table(LEASES)?;
        leases.insert(("", ""), &[0; 512][..])?;
        leases.remove(("", ""))?;
        let mut quarantined = transaction.open_table(QUARANTINED)?;
        quarantined.insert(&[][..], 0)?;
        quarantined.remove(&[][..])?;
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
