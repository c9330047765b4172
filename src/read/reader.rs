//! Reads byte ranges of a source into memory. Threads take chunks of equal size, whatever the sizes of the ranges.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::read::prefault::read_and_map;
use crate::read::source::{Mapping, OpenFile, ReadMethod};
use crate::read::strategy::ReadStrategy;
use crate::read::vectored::VectoredReader;
use crate::sys::buffers::Buffers;
use crate::sys::copy;
use crate::sys::huge_pages::is_resident;
use crate::sys::page_cache::Residency;
use crate::sys::parallel::{self, CHUNK_BYTES, Chunks};
use crate::sys::threads::ThreadLimit;

/// Fewer contiguous bytes of a mapping are not worth a `madvise`.
const BRING_IN_BYTES: usize = 64 << 10;

/// Smaller copies go through the processor's caches, because they may be used while they are there.
const STREAM_BYTES: usize = 1 << 20;

/// A range of a source, and its destination.
#[derive(Clone, Copy, Debug)]
pub struct ReadRange {
    /// The offset of the first byte in the source.
    pub offset: u64,
    pub destination: *mut u8,
    pub length: usize,
}

// SAFETY: only `read`, `read_here` and `PendingRead::read_left` write to the destination. Their contract requires that it is
// valid on any thread and overlaps no other one.
unsafe impl Send for ReadRange {}
// SAFETY: as above.
unsafe impl Sync for ReadRange {}

pub(crate) fn total_bytes(ranges: &[ReadRange]) -> usize {
    ranges.iter().map(|range| range.length).sum()
}

/// Reads `ranges`, on as many threads as are worth it. `explain` gets the error of a chunk, the offset of its first byte, and
/// how many ranges it has bytes of.
///
/// # Errors
///
/// [`ErrorKind::FileChanged`] if the source ends early, [`ErrorKind::Io`] if a read fails. The contents of the
/// destinations are then unspecified.
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

/// As [`read`], on the calling thread, with the `strategy` of the larger read that this is part of.
///
/// # Safety
///
/// As for [`read`].
pub(crate) unsafe fn read_here(
    method: ReadMethod<'_>,
    ranges: &[ReadRange],
    strategy: ReadStrategy,
) -> Result<()> {
    check_within(method, ranges)?;
    let parts = ranges.iter().copied();
    // SAFETY: this function's contract covers the destinations; the ranges are inside the source (checked).
    unsafe { read_parts(method, parts, strategy) }
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
        check_within(method, &self.ranges)
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

/// Checks that `ranges` are inside a source in memory.
fn check_within(method: ReadMethod<'_>, ranges: &[ReadRange]) -> Result<()> {
    let length = match method {
        // Reads return how many bytes there are.
        ReadMethod::File(_) => return Ok(()),
        ReadMethod::Mapping(mapping, _) => mapping.len(),
        ReadMethod::Memory(memory) => memory.length,
    };
    let is_outside = |range: &ReadRange| {
        range.offset.checked_add(range.length as u64).is_none_or(|end| end > length as u64)
    };
    if ranges.iter().any(is_outside) {
        return Err(Error::new(ErrorKind::FileChanged, "a range is outside the source"));
    }
    Ok(())
}

/// Reads `parts` on this thread.
///
/// # Safety
///
/// As for [`read`]. The parts must be inside a source in memory.
unsafe fn read_parts(
    method: ReadMethod<'_>,
    parts: impl Iterator<Item = ReadRange> + Clone,
    strategy: ReadStrategy,
) -> Result<()> {
    match method {
        ReadMethod::Memory(memory) => {
            for ReadRange { offset, destination, length } in parts {
                let source = memory.start.wrapping_add(offset as usize);
                // SAFETY: this function's contract covers both ends; `ExternalMemory::new` keeps the source valid.
                unsafe { std::ptr::copy_nonoverlapping(source, destination, length) };
            }
            Ok(())
        }
        ReadMethod::File(file) => {
            let mut reader = VectoredReader::new(file, strategy);
            for ReadRange { offset, destination, length } in parts {
                // SAFETY: this function's contract covers the destination until everything is read.
                unsafe { reader.add(offset, destination, length) }?;
            }
            // SAFETY: as above.
            unsafe { reader.finish() }
        }
        // SAFETY: this function has the contract of `copy_mapped`.
        ReadMethod::Mapping(mapping, file) => unsafe { copy_mapped(mapping, file, parts, strategy) },
    }
}

/// Copies from a mapping, after mapping its pages, many with one call. The copies bypass the processor's caches if the
/// destination already has memory.
///
/// # Safety
///
/// As for [`read_parts`].
unsafe fn copy_mapped(
    mapping: &Mapping,
    file: Option<&OpenFile>,
    parts: impl Iterator<Item = ReadRange> + Clone,
    strategy: ReadStrategy,
) -> Result<()> {
    let mut neighbours: Vec<Range<usize>> = Vec::new();
    for ReadRange { offset, length, .. } in parts.clone() {
        let start = offset as usize;
        match neighbours.last_mut() {
            Some(last) if last.end == start => last.end += length,
            _ => neighbours.push(start..start + length),
        }
    }
    // If the file is cold, a failed read must be an error, which it is not for a page that is touched.
    let is_cold = strategy.request_bytes.is_some();
    neighbours.retain(|bytes| is_cold || bytes.len() >= BRING_IN_BYTES);
    for bytes in &neighbours {
        read_and_map(mapping, file, bytes.clone(), strategy)?;
    }
    for ReadRange { offset, destination, length } in parts {
        let source = mapping.as_ptr().wrapping_add(offset as usize);
        // SAFETY: this function's contract covers the destination, and the part is inside the mapping.
        unsafe {
            if length >= STREAM_BYTES && is_resident(destination.wrapping_add(length / 2)) {
                copy::copy_nontemporal(source, destination, length);
            } else {
                std::ptr::copy_nonoverlapping(source, destination, length);
            }
        }
    }
    for bytes in neighbours {
        mapping.release(bytes.start, bytes.len());
    }
    Ok(())
}

/// Returns the smallest range that contains all of `ranges`.
fn extent(ranges: &[ReadRange]) -> Range<u64> {
    let start = ranges.iter().map(|range| range.offset).min().unwrap_or(0);
    let end = ranges.iter().map(|range| range.offset + range.length as u64).max();
    start..end.unwrap_or(start)
}
