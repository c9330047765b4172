//! A new file with a new header and the data of the old one.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::entry::Entry;
use crate::error::Result;
use crate::format::header::{Header, pad};
use crate::format::layout::{DEFAULT_ALIGNMENT, MAX_ALIGNMENT};
use crate::read::file::TensorFile;
use crate::read::source::{Source, shrank};
use crate::write::atomic::AtomicFile;

/// The most bytes to copy at a time.
const STEP_BYTES: u64 = 32 << 20;

/// Sharing the blocks of less data is not worth the padding of the header.
const MIN_SHARED_BYTES: u64 = 1 << 20;

/// The largest block size of a filesystem that shares blocks.
const MAX_BLOCK_BYTES: u64 = 64 << 10;

#[derive(Debug)]
pub(super) struct Rewrite {
    file: AtomicFile,
    source: TensorFile,
    total_bytes: u64,
    /// The bytes of `source` that are still to be copied.
    rest: Range<u64>,
    /// The block size, until the filesystem refuses to share blocks.
    block: Option<u64>,
}

impl Rewrite {
    /// Creates the new file. `header` is unpadded, and gets `reserve` free bytes or more.
    pub(super) fn create(
        entry: &Entry,
        source: TensorFile,
        header: Vec<u8>,
        reserve: u64,
        block: u64,
    ) -> Result<Rewrite> {
        let old = source.header();
        let data_bytes = data_bytes(old);
        let block = Some(block).filter(|&block| data_bytes >= MIN_SHARED_BYTES && can_share(old, block));
        let needed = (header.len() as u64).saturating_add(reserve);
        let header =
            pad(header, padded_length(old, needed, block)).map_err(|error| error.in_file(&entry.path))?;
        let total_bytes = header.len() as u64 + data_bytes;
        // The space of the data is reserved once it is clear that it cannot be shared.
        let reserved = if block.is_some() { header.len() as u64 } else { total_bytes };
        let mut file =
            AtomicFile::create_in(Arc::clone(&entry.directory), entry.name.clone(), &entry.path, reserved)?;
        file.write([&header[..]])?;
        let rest = old.data_start()..old.data_start() + data_bytes;
        Ok(Rewrite { file, source, total_bytes, rest, block })
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    pub(super) fn done_bytes(&self) -> u64 {
        self.total_bytes - (self.rest.end - self.rest.start)
    }

    /// Copies some data, or shares its blocks.
    pub(super) fn step(&mut self, entry: &Entry) -> Result<()> {
        let offset = self.rest.start;
        let length = (self.rest.end - offset).min(STEP_BYTES);
        let done = match self.block.map(|block| offset.next_multiple_of(block) - offset) {
            None => self.file.copy_from(file_of(&self.source), offset, length)?,
            Some(0) if self.file.share_from(file_of(&self.source), offset, length)? => length,
            Some(0) => {
                self.block = None;
                self.file.reserve(self.total_bytes)?;
                self.file.copy_from(file_of(&self.source), offset, length)?
            }
            Some(unaligned) => self.file.copy_from(file_of(&self.source), offset, length.min(unaligned))?,
        };
        if done == 0 {
            return Err(shrank(&entry.path));
        }
        self.rest.start += done;
        Ok(())
    }

    /// Replaces the old file, unless it has changed.
    pub(super) fn commit(&mut self, entry: &Entry, durable: bool) -> Result<()> {
        self.file.commit_if(durable, || entry.check_unchanged())
    }
}

fn file_of(source: &TensorFile) -> &File {
    match source.source() {
        Source::File(file) => &file.file,
        Source::Mapped(_) | Source::Memory(_) | Source::External(_) => {
            unreachable!("opened with the pread backend")
        }
    }
}

/// Returns the bytes after the header. Validation proved that all of them belong to tensors.
fn data_bytes(header: &Header) -> u64 {
    header.iter().map(|tensor| tensor.end).max().unwrap_or(0)
}

/// Whether the new file's data can begin at the same offset in a block. Misaligned data cannot, because a rewrite aligns
/// it.
fn can_share(header: &Header, block: u64) -> bool {
    block.is_power_of_two()
        && block <= MAX_BLOCK_BYTES
        && header.data_start().is_multiple_of(DEFAULT_ALIGNMENT)
}

/// Returns the length of a new header of at least `needed` bytes. It keeps the alignment of the data, and its offset in a
/// `block`, if given.
fn padded_length(header: &Header, needed: u64, block: Option<u64>) -> u64 {
    let alignment = 1u64 << header.data_start().trailing_zeros().min(63);
    let alignment = alignment.clamp(DEFAULT_ALIGNMENT, MAX_ALIGNMENT);
    let step = block.map_or(alignment, |block| block.max(alignment));
    let offset = if block.is_some() { header.data_start() % step } else { 0 };
    let steps = needed.saturating_sub(offset).checked_next_multiple_of(step);
    // Without a multiple, a length that `pad` refuses.
    steps.and_then(|steps| steps.checked_add(offset)).unwrap_or(u64::MAX)
}
