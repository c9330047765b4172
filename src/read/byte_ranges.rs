//! Reads byte ranges of a source into memory, on one thread.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::read::external::Piece;
use crate::read::prefault::read_and_map;
use crate::read::source::{Mapping, OpenFile, ReadMethod};
use crate::read::strategy::ReadStrategy;
use crate::read::vectored::VectoredReader;
use crate::sys::copy;
use crate::sys::huge_pages::is_resident;

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

// SAFETY: only `read_here` and `read_parts` write to the destination. Their contract requires that it is valid on any thread
// and overlaps no other one.
unsafe impl Send for ReadRange {}
// SAFETY: as above.
unsafe impl Sync for ReadRange {}

impl ReadRange {
    /// Returns the range in the source.
    pub(crate) fn extent(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.length as u64)
    }
}

/// Checks that `ranges` are inside a source of known length.
pub(crate) fn check_within(
    method: ReadMethod<'_>,
    mut ranges: impl Iterator<Item = Range<u64>>,
) -> Result<()> {
    let length = match method {
        // Reads return how many bytes there are.
        ReadMethod::File(_) => return Ok(()),
        ReadMethod::Mapping(mapping, _) => mapping.len(),
        ReadMethod::Memory(memory) => memory.length,
        ReadMethod::External(source) => source.len() as usize,
    };
    if ranges.any(|range| range.end > length as u64) {
        return Err(Error::new(ErrorKind::FileChanged, "a range is outside the source"));
    }
    Ok(())
}

/// Reads `ranges` with the `strategy` of the larger read that they are part of.
///
/// # Errors
///
/// [`ErrorKind::FileChanged`] if the source ends early, [`ErrorKind::Io`] if a read fails. The contents of the destinations
/// are then unspecified.
///
/// # Safety
///
/// Every destination must be valid for writes of its length, on any thread, until the call returns. None may overlap
/// another one or the source.
pub(crate) unsafe fn read_here(
    method: ReadMethod<'_>,
    ranges: &[ReadRange],
    strategy: ReadStrategy,
) -> Result<()> {
    check_within(method, ranges.iter().map(ReadRange::extent))?;
    // SAFETY: this function's contract covers the destinations; the ranges are inside the source (checked).
    unsafe { read_parts(method, ranges.iter().copied(), strategy) }
}

/// As [`read_here`], for ranges that [`check_within`] has accepted.
///
/// # Safety
///
/// As for [`read_here`]. The parts must be inside a source of known length.
pub(crate) unsafe fn read_parts(
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
        ReadMethod::External(source) => {
            let pieces = parts.map(|ReadRange { offset, destination, length }| {
                (offset, Piece { start: destination, length })
            });
            // SAFETY: this function's contract covers the destinations.
            unsafe { source.read(pieces) }
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
