//! Tensors in memory to a file, or to a buffer: the layout's header, then every tensor's bytes in its place.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::Metadata;
use crate::format::layout::{DEFAULT_ALIGNMENT, Layout, TensorSpec};
use crate::sys::copy::{self, CopyRange};
use crate::sys::populate::PagePopulator;
use crate::write::output::Output;

/// How a file is written.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// Where the data begins: at a multiple of this many bytes, a power of two from 8 on.
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
/// Those of [`Layout::plan`]; [`ErrorKind::BufferSize`] where a tensor's bytes are not as many as its dtype and shape
/// need; those of [`AtomicFile`](crate::AtomicFile).
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
/// # std::fs::remove_file(&path).expect("it was written");
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
    let layout = plan(tensors, data, metadata, options.alignment).map_err(|error| error.in_file(path))?;
    let mut file = Output::create(path, layout.total_bytes())?;
    let pieces = layout.order().iter().map(|place| data[place.index]);
    file.write_until(std::iter::once(layout.header()).chain(pieces), None)?;
    file.commit(options.durable)
}

/// Writes `tensors` to `buffer`, which must have exactly the layout's [`Layout::total_bytes`].
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
    // SAFETY: a slice is valid for writes of its length, and no other reference to it can be among `data`.
    unsafe { save_into_raw(tensors, data, metadata, buffer.as_mut_ptr(), buffer.len(), alignment) }
}

/// As [`save_into`], for memory that may hold nothing yet.
///
/// # Safety
///
/// `buffer` must be valid for writes of `length` bytes during the call, and overlap none of `data`.
pub(crate) unsafe fn save_into_raw(
    tensors: &[TensorSpec<'_>],
    data: &[&[u8]],
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
    // SAFETY: the places follow one another without gaps up to `total_bytes`, which is `length`, and `plan` has checked
    // that every tensor's bytes are as many as its place has; the rest is the caller's promise.
    let mut filler = unsafe { Filler::new(buffer, length, None) };
    filler.write(std::iter::once(layout.header()).chain(pieces))
}

/// Memory that is written from its start to its end, in parallel where it pays.
#[derive(Debug)]
pub(crate) struct Filler {
    next: *mut u8,
    left: usize,
    /// All of the memory, if nobody has written to it yet.
    fresh: Option<PagePopulator>,
}

impl Filler {
    /// Fills `length` bytes from `start` on; `fresh` are the pages of all of them, if they are.
    ///
    /// # Safety
    ///
    /// They must be valid for writes, and nobody else may use them, until the last write has returned.
    pub(crate) unsafe fn new(start: *mut u8, length: usize, fresh: Option<PagePopulator>) -> Filler {
        Filler { next: start, left: length, fresh }
    }

    /// Appends `pieces`, none of which may lie in the memory that is written.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::BufferSize`] where they are more than is left; nothing is written then.
    pub(crate) fn write<'a>(&mut self, pieces: impl Iterator<Item = &'a [u8]>) -> Result<()> {
        let mut moves = Vec::with_capacity(pieces.size_hint().0);
        let (mut next, mut left) = (self.next, self.left);
        for piece in pieces {
            let Some(rest) = left.checked_sub(piece.len()) else {
                let detail = "more bytes were given than the layout has room for";
                return Err(Error::new(ErrorKind::BufferSize, detail));
            };
            moves.push(CopyRange { source: piece.as_ptr(), destination: next, length: piece.len() });
            (next, left) = (next.wrapping_add(piece.len()), rest);
        }
        // SAFETY: the pieces are borrowed, their destinations follow one another in the memory that `new` was promised.
        unsafe { copy::copy_ranges(&moves, self.fresh.as_ref()) }?;
        (self.next, self.left) = (next, left);
        Ok(())
    }
}

/// The layout of `tensors`, whose bytes are as many as it has room for.
pub(crate) fn plan(
    tensors: &[TensorSpec<'_>],
    data: &[&[u8]],
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
