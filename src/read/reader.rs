//! Reads byte ranges of a source into memory. Threads take chunks of equal size, whatever the sizes of the ranges.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::read::byte_ranges::{ReadRange, check_within, read_parts};
use crate::read::source::ReadMethod;
use crate::read::strategy::ReadStrategy;
use crate::sys::buffers::Buffers;
use crate::sys::page_cache::Residency;
use crate::sys::parallel::{self, CHUNK_BYTES, Chunks};
use crate::sys::threads::ThreadLimit;

pub(crate) fn total_bytes(ranges: &[ReadRange]) -> usize {
    ranges.iter().map(|range| range.length).sum()
}

/// Reads `ranges`, on as many threads as are worth it. `explain` gets the error of a chunk, the offset of its first byte, and
/// how many ranges it has bytes of.
///
/// # Errors
///
/// Those of [`read_here`](crate::read::byte_ranges::read_here).
///
/// # Safety
///
/// Every destination must be valid for writes of its length, on any thread, until the call returns. None may overlap
/// another one or the source.
pub(crate) unsafe fn read(
    method: ReadMethod<'_>,
    ranges: Vec<ReadRange>,
    explain: impl Fn(Error, u64, usize) -> Error + Sync,
) -> Result<()> {
    let read = PendingRead::new(method, ranges)?;
    // SAFETY: this function has the same contract.
    unsafe { read_all(method, &read, explain) }
}

/// As [`read`], for one that is planned and not begun.
///
/// # Safety
///
/// As for [`read`].
pub(crate) unsafe fn read_all(
    method: ReadMethod<'_>,
    read: &PendingRead,
    explain: impl Fn(Error, u64, usize) -> Error + Sync,
) -> Result<()> {
    read.check(method)?;
    parallel::for_each(read.chunks_left(), read.threads(), |chunk| {
        let left = read.chunks_left() - chunk;
        // SAFETY: this function has the contract of `read_left`, and each chunk is read once.
        unsafe { read.read_left(method, left) }.map_err(|error| {
            let (offset, count) = read.chunk_left(left);
            explain(error, offset, count)
        })
    })
}

/// A read that is planned, in chunks.
#[derive(Debug)]
pub(crate) struct PendingRead {
    ranges: Vec<ReadRange>,
    /// Its buffers are the destinations, in the order of the ranges, if it was made for this read.
    memory: Option<Buffers>,
    chunks: Chunks,
    strategy: ReadStrategy,
    /// The first chunk that is not done.
    next: usize,
}

impl PendingRead {
    /// Plans a read; reads nothing yet.
    pub(crate) fn new(method: ReadMethod<'_>, ranges: Vec<ReadRange>) -> Result<PendingRead> {
        let strategy = strategy_of(method, &ranges)?.through_buffers(ThreadLimit::current()?);
        Ok(PendingRead::with(ranges, None, strategy))
    }

    /// Plans a read of `tensors`, offsets and lengths, into memory that is made for it.
    pub(crate) fn load(method: ReadMethod<'_>, tensors: &[(u64, usize)]) -> Result<PendingRead> {
        let destination = std::ptr::null_mut();
        let mut ranges: Vec<ReadRange> =
            tensors.iter().map(|&(offset, length)| ReadRange { offset, destination, length }).collect();
        let strategy = strategy_of(method, &ranges)?;
        let memory = strategy.allocate(tensors)?;
        for (place, range) in ranges.iter_mut().enumerate() {
            range.destination = memory.start(place);
        }
        Ok(PendingRead::with(ranges, Some(memory), strategy))
    }

    fn with(ranges: Vec<ReadRange>, memory: Option<Buffers>, strategy: ReadStrategy) -> PendingRead {
        // Whole tensors follow one another in a file: chunks end where its blocks do.
        let start = ranges.first().map_or(0, |range| range.offset);
        let lengths = ranges.iter().map(|range| range.length);
        let chunks = Chunks::of_size(lengths, strategy.chunk_bytes, start);
        PendingRead { ranges, memory, chunks, strategy, next: 0 }
    }

    /// Returns the memory that [`PendingRead::load`] has made.
    pub(crate) fn memory(&self) -> &Buffers {
        self.memory.as_ref().expect("`load` has planned the read")
    }

    pub(crate) fn into_memory(self) -> Buffers {
        self.memory.expect("`load` has planned the read")
    }

    pub(crate) fn total_bytes(&self) -> usize {
        self.chunks.total_bytes()
    }

    pub(crate) fn done_bytes(&self) -> usize {
        self.chunks.bytes_before(self.next)
    }

    /// Returns how many threads the whole read is worth.
    pub(crate) fn threads(&self) -> usize {
        self.strategy.threads
    }

    /// Returns the number of chunks that are not done.
    pub(crate) fn chunks_left(&self) -> usize {
        self.chunks.len() - self.next
    }

    /// Notes that only the last `left` chunks are not done.
    pub(crate) fn keep_left(&mut self, left: usize) {
        self.next = self.next.max(self.chunks.len() - left.min(self.chunks.len()));
    }

    /// Checks that the ranges are inside the source.
    pub(crate) fn check(&self, method: ReadMethod<'_>) -> Result<()> {
        check_within(method, self.ranges.iter().map(ReadRange::extent))
    }

    /// Returns the offset of the first byte of the chunk that has `left` chunks from its start on, and how many ranges it has
    /// bytes of.
    pub(crate) fn chunk_left(&self, left: usize) -> (u64, usize) {
        let mut parts = self.chunks.parts(self.chunks.len() - left);
        let first = parts.next().map(|(index, part)| self.ranges[index].offset + part.start as u64);
        (first.unwrap_or(0), 1 + parts.count())
    }

    /// Reads the chunk that has `left` chunks from its start on, on this thread. `method` must be one of the source that the
    /// read was planned for.
    ///
    /// # Safety
    ///
    /// As for [`read`]. No other thread may read the same chunk, and [`PendingRead::check`] must have accepted `method`.
    pub(crate) unsafe fn read_left(&self, method: ReadMethod<'_>, left: usize) -> Result<()> {
        let PendingRead { ranges, memory, chunks, strategy, .. } = self;
        let chunk = chunks.len() - left;
        if let Some(memory) = memory {
            memory.populate(chunks.parts(chunk));
        }
        let parts = chunks.parts(chunk).map(|(index, part)| {
            let ReadRange { offset, destination, .. } = ranges[index];
            ReadRange {
                offset: offset + part.start as u64,
                destination: destination.wrapping_add(part.start),
                length: part.len(),
            }
        });
        // SAFETY: this function's contract covers the destinations, and no other chunk has these parts of them; the ranges
        // are inside the source (`check`).
        unsafe { read_parts(method, parts, *strategy) }
    }
}

/// Returns whether the file of `ranges` is not in the page cache, and they are many.
pub(crate) fn is_cold(method: ReadMethod<'_>, ranges: &[ReadRange]) -> Result<bool> {
    let strategy = strategy_of(method, ranges)?;
    Ok(strategy.residency == Residency::Cold && strategy.request_bytes.is_some())
}

fn strategy_of(method: ReadMethod<'_>, ranges: &[ReadRange]) -> Result<ReadStrategy> {
    let limit = ThreadLimit::current()?;
    ReadStrategy::of(method, total_bytes(ranges), || extent(ranges), CHUNK_BYTES, limit)
}

/// Returns the smallest range that contains all of `ranges`.
fn extent(ranges: &[ReadRange]) -> Range<u64> {
    let start = ranges.iter().map(|range| range.offset).min().unwrap_or(0);
    let end = ranges.iter().map(|range| range.offset + range.length as u64).max();
    start..end.unwrap_or(start)
}
