//! The replay window (RFC 6479), which accepts each counter of a lane once.

use crate::drop::DropReason;

const WORDS: usize = 64;
const WORD_BITS: u64 = u64::BITS as u64;

/// Record of the counters that were received in one session and lane.
///
/// The record is a ring of 64-bit words. Moving the window clears whole words and never shifts. The
/// window belongs to the one thread that receives the lane, so that nothing is shared. Its size is
/// 520 bytes.
#[derive(Debug, Clone)]
pub struct ReplayWindow {
    /// Highest counter accepted; 0 if none was.
    highest: u64,
    seen: [u64; WORDS],
}

impl ReplayWindow {
    /// Number of counters up to the highest one that the window can tell apart.
    pub const WIDTH: u64 = (WORDS as u64 - 1) * WORD_BITS;

    /// Creates a window that has accepted no counter.
    pub const fn new() -> Self {
        Self { highest: 0, seen: [0; WORDS] }
    }

    /// Creates a window that refuses every counter below `next`. If `next` is `u64::MAX`, the
    /// window refuses all counters, because one more than the highest counter cannot be
    /// represented.
    pub const fn after(next: u64) -> Self {
        match next.checked_sub(1) {
            Some(_) if next == u64::MAX => Self { highest: next, seen: [u64::MAX; WORDS] },
            Some(highest) => Self { highest, seen: [u64::MAX; WORDS] }.clear_above_highest(),
            None => Self::new(),
        }
    }

    /// Clears the bits above the highest counter in its word.
    const fn clear_above_highest(mut self) -> Self {
        let bit = self.highest % WORD_BITS;
        self.seen[slot(self.highest / WORD_BITS)] = u64::MAX >> (WORD_BITS - 1 - bit);
        self
    }

    /// Returns one more than the highest counter accepted, at most `u64::MAX`; 0 if none was
    /// accepted. [`Self::after`] takes this value.
    pub const fn next_counter(&self) -> u64 {
        // A window that has accepted counter 0 has its bit set.
        match self.highest {
            0 => self.seen[0] & 1,
            highest => highest.saturating_add(1),
        }
    }

    /// Accepts `counter` if it is new. Call this method only after the datagram has been
    /// authenticated: otherwise a sender without the key could move the window.
    ///
    /// # Errors
    /// [`DropReason::Replayed`] if the counter was accepted before, [`DropReason::ReplayWindow`] if
    /// it is [`Self::WIDTH`] or more behind the highest counter.
    #[inline]
    pub fn check_and_set(&mut self, counter: u64) -> Result<(), DropReason> {
        let word = counter / WORD_BITS;
        if counter > self.highest {
            let top = self.highest / WORD_BITS;
            for step in 1..=(word - top).min(WORDS as u64) {
                self.seen[slot(top + step)] = 0;
            }
            self.highest = counter;
        } else if self.highest - counter >= Self::WIDTH {
            return Err(DropReason::ReplayWindow);
        }
        let bit = 1 << (counter % WORD_BITS);
        let seen = &mut self.seen[slot(word)];
        if *seen & bit != 0 {
            return Err(DropReason::Replayed);
        }
        *seen |= bit;
        Ok(())
    }
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self::new()
    }
}

const fn slot(word: u64) -> usize {
    (word % WORDS as u64) as usize
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const WIDTH: u64 = ReplayWindow::WIDTH;
    const REPLAYED: Result<(), DropReason> = Err(DropReason::Replayed);
    const TOO_OLD: Result<(), DropReason> = Err(DropReason::ReplayWindow);

    #[test]
    fn first_counters_are_accepted_once() {
        let mut window = ReplayWindow::new();
        for counter in [0, 1, 2, 5, 4, 3, 63, 64, 65] {
            assert_eq!(window.check_and_set(counter), Ok(()), "{counter}");
            assert_eq!(window.check_and_set(counter), REPLAYED, "{counter}");
        }
        assert_eq!(window.check_and_set(6), Ok(()));
    }

    #[test]
    fn restored_window_refuses_counters_below_next() {
        for next in [1, 2, 63, 64, 65, 4_095, 4_096, 1 << 32, (1 << 32) + 77] {
            let mut window = ReplayWindow::after(next);
            for old in [0, next / 2, next.saturating_sub(2), next - 1] {
                assert!(window.check_and_set(old).is_err(), "{old} of {next}");
            }
            for new in [next + 2, next, next + 1, next + 300] {
                assert_eq!(window.check_and_set(new), Ok(()), "{new} of {next}");
                assert_eq!(window.check_and_set(new), REPLAYED, "{new} of {next}");
            }
        }
        assert_eq!(ReplayWindow::after(0).check_and_set(0), Ok(()));
    }

    #[test]
    fn window_width_is_exact() {
        let mut window = ReplayWindow::new();
        let top = WIDTH + 1000;
        assert_eq!(window.check_and_set(top), Ok(()));
        assert_eq!(window.check_and_set(top - WIDTH), TOO_OLD);
        assert_eq!(window.check_and_set(top - WIDTH + 1), Ok(()));
        assert_eq!(window.check_and_set(top - WIDTH + 1), REPLAYED);
        assert_eq!(window.check_and_set(0), TOO_OLD);
    }

    #[test]
    fn words_are_cleared_when_ring_wraps() {
        let mut window = ReplayWindow::new();
        let ring = WORDS as u64 * WORD_BITS;
        for counter in 0..ring {
            assert_eq!(window.check_and_set(counter), Ok(()));
        }
        // Same slots, next round.
        for counter in ring..2 * ring {
            assert_eq!(window.check_and_set(counter), Ok(()), "{counter}");
        }
        assert_eq!(window.check_and_set(2 * ring - 1), REPLAYED);
    }

    #[test]
    fn jump_over_whole_ring_clears_all_words() {
        let mut window = ReplayWindow::new();
        for counter in 0..300 {
            assert_eq!(window.check_and_set(counter), Ok(()));
        }
        assert_eq!(window.check_and_set(1 << 40), Ok(()));
        assert_eq!(window.check_and_set(299), TOO_OLD);
        for back in 1..WIDTH {
            assert_eq!(window.check_and_set((1 << 40) - back), Ok(()), "{back}");
        }
    }

    #[test]
    fn highest_counters_do_not_overflow() {
        let mut window = ReplayWindow::new();
        assert_eq!(window.check_and_set(u64::MAX), Ok(()));
        assert_eq!(window.check_and_set(u64::MAX), REPLAYED);
        assert_eq!(window.check_and_set(u64::MAX - 1), Ok(()));
        assert_eq!(window.check_and_set(u64::MAX - WIDTH), TOO_OLD);
        assert_eq!(window.check_and_set(0), TOO_OLD);
    }

    #[test]
    fn window_restored_at_highest_counter_accepts_nothing() {
        let mut window = ReplayWindow::after(u64::MAX);
        for counter in [u64::MAX, u64::MAX - 1, u64::MAX - WIDTH + 1] {
            assert_eq!(window.check_and_set(counter), REPLAYED, "{counter}");
        }
        assert_eq!(window.check_and_set(0), TOO_OLD);
    }

    proptest! {
        /// Against a set that forgets nothing.
        #[test]
        fn window_agrees_with_reference_model(steps in prop::collection::vec((0u64..9000, any::<bool>()), 1..400)) {
            let mut window = ReplayWindow::new();
            let (mut seen, mut highest) = (HashSet::new(), 0u64);
            for (step, ahead) in steps {
                let counter = if ahead { highest + step % 5000 } else { highest.saturating_sub(step) };
                let expected = if counter <= highest && highest - counter >= WIDTH {
                    TOO_OLD
                } else if !seen.insert(counter) {
                    REPLAYED
                } else {
                    Ok(())
                };
                prop_assert_eq!(window.check_and_set(counter), expected);
                highest = highest.max(counter);
            }
        }
    }
}
