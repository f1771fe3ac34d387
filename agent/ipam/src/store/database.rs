//! Tables of the database, and transactions on them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::SystemTime;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use skein_cni_protocol::AttachmentId;

use crate::change_set::ChangeSet;
use crate::error::StoreError;
use crate::family::Family;
use crate::lease::{Lease, millis};

/// Raised when what is stored changes in a way that an older agent would misunderstand.
const SCHEMA: u64 = 1;

/// Memory for pages of the database, in bytes: all of it for 10,000 leases.
const CACHE_SIZE: usize = 8 << 20;

/// `schema`.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Container id and interface name to a [`Lease`] in JSON.
const LEASES: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("leases");
/// Address (4 or 16 bytes) to when it was freed, in milliseconds since 1970.
const QUARANTINED: TableDefinition<'_, &[u8], u64> = TableDefinition::new("resting");
/// Family (4 or 6) to the number of the address that was given last.
const CURSORS: TableDefinition<'_, u8, u128> = TableDefinition::new("cursors");

/// What is stored.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Contents {
    pub(in super::super) leases: BTreeMap<AttachmentId, Lease>,
    pub(in super::super) quarantined: BTreeMap<IpAddr, SystemTime>,
    pub(in super::super) cursors: BTreeMap<Family, u128>,
}

/// How every database is opened: with the checksum of each page compared first.
pub(in super::super) fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_SIZE).set_check_integrity_on_open(true);
    builder
}

/// Makes the tables of a new database.
pub(in super::super) fn initialize(database: &Database) -> Result<(), StoreError> {
    let transaction = database.begin_write()?;
    transaction.open_table(META)?.insert("schema", SCHEMA)?;
    transaction.open_table(LEASES)?;
    transaction.open_table(QUARANTINED)?;
    transaction.open_table(CURSORS)?;
    Ok(transaction.commit()?)
}

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
            return Err(damaged("a lease is another's"));
        }
        contents.leases.insert(lease.id.clone(), lease);
    }
    for row in transaction.open_table(QUARANTINED)?.iter()? {
        let (key, value) = row?;
        let ip = address(key.value()).ok_or_else(|| damaged("an address has a strange length"))?;
        contents.quarantined.insert(ip, millis::to_time(value.value()));
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

pub(super) fn write(database: &Database, change_set: &ChangeSet) -> Result<(), StoreError> {
    // Its commit is durable: that is the default of the database.
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

pub(super) fn probe(database: &Database) -> Result<(), StoreError> {
    let transaction = database.begin_write()?;
    {
        // No attachment, address or family is called that.
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
