//! Tensors that are handed out as soon as they have landed.

use std::sync::Arc;
use std::time::Duration;

use super::Result;
use super::ffi::{PrefetchState, PrefetchedTensor, Range, ReadFrom};
use super::file::File;
use crate::format::slice::Slice;
use crate::read::prefetch_loader::{self, NextTensor};
use crate::read::prefetch_plan::{PrefetchOptions, PrefetchRequest};
use crate::read::prefetch_schedule;
use crate::sys::threads::threads;

#[derive(Default)]
pub struct PrefetchPlan(pub(super) Vec<PrefetchRequest>);

pub fn plan_prefetch() -> Box<PrefetchPlan> {
    Box::default()
}

fn bounded(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

pub(super) fn options(from: ReadFrom, buffer_bytes: u64, most_threads: u64) -> Result<PrefetchOptions> {
    let most = bounded(most_threads);
    // The thread that takes the tensors counts in the limit, too.
    let threads = Some(threads()?.checked_sub(1).map_or(most, |limit| most.min(limit)));
    Ok(PrefetchOptions { read_from: from.into(), buffer_bytes: bounded(buffer_bytes), threads })
}

impl PrefetchPlan {
    fn push(&mut self, file: &File, index: usize, slice: Option<Slice>, extra_bytes: u64) {
        let file = Arc::clone(&file.0);
        let extra_bytes = bounded(extra_bytes);
        self.0.push(PrefetchRequest { file, index, slice, destination: None, extra_bytes });
    }

    pub fn add(&mut self, file: &File, index: usize, extra_bytes: u64) {
        self.push(file, index, None, extra_bytes);
    }

    pub fn add_slice(&mut self, file: &File, index: usize, ranges: &[Range], extra_bytes: u64) -> Result<()> {
        self.push(file, index, Some(file.slice(index, ranges)?), extra_bytes);
        Ok(())
    }

    pub fn start(
        &mut self,
        from: ReadFrom,
        buffer_bytes: u64,
        most_threads: u64,
    ) -> Result<Box<PrefetchLoader>> {
        let options = options(from, buffer_bytes, most_threads)?;
        let requests = std::mem::take(&mut self.0);
        // SAFETY: no request has a destination (`PrefetchPlan::push`).
        Ok(Box::new(PrefetchLoader(unsafe { prefetch_loader::PrefetchLoader::new(requests, options) }?)))
    }
}

pub struct PrefetchLoader(prefetch_loader::PrefetchLoader);

fn not_ready(state: PrefetchState) -> PrefetchedTensor {
    PrefetchedTensor { state, request: 0, start: std::ptr::null_mut(), block: std::ptr::null() }
}

fn ready(tensor: prefetch_schedule::PrefetchedTensor) -> PrefetchedTensor {
    let prefetch_schedule::PrefetchedTensor { request, start, owner } = tensor;
    let block = Arc::into_raw(owner.expect("the loader allocates memory for requests without destinations"));
    PrefetchedTensor { state: PrefetchState::Ready, request, start, block }
}

impl PrefetchLoader {
    pub fn next(&self, milliseconds: u64) -> Result<PrefetchedTensor> {
        Ok(match self.0.next(Duration::from_millis(milliseconds))? {
            NextTensor::Ready(tensor) => ready(tensor),
            NextTensor::NotReady => not_ready(PrefetchState::NotReady),
            NextTensor::End => not_ready(PrefetchState::End),
        })
    }

    pub fn take(&self, request: usize, milliseconds: u64) -> Result<PrefetchedTensor> {
        let taken = match self.0.take(request, Duration::from_millis(milliseconds)) {
            // Another thread took it during the wait. That does not end the loader.
            Err(_) if self.0.is_taken(request) => return Ok(not_ready(PrefetchState::End)),
            taken => taken?,
        };
        Ok(taken.map_or_else(|| not_ready(PrefetchState::NotReady), ready))
    }
}
