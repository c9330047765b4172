//! Reads the bytes of a slice. Runs that are close to each other are read together.

use std::ops::Range;

use crate::error::Result;
use crate::format::slice::Slice;
use crate::read::byte_ranges::{ReadRange, read_here};
use crate::read::source::ReadMethod;
use crate::read::strategy::ReadStrategy;

/// Runs with gaps below this are read together: the kernel reads whole pages anyway.
pub(crate) const GATHER_GAP: u64 = 4096;

/// The most bytes that are read together.
pub(crate) const GATHER_BYTES: u64 = 1 << 20;

/// The most runs in one batch, to bound the memory for slices of many small runs.
const BATCH_RUNS: usize = 1 << 16;

/// A slice of the tensor whose bytes begin at `base` in the source.
pub(crate) struct SliceReader<'a> {
    pub(crate) method: ReadMethod<'a>,
    /// That of the larger read that this is part of.
    pub(crate) strategy: ReadStrategy,
    pub(crate) slice: &'a Slice,
    pub(crate) base: u64,
}

impl SliceReader<'_> {
    /// Reads the given range of the slice's own bytes to `destination`, without gaps.
    ///
    /// # Safety
    ///
    /// `destination` must be valid for writes of as many bytes and must not overlap the source.
    pub(crate) unsafe fn read(&self, bytes: Range<u64>, destination: *mut u8) -> Result<()> {
        let mut batch = Vec::new();
        let mut written = 0;
        let mut runs = self.slice.byte_ranges_of(bytes).peekable();
        while let Some(first) = runs.next() {
            let mut group = vec![first.clone()];
            let mut end = first.end;
            while let Some(next) = runs.next_if(|next| {
                next.start >= end && next.start - end < GATHER_GAP && next.end - first.start <= GATHER_BYTES
            }) {
                end = next.end;
                group.push(next);
            }
            let target = destination.wrapping_add(written);
            written += group.iter().map(|run| (run.end - run.start) as usize).sum::<usize>();
            if let [run] = &group[..] {
                let length = (run.end - run.start) as usize;
                batch.push(ReadRange { offset: self.base + run.start, destination: target, length });
                if batch.len() == BATCH_RUNS {
                    // SAFETY: the targets follow one another in `destination`, which this function's contract covers.
                    unsafe { read_here(self.method, &std::mem::take(&mut batch), self.strategy) }?;
                }
            } else {
                // SAFETY: as above; the group's bytes are the next ones of the slice.
                unsafe { self.gather(&group, target) }?;
            }
        }
        // SAFETY: as above.
        unsafe { read_here(self.method, &batch, self.strategy) }
    }

    /// Reads everything from the first of `runs` to the last with one call, then copies the runs to `target`.
    ///
    /// # Safety
    ///
    /// `target` must be valid for writes of the runs' bytes.
    unsafe fn gather(&self, runs: &[Range<u64>], target: *mut u8) -> Result<()> {
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(()) };
        let mut scratch = vec![0u8; (last.end - first.start) as usize];
        let range = ReadRange {
            offset: self.base + first.start,
            destination: scratch.as_mut_ptr(),
            length: scratch.len(),
        };
        // SAFETY: `scratch` was allocated with this length, and nothing else uses it.
        unsafe { read_here(self.method, &[range], self.strategy) }?;
        let mut written = 0;
        for run in runs {
            let bytes = &scratch[(run.start - first.start) as usize..(run.end - first.start) as usize];
            // SAFETY: `target` holds the bytes of all runs (this function's contract), and `scratch` is our own.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.add(written), bytes.len()) };
            written += bytes.len();
        }
        Ok(())
    }
}
