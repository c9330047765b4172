//! A slice with short runs, read in tiles: boxes of about 1 MiB, which several threads read and copy to their places.

use std::ops::Range;

use crate::error::Result;
use crate::format::runs::{Loop, Runs};
use crate::read::byte_ranges::{ReadRange, read_parts};
use crate::read::copy_runs::copy_runs;
use crate::read::slice_reader::{GATHER_BYTES, GATHER_GAP};
use crate::read::source::ReadMethod;
use crate::read::strategy::ReadStrategy;

/// The bytes of the file that a tile spans in the innermost loops, so that its reads are not too short.
const SOURCE_BYTES: u64 = 4096;

/// The bytes of the destination that a tile spans in the innermost loops there: a few lines of the processor's caches.
const DESTINATION_BYTES: u64 = 256;

/// A slice to read, and its destination.
#[derive(Debug)]
pub(crate) struct StridedRead {
    /// The offset of the first run in the source.
    offset: u64,
    destination: *mut u8,
    /// In the source and in the destination.
    runs: Runs<2>,
    /// How many iterations of each loop a tile has; fewer at the ends.
    tile: Vec<u64>,
}

// SAFETY: only `read` writes to the destination. Its contract requires that it is valid on any thread, and that no two threads
// read the same tile.
unsafe impl Send for StridedRead {}
// SAFETY: as above.
unsafe impl Sync for StridedRead {}

impl StridedRead {
    /// Plans to read `runs`, which are at least one, from `offset` of a source.
    pub(crate) fn new(offset: u64, destination: *mut u8, runs: Runs<2>) -> StridedRead {
        let tile = plan_tile(&runs);
        StridedRead { offset, destination, runs, tile }
    }

    pub(crate) fn total_bytes(&self) -> usize {
        self.runs.total() as usize
    }

    /// Returns the range of the source with all runs.
    pub(crate) fn extent(&self) -> Range<u64> {
        let reach = |around: &Loop<2>| (around.count - 1) * around.strides[0];
        self.offset..self.offset + self.runs.length + self.runs.loops.iter().map(reach).sum::<u64>()
    }

    /// Returns the number of tiles.
    pub(crate) fn tiles(&self) -> usize {
        let loops = self.runs.loops.iter().zip(&self.tile);
        loops.map(|(around, &size)| around.count.div_ceil(size) as usize).product()
    }

    /// Reads tile number `number`.
    ///
    /// # Safety
    ///
    /// The destination must be valid for writes of all runs, on any thread, and no two of them may overlap there. No other
    /// thread may read the same tile. [`StridedRead::extent`] must be inside a source of known length.
    pub(crate) unsafe fn read(
        &self,
        number: usize,
        method: ReadMethod<'_>,
        strategy: ReadStrategy,
    ) -> Result<()> {
        let (mut tile, starts) = self.tile(number as u64);
        let offset = self.offset + starts[0];
        let destination = self.destination.wrapping_add(starts[1] as usize);
        // The spans follow one another in the buffer.
        let spans = spans(&tile).beside_packed();
        let mut buffer = Vec::<u8>::with_capacity(spans.total() as usize);
        let start = buffer.as_mut_ptr();
        let parts = (0..spans.count()).map(|span| {
            let [from, to] = spans.offsets(span);
            let destination = start.wrapping_add(to as usize);
            ReadRange { offset: offset + from, destination, length: spans.length as usize }
        });
        // SAFETY: the buffer has room for all spans, and nothing else uses it; the extent contains them.
        unsafe { read_parts(method, parts, strategy) }?;
        for (around, span) in tile.loops.iter_mut().zip(&spans.loops) {
            around.strides[0] = span.strides[1];
        }
        // SAFETY: the spans, which were read, contain the runs; this function's contract covers the destination.
        unsafe { copy_runs(&tile, start, destination) };
        Ok(())
    }

    /// Returns the runs of tile number `number`, and the offsets of the first one in the source and the destination.
    fn tile(&self, mut number: u64) -> (Runs<2>, [u64; 2]) {
        let (mut loops, mut starts) = (self.runs.loops.clone(), [0; 2]);
        for (around, size) in loops.iter_mut().zip(&self.tile).rev() {
            let tiles = around.count.div_ceil(*size);
            let first = number % tiles * size;
            number /= tiles;
            starts[0] += first * around.strides[0];
            starts[1] += first * around.strides[1];
            around.count = (around.count - first).min(*size);
        }
        (Runs { length: self.runs.length, loops }, starts)
    }
}

/// Returns the parts of the source to read for a tile: runs, with what is between them if that is little. The loops around
/// them are the outer ones of the tile.
fn spans(tile: &Runs<2>) -> Runs<1> {
    let (mut length, mut outer) = (tile.length, &tile.loops[..]);
    while let [rest @ .., inner] = outer
        && (inner.count == 1 || inner.strides[0] - length < GATHER_GAP)
    {
        length += (inner.count - 1) * inner.strides[0];
        outer = rest;
    }
    let loops = outer.iter().map(|around| Loop { count: around.count, strides: [around.strides[0]] });
    Runs { length, loops: loops.collect() }
}

/// Returns how many iterations of each loop a tile has. It has some neighbours in both layouts, and fits in the buffer.
fn plan_tile(runs: &Runs<2>) -> Vec<u64> {
    let mut tile = runs.clone();
    for around in &mut tile.loops {
        around.count = 1;
    }
    let from_source: Vec<usize> = (0..runs.loops.len()).rev().collect();
    let mut from_destination = from_source.clone();
    from_destination.sort_by_key(|&index| runs.loops[index].strides[1]);
    let steps = [
        (&from_source, 0, SOURCE_BYTES),
        (&from_destination, 1, DESTINATION_BYTES),
        (&from_source, 0, u64::MAX),
    ];
    for (order, side, bytes) in steps {
        for &index in order {
            let Loop { count, strides } = runs.loops[index];
            grow(&mut tile, index, bytes.div_ceil(strides[side]).min(count));
            if tile.loops[index].count < count {
                break;
            }
        }
    }
    tile.loops.iter().map(|around| around.count).collect()
}

/// Doubles the iterations of loop number `index` until they are `most`, or until the tile would not fit in the buffer.
fn grow(tile: &mut Runs<2>, index: usize, most: u64) {
    while tile.loops[index].count < most {
        let before = tile.loops[index].count;
        tile.loops[index].count = most.min(2 * before);
        if spans(tile).total() > GATHER_BYTES {
            tile.loops[index].count = before;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strided(length: u64, loops: &[(u64, [u64; 2])]) -> StridedRead {
        let loops = loops.iter().map(|&(count, strides)| Loop { count, strides }).collect();
        StridedRead::new(100, std::ptr::null_mut(), Runs { length, loops })
    }

    fn reads() -> Vec<StridedRead> {
        vec![
            // Transposed: square, flat, tall; images whose channels come last.
            strided(4, &[(500, [2000, 4]), (500, [4, 2000])]),
            strided(4, &[(3, [400_000, 4]), (100_000, [4, 12])]),
            strided(4, &[(100_000, [12, 4]), (3, [4, 400_000])]),
            strided(1, &[(2, [75_000, 75_000]), (3, [25_000, 1]), (25_000, [1, 3])]),
            // Rows, near each other and far from each other.
            strided(3000, &[(700, [3000, 5000])]),
            strided(3000, &[(700, [7095, 3000])]),
            strided(3000, &[(700, [7096, 3000])]),
            strided(8, &[(50, [1_000_000, 80]), (10, [5000, 8])]),
            // One row.
            strided(8, &[(200_000, [8, 16])]),
            strided(8, &[(2, [8, 16])]),
        ]
    }

    #[test]
    fn tiles_have_each_run_once() {
        for read in reads() {
            let tiles = (0..read.tiles()).flat_map(|number| {
                let (tile, starts) = read.tile(number as u64);
                let place = |run| [0, 1].map(|side| starts[side] + tile.offsets(run)[side]);
                (0..tile.count()).map(place).collect::<Vec<_>>()
            });
            let mut runs: Vec<_> = tiles.collect();
            runs.sort_unstable();
            let mut expected: Vec<_> = (0..read.runs.count()).map(|run| read.runs.offsets(run)).collect();
            expected.sort_unstable();
            assert!(runs == expected, "{read:?}");
        }
    }

    #[test]
    fn tiles_fit_in_the_buffer_and_are_not_much_smaller() {
        for read in reads() {
            let whole = spans(&read.runs).total();
            for number in 0..read.tiles() {
                let tile = spans(&read.tile(number as u64).0);
                assert!(tile.total() <= GATHER_BYTES, "{read:?}");
            }
            let first = spans(&read.tile(0).0).total();
            assert!(first == whole || first > GATHER_BYTES / 4, "{read:?}: {first} of {whole}");
        }
    }

    #[test]
    fn gaps_of_less_than_a_page_are_read() {
        let span =
            |stride| spans(&Runs { length: 10, loops: vec![Loop { count: 3, strides: [stride, 10] }] });
        assert_eq!(span(10 + GATHER_GAP - 1), Runs { length: 2 * (9 + GATHER_GAP) + 10, loops: vec![] });
        assert_eq!(span(10 + GATHER_GAP).count(), 3);
    }

    #[test]
    fn the_extent_is_from_the_first_run_to_the_last() {
        assert_eq!(strided(4, &[(3, [400, 4]), (10, [4, 12])]).extent(), 100..100 + 2 * 400 + 9 * 4 + 4);
        assert_eq!(strided(4, &[]).extent(), 100..104);
    }
}
