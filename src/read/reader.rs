//! Reads byte ranges and slices of a source into memory. Threads take chunks of equal size, whatever the sizes of the ranges,
//! and tiles of slices.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::read::byte_ranges::{ReadRange, check_within, read_parts};
use crate::read::source::ReadMethod;
use crate::read::strategy::ReadStrategy;
use crate::read::strided_read::StridedRead;
use crate::sys::buffers::Buffers;
use crate::sys::page_cache::Residency;
use crate::sys::parallel::{self, CHUNK_BYTES, Chunks};
use crate::sys::threads::ThreadLimit;

/// What to read together.
#[derive(Debug, Default)]
pub(crate) struct ReadList {
    pub(crate) ranges: Vec<ReadRange>,
    pub(crate) strided: Vec<StridedRead>,
}

impl ReadList {
    pub(crate) fn total_bytes(&self) -> usize {
        let ranges = self.ranges.iter().map(|range| range.length);
        ranges.chain(self.strided.iter().map(StridedRead::total_bytes)).sum()
    }

    fn extents(&self) -> impl Iterator<Item = Range<u64>> {
        self.ranges.iter().map(ReadRange::extent).chain(self.strided.iter().map(StridedRead::extent))
    }
}

impl From<Vec<ReadRange>> for ReadList {
    fn from(ranges: Vec<ReadRange>) -> ReadList {
        ReadList { ranges, strided: Vec::new() }
    }
}

/// Reads `list`, on as many threads as are worth it. `explain` gets the error of a chunk, the offset of its first byte, and
/// how many ranges it has bytes of.
///
/// # Errors
///
/// Those of [`read_here`](crate::read::byte_ranges::read_here).
///
/// # Safety
///
/// Every destination must be valid for writes of its length, or of its runs, on any thread, until the call returns. None may
/// overlap another one or the source, and no two runs may overlap.
pub(crate) unsafe fn read(
    method: ReadMethod<'_>,
    list: ReadList,
    explain: impl Fn(Error, u64, usize) -> Error + Sync,
) -> Result<()> {
    let read = PendingRead::new(method, list)?;
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

/// A read that is planned, in chunks: those of the ranges, then the tiles of the strided reads.
#[derive(Debug)]
pub(crate) struct PendingRead {
    list: ReadList,
    /// Its buffers are the destinations, in the order of the ranges, if it was made for this read.
    memory: Option<Buffers>,
    /// Of the ranges.
    chunks: Chunks,
    /// The chunk after the last tile of each strided read.
    ends: Vec<usize>,
    strategy: ReadStrategy,
    /// The first chunk that is not done.
    next: usize,
}

impl PendingRead {
    /// Plans a read; reads nothing yet.
    pub(crate) fn new(method: ReadMethod<'_>, list: ReadList) -> Result<PendingRead> {
        let strategy = strategy_of(method, &list)?.through_buffers(ThreadLimit::current()?);
        Ok(PendingRead::with(list, None, strategy))
    }

    /// Plans a read of `tensors`, offsets and lengths, into memory that is made for it.
    pub(crate) fn load(method: ReadMethod<'_>, tensors: &[(u64, usize)]) -> Result<PendingRead> {
        let destination = std::ptr::null_mut();
        let ranges = tensors.iter().map(|&(offset, length)| ReadRange { offset, destination, length });
        let mut list = ReadList::from(ranges.collect::<Vec<_>>());
        let strategy = strategy_of(method, &list)?;
        let memory = strategy.allocate(tensors)?;
        for (place, range) in list.ranges.iter_mut().enumerate() {
            range.destination = memory.start(place);
        }
        Ok(PendingRead::with(list, Some(memory), strategy))
    }

    fn with(list: ReadList, memory: Option<Buffers>, strategy: ReadStrategy) -> PendingRead {
        // Whole tensors follow one another in a file: chunks end where its blocks do.
        let start = list.ranges.first().map_or(0, |range| range.offset);
        let lengths = list.ranges.iter().map(|range| range.length);
        let chunks = Chunks::of_size(lengths, strategy.chunk_bytes, start);
        let mut end = chunks.len();
        let ends = list.strided.iter().map(|strided| {
            end += strided.tiles();
            end
        });
        let ends = ends.collect();
        PendingRead { list, memory, chunks, ends, strategy, next: 0 }
    }

    /// Returns the memory that [`PendingRead::load`] has made.
    pub(crate) fn memory(&self) -> &Buffers {
        self.memory.as_ref().expect("`load` has planned the read")
    }

    pub(crate) fn into_memory(self) -> Buffers {
        self.memory.expect("`load` has planned the read")
    }

    pub(crate) fn total_bytes(&self) -> usize {
        self.chunks.total_bytes() + self.list.strided.iter().map(StridedRead::total_bytes).sum::<usize>()
    }

    /// Returns the bytes of the chunks that are done. Tiles of one slice count as if they had the same size.
    pub(crate) fn done_bytes(&self) -> usize {
        let mut bytes = self.chunks.bytes_before(self.next);
        for (strided, end) in self.list.strided.iter().zip(&self.ends) {
            let tiles = strided.tiles();
            let done = self.next.saturating_sub(end - tiles).min(tiles);
            bytes += (strided.total_bytes() as u128 * done as u128 / tiles as u128) as usize;
        }
        bytes
    }

    /// Returns how many threads the whole read is worth.
    pub(crate) fn threads(&self) -> usize {
        self.strategy.threads
    }

    fn chunk_count(&self) -> usize {
        self.ends.last().copied().unwrap_or(self.chunks.len())
    }

    /// Returns the number of chunks that are not done.
    pub(crate) fn chunks_left(&self) -> usize {
        self.chunk_count() - self.next
    }

    /// Notes that only the last `left` chunks are not done.
    pub(crate) fn keep_left(&mut self, left: usize) {
        self.next = self.next.max(self.chunk_count() - left.min(self.chunk_count()));
    }

    /// Checks that everything to read is inside the source.
    pub(crate) fn check(&self, method: ReadMethod<'_>) -> Result<()> {
        check_within(method, self.list.extents())
    }

    /// Returns the strided read that chunk number `chunk` is a tile of, and the number of the tile.
    fn tile(&self, chunk: usize) -> Option<(&StridedRead, usize)> {
        let index = self.ends.partition_point(|&end| end <= chunk);
        let strided = self.list.strided.get(index).filter(|_| chunk >= self.chunks.len())?;
        Some((strided, chunk + strided.tiles() - self.ends[index]))
    }

    /// Returns the offset of the first byte of the chunk that has `left` chunks from its start on, and how many ranges it has
    /// bytes of.
    pub(crate) fn chunk_left(&self, left: usize) -> (u64, usize) {
        let chunk = self.chunk_count() - left;
        if let Some((strided, _)) = self.tile(chunk) {
            return (strided.extent().start, 1);
        }
        let mut parts = self.chunks.parts(chunk);
        let first = parts.next().map(|(index, part)| self.list.ranges[index].offset + part.start as u64);
        (first.unwrap_or(0), 1 + parts.count())
    }

    /// Reads the chunk that has `left` chunks from its start on, on this thread. `method` must be one of the source that the
    /// read was planned for.
    ///
    /// # Safety
    ///
    /// As for [`read`]. No other thread may read the same chunk, and [`PendingRead::check`] must have accepted `method`.
    pub(crate) unsafe fn read_left(&self, method: ReadMethod<'_>, left: usize) -> Result<()> {
        let PendingRead { list, memory, chunks, strategy, .. } = self;
        let chunk = self.chunk_count() - left;
        if let Some((strided, tile)) = self.tile(chunk) {
            // SAFETY: this function's contract covers the destination; the extent is inside the source (`check`).
            return unsafe { strided.read(tile, method, *strategy) };
        }
        if let Some(memory) = memory {
            memory.populate(chunks.parts(chunk));
        }
        let parts = chunks.parts(chunk).map(|(index, part)| {
            let ReadRange { offset, destination, .. } = list.ranges[index];
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

/// Returns whether the file of `list` is not in the page cache, and its bytes are many.
pub(crate) fn is_cold(method: ReadMethod<'_>, list: &ReadList) -> Result<bool> {
    let strategy = strategy_of(method, list)?;
    Ok(strategy.residency == Residency::Cold && strategy.request_bytes.is_some())
}

fn strategy_of(method: ReadMethod<'_>, list: &ReadList) -> Result<ReadStrategy> {
    let limit = ThreadLimit::current()?;
    ReadStrategy::of(method, list.total_bytes(), || extent(list), CHUNK_BYTES, limit)
}

/// Returns the smallest range that contains everything to read.
fn extent(list: &ReadList) -> Range<u64> {
    let start = list.extents().map(|range| range.start).min().unwrap_or(0);
    let end = list.extents().map(|range| range.end).max();
    start..end.unwrap_or(start)
}
