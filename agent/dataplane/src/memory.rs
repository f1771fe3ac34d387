//! Session store in a memfd that outlives the process, from which the next data process restores
//! the sessions.
//!
//! Layout in 64-bit words: a header; records (a word with the kind of the record, then a session,
//! or a public key with the timestamp of its last handshake); and the next counters of each session
//! ([`SessionSlot`]), one word per receive lane. The counters of one lane are adjacent, so that two
//! lanes, which two threads receive, share no cache line. A process that is killed while it writes
//! a record leaves a record that counts as free.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use skein_core::PublicKey;
use skein_core::tunnel::{SAVED_LEN, SavedSession, SessionSlot, SessionStore};
use skein_core::wire::header::{CONTROL_LANE, MAX_LANES};
use skein_sys::memory::SharedWords;

/// Maximum number of records: two sessions for each of 5,000 peers, and the timestamp of each
/// peer's last handshake. If no record is free, a session replaces a timestamp. A session without a
/// record ends with its process.
const MAX_RECORDS: usize = 16_384;
/// First word of the memfd; another layout has another number.
const LAYOUT: u64 = 0x736b_6569_6e00_0001;
/// Words of the header.
const HEADER_WORDS: usize = 8;
/// Header word: number of records ever used.
const USED_RECORDS: usize = 1;
/// Header word: latest timestamp of the node's own initiations, nanoseconds since 1970.
const LATEST_TIMESTAMP: usize = 2;
/// Words of a record.
const RECORD_WORDS: usize = 1 + SAVED_LEN / 8;
/// Kind of a record that holds a session.
const SESSION: u64 = 1;
/// Kind of a record that holds a public key (4 words) and the latest timestamp of its accepted
/// initiations, nanoseconds since 1970. A release without such records treats them as free.
const SEEN_TIMESTAMP: u64 = 2;
const COUNTERS: usize = HEADER_WORDS + MAX_RECORDS * RECORD_WORDS;
const TOTAL_WORDS: usize = COUNTERS + (MAX_LANES + 1) * MAX_RECORDS;

const _: () = assert!(SAVED_LEN.is_multiple_of(8));

/// Session store in a memfd. Clones share the memfd.
#[derive(Debug, Clone)]
pub(super) struct MemfdStore(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    words: SharedWords,
    /// Free records below the used count of the header.
    free: Mutex<BTreeSet<usize>>,
    /// Records of handshake timestamps, by public key.
    timestamps: Mutex<HashMap<PublicKey, usize>>,
}

/// A session of an earlier process with its slot.
pub(super) type RestoredSession = (SavedSession, Box<dyn SessionSlot>);

/// Record of one session; drop frees it.
struct MemfdSlot {
    store: MemfdStore,
    record: usize,
    lanes: u8,
}

impl MemfdStore {
    /// Creates an empty store.
    ///
    /// # Errors
    /// The kernel's error if the memfd cannot be created or mapped.
    pub(super) fn create() -> io::Result<Self> {
        let words = SharedWords::create(TOTAL_WORDS)?;
        words.words()[0].store(LAYOUT, Ordering::Relaxed);
        Ok(Self::from_words(words))
    }

    /// Opens the store of an earlier process, which must not run any more. Returns its sessions,
    /// each in its next epoch. Frees the record of a session if the session has no next epoch, or
    /// if the record is not valid.
    ///
    /// # Errors
    /// The kernel's error if the memfd cannot be mapped; `InvalidData` if its layout is unknown.
    pub(super) fn open(file: OwnedFd) -> io::Result<(Self, Vec<RestoredSession>)> {
        let words = SharedWords::open(file, TOTAL_WORDS)?;
        if words.words()[0].load(Ordering::Relaxed) != LAYOUT {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let store = Self::from_words(words);
        let mut found = Vec::new();
        for record in 0..store.used() {
            if let Some(key) = store.timestamp_key(record) {
                // If two records have the same key, the last one counts, because the process was
                // freeing the other one.
                store.timestamps().insert(key, record);
                continue;
            }
            let next = |mut session: SavedSession| {
                session.epoch = session.epoch.checked_add(1)?;
                Some(session)
            };
            match store.read(record).and_then(next) {
                Some(session) => {
                    // Store the new epoch before a datagram is sealed in it.
                    store.write(record, &session);
                    let lanes = MAX_LANES as u8;
                    let slot = MemfdSlot { store: store.clone(), record, lanes };
                    found.push((session, Box::new(slot) as Box<dyn SessionSlot>));
                }
                None => store.clear_record(record, MAX_LANES as u8),
            }
        }
        Ok((store, found))
    }

    fn from_words(words: SharedWords) -> Self {
        Self(Arc::new(Shared { words, free: Mutex::default(), timestamps: Mutex::default() }))
    }

    fn timestamps(&self) -> MutexGuard<'_, HashMap<PublicKey, usize>> {
        self.0.timestamps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the public key of a record that holds a handshake timestamp; `None` for other
    /// records.
    fn timestamp_key(&self, record: usize) -> Option<PublicKey> {
        let (kind, words) = self.record_words(record).split_first()?;
        if kind.load(Ordering::Acquire) != SEEN_TIMESTAMP {
            return None;
        }
        let mut key = [0; 32];
        for (out, word) in key.chunks_exact_mut(8).zip(words) {
            out.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        Some(PublicKey::new(key))
    }

    /// Returns the word of a record that holds the handshake timestamp.
    fn timestamp_word(&self, record: usize) -> &AtomicU64 {
        &self.record_words(record)[1 + 32 / 8]
    }

    fn write_timestamp(&self, record: usize, key: &PublicKey, nanos: u64) {
        let Some((kind, words)) = self.record_words(record).split_first() else { return };
        for (bytes, word) in key.as_bytes().chunks_exact(8).zip(words) {
            let bytes = bytes.first_chunk().copied().unwrap_or_default();
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
        self.timestamp_word(record).store(nanos, Ordering::Relaxed);
        kind.store(SEEN_TIMESTAMP, Ordering::Release);
    }

    /// Returns the memfd, for the keeper.
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.0.words.as_fd()
    }

    fn used(&self) -> usize {
        let used = self.0.words.words()[USED_RECORDS].load(Ordering::Relaxed);
        usize::try_from(used).map_or(MAX_RECORDS, |used| used.min(MAX_RECORDS))
    }

    fn record_words(&self, record: usize) -> &[AtomicU64] {
        &self.0.words.words()[HEADER_WORDS + record * RECORD_WORDS..][..RECORD_WORDS]
    }

    fn counter_word(&self, record: usize, lane: u8) -> Option<&AtomicU64> {
        let lane = match lane {
            CONTROL_LANE => MAX_LANES,
            lane => Some(usize::from(lane)).filter(|lane| *lane < MAX_LANES)?,
        };
        self.0.words.words().get(COUNTERS + lane * MAX_RECORDS + record)
    }

    /// Returns a free record; `None` if all are in use.
    fn allocate_record(&self) -> Option<usize> {
        let mut free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(record) = free.pop_first() {
            return Some(record);
        }
        let record = Some(self.used()).filter(|record| *record < MAX_RECORDS)?;
        self.0.words.words()[USED_RECORDS].store(record as u64 + 1, Ordering::Relaxed);
        Some(record)
    }

    /// Frees a record that holds a handshake timestamp, and allocates it.
    fn reclaim_timestamp_record(&self) -> Option<usize> {
        let mut timestamps = self.timestamps();
        let key = *timestamps.keys().next()?;
        let record = timestamps.remove(&key)?;
        self.clear_record(record, 0);
        self.allocate_record()
    }

    fn read(&self, record: usize) -> Option<SavedSession> {
        let (kind, words) = self.record_words(record).split_first()?;
        if kind.load(Ordering::Acquire) != SESSION {
            return None;
        }
        let mut bytes = zeroize::Zeroizing::new([0; SAVED_LEN]);
        for (out, word) in bytes.chunks_exact_mut(8).zip(words) {
            out.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        SavedSession::from_bytes(&bytes)
    }

    fn write(&self, record: usize, session: &SavedSession) {
        let Some((kind, words)) = self.record_words(record).split_first() else { return };
        for (bytes, word) in session.to_bytes().chunks_exact(8).zip(words) {
            let bytes = bytes.first_chunk().copied().unwrap_or_default();
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
        kind.store(SESSION, Ordering::Release);
    }

    /// Clears a record and its counters in `lanes` lanes, and frees it.
    fn clear_record(&self, record: usize, lanes: u8) {
        let Some((kind, words)) = self.record_words(record).split_first() else { return };
        kind.store(0, Ordering::Relaxed);
        std::sync::atomic::fence(Ordering::Release);
        words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        let counters =
            (0..lanes).chain([CONTROL_LANE]).filter_map(|lane| self.counter_word(record, lane));
        // Skip words that were never written, because a write would allocate their page.
        let counters = counters.filter(|counter| counter.load(Ordering::Relaxed) != 0);
        counters.for_each(|counter| counter.store(0, Ordering::Relaxed));
        self.0.free.lock().unwrap_or_else(PoisonError::into_inner).insert(record);
    }
}

impl SessionStore for MemfdStore {
    fn insert(&mut self, session: &SavedSession) -> Option<Box<dyn SessionSlot>> {
        let record = self.allocate_record().or_else(|| self.reclaim_timestamp_record())?;
        self.write(record, session);
        Some(Box::new(MemfdSlot { store: self.clone(), record, lanes: session.remote_lanes() }))
    }

    fn latest_timestamp(&self) -> Duration {
        Duration::from_nanos(self.0.words.words()[LATEST_TIMESTAMP].load(Ordering::Relaxed))
    }

    fn set_latest_timestamp(&mut self, timestamp: Duration) {
        // Valid until the year 2554.
        let nanos = u64::try_from(timestamp.as_nanos()).unwrap_or(u64::MAX);
        self.0.words.words()[LATEST_TIMESTAMP].store(nanos, Ordering::Relaxed);
    }

    fn seen_timestamp(&self, key: &PublicKey) -> Duration {
        let nanos = |record: &usize| self.timestamp_word(*record).load(Ordering::Relaxed);
        Duration::from_nanos(self.timestamps().get(key).map_or(0, nanos))
    }

    fn set_seen_timestamp(&mut self, key: &PublicKey, timestamp: Duration) {
        let nanos = u64::try_from(timestamp.as_nanos()).unwrap_or(u64::MAX);
        let mut timestamps = self.timestamps();
        match (timestamps.get(key), nanos) {
            (Some(&record), 0) => {
                timestamps.remove(key);
                self.clear_record(record, 0);
            }
            (Some(&record), nanos) => self.timestamp_word(record).store(nanos, Ordering::Relaxed),
            (None, 0) => {}
            (None, nanos) => {
                // Without a free record, only the control process stores the timestamp, up to 60 s
                // late.
                let Some(record) = self.allocate_record() else { return };
                self.write_timestamp(record, key, nanos);
                timestamps.insert(*key, record);
            }
        }
    }

    fn retain_seen_timestamps(&mut self, is_known: &dyn Fn(&PublicKey) -> bool) {
        self.timestamps().retain(|key, record| {
            let known = is_known(key);
            if !known {
                self.clear_record(*record, 0);
            }
            known
        });
    }
}

impl SessionSlot for MemfdSlot {
    fn next_counter(&self, lane: u8) -> u64 {
        self.store
            .counter_word(self.record, lane)
            .map_or(0, |counter| counter.load(Ordering::Relaxed))
    }

    fn set_next_counter(&self, lane: u8, next: u64) {
        if let Some(word) = self.store.counter_word(self.record, lane) {
            word.store(next, Ordering::Relaxed);
        }
    }
}

impl Drop for MemfdSlot {
    fn drop(&mut self) {
        self.store.clear_record(self.record, self.lanes);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Returns a session as the engine would store it.
    fn saved(number: u8) -> SavedSession {
        let mut bytes = [0; SAVED_LEN];
        bytes[..32].fill(number);
        // Cipher, local lanes, remote lanes, not the initiator.
        bytes[128..132].copy_from_slice(&[1, 2, 3, 0]);
        SavedSession::from_bytes(&bytes).unwrap()
    }

    fn reopen(store: &MemfdStore) -> (MemfdStore, Vec<RestoredSession>) {
        MemfdStore::open(store.file().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn session_is_restored_in_the_next_epoch() {
        let mut store = MemfdStore::create().unwrap();
        let kept: Vec<_> = (0..3).map(|n| store.insert(&saved(n)).unwrap()).collect();
        kept[1].set_next_counter(2, 77);
        kept[1].set_next_counter(CONTROL_LANE, 5);
        store.set_latest_timestamp(Duration::new(9, 1));
        // A killed process runs no destructor.
        kept.into_iter().for_each(std::mem::forget);
        let (store, found) = reopen(&store);
        assert_eq!(store.latest_timestamp(), Duration::new(9, 1));
        assert_eq!(found.iter().map(|(s, _)| s.epoch).collect::<Vec<_>>(), [1, 1, 1]);
        assert_eq!(found[1].0.public_key, PublicKey::new([1; 32]));
        assert_eq!([0, 2, CONTROL_LANE].map(|lane| found[1].1.next_counter(lane)), [0, 77, 5]);
        found.into_iter().for_each(std::mem::forget);
        let (_, found) = reopen(&store);
        assert_eq!(found.iter().map(|(s, _)| s.epoch).collect::<Vec<_>>(), [2, 2, 2]);
    }

    #[test]
    fn freed_record_leaves_no_trace() {
        let mut store = MemfdStore::create().unwrap();
        let kept = store.insert(&saved(9)).unwrap();
        kept.set_next_counter(1, 7);
        drop(kept);
        assert_eq!(reopen(&store).1.len(), 0);
        let words = store.0.words.words();
        assert!(
            words[HEADER_WORDS..]
                .iter()
                .take(RECORD_WORDS)
                .all(|word| word.load(Ordering::Relaxed) == 0)
        );
        let again = store.insert(&saved(8)).unwrap();
        assert_eq!(
            (again.next_counter(1), store.used()),
            (0, 1),
            "The freed record must be used again."
        );
    }

    #[test]
    fn handshake_timestamps_outlive_the_process() {
        let at = Duration::from_secs;
        let mut store = MemfdStore::create().unwrap();
        assert_eq!(store.seen_timestamp(&PublicKey::new([1; 32])), Duration::ZERO);
        store.set_seen_timestamp(&PublicKey::new([1; 32]), at(10));
        std::mem::forget(store.insert(&saved(7)).unwrap());
        store.set_seen_timestamp(&PublicKey::new([2; 32]), Duration::MAX);
        store.set_seen_timestamp(&PublicKey::new([3; 32]), at(30));
        store.set_seen_timestamp(&PublicKey::new([1; 32]), at(11));
        store.set_seen_timestamp(&PublicKey::new([3; 32]), Duration::ZERO);
        let (mut store, found) = reopen(&store);
        assert_eq!((found.len(), found[0].0.public_key), (1, PublicKey::new([7; 32])));
        found.into_iter().for_each(std::mem::forget);
        let seen = [1, 2, 3].map(|n| store.seen_timestamp(&PublicKey::new([n; 32])));
        assert_eq!(seen, [at(11), Duration::from_nanos(u64::MAX), Duration::ZERO]);
        store.retain_seen_timestamps(&|key| *key == PublicKey::new([1; 32]));
        let (store, found) = reopen(&store);
        found.into_iter().for_each(std::mem::forget);
        let seen = [1, 2].map(|n| store.seen_timestamp(&PublicKey::new([n; 32])));
        assert_eq!(seen, [at(11), Duration::ZERO]);
        assert_eq!(store.used(), 4, "A freed record must be used again.");
    }

    #[test]
    fn handshake_timestamps_leave_room_for_sessions() {
        let mut store = MemfdStore::create().unwrap();
        for number in 0..MAX_RECORDS as u32 {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&number.to_be_bytes());
            store.set_seen_timestamp(&PublicKey::new(key), Duration::from_secs(1));
        }
        assert_eq!(store.timestamps().len(), MAX_RECORDS);
        let sessions: Vec<_> = (0..MAX_RECORDS).map(|_| store.insert(&saved(1))).collect();
        assert!(sessions.iter().all(Option::is_some));
        assert_eq!(store.timestamps().len(), 0);
    }

    #[test]
    fn partial_record_and_other_layout_are_ignored() {
        let mut store = MemfdStore::create().unwrap();
        std::mem::forget(store.insert(&saved(1)).unwrap());
        std::mem::forget(store.insert(&saved(2)).unwrap());
        store.record_words(0)[0].store(0, Ordering::Relaxed);
        let (_, found) = reopen(&store);
        assert_eq!((found.len(), found[0].0.public_key), (1, PublicKey::new([2; 32])));
        store.0.words.words()[0].store(LAYOUT + 1, Ordering::Relaxed);
        assert!(MemfdStore::open(store.file().try_clone_to_owned().unwrap()).is_err());
    }

    #[test]
    fn full_store_refuses_a_session() {
        let mut store = MemfdStore::create().unwrap();
        let all: Vec<_> = (0..MAX_RECORDS).map(|_| store.insert(&saved(1)).unwrap()).collect();
        assert!(store.insert(&saved(1)).is_none());
        drop(all);
        assert!(store.insert(&saved(1)).is_some());
    }
}
