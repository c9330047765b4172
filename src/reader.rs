//! Copies byte ranges of a source to memory: threads pull chunks from one counter.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::source::{Source, read_vectored_at, shrank};

/// The bytes that a thread takes at a time: large enough for the call to be free, small enough to share evenly.
const CHUNK_BYTES: usize = 8 << 20;

/// The most ranges in one vectored read; Linux allows 1024.
const CHUNK_PARTS: usize = 512;

/// Below this a second thread costs more than it saves.
const PARALLEL_BYTES: usize = 4 << 20;

/// More threads than this find no more memory bandwidth.
const MAX_THREADS: usize = 8;

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
pub unsafe fn read(source: &Source, transfers: Vec<Transfer>) -> Result<()> {
    let total: usize = transfers.iter().map(|transfer| transfer.length).sum();
    let transfers = split(transfers);
    let chunks = chunk(&transfers);
    let threads = if total < PARALLEL_BYTES {
        1
    } else {
        std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(chunks.len())
    };
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let work = || {
        while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            // SAFETY: the caller of `read` vouches for the destinations, and no other thread gets this chunk.
            if let Err(error) = unsafe { read_chunk(source, &transfers[chunk.clone()]) } {
                // Leaves nothing to pull for the others.
                next.store(chunks.len(), Ordering::Relaxed);
                failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // A machine that gives no more threads still has this one.
            if std::thread::Builder::new().spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).map_or(Ok(()), Err)
}

/// Cuts what is longer than a chunk into chunks; drops what is empty.
fn split(transfers: Vec<Transfer>) -> Vec<Transfer> {
    let mut pieces = Vec::with_capacity(transfers.len());
    for transfer in transfers {
        let mut done = 0;
        while done < transfer.length {
            let length = (transfer.length - done).min(CHUNK_BYTES);
            pieces.push(Transfer {
                offset: transfer.offset + done as u64,
                destination: transfer.destination.wrapping_add(done),
                length,
            });
            done += length;
        }
    }
    pieces
}

/// Groups neighbours in the file, so that one vectored read serves many small tensors.
fn chunk(transfers: &[Transfer]) -> Vec<Range<usize>> {
    let mut chunks: Vec<Range<usize>> = Vec::new();
    let mut bytes = 0;
    for (index, transfer) in transfers.iter().enumerate() {
        let joins = index > 0 && {
            let previous = &transfers[index - 1];
            previous.offset + previous.length as u64 == transfer.offset
                && bytes + transfer.length <= CHUNK_BYTES
        };
        match chunks.last_mut() {
            Some(last) if joins && last.len() < CHUNK_PARTS => {
                last.end = index + 1;
                bytes += transfer.length;
            }
            _ => {
                chunks.push(index..index + 1);
                bytes = transfer.length;
            }
        }
    }
    chunks
}

/// # Safety
///
/// As for [`read`].
unsafe fn read_chunk(source: &Source, transfers: &[Transfer]) -> Result<()> {
    if let Source::File(file, path) = source {
        // SAFETY: the caller vouches for the destinations.
        return unsafe { read_file_chunk(file, path, transfers) };
    }
    // Only files have no address.
    let Some(start) = source.as_ptr() else { return Ok(()) };
    for transfer in transfers {
        let end = transfer.offset.checked_add(transfer.length as u64);
        if end.is_none_or(|end| end > source.memory_bytes() as u64) {
            return Err(Error::new(ErrorKind::FileChanged, "a range leaves the source"));
        }
        // SAFETY: the range lies in the source (just checked), the destination is valid and apart from it (caller).
        unsafe {
            std::ptr::copy_nonoverlapping(
                start.add(transfer.offset as usize),
                transfer.destination,
                transfer.length,
            );
        }
    }
    Ok(())
}

/// # Safety
///
/// As for [`read`].
unsafe fn read_file_chunk(file: &File, path: &Path, transfers: &[Transfer]) -> Result<()> {
    let Some(first) = transfers.first() else { return Ok(()) };
    let mut parts: Vec<libc::iovec> = transfers
        .iter()
        .map(|transfer| libc::iovec { iov_base: transfer.destination.cast(), iov_len: transfer.length })
        .collect();
    let mut offset = first.offset;
    let mut rest = &mut parts[..];
    while !rest.is_empty() {
        // SAFETY: the caller vouches for the destinations, and `rest` is what is left of them.
        let mut count = unsafe { read_vectored_at(file, rest, offset) }
            .map_err(|source| Error::io("read", path, source))?;
        if count == 0 {
            return Err(shrank(path));
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
