//! Planning and writing files.

use std::time::{Duration, Instant};

use super::ffi::{Entry, Piece, Spec};
use super::{Result, as_path, as_text};
use crate::error::Error;
use crate::format::dtype::Dtype;
use crate::format::header::Metadata;
use crate::format::layout::{DEFAULT_ALIGNMENT, Layout, TensorSpec};
use crate::sys::huge_pages::PagePopulator;
use crate::sys::raw_bytes::RawBytes;
use crate::write::output::Output;
use crate::write::save;

pub struct SavePlan(Layout);

pub fn plan_save(
    specs: &[Spec<'_>],
    metadata: &[Entry],
    has_metadata: bool,
    path: &[u8],
) -> Result<Box<SavePlan>> {
    let tensors = specs.iter().map(as_spec).collect::<Result<Vec<TensorSpec<'_>>>>()?;
    let entries = as_metadata(metadata)?;
    let layout = Layout::plan(&tensors, has_metadata.then_some(&entries), DEFAULT_ALIGNMENT);
    let in_file = |error: Error| if path.is_empty() { error } else { error.in_file(as_path(path)) };
    Ok(Box::new(SavePlan(layout.map_err(in_file)?)))
}

/// Returns the core's description of a tensor.
pub(super) fn as_spec<'a>(spec: &Spec<'a>) -> Result<TensorSpec<'a>> {
    let name = as_text("tensor name", spec.name)?;
    let dtype = Dtype::from_number(u32::from(spec.dtype)).expect("cpp/ takes numbers from dtype_number");
    Ok(TensorSpec { name, dtype, shape: spec.shape })
}

pub(super) fn as_metadata(entries: &[Entry]) -> Result<Metadata> {
    let mut metadata = Metadata::new();
    for Entry { key, value } in entries {
        let key = as_text("metadata key", key)?;
        metadata.insert(key.to_owned(), as_text("metadata value", value)?.to_owned());
    }
    Ok(metadata)
}

impl SavePlan {
    pub fn total_bytes(&self) -> u64 {
        self.0.total_bytes()
    }

    pub fn header(&self) -> &[u8] {
        self.0.header()
    }

    pub fn tensor(&self, place: usize) -> usize {
        self.0.order()[place].index
    }

    pub fn nbytes(&self, place: usize) -> u64 {
        let place = self.0.order()[place];
        place.end - place.begin
    }
}

/// # Safety
///
/// The bytes of `pieces` must be valid for reads during `'a`.
pub(super) unsafe fn raw_bytes<'a>(pieces: &'a [Piece]) -> impl Iterator<Item = RawBytes<'a>> {
    // SAFETY: the clause above.
    pieces.iter().map(|piece| unsafe { RawBytes::new(piece.start, piece.length) })
}

pub struct FileWriter(pub(super) Output);

pub fn create_file(path: &[u8], length: u64) -> Result<Box<FileWriter>> {
    Ok(Box::new(FileWriter(Output::create(as_path(path), length)?)))
}

impl FileWriter {
    /// # Safety
    ///
    /// The bytes of `pieces` must be valid for reads during the call.
    pub unsafe fn write(&mut self, pieces: &[Piece], milliseconds: u64) -> Result<u64> {
        // SAFETY: the clause above.
        let pieces = unsafe { raw_bytes(pieces) };
        Ok(self.0.write_until(pieces, until(milliseconds))?)
    }

    pub fn make_joinable(&mut self, number: u64) -> Result<Vec<u8>> {
        let Output::Atomic(file) = &mut self.0 else { unreachable!("cpp/ joins files of a checkpoint only") };
        Ok(file.make_joinable_as(number)?.as_encoded_bytes().to_vec())
    }
}

// By value, because the bridge transfers ownership of a Box.
#[allow(clippy::boxed_local)]
pub fn commit_file(writer: Box<FileWriter>, durable: bool) -> Result<()> {
    Ok(writer.0.commit(durable)?)
}

/// Returns the time that is so many milliseconds from now; `None`, which means no deadline, if the clock cannot hold it.
pub(super) fn until(milliseconds: u64) -> Option<Instant> {
    Instant::now().checked_add(Duration::from_millis(milliseconds))
}

pub struct MemoryWriter(save::MemoryWriter);

/// Returns a writer of newly allocated memory that nobody has written to.
///
/// # Safety
///
/// As for `save::MemoryWriter::new`.
pub unsafe fn fill_memory(start: *mut u8, length: usize) -> Box<MemoryWriter> {
    let fresh = PagePopulator::new(start, length);
    // SAFETY: `new` requires `length` writable bytes that nobody else uses until the last write; cpp/write/save.cpp keeps
    // the tensor that owns them as long as the writer, and has given it to nobody yet.
    Box::new(MemoryWriter(unsafe { save::MemoryWriter::new(start, length, Some(fresh)) }))
}

impl MemoryWriter {
    /// # Safety
    ///
    /// The bytes of `pieces` must be valid for reads during the call.
    pub unsafe fn write(&mut self, pieces: &[Piece]) -> Result<()> {
        // SAFETY: the clause above.
        Ok(self.0.write(unsafe { raw_bytes(pieces) })?)
    }
}
