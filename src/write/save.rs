//! Writes tensors in memory to a file or a buffer: the header, then the bytes of every tensor in layout order.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::Metadata;
use crate::format::layout::{DEFAULT_ALIGNMENT, Layout, TensorSpec};
use crate::sys::copy::{self, CopyRange};
use crate::sys::huge_pages::PagePopulator;
use crate::sys::raw_bytes::RawBytes;
use crate::write::output::Output;

/// Options of a save.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// The alignment of the data in the file, a power of two from 8 on.
    pub alignment: u64,
    /// Whether to return only once the bytes are on the disk.
    pub durable: bool,
}

impl Default for SaveOptions {
    fn default() -> SaveOptions {
        SaveOptions { alignment: DEFAULT_ALIGNMENT, durable: false }
    }
}

/// Writes `tensors`, whose bytes are in `data` at the same index, to `path`: all of it, or nothing.
///
/// # Errors
///
/// Those of [`Layout::plan`] and [`AtomicFile`](crate::AtomicFile); [`ErrorKind::BufferSize`] if a tensor has more or
/// fewer bytes than its dtype and shape need.
///
/// ```
/// # fn main() -> safetensors_torch::Result<()> {
/// use safetensors_torch::{Backend, Dtype, SaveOptions, TensorFile, TensorSpec, save_file};
///
/// let path = std::env::temp_dir().join(format!("doc-{}.safetensors", std::process::id()));
/// let spec = TensorSpec { name: "weight", dtype: Dtype::U8, shape: &[3] };
/// save_file(&[spec], &[&[1, 2, 3]], None, &path, SaveOptions::default())?;
/// let file = TensorFile::open(&path, Backend::Pread)?;
/// assert_eq!(file.header().get(0).map(|tensor| tensor.nbytes()), Some(3));
/// # std::fs::remove_file(&path).expect("removed");
/// # Ok(())
/// # }
/// ```
pub fn save_file(
    tensors: &[TensorSpec<'_>],
    data: &[&[u8]],
    metadata: Option<&Metadata>,
    path: &Path,
    options: SaveOptions,
) -> Result<()> {
    save_file_raw(tensors, &RawBytes::of_slices(data), metadata, path, options)
}

/// As [`save_file`], for data that others may change.
pub(crate) fn save_file_raw(
    tensors: &[TensorSpec<'_>],
    data: &[RawBytes<'_>],
    metadata: Option<&Metadata>,
    path: &Path,
    options: SaveOptions,
) -> Result<()> {
    let layout = plan(tensors, data, metadata, options.alignment).map_err(|error| error.in_file(path))?;
    let mut file = Output::create(path, layout.total_bytes())?;
    let pieces = layout.order().iter().map(|place| data[place.index]);
    file.write_until(std::iter::once(layout.header().into()).chain(pieces), None)?;
    file.commit(options.durable)
}

/// Writes `tensors` to `buffer`, which must have exactly [`Layout::total_bytes`].
///
/// # Errors
///
/// As [`save_file`], less those of the file; [`ErrorKind::BufferSize`] also for `buffer`.
pub fn save_into(
    tensors: &[TensorSpec<'_>],
    data: &[&[u8]],
    metadata: Option<&Metadata>,
    buffer: &mut [u8],
    alignment: u64,
) -> Result<()> {
    // SAFETY: `save_into_raw` requires writable memory that does not overlap `data`: a `&mut` slice is both.
    unsafe {
        save_into_raw(
            tensors,
            &RawBytes::of_slices(data),
            metadata,
            buffer.as_mut_ptr(),
            buffer.len(),
            alignment,
        )
    }
}

/// As [`save_into`], for memory that may be uninitialized.
///
/// # Safety
///
/// `buffer` must be valid for writes of `length` bytes during the call, and overlap none of `data`.
pub(crate) unsafe fn save_into_raw(
    tensors: &[TensorSpec<'_>],
    data: &[RawBytes<'_>],
    metadata: Option<&Metadata>,
    buffer: *mut u8,
    length: usize,
    alignment: u64,
) -> Result<()> {
    let layout = plan(tensors, data, metadata, alignment)?;
    if length as u64 != layout.total_bytes() {
        let detail = format!("the buffer has {length} bytes, but {} are needed", layout.total_bytes());
        return Err(Error::new(ErrorKind::BufferSize, detail));
    }
    let pieces = layout.order().iter().map(|place| data[place.index]);
    // SAFETY: `MemoryWriter::new` requires `length` writable bytes that nobody else uses; this function's contract promises
    // them.
    let mut writer = unsafe { MemoryWriter::new(buffer, length, None) };
    writer.write(std::iter::once(layout.header().into()).chain(pieces))
}

/// A writer that fills memory from start to end, on several threads if that is faster.
#[derive(Debug)]
pub(crate) struct MemoryWriter {
    next: *mut u8,
    left: usize,
    /// The pages of all of the memory, if nobody has written to it yet.
    fresh: Option<PagePopulator>,
}

impl MemoryWriter {
    /// Returns a writer of `length` bytes from `start` on; `fresh` are their pages if nobody has written to them yet.
    ///
    /// # Safety
    ///
    /// The bytes must be valid for writes, and unused by others, until the last write has returned.
    pub(crate) unsafe fn new(start: *mut u8, length: usize, fresh: Option<PagePopulator>) -> MemoryWriter {
        MemoryWriter { next: start, left: length, fresh }
    }

    /// Appends `pieces`. Writes nothing if they are more than is left.
    pub(crate) fn write<'a>(&mut self, pieces: impl Iterator<Item = RawBytes<'a>>) -> Result<()> {
        let mut ranges = Vec::with_capacity(pieces.size_hint().0);
        let (mut next, mut left) = (self.next, self.left);
        for piece in pieces {
            let Some(rest) = left.checked_sub(piece.len()) else {
                let detail = "more bytes were given than the layout has room for";
                return Err(Error::new(ErrorKind::BufferSize, detail));
            };
            ranges.push(CopyRange { source: piece.as_ptr(), destination: next, length: piece.len() });
            (next, left) = (next.wrapping_add(piece.len()), rest);
        }
        // SAFETY: `copy_ranges` requires readable sources, which the borrowed pieces are, and writable destinations that
        // overlap nothing: each is a range of its own within the `left` bytes that the contract of `new` promises.
        unsafe { copy::copy_ranges(&ranges, self.fresh.as_ref()) }?;
        (self.next, self.left) = (next, left);
        Ok(())
    }
}

/// Returns the layout of `tensors`, after checking that `data` has as many bytes as each needs.
pub(crate) fn plan(
    tensors: &[TensorSpec<'_>],
    data: &[RawBytes<'_>],
    metadata: Option<&Metadata>,
    alignment: u64,
) -> Result<Layout> {
    let layout = Layout::plan(tensors, metadata, alignment)?;
    for place in layout.order() {
        let (needed, given) = (place.end - place.begin, data.get(place.index).map_or(0, |bytes| bytes.len()));
        if needed != given as u64 {
            let name = tensors[place.index].name;
            let detail = format!("tensor {name:?} takes {needed} bytes, but {given} were given");
            return Err(Error::new(ErrorKind::BufferSize, detail));
        }
    }
    Ok(layout)
}
