//! Reading tensors through slabs.

use std::time::Duration;

use super::Result;
use super::ffi::{NextSlab, ReadFrom, Slab, SlabPart, SlabState};
use super::prefetch_loader::{PrefetchPlan, options};
use crate::read::{prefetch, source};

pub struct Prefetcher(prefetch::Prefetcher);

impl From<ReadFrom> for source::ReadFrom {
    fn from(from: ReadFrom) -> source::ReadFrom {
        match from {
            ReadFrom::Mapping => source::ReadFrom::Mapping,
            _ => source::ReadFrom::File,
        }
    }
}

impl PrefetchPlan {
    pub fn start_slabs(
        &mut self,
        from: ReadFrom,
        buffer_bytes: u64,
        most_threads: u64,
        slab_bytes: usize,
    ) -> Result<Box<Prefetcher>> {
        let options = options(from, buffer_bytes, most_threads)?;
        let requests = std::mem::take(&mut self.0);
        Ok(Box::new(Prefetcher(prefetch::Prefetcher::new(requests, options, slab_bytes)?)))
    }
}

impl Prefetcher {
    pub fn next_slab(&self, microseconds: u64) -> Result<NextSlab> {
        let (state, slab, parts) = match self.0.next_slab(Duration::from_micros(microseconds))? {
            prefetch::NextSlab::Filled(slab, parts) => (SlabState::Filled, slab, parts),
            prefetch::NextSlab::NotReady => (SlabState::NotReady, 0, Vec::new()),
            prefetch::NextSlab::End => (SlabState::End, 0, Vec::new()),
        };
        let parts = parts.into_iter().map(|part| {
            let crate::SlabPart { request, offset, slab_offset, length } = part;
            SlabPart { request, offset, slab_offset, length }
        });
        Ok(NextSlab { state, slab, parts: parts.collect() })
    }

    pub fn release_slab(&self, slab: usize) {
        self.0.release_slab(slab);
    }

    /// # Safety
    ///
    /// As for [`prefetch::Prefetcher::add_slab`].
    pub unsafe fn add_slab(&self, slab: Slab) -> usize {
        // SAFETY: the slab is valid, distinct and unused by others: cpp/device/upload.cpp takes it from the pinned pool and
        // returns it after it has stopped the prefetcher.
        unsafe { self.0.add_slab(slab.start) }
    }

    pub fn is_starved(&self) -> bool {
        self.0.is_starved()
    }

    pub fn prioritize(&self, request: usize) {
        self.0.prioritize(request);
    }

    pub fn hand_out(&self, request: usize) {
        self.0.hand_out(request);
    }

    pub fn stop(&self) {
        self.0.stop();
    }

    pub fn check_process(&self, object: &str) -> Result<()> {
        Ok(self.0.check_process(object)?)
    }
}
