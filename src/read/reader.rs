//! Copies byte ranges of a source to memory: threads take chunks of equal size from all ranges together.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::read::prefault::bring_in;
use crate::read::source::{Mapping, OpenFile, ReadMethod, shrank};
use crate::sys::buffers::Buffers;
use crate::sys::copy;
use crate::sys::page_cache::{COLD_READ_BYTES, COLD_READERS, Residency, residency};
use crate::sys::parallel::{self, Chunks};
use crate::sys::populate::is_resident;
use crate::sys::threads::ThreadLimit;

/// The most ranges in one vectored read; Linux allows 1024.
const MAX_PARTS: usize = 512;

/// Fewer neighbouring bytes of a mapping are not worth a call that brings them in.
const BRING_IN_BYTES: usize = 64 << 10;

/// Fewer bytes may well be used while they are still in the processor's caches.
const STREAM_BYTES: usize = 1 << 20;

/// One range of a source, and where it goes.
#[derive(Clone, Copy, Debug)]
pub struct ReadRange {
    /// Where the bytes begin in the source.
    pub offset: u64,
    /// Where the bytes go.
    pub destination: *mut u8,
    /// How many bytes.
    pub length: usize,
}

// SAFETY: a range is a plain instruction; `read` requires of its caller that destinations are valid for writes
// from any thread and do not overlap.
unsafe impl Send for ReadRange {}
// SAFETY: as above.
unsafe impl Sync for ReadRange {}

/// Returns the sum of the lengths of `ranges`.
pub(crate) fn total_bytes(ranges: &[ReadRange]) -> usize {
    ranges.iter().map(|range| range.length).sum()
}

/// Carries out `ranges`, on as many threads as they are worth; into `fresh`, if it is given, each range into the
/// place of the same number.
///
/// # Errors
///
/// [`ErrorKind::FileChanged`] where the source ends early, [`ErrorKind::Io`] where a read fails. The destinations
/// then hold anything.
///
/// # Safety
///
/// Every destination must be valid for writes of its length until the call returns, and no two may overlap each
/// other or the source.
pub(crate) unsafe fn read(
    method: ReadMethod<'_>,
    ranges: Vec<ReadRange>,
    fresh: Option<&Buffers>,
) -> Result<()> {
    // SAFETY: the caller vouches for the destinations.
    unsafe { PendingRead::new(method, ranges)?.advance(method, fresh, None) }
}

/// As [`read`], on the calling thread alone, at the `strategy` of the whole that this is part of.
///
/// # Errors
///
/// As [`read`].
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
    // SAFETY: the caller vouches for the destinations, and the ranges lie in the source (checked).
    unsafe { read_parts(method, parts, strategy.most_bytes, strategy.residency) }
}

/// Transfers that are carried out in steps, each on as many threads as all of them are worth.
#[derive(Debug)]
pub(crate) struct PendingRead {
    ranges: Vec<ReadRange>,
    chunks: Chunks,
    strategy: ReadStrategy,
    /// The first chunk that is not done.
    next: usize,
}

impl PendingRead {
    /// Nothing is read yet.
    ///
    /// # Errors
    ///
    /// Those of [`threads`](crate::threads()).
    pub(crate) fn new(method: ReadMethod<'_>, ranges: Vec<ReadRange>) -> Result<PendingRead> {
        let chunks = Chunks::new(ranges.iter().map(|range| range.length));
        let strategy = ReadStrategy::new(method, &ranges, &chunks, ThreadLimit::current()?);
        Ok(PendingRead { ranges, chunks, strategy, next: 0 })
    }

    /// The bytes of all ranges.
    #[cfg_attr(not(feature = "bridge"), expect(dead_code, reason = "only C++ reads in steps"))]
    pub(crate) fn total_bytes(&self) -> usize {
        self.chunks.total_bytes()
    }

    /// The bytes that are where they belong.
    #[cfg_attr(not(feature = "bridge"), expect(dead_code, reason = "only C++ reads in steps"))]
    pub(crate) fn done_bytes(&self) -> usize {
        self.chunks.bytes_before(self.next)
    }

    /// Goes on until all is done, or it is later than `until`; at least one chunk is done. `method` must be of the source
    /// that the job was made for, and `fresh` the memory that it reads into, each range into the place of the same
    /// number, unless that is somebody else's.
    ///
    /// # Errors
    ///
    /// As [`read`].
    ///
    /// # Safety
    ///
    /// As for [`read`].
    pub(crate) unsafe fn advance(
        &mut self,
        method: ReadMethod<'_>,
        fresh: Option<&Buffers>,
        until: Option<Instant>,
    ) -> Result<()> {
        let PendingRead { ranges, chunks, strategy, .. } = &*self;
        check_within(method, ranges)?;
        self.next = parallel::for_each_until(until, self.next..chunks.len(), strategy.threads, |chunk| {
            if let Some(memory) = fresh {
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
            // SAFETY: the caller vouches for the destinations, no other chunk has these parts of them, and the
            // ranges lie in the source (checked).
            unsafe { read_parts(method, parts, strategy.most_bytes, strategy.residency) }
        })?;
        Ok(())
    }
}

/// Refuses ranges that leave a source whose length is known.
fn check_within(method: ReadMethod<'_>, ranges: &[ReadRange]) -> Result<()> {
    let length = match method {
        // Reads see for themselves where the file ends.
        ReadMethod::File(_) => return Ok(()),
        ReadMethod::Mapping(mapping, _) => mapping.len(),
        ReadMethod::Memory(memory) => memory.length,
    };
    let leaves = |range: &ReadRange| {
        range.offset.checked_add(range.length as u64).is_none_or(|end| end > length as u64)
    };
    if ranges.iter().any(leaves) {
        return Err(Error::new(ErrorKind::FileChanged, "a range leaves the source"));
    }
    Ok(())
}

/// Reads `parts`, which lie in the source, on this thread.
///
/// # Safety
///
/// As for [`read`].
unsafe fn read_parts(
    method: ReadMethod<'_>,
    parts: impl Iterator<Item = ReadRange> + Clone,
    most_bytes: usize,
    residency: Residency,
) -> Result<()> {
    match method {
        ReadMethod::Memory(memory) => {
            for ReadRange { offset, destination, length } in parts {
                let source = memory.start.wrapping_add(offset as usize);
                // SAFETY: the range lies in the source, the destination is valid and apart from it (caller).
                unsafe { std::ptr::copy_nonoverlapping(source, destination, length) };
            }
            Ok(())
        }
        ReadMethod::File(file) => {
            // Neighbours in the file come with one read, however small they are.
            let mut run = Run::new(file, most_bytes);
            for ReadRange { offset, destination, length } in parts {
                // SAFETY: the caller vouches for the destinations.
                unsafe { run.add(offset, destination, length) }?;
            }
            // SAFETY: as above.
            unsafe { run.read() }
        }
        // SAFETY: the caller vouches for the destinations and the ranges.
        ReadMethod::Mapping(mapping, file) => unsafe { copy_mapped(mapping, file, parts, residency) },
    }
}

/// Copies out of a mapping: its pages are brought in first, many with one call, and where the destination has memory
/// already the copies go past the processor's caches.
///
/// # Safety
///
/// As for [`read_parts`].
unsafe fn copy_mapped(
    mapping: &Mapping,
    file: Option<&OpenFile>,
    parts: impl Iterator<Item = ReadRange> + Clone,
    residency: Residency,
) -> Result<()> {
    let mut neighbours: Vec<Range<usize>> = Vec::new();
    for ReadRange { offset, length, .. } in parts.clone() {
        let start = offset as usize;
        match neighbours.last_mut() {
            Some(last) if last.end == start => last.end += length,
            _ => neighbours.push(start..start + length),
        }
    }
    for bytes in neighbours.into_iter().filter(|bytes| bytes.len() >= BRING_IN_BYTES) {
        bring_in(mapping, file, bytes, residency)?;
    }
    for ReadRange { offset, destination, length } in parts {
        let source = mapping.as_ptr().wrapping_add(offset as usize);
        // SAFETY: the part lies in the mapping and in its destination (caller).
        unsafe {
            if length >= STREAM_BYTES && is_resident(destination.wrapping_add(length / 2)) {
                copy::copy_nontemporal(source, destination, length);
            } else {
                std::ptr::copy_nonoverlapping(source, destination, length);
            }
        }
    }
    Ok(())
}

/// How a source is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadStrategy {
    residency: Residency,
    /// How many threads its bytes are worth.
    pub(crate) threads: usize,
    /// The most bytes of one read.
    most_bytes: usize,
}

impl ReadStrategy {
    fn new(
        method: ReadMethod<'_>,
        ranges: &[ReadRange],
        chunks: &Chunks,
        threads: ThreadLimit,
    ) -> ReadStrategy {
        let wanted = parallel::thread_count(threads, chunks.total_bytes(), chunks.len());
        ReadStrategy::of(method, chunks.total_bytes(), || extent(ranges), wanted, threads)
    }

    /// The strategy for `bytes` that lie in `extent`, where a source in memory would be read by `wanted` of `threads`.
    pub(crate) fn of(
        method: ReadMethod<'_>,
        bytes: usize,
        extent: impl FnOnce() -> Range<u64>,
        wanted: usize,
        threads: ThreadLimit,
    ) -> ReadStrategy {
        let residency = match method {
            // For little it makes no difference.
            ReadMethod::File(file) | ReadMethod::Mapping(_, Some(file))
                if bytes >= parallel::MIN_PARALLEL_BYTES =>
            {
                residency(&file.file, extent())
            }
            _ => Residency::Unknown,
        };
        match residency {
            Residency::Cold => {
                let readers = wanted.max(threads.cap(COLD_READERS));
                ReadStrategy { residency, threads: readers, most_bytes: COLD_READ_BYTES }
            }
            Residency::Cached | Residency::Unknown => {
                ReadStrategy { residency, threads: wanted, most_bytes: usize::MAX }
            }
        }
    }
}

/// From where to where the ranges reach in the file.
fn extent(ranges: &[ReadRange]) -> Range<u64> {
    let start = ranges.iter().map(|range| range.offset).min().unwrap_or(0);
    let end = ranges.iter().map(|range| range.offset + range.length as u64).max();
    start..end.unwrap_or(start)
}

/// A range of a file that is read with one call, into several places.
struct Run<'a> {
    file: &'a OpenFile,
    /// No more than this is read at a time.
    most_bytes: usize,
    start: u64,
    bytes: usize,
    parts: Vec<libc::iovec>,
}

impl<'a> Run<'a> {
    fn new(file: &'a OpenFile, most_bytes: usize) -> Run<'a> {
        Run { file, most_bytes, start: 0, bytes: 0, parts: Vec::new() }
    }

    /// Adds a range; reads what was added before where that range does not follow, or where it is enough.
    ///
    /// # Safety
    ///
    /// `destination` must be valid for writes of `length` bytes until the run was read.
    unsafe fn add(&mut self, mut offset: u64, mut destination: *mut u8, mut length: usize) -> Result<()> {
        while length > 0 {
            let follows = self.start + self.bytes as u64 == offset;
            if !follows || self.bytes == self.most_bytes || self.parts.len() == MAX_PARTS {
                // SAFETY: the caller's promise, for what was added before.
                unsafe { self.read() }?;
                (self.start, self.bytes) = (offset, 0);
                self.parts.clear();
            }
            let taken = length.min(self.most_bytes - self.bytes);
            self.parts.push(libc::iovec { iov_base: destination.cast(), iov_len: taken });
            self.bytes += taken;
            offset += taken as u64;
            destination = destination.wrapping_add(taken);
            length -= taken;
        }
        Ok(())
    }

    /// Reads all of it.
    ///
    /// # Safety
    ///
    /// Every part must be valid for writes of its length.
    unsafe fn read(&mut self) -> Result<()> {
        let file = self.file;
        let mut offset = self.start;
        let mut rest = &mut self.parts[..];
        while !rest.is_empty() {
            // SAFETY: the caller vouches for the parts, and `rest` is what is left of them.
            let mut count = unsafe { read_vectored_at(file, rest, offset) }
                .map_err(|source| Error::io("read", &file.path, source))?;
            if count == 0 {
                return Err(shrank(&file.path));
            }
            offset += count as u64;
            while let Some(part) = rest.first_mut() {
                if count < part.iov_len {
                    part.iov_base = part.iov_base.wrapping_byte_add(count);
                    part.iov_len -= count;
                    break;
                }
                count -= part.iov_len;
                rest = &mut rest[1..];
            }
        }
        Ok(())
    }
}

/// Reads into `parts` one after the other from `offset` on; gives how many bytes came, 0 at the end of the file.
///
/// # Safety
///
/// Every part must be valid for writes of its length.
unsafe fn read_vectored_at(file: &OpenFile, parts: &[libc::iovec], offset: u64) -> io::Result<usize> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    loop {
        // SAFETY: the caller vouches for the parts; the kernel writes to nothing else.
        let read = unsafe {
            libc::preadv(file.file.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int, offset)
        };
        if read >= 0 {
            return Ok(read as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
