//! Table of the superpackets that may still grow, by the hash of their flow.

/// Maximum number of superpackets that may grow at the same time; a new one replaces the oldest.
pub(super) const SLOTS: usize = 32;

/// A small table. A lookup compares all slots with a few vector instructions.
#[derive(Debug)]
pub(super) struct OpenFlows {
    hashes: [u32; SLOTS],
    items: [u32; SLOTS],
    /// Bit mask of the slots in use.
    live: u32,
    /// Slot to reuse when all are in use.
    oldest: usize,
    last: usize,
}

impl OpenFlows {
    pub(super) fn new() -> Self {
        Self { hashes: [0; SLOTS], items: [0; SLOTS], live: 0, oldest: 0, last: 0 }
    }

    /// Returns the slot that was used last, if it is still in use.
    #[inline]
    pub(super) fn last(&self) -> Option<usize> {
        (self.live >> self.last & 1 == 1).then_some(self.last)
    }

    /// Marks `slot` as used last, because the next packet probably belongs to it.
    #[inline]
    pub(super) fn touch(&mut self, slot: usize) {
        self.last = slot;
    }

    /// Returns the item in a slot.
    #[inline]
    pub(super) fn item(&self, slot: usize) -> usize {
        self.items[slot] as usize
    }

    /// Returns the slots in use whose flow has this hash.
    #[inline]
    pub(super) fn with_hash(&self, hash: u32) -> Slots {
        let mut equal = 0;
        for (slot, other) in self.hashes.iter().enumerate() {
            equal |= u32::from(*other == hash) << slot;
        }
        Slots(equal & self.live)
    }

    /// Returns all slots in use.
    pub(super) fn all(&self) -> Slots {
        Slots(self.live)
    }

    /// Inserts an item, in place of the oldest one if the table is full.
    pub(super) fn insert(&mut self, hash: u32, item: usize) {
        let slot = match (!self.live).trailing_zeros() as usize {
            SLOTS => {
                let slot = self.oldest;
                self.oldest = (slot + 1) % SLOTS;
                slot
            }
            free => free,
        };
        self.hashes[slot] = hash;
        self.items[slot] = item as u32;
        self.live |= 1 << slot;
        self.last = slot;
    }

    #[inline]
    pub(super) fn remove(&mut self, slot: usize) {
        self.live &= !(1 << slot);
    }

    pub(super) fn clear(&mut self) {
        self.live = 0;
        self.oldest = 0;
    }
}

/// A set of slots, as a bit mask.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slots(u32);

impl Iterator for Slots {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let slot = self.0.trailing_zeros() as usize;
        (slot < SLOTS).then(|| {
            self.0 &= self.0 - 1;
            slot
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_found_by_hash_until_removed() {
        let mut open = OpenFlows::new();
        assert_eq!((open.last(), open.all().count()), (None, 0));
        for (item, hash) in [5, 0, 5].into_iter().enumerate() {
            open.insert(hash, item);
        }
        let items = |open: &OpenFlows, hash| -> Vec<usize> {
            open.with_hash(hash).map(|slot| open.item(slot)).collect()
        };
        assert_eq!(items(&open, 5), [0, 2]);
        assert_eq!(items(&open, 0), [1], "empty slots are not found by the hash 0");
        assert_eq!(open.last(), Some(2));
        open.remove(2);
        assert_eq!((items(&open, 5), open.last()), (vec![0], None));
        open.clear();
        assert_eq!(open.all().count(), 0);
    }

    #[test]
    fn oldest_flow_is_replaced_when_full() {
        let mut open = OpenFlows::new();
        for item in 0..SLOTS + 2 {
            open.insert(item as u32, item);
        }
        assert_eq!(open.all().count(), SLOTS);
        assert_eq!(open.with_hash(1).count(), 0);
        let newest = open.with_hash(SLOTS as u32 + 1).next();
        assert_eq!(newest.map(|slot| open.item(slot)), Some(SLOTS + 1));
        assert_eq!(open.with_hash(2).count(), 1);
    }
}
