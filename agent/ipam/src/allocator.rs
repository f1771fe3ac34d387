//! Allocation state of one address family: leased, quarantined and free addresses, and the address
//! after which the next search starts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use skein_cni_protocol::AttachmentId;

use super::change_set::{ChangeSet, Step};
use super::error::IpamError;
use super::family::{Family, number};
use super::free::Ranges;

/// Duration of the quarantine of a released address. A quarantined address is allocated only if no
/// other address is free. Programs may still send to the former holder, or may have cached the
/// address.
pub const QUARANTINE_TIME: Duration = Duration::from_secs(30);

/// Usage of one pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolUsage {
    /// CIDR of the pool.
    pub cidr: IpNet,
    /// Number of addresses that can be allocated.
    pub total: u128,
    /// Number of leases in the pool.
    pub in_use: u64,
    /// Number of addresses that were released less than [`QUARANTINE_TIME`] ago.
    pub quarantined: u64,
}

/// Pool with its first and last allocatable address.
#[derive(Debug)]
struct Pool {
    cidr: IpNet,
    first: u128,
    last: u128,
}

impl Pool {
    fn new(cidr: &IpNet) -> Self {
        let (first, last) = (number(cidr.network()), number(cidr.broadcast()));
        // Prefixes of one or two addresses have no network address, broadcast address (RFC 3021) or
        // subnet-router anycast address (RFC 6164). IPv6 has no broadcast.
        let (below, above) = match (cidr, cidr.max_prefix_len() - cidr.prefix_len()) {
            (_, 0 | 1) => (0, 0),
            (IpNet::V4(_), _) => (1, 1),
            (IpNet::V6(_), _) => (1, 0),
        };
        Self { cidr: *cidr, first: first + below, last: last - above }
    }

    fn contains(&self, number: u128) -> bool {
        (self.first..=self.last).contains(&number)
    }
}

/// Allocation state of one address family. `leased`, `quarantined` and `cursor` are stored on disk;
/// the other fields are derived.
#[derive(Debug)]
pub(super) struct AddressAllocator {
    family: Family,
    pools: Vec<Pool>,
    reserved: BTreeSet<u128>,
    leased: BTreeMap<u128, AttachmentId>,
    quarantined: BTreeMap<u128, SystemTime>,
    by_age: BTreeSet<(SystemTime, u128)>,
    cursor: Option<u128>,
    /// Addresses in a pool that are not reserved, leased or quarantined.
    free: Ranges,
}

impl AddressAllocator {
    pub(super) fn new(family: Family) -> Self {
        Self {
            family,
            pools: Vec::new(),
            reserved: BTreeSet::new(),
            leased: BTreeMap::new(),
            quarantined: BTreeMap::new(),
            by_age: BTreeSet::new(),
            cursor: None,
            free: Ranges::default(),
        }
    }

    pub(super) fn family(&self) -> Family {
        self.family
    }

    /// Replaces the stored part of the state.
    pub(super) fn load(
        &mut self,
        leased: BTreeMap<u128, AttachmentId>,
        quarantined: BTreeMap<u128, SystemTime>,
        cursor: Option<u128>,
    ) {
        (self.leased, self.quarantined, self.cursor) = (leased, quarantined, cursor);
        self.rebuild_index();
    }

    /// Sets the pools and reserved addresses of this family. Leases outside the pools remain.
    pub(super) fn set_pools(&mut self, cidrs: &[IpNet], reserved: &[IpAddr]) {
        let ours = |ip: IpAddr| Family::of(ip) == self.family;
        self.pools = cidrs.iter().filter(|cidr| ours(cidr.addr())).map(Pool::new).collect();
        self.reserved = reserved.iter().filter(|ip| ours(**ip)).map(|ip| number(*ip)).collect();
        self.pools.sort_by_key(|pool| pool.first);
        self.rebuild_index();
    }

    /// Restores an entry of the quarantine from a change set. Call
    /// [`AddressAllocator::rebuild_index`] afterwards.
    pub(super) fn undo_quarantine(&mut self, number: u128, before: Option<SystemTime>) {
        match before {
            Some(time) => self.quarantined.insert(number, time),
            None => self.quarantined.remove(&number),
        };
    }

    /// Restores a lease from a change set. Call [`AddressAllocator::rebuild_index`] afterwards.
    pub(super) fn undo_lease(&mut self, number: u128, before: Option<AttachmentId>) {
        match before {
            Some(id) => self.leased.insert(number, id),
            None => self.leased.remove(&number),
        };
    }

    /// Restores the cursor from a change set.
    pub(super) fn undo_cursor(&mut self, before: Option<u128>) {
        self.cursor = before;
    }

    /// Derives the fields that are not stored.
    pub(super) fn rebuild_index(&mut self) {
        self.by_age = self.quarantined.iter().map(|(&number, &time)| (time, number)).collect();
        self.free = Ranges::default();
        for pool in &self.pools {
            self.free.insert(pool.first, pool.last);
        }
        let held = self.reserved.iter().chain(self.leased.keys()).chain(self.quarantined.keys());
        for number in held {
            self.free.remove(*number);
        }
    }

    /// Returns whether this address family has pools. Each allocation takes one address of every
    /// family that has pools.
    pub(super) fn has_pools(&self) -> bool {
        !self.pools.is_empty()
    }

    /// Returns the attachment that has an address.
    pub(super) fn holder(&self, number: u128) -> Option<&AttachmentId> {
        self.leased.get(&number)
    }

    /// Selects the next address: the first free one after the cursor, or, if none is free, the one
    /// that has been quarantined longest. `None` if every address is leased.
    pub(super) fn pick(&mut self, now: SystemTime, change_set: &mut ChangeSet) -> Option<u128> {
        self.expire_quarantine(now, change_set);
        self.free.after(self.cursor).or_else(|| {
            // Quarantined addresses outside all pools are few, because they remain for at most
            // `QUARANTINE_TIME`.
            let mut oldest = self.by_age.iter().map(|&(_, number)| number);
            oldest.find(|&number| self.is_usable(number))
        })
    }

    /// Checks that a requested address can be allocated.
    ///
    /// # Errors
    /// `Taken` if another attachment has it; `Reserved` if a pool contains it, but it must not be
    /// allocated; `NotInPool` otherwise.
    pub(super) fn check(&self, number: u128) -> Result<(), IpamError> {
        let ip = self.family.ip(number);
        if let Some(holder) = self.holder(number) {
            return Err(IpamError::Taken { ip, holder: Box::new(holder.clone()) });
        }
        if self.is_usable(number) {
            return Ok(());
        }
        let inside = self.pools.iter().any(|pool| pool.cidr.contains(&ip));
        Err(if inside { IpamError::Reserved(ip) } else { IpamError::NotInPool(ip) })
    }

    /// Leases an address that no attachment has.
    pub(super) fn lease(&mut self, number: u128, id: &AttachmentId, change_set: &mut ChangeSet) {
        self.free.remove(number);
        if let Some(freed) = self.quarantined.remove(&number) {
            self.by_age.remove(&(freed, number));
            let step = Step { before: Some(freed), after: None };
            change_set.quarantined.push((self.family.ip(number), step));
        }
        self.leased.insert(number, id.clone());
    }

    /// Sets the address after which the next search starts.
    pub(super) fn set_cursor(&mut self, number: u128, change_set: &mut ChangeSet) {
        let before = self.cursor.replace(number);
        change_set.cursors.push((self.family, Step { before, after: Some(number) }));
    }

    /// Ends the lease of an address and quarantines it.
    pub(super) fn quarantine(&mut self, number: u128, now: SystemTime, change_set: &mut ChangeSet) {
        self.leased.remove(&number);
        self.quarantined.insert(number, now);
        self.by_age.insert((now, number));
        let step = Step { before: None, after: Some(now) };
        change_set.quarantined.push((self.family.ip(number), step));
    }

    /// Returns the error for a family whose addresses are all leased.
    pub(super) fn exhausted(&self) -> IpamError {
        IpamError::Exhausted {
            cidrs: self.pools.iter().map(|pool| pool.cidr).collect(),
            in_use: self.pools.iter().map(|pool| self.in_use(pool)).sum(),
        }
    }

    /// Returns the usage of each pool.
    pub(super) fn usage(&self, now: SystemTime) -> impl Iterator<Item = PoolUsage> {
        self.pools.iter().map(move |pool| {
            let inside = pool.first..=pool.last;
            let reserved = self.reserved.range(inside.clone()).count() as u128;
            let quarantined = self.quarantined.range(inside).filter(|(number, freed)| {
                is_quarantined(**freed, now) && !self.reserved.contains(number)
            });
            PoolUsage {
                cidr: pool.cidr,
                total: (pool.last - pool.first).saturating_add(1) - reserved,
                in_use: self.in_use(pool),
                quarantined: quarantined.count() as u64,
            }
        })
    }

    /// Returns the number of leases in a pool. A lease does not count if its address became
    /// reserved after the allocation.
    fn in_use(&self, pool: &Pool) -> u64 {
        let inside = pool.first..=pool.last;
        let reserved = self.reserved.range(inside.clone());
        let both = reserved.filter(|number| self.leased.contains_key(number)).count();
        (self.leased.range(inside).count() - both) as u64
    }

    fn is_usable(&self, number: u128) -> bool {
        self.pools.iter().any(|pool| pool.contains(number)) && !self.reserved.contains(&number)
    }

    /// Frees addresses whose quarantine has ended.
    fn expire_quarantine(&mut self, now: SystemTime, change_set: &mut ChangeSet) {
        // If the clock was set back, the quarantine restarts now, so that no address stays longer
        // than `QUARANTINE_TIME`.
        while let Some(&(freed, number)) = self.by_age.last()
            && freed > now
        {
            self.by_age.remove(&(freed, number));
            self.by_age.insert((now, number));
            self.quarantined.insert(number, now);
            let step = Step { before: Some(freed), after: Some(now) };
            change_set.quarantined.push((self.family.ip(number), step));
        }
        while let Some(&(freed, number)) = self.by_age.first()
            && !is_quarantined(freed, now)
        {
            self.by_age.remove(&(freed, number));
            self.quarantined.remove(&number);
            if self.is_usable(number) {
                self.free.insert(number, number);
            }
            let step = Step { before: Some(freed), after: None };
            change_set.quarantined.push((self.family.ip(number), step));
        }
    }
}

fn is_quarantined(freed: SystemTime, now: SystemTime) -> bool {
    now.duration_since(freed).is_ok_and(|since| since < QUARANTINE_TIME) || freed > now
}
