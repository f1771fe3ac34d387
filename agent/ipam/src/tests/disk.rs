//! Disk in memory that fails, or loses unsynced operations, at any of its operations.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use redb::StorageBackend;

use super::super::store::{Store, builder, initialize};
use super::*;

/// Fault of the disk. The number counts the operations that change the disk, from 0. The fault
/// occurs at the operation with this number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// The operation with this number fails with ENOSPC after half of its data.
    Once(usize),
    /// The operation with this number and all later ones fail.
    From(usize),
    /// Power is lost: this operation and all later ones fail, and reads fail, too.
    Power(usize),
}

#[derive(Debug, Clone)]
enum Operation {
    Write(u64, Vec<u8>),
    Length(u64),
}

#[derive(Debug, Default)]
pub(super) struct Sectors {
    /// Content that processes read.
    now: Vec<u8>,
    /// Content at the last sync.
    synced: Vec<u8>,
    /// Operations since the last sync.
    unsynced: Vec<Operation>,
    operations: usize,
    fault: Option<Fault>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Disk(Arc<Mutex<Sectors>>);

impl Disk {
    /// Returns a disk with an empty store.
    pub(super) fn new() -> Self {
        let disk = Self::default();
        initialize(&builder().create_with_backend(disk.clone()).unwrap()).unwrap();
        disk.reset(Fault::None);
        disk
    }

    fn with(content: Vec<u8>) -> Self {
        let sectors = Sectors { now: content.clone(), synced: content, ..Sectors::default() };
        Self(Arc::new(Mutex::new(sectors)))
    }

    pub(super) fn open(&self) -> Result<Ipam, StoreError> {
        let disk = self.clone();
        let open = move || Ok(builder().create_with_backend(disk.clone())?);
        Ipam::with(Store::new(Box::new(open)))
    }

    /// Restarts the count of operations at 0 and sets the fault.
    pub(super) fn reset(&self, fault: Fault) {
        let mut sectors = self.lock();
        (sectors.operations, sectors.fault) = (0, Some(fault));
    }

    pub(super) fn operations(&self) -> usize {
        self.lock().operations
    }

    /// Returns another disk with the same content, synced.
    pub(super) fn copy(&self) -> Self {
        Self::with(self.lock().now.clone())
    }

    /// Returns the disk after a power loss. The disk has all synced data. `kept` gets the index of
    /// an unsynced operation and the number of these operations, and returns the part of the
    /// operation that survives.
    pub(super) fn after_power_loss(&self, kept: impl Fn(usize, usize) -> Kept) -> Self {
        let sectors = self.lock();
        let mut content = sectors.synced.clone();
        for (n, operation) in sectors.unsynced.iter().enumerate() {
            let operation = match (kept(n, sectors.unsynced.len()), operation) {
                (Kept::Lost, _) => continue,
                (Kept::Whole, operation) | (_, operation @ Operation::Length(_)) => {
                    operation.clone()
                }
                (Kept::Head, Operation::Write(offset, bytes)) => {
                    Operation::Write(*offset, bytes[..bytes.len() / 2].to_vec())
                }
                (Kept::Tail, Operation::Write(offset, bytes)) => {
                    let half = bytes.len() / 2;
                    Operation::Write(offset + half as u64, bytes[half..].to_vec())
                }
            };
            apply(&mut content, &operation);
        }
        Self::with(content)
    }

    fn lock(&self) -> MutexGuard<'_, Sectors> {
        self.0.lock().unwrap()
    }

    fn change(&self, operation: Option<Operation>) -> io::Result<()> {
        let mut sectors = self.lock();
        let number = sectors.operations;
        sectors.operations += 1;
        let fails = match sectors.fault {
            Some(Fault::Once(k)) => number == k,
            Some(Fault::From(k) | Fault::Power(k)) => number >= k,
            _ => false,
        };
        match operation {
            Some(Operation::Write(offset, bytes)) if fails => {
                // After a power loss, no operation reaches the disk.
                if !matches!(sectors.fault, Some(Fault::Power(k)) if number > k) {
                    let half = Operation::Write(offset, bytes[..bytes.len() / 2].to_vec());
                    apply(&mut sectors.now, &half);
                    sectors.unsynced.push(half);
                }
            }
            _ if fails => {}
            Some(operation) => {
                apply(&mut sectors.now, &operation);
                sectors.unsynced.push(operation);
            }
            None => {
                sectors.synced = sectors.now.clone();
                sectors.unsynced.clear();
            }
        }
        if fails { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

/// Part of an operation that survives.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kept {
    Lost,
    Whole,
    Head,
    Tail,
}

fn apply(content: &mut Vec<u8>, operation: &Operation) {
    match operation {
        Operation::Length(length) => content.resize(*length as usize, 0),
        Operation::Write(offset, bytes) => {
            let (start, end) = (*offset as usize, *offset as usize + bytes.len());
            // The write survived, but the preceding change of length did not.
            content.resize(content.len().max(end), 0);
            content[start..end].copy_from_slice(bytes);
        }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let sectors = self.lock();
        if matches!(sectors.fault, Some(Fault::Power(k)) if sectors.operations > k) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let start = offset as usize;
        let bytes = sectors.now.get(start..start + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Some(Operation::Length(len)))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.change(None)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Some(Operation::Write(offset, data.to_vec())))
    }
}
