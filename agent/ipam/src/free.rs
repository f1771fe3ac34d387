//! Free addresses as disjoint ranges. Every operation is logarithmic in the number of ranges,
//! independent of the size of the pool.

use std::collections::BTreeMap;

/// Set of numbers. No two ranges overlap or are adjacent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ranges {
    /// Last number of each range, by its first number.
    ranges: BTreeMap<u128, u128>,
}

impl Ranges {
    /// Adds `first..=last`; numbers may be in the set already.
    pub(super) fn insert(&mut self, mut first: u128, mut last: u128) {
        if let Some((&start, &end)) = self.ranges.range(..=first).next_back()
            && end.checked_add(1).is_none_or(|next| next >= first)
        {
            first = start;
            last = last.max(end);
        }
        while let Some((&start, &end)) = self.ranges.range(first..).next()
            && last.checked_add(1).is_none_or(|next| start <= next)
        {
            self.ranges.remove(&start);
            last = last.max(end);
        }
        self.ranges.insert(first, last);
    }

    /// Removes a number. Returns whether it was in the set.
    pub(super) fn remove(&mut self, number: u128) -> bool {
        let Some((start, end)) = self.around(number) else { return false };
        self.ranges.remove(&start);
        if start < number {
            self.ranges.insert(start, number - 1);
        }
        if number < end {
            self.ranges.insert(number + 1, end);
        }
        true
    }

    /// Returns whether a number is in the set.
    pub(super) fn contains(&self, number: u128) -> bool {
        self.around(number).is_some()
    }

    /// Returns the smallest number greater than `number`, or, if there is none, the smallest number
    /// of the set.
    pub(super) fn after(&self, number: Option<u128>) -> Option<u128> {
        let next = number.and_then(|number| number.checked_add(1)).and_then(|next| {
            if self.contains(next) {
                return Some(next);
            }
            self.ranges.range(next..).next().map(|(&start, _)| start)
        });
        next.or_else(|| self.ranges.first_key_value().map(|(&start, _)| start))
    }

    /// Returns the range that contains `number`.
    fn around(&self, number: u128) -> Option<(u128, u128)> {
        let (&start, &end) = self.ranges.range(..=number).next_back()?;
        (number <= end).then_some((start, end))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_behave_as_a_set(
            steps in prop::collection::vec((any::<bool>(), 0..40_u128, 0..6_u128), 0..80),
            from in 0..48_u128,
        ) {
            let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
            for (insert, number, more) in steps {
                if insert {
                    ranges.insert(number, number + more);
                    model.extend(number..=number + more);
                } else {
                    prop_assert_eq!(ranges.remove(number), model.remove(&number));
                }
                let flat: Vec<_> = ranges.ranges.iter().flat_map(|(&a, &b)| a..=b).collect();
                prop_assert_eq!(&flat, &model.iter().copied().collect::<Vec<_>>());
                let mut last = None;
                for (&start, &end) in &ranges.ranges {
                    prop_assert!(last.is_none_or(|last: u128| last + 1 < start));
                    last = Some(end);
                }
            }
            let after = model.range(from + 1..).next().or(model.first()).copied();
            prop_assert_eq!(ranges.after(Some(from)), after);
            prop_assert_eq!(ranges.after(None), model.first().copied());
        }
    }

    #[test]
    fn largest_number_is_handled() {
        let mut ranges = Ranges::default();
        ranges.insert(u128::MAX - 1, u128::MAX);
        ranges.insert(0, 0);
        assert_eq!(ranges.after(Some(u128::MAX - 1)), Some(u128::MAX));
        assert_eq!(ranges.after(Some(u128::MAX)), Some(0));
        assert!(ranges.remove(u128::MAX) && !ranges.remove(u128::MAX));
        ranges.insert(u128::MAX, u128::MAX);
        assert_eq!(ranges.after(Some(0)), Some(u128::MAX - 1));
    }
}
