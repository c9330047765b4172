//! Copies byte ranges of a source to memory: threads take chunks of equal size from all ranges together.

use std::io;
use std::os::fd::AsRawFd;

use crate::copy::{self, Copy};
use crate::error::{Error, ErrorKind, Result};
use crate::parallel::{self, Chunks};
use crate::source::{Borrowed, OpenFile, Origin, shrank};

/// The most ranges in one vectored read; Linux allows 1024.
const MAX_PARTS: usize = 512;

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
        Origin::Memory(memory) => unsafe { read_memory(memory, transfers) },
    }
}

/// # Safety
///
/// As for [`read`].
unsafe fn read_memory(memory: Borrowed, transfers: &[Transfer]) -> Result<()> {
    let copies: Result<Vec<Copy>> = transfers
        .iter()
        .map(|&Transfer { offset, destination, length }| {
            let end = offset.checked_add(length as u64);
            if end.is_none_or(|end| end > memory.length as u64) {
                return Err(Error::new(ErrorKind::FileChanged, "a range leaves the source"));
            }
            Ok(Copy { source: memory.start.wrapping_add(offset as usize), destination, length })
        })
        .collect();
    // SAFETY: the ranges lie in the source (just checked), the destinations are valid and apart from it (caller).
    unsafe { copy::copy(&copies?) }
}

/// # Safety
///
/// As for [`read`].
unsafe fn read_file(file: &OpenFile, transfers: &[Transfer]) -> Result<()> {
    let chunks = Chunks::new(transfers.iter().map(|transfer| transfer.length));
    parallel::pull(chunks.len(), parallel::threads_for(chunks.bytes(), chunks.len()), |chunk| {
        // Neighbours in the file come with one read, however small they are.
        let mut run = Run::default();
        for (index, part) in chunks.parts(chunk) {
            let Transfer { offset, destination, .. } = transfers[index];
            let offset = offset + part.start as u64;
            if run.parts.len() == MAX_PARTS || offset != run.end {
                // SAFETY: the caller vouches for the destinations, and no other chunk has these parts of them.
                unsafe { run.read(file) }?;
                run.start_at(offset);
            }
            run.add(destination.wrapping_add(part.start), part.len());
        }
        // SAFETY: as above.
        unsafe { run.read(file) }
    })
}

/// A range of a file that is read with one call, into several places.
#[derive(Default)]
struct Run {
    start: u64,
    end: u64,
    parts: Vec<libc::iovec>,
}

impl Run {
    fn start_at(&mut self, offset: u64) {
        self.parts.clear();
        (self.start, self.end) = (offset, offset);
    }

    fn add(&mut self, destination: *mut u8, length: usize) {
        self.parts.push(libc::iovec { iov_base: destination.cast(), iov_len: length });
        self.end += length as u64;
    }

    /// Reads all of it.
    ///
    /// # Safety
    ///
    /// Every part must be valid for writes of its length.
    unsafe fn read(&mut self, file: &OpenFile) -> Result<()> {
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
