//! Slices of a tensor: their sizes and their bytes.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use super::boundary::boundary;
use super::handle::{OpenState, sft_file};
use super::pointer::{self, Out};
use super::types::sft_status;
use crate::error::Result;
use crate::format::slice::{AxisRange, Slice};
use crate::read::file::SliceRequest;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_range {
    pub start: u64,
    pub stop: u64,
    pub step: u64,
}

pub(super) fn axis_ranges(ranges: &[sft_range]) -> Vec<AxisRange> {
    ranges.iter().map(|&sft_range { start, stop, step }| AxisRange { start, stop, step }).collect()
}

pub(super) fn plan(state: &OpenState, index: usize, ranges: &[sft_range]) -> Result<Slice> {
    state.file.slice(index, &axis_ranges(ranges))
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_slice_request {
    pub index: usize,
    pub ranges: *const sft_range,
    pub rank: usize,
    pub buffer: *mut c_void,
    pub nbytes: usize,
    pub strides: *const u64,
}

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
        // SAFETY: a live handle (header, "Ownership", "Threads"); `rank` ranges and dimensions, a number ("Pointers").
        let (state, ranges, shape, nbytes) = unsafe {
            (
                sft_file::state(file)?,
                pointer::array(ranges, rank, "ranges")?,
                pointer::out_array(shape, rank, "shape")?,
                Out::new(nbytes, "nbytes")?,
            )
        };
        let slice = plan(state, index, ranges)?;
        for (out, &dimension) in shape.iter().zip(slice.shape()) {
            out.set(MaybeUninit::new(dimension));
        }
        nbytes.set(slice.nbytes());
        Ok(())
    })
}

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
        // SAFETY: a live handle (header, "Ownership", "Threads"); `rank` ranges ("Pointers").
        let (state, ranges) = unsafe { (sft_file::state(file)?, pointer::array(ranges, rank, "ranges")?) };
        let slice = plan(state, index, ranges)?;
        let buffer = pointer::buffer(buffer, nbytes, "buffer")?;
        // SAFETY: `buffer` is not NULL (checked), valid for writes of `nbytes` during the call (header, "Pointers").
        unsafe { state.file.read_slice(index, &slice, buffer, nbytes) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_read_slices(
    file: *const sft_file,
    reads: *const sft_slice_request,
    count: usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); `count` requests ("Pointers").
        let (state, reads) = unsafe { (sft_file::state(file)?, pointer::array(reads, count, "reads")?) };
        let slices = reads.iter().map(|read| {
            // SAFETY: `rank` ranges (header, "Pointers").
            plan(state, read.index, unsafe { pointer::array(read.ranges, read.rank, "reads: ranges") }?)
        });
        let slices = slices.collect::<Result<Vec<_>>>()?;
        let requests = reads.iter().zip(&slices).map(|(read, slice)| {
            let &sft_slice_request { index, rank, buffer, nbytes, strides, .. } = read;
            let destination = pointer::buffer(buffer, nbytes, "reads: a buffer")?;
            // SAFETY: NULL, or `rank` strides (header, sft_slice_request and "Pointers").
            let strides = unsafe { pointer::optional_array(strides, rank, "reads: strides") }?;
            Ok(SliceRequest { index, slice, destination, nbytes, strides })
        });
        let requests = requests.collect::<Result<Vec<_>>>()?;
        // SAFETY: the buffers are not NULL (checked), valid for writes during the call, and their elements do not overlap
        // (header, "Pointers" and sft_slice_request).
        unsafe { state.file.read_slices(&requests) }
    })
}
