//! Bytes as runs of equal length with loops around them.

/// Runs that are shorter than this, the size of a page, are not worth a read each.
const SHORT_RUN_BYTES: u64 = 4096;

/// A loop around runs: its iterations, and the distance between two of them in each of `N` layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loop<const N: usize> {
    pub(crate) count: u64,
    pub(crate) strides: [u64; N],
}

/// Runs that are contiguous in each of `N` layouts, and the loops around them, outermost first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Runs<const N: usize> {
    pub(crate) length: u64,
    pub(crate) loops: Vec<Loop<N>>,
}

impl<const N: usize> Runs<N> {
    /// Returns the longest runs of elements of `length`. Loops whose iterations are equally far apart in all layouts become
    /// one. The strides of a loop of one iteration do not matter.
    pub(crate) fn merge(length: u64, loops: impl DoubleEndedIterator<Item = Loop<N>>) -> Runs<N> {
        let mut runs = Runs { length, loops: Vec::new() };
        for next in loops.rev().filter(|next| next.count != 1) {
            match runs.loops.last_mut() {
                None if next.strides == [runs.length; N] => runs.length *= next.count,
                Some(inner) if next.strides == inner.strides.map(|stride| stride * inner.count) => {
                    inner.count *= next.count;
                }
                _ => runs.loops.push(next),
            }
        }
        runs.loops.reverse();
        runs
    }

    /// Returns the number of runs.
    pub(crate) fn count(&self) -> u64 {
        self.loops.iter().map(|around| around.count).product()
    }

    /// Returns the length of all runs together.
    pub(crate) fn total(&self) -> u64 {
        self.length * self.count()
    }

    /// Returns whether there are several runs, and each is shorter than a page.
    pub(crate) fn are_short(&self) -> bool {
        self.length < SHORT_RUN_BYTES && self.count() > 1
    }

    /// Returns the offset of run number `run` in each layout.
    pub(crate) fn offsets(&self, mut run: u64) -> [u64; N] {
        let mut offsets = [0; N];
        for around in self.loops.iter().rev() {
            let index = run % around.count;
            run /= around.count;
            for (offset, stride) in offsets.iter_mut().zip(around.strides) {
                *offset += index * stride;
            }
        }
        offsets
    }
}

impl Runs<1> {
    /// Adds a second layout, in which the runs follow one another without gaps.
    pub(crate) fn beside_packed(&self) -> Runs<2> {
        let mut packed = self.length;
        let mut loops = Vec::with_capacity(self.loops.len());
        for &Loop { count, strides: [stride] } in self.loops.iter().rev() {
            loops.push(Loop { count, strides: [stride, packed] });
            packed *= count;
        }
        loops.reverse();
        Runs { length: self.length, loops }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged<const N: usize>(loops: &[(u64, [u64; N])]) -> (u64, Vec<(u64, [u64; N])>) {
        let loops = loops.iter().map(|&(count, strides)| Loop { count, strides });
        let Runs { length, loops } = Runs::merge(4, loops);
        (length, loops.iter().map(|around| (around.count, around.strides)).collect())
    }

    #[test]
    fn loops_merge_if_they_are_one_in_all_layouts() {
        assert_eq!(merged(&[(3, [20]), (5, [4])]), (60, vec![]));
        assert_eq!(merged(&[(3, [40]), (5, [8])]), (4, vec![(15, [8])]));
        assert_eq!(merged(&[(3, [24]), (5, [4])]), (20, vec![(3, [24])]));
        assert_eq!(merged(&[(2, [60, 60]), (3, [20, 20]), (5, [4, 4])]), (120, vec![]));
        assert_eq!(merged(&[(2, [60, 70]), (3, [20, 20]), (5, [4, 4])]), (60, vec![(2, [60, 70])]));
        assert_eq!(merged(&[(3, [20, 4]), (5, [4, 12])]), (4, vec![(3, [20, 4]), (5, [4, 12])]));
    }

    #[test]
    fn strides_of_one_iteration_do_not_matter() {
        assert_eq!(merged(&[(1, [7]), (3, [20]), (1, [u64::MAX]), (5, [4]), (1, [0])]), (60, vec![]));
        assert_eq!(merged::<2>(&[]), (4, vec![]));
    }

    #[test]
    fn offsets_are_those_of_nested_loops() {
        let loops = [Loop { count: 2, strides: [100, 1] }, Loop { count: 3, strides: [10, 7] }];
        let runs = Runs { length: 1, loops: loops.to_vec() };
        let offsets: Vec<_> = (0..runs.count()).map(|run| runs.offsets(run)).collect();
        assert_eq!(offsets, [[0, 0], [10, 7], [20, 14], [100, 1], [110, 8], [120, 15]]);
        let source = [Loop { count: 2, strides: [100] }, Loop { count: 3, strides: [10] }];
        let packed = Runs { length: 4, loops: source.to_vec() }.beside_packed();
        assert!((0..6).all(|run| packed.offsets(run)[1] == 4 * run));
    }
}
