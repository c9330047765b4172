//! The written bytes of a tensor: ranges that arrive in any order, and do not overlap.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of bytes as disjoint, non-adjacent, non-empty ranges, sorted by their starts.
#[derive(Debug, Default)]
pub(crate) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds `range`; returns `false`, without a change, if it overlaps the set.
    pub(crate) fn insert(&mut self, range: Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        let before = self.0.range(..range.end).next_back().map(|(&start, &end)| start..end);
        if before.as_ref().is_some_and(|before| before.end > range.start) {
            return false;
        }
        let start =
            before.filter(|before| before.end == range.start).map_or(range.start, |before| before.start);
        let end = self.0.remove(&range.end).unwrap_or(range.end);
        self.0.insert(start, end);
        true
    }

    /// Removes `range`, all of which was added before.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Some((&start, &end)) = self.0.range(..=range.start).next_back() else { return };
        debug_assert!(range.end <= end);
        self.0.remove(&start);
        if start < range.start {
            self.0.insert(start, range.start);
        }
        if range.end < end {
            self.0.insert(range.end, end);
        }
    }

    /// Whether the set has every byte from 0 to `end`.
    pub(crate) fn reach(&self, end: u64) -> bool {
        end == 0 || self.0.get(&0) == Some(&end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The same as marks on every byte.
        #[test]
        fn ranges_are_the_bytes_that_were_added(
            steps in proptest::collection::vec((any::<bool>(), 0u64..40, 0u64..12), 1..80)
        ) {
            let mut ranges = Ranges::default();
            let mut marks = [false; 64];
            let mut added: Vec<Range<u64>> = Vec::new();
            for (adds, start, length) in steps {
                let range = start..start + length;
                let span = start as usize..(start + length) as usize;
                if adds {
                    let is_free = !marks[span.clone()].contains(&true);
                    prop_assert_eq!(ranges.insert(range.clone()), is_free);
                    if is_free {
                        marks[span].fill(true);
                        added.push(range);
                    }
                } else if !added.is_empty() {
                    let range = added.swap_remove(start as usize % added.len());
                    marks[range.start as usize..range.end as usize].fill(false);
                    ranges.remove(range);
                }
                let fewest = (0..64).filter(|&i| marks[i] && (i == 0 || !marks[i - 1])).count();
                prop_assert_eq!(ranges.0.len(), fewest);
                for end in 0..64 {
                    let all = !marks[..end].contains(&false) && !marks[end];
                    prop_assert_eq!(ranges.reach(end as u64), end == 0 || all);
                }
            }
        }
    }
}
