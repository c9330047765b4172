//! `sft_prefetch`: tensors that are read in the background, and handed out as they land.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::boundary::boundary;
use super::handle::sft_file;
use super::pointer::{self, Out};
use super::slice::{self, sft_range};
use super::types::sft_status;
use crate::error::Result;
use crate::read::prefetch_loader::{NextTensor, PrefetchLoader};
use crate::read::prefetch_plan::{PrefetchOptions, PrefetchRequest};
use crate::read::source::ReadFrom;
use crate::sys::threads::threads;

pub type sft_prefetch_state = u32;
pub const SFT_PREFETCH_PENDING: sft_prefetch_state = 0;
pub const SFT_PREFETCH_LANDED: sft_prefetch_state = 1;
pub const SFT_PREFETCH_END: sft_prefetch_state = 2;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_prefetch_request {
    pub file: *const sft_file,
    pub index: usize,
    pub ranges: *const sft_range,
    pub rank: usize,
    pub buffer: *mut c_void,
    pub nbytes: usize,
}

pub struct sft_prefetch(PrefetchLoader);

// Several threads may take tensors of one prefetch at once (header, "Threads").
const _: () = pointer::assert_sync::<PrefetchLoader>();

impl sft_prefetch_request {
    /// # Safety
    ///
    /// "Pointers", "Ownership": `file` is NULL or a live handle, `ranges` is NULL or valid for reads of `rank` elements.
    unsafe fn parse(&self) -> Result<PrefetchRequest> {
        // SAFETY: this function's contract.
        let state = unsafe { sft_file::state(self.file) }?;
        let slice = if self.ranges.is_null() {
            None
        } else {
            // SAFETY: this function's contract.
            let ranges = unsafe { pointer::array(self.ranges, self.rank, "requests: ranges") }?;
            Some(slice::plan(state, self.index, ranges)?)
        };
        let buffer = pointer::buffer(self.buffer, self.nbytes, "requests: a buffer")?;
        Ok(PrefetchRequest {
            file: Arc::clone(&state.file),
            index: self.index,
            slice,
            destination: Some((buffer, self.nbytes)),
            extra_bytes: 0,
        })
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_prefetch_start(
    requests: *const sft_prefetch_request,
    count: usize,
    prefetch: *mut *mut sft_prefetch,
) -> sft_status {
    boundary!({
        // SAFETY: a handle to set, `count` requests (header, "Pointers").
        let (out, requests) =
            unsafe { (Out::null(prefetch, "prefetch")?, pointer::array(requests, count, "requests")?) };
        // SAFETY: live files, valid ranges (header, "Ownership", "Pointers").
        let requests =
            requests.iter().map(|request| unsafe { request.parse() }).collect::<Result<Vec<_>>>()?;
        // The calling thread counts too.
        let threads = threads()?.checked_sub(1);
        let options = PrefetchOptions { read_from: ReadFrom::Mapping, threads, ..Default::default() };
        // SAFETY: the buffers are not NULL (checked), and valid for writes until the prefetch is freed, and do not overlap
        // (header, "Ownership").
        let loader = unsafe { PrefetchLoader::new(requests, options) }?;
        out.set(pointer::new_handle(sft_prefetch(loader)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_prefetch_next(
    prefetch: *const sft_prefetch,
    milliseconds: u64,
    state: *mut sft_prefetch_state,
    request: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); two numbers to set ("Pointers").
        let (prefetch, state, request) = unsafe {
            (pointer::shared(prefetch, "prefetch")?, Out::new(state, "state")?, Out::new(request, "request")?)
        };
        match prefetch.0.next(Duration::from_millis(milliseconds))? {
            NextTensor::Ready(tensor) => {
                state.set(SFT_PREFETCH_LANDED);
                request.set(tensor.request);
            }
            NextTensor::NotReady => state.set(SFT_PREFETCH_PENDING),
            NextTensor::End => state.set(SFT_PREFETCH_END),
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_prefetch_take(
    prefetch: *const sft_prefetch,
    request: usize,
    milliseconds: u64,
    state: *mut sft_prefetch_state,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a number to set ("Pointers").
        let (prefetch, state) =
            unsafe { (pointer::shared(prefetch, "prefetch")?, Out::new(state, "state")?) };
        let taken = prefetch.0.take(request, Duration::from_millis(milliseconds))?;
        state.set(if taken.is_some() { SFT_PREFETCH_LANDED } else { SFT_PREFETCH_PENDING });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_prefetch_free(prefetch: *mut sft_prefetch) {
    boundary!((); {
        // SAFETY: NULL or a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::free_handle(prefetch) }
    })
}
