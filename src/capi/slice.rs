//! Parts of a tensor: how large one is, and its bytes.

use std::ffi::c_void;

use super::boundary;
use super::file::{Open, sft_file};
use super::options::sft_range;
use super::pointer::{self, Out};
use super::status::sft_status;
use crate::error::Result;
use crate::format::slice::{AxisRange, Slice};

/// Plans the slice that a caller's ranges ask for.
///
/// # Safety
///
/// `ranges` is NULL or valid for reads of `rank` elements.
unsafe fn plan(open: &Open, index: usize, ranges: *const sft_range, rank: usize) -> Result<Slice> {
    // SAFETY: the caller's promise.
    let ranges = unsafe { pointer::array(ranges, rank, "ranges") }?;
    let ranges: Vec<AxisRange> =
        ranges.iter().map(|&sft_range { start, stop, step }| AxisRange { start, stop, step }).collect();
    open.file.slice(index, &ranges)
}

/// The shape and the size of a slice.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_slice_size(
    file: *const sft_file,
    index: usize,
    ranges: *const sft_range,
    rank: usize,
    shape: *mut u64,
    nbytes: *mut u64,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle, `rank` ranges and a place for a number (header).
        let (open, out) = unsafe { (sft_file::open(file)?, Out::new(nbytes, "nbytes")?) };
        // SAFETY: as above.
        let slice = unsafe { plan(open, index, ranges, rank) }?;
        // SAFETY: `shape` has room for `rank` dimensions, and a slice has as many as it has ranges (header).
        unsafe { pointer::copy_out(slice.shape(), shape, "shape") }?;
        out.set(slice.nbytes());
        Ok(())
    })
}

/// Reads a slice into `buffer`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_read_slice(
    file: *const sft_file,
    index: usize,
    ranges: *const sft_range,
    rank: usize,
    buffer: *mut c_void,
    nbytes: usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle and `rank` ranges (header).
        let open = unsafe { sft_file::open(file) }?;
        // SAFETY: as above.
        let slice = unsafe { plan(open, index, ranges, rank) }?;
        let buffer = pointer::destination(buffer.cast(), nbytes, "buffer")?;
        // SAFETY: `buffer` is valid for writes of `nbytes` during the call (header; not NULL, checked).
        unsafe { open.file.read_slice(index, &slice, buffer, nbytes) }
    })
}
