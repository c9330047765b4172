//! Copies byte ranges of a source to memory: threads take chunks of equal size from all ranges together.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use crate::copy::{self, Move};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::has_page;
use crate::page_cache::{COLD_READ_BYTES, COLD_READERS, Residency, residency};
use crate::parallel::{self, Chunks};
use crate::prefault::bring_in;
use crate::source::{Borrowed, Mapping, OpenFile, Origin, shrank};

/// The most ranges in one vectored read; Linux allows 1024.
const MAX_PARTS: usize = 512;

/// Fewer neighbouring bytes of a mapping are not worth a call that brings them in.
const BRING_IN_BYTES: usize = 64 << 10;

/// Fewer bytes may well be used while they are still in the processor's caches.
const STREAM_BYTES: usize = 1 << 20;

/// One range of a source, and where it goes.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Where the bytes begin in the source.
    pub offset: u64,
    /// Where the bytes go.
    pub destination: *mut u8,
    /// How many bytes.
    pub length: usize,
}

// SAFETY: a transfer is a plain instruction; `read` requires of its caller that destinations are valid for writes
// from any thread and do not overlap.
unsafe impl Send for Transfer {}
// SAFETY: as above.
unsafe impl Sync for Transfer {}

/// Carries out `transfers`, on as many threads as they are worth.
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
pub(crate) unsafe fn read(origin: Origin<'_>, transfers: &[Transfer]) -> Result<()> {
    match origin {
        // SAFETY: the caller vouches for the destinations.
        Origin::File(file) => unsafe { read_file(file, transfers) },
        // SAFETY: as above.
        Origin::Mapped(mapping, file) => unsafe { read_mapped(mapping, file, transfers) },
        // SAFETY: as above.
        Origin::Memory(memory) => unsafe { read_memory(memory, transfers) },
    }
}

/// # Safety
///
/// As for [`read`].
unsafe fn read_memory(memory: Borrowed, transfers: &[Transfer]) -> Result<()> {
    check_within(transfers, memory.length)?;
    let moves: Vec<Move> = transfers
        .iter()
        .map(|&Transfer { offset, destination, length }| Move {
            source: memory.start.wrapping_add(offset as usize),
            destination,
            length,
        })
        .collect();
    // SAFETY: the ranges lie in the source (just checked), the destinations are valid and apart from it (caller).
    unsafe { copy::copy(&moves) }
}

fn check_within(transfers: &[Transfer], length: usize) -> Result<()> {
    let leaves = |transfer: &Transfer| {
        transfer.offset.checked_add(transfer.length as u64).is_none_or(|end| end > length as u64)
    };
    if transfers.iter().any(leaves) {
        return Err(Error::new(ErrorKind::FileChanged, "a range leaves the source"));
    }
    Ok(())
}

/// Copies out of a mapping: its pages are brought in first, many with one call, and where the destination has memory
/// already the copies go past the processor's caches.
///
/// # Safety
///
/// As for [`read`].
unsafe fn read_mapped(mapping: &Mapping, file: &OpenFile, transfers: &[Transfer]) -> Result<()> {
    check_within(transfers, mapping.len())?;
    let chunks = Chunks::new(transfers.iter().map(|transfer| transfer.length));
    let pace = Pace::new(file, transfers, &chunks);
    parallel::pull(chunks.len(), pace.threads, |chunk| {
        let mut neighbours: Vec<Range<usize>> = Vec::new();
        for (index, part) in chunks.parts(chunk) {
            let start = transfers[index].offset as usize + part.start;
            match neighbours.last_mut() {
                Some(last) if last.end == start => last.end += part.len(),
                _ => neighbours.push(start..start + part.len()),
            }
        }
        for bytes in neighbours.into_iter().filter(|bytes| bytes.len() >= BRING_IN_BYTES) {
            bring_in(mapping, file, bytes, pace.residency)?;
        }
        for (index, part) in chunks.parts(chunk) {
            let Transfer { offset, destination, .. } = transfers[index];
            let source = mapping.as_ptr().wrapping_add(offset as usize + part.start);
            let destination = destination.wrapping_add(part.start);
            // SAFETY: the part lies in the mapping (checked) and in its destination, which no other chunk has (caller).
            unsafe {
                if part.len() >= STREAM_BYTES && has_page(destination.wrapping_add(part.len() / 2)) {
                    copy::stream(source, destination, part.len());
                } else {
                    std::ptr::copy_nonoverlapping(source, destination, part.len());
                }
            }
        }
        Ok(())
    })
}

/// How a file is read.
struct Pace {
    residency: Residency,
    threads: usize,
    /// The most bytes of one read.
    most_bytes: usize,
}

impl Pace {
    fn new(file: &OpenFile, transfers: &[Transfer], chunks: &Chunks) -> Pace {
        let threads = parallel::threads_for(chunks.bytes(), chunks.len());
        // For little it makes no difference.
        let residency = if chunks.bytes() < parallel::PARALLEL_BYTES {
            Residency::Unknown
        } else {
            residency(&file.file, extent(transfers))
        };
        match residency {
            Residency::Cold => {
                Pace { residency, threads: threads.max(COLD_READERS), most_bytes: COLD_READ_BYTES }
            }
            Residency::Cached | Residency::Unknown => Pace { residency, threads, most_bytes: usize::MAX },
        }
    }
}

/// From where to where the transfers reach in the file.
fn extent(transfers: &[Transfer]) -> Range<u64> {
    let start = transfers.iter().map(|transfer| transfer.offset).min().unwrap_or(0);
    let end = transfers.iter().map(|transfer| transfer.offset + transfer.length as u64).max();
    start..end.unwrap_or(start)
}

/// # Safety
///
/// As for [`read`].
unsafe fn read_file(file: &OpenFile, transfers: &[Transfer]) -> Result<()> {
    let chunks = Chunks::new(transfers.iter().map(|transfer| transfer.length));
    let pace = Pace::new(file, transfers, &chunks);
    parallel::pull(chunks.len(), pace.threads, |chunk| {
        // Neighbours in the file come with one read, however small they are.
        let mut run = Run::new(file, pace.most_bytes);
        for (index, part) in chunks.parts(chunk) {
            let Transfer { offset, destination, .. } = transfers[index];
            // SAFETY: the caller vouches for the destinations, and no other chunk has these parts of them.
            unsafe { run.add(offset + part.start as u64, destination.wrapping_add(part.start), part.len()) }?;
        }
        // SAFETY: as above.
        unsafe { run.read() }
    })
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
