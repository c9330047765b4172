//! Reading tensors through slabs.

use std::sync::Arc;
use std::time::Duration;

use super::Result;
use super::ffi::{NextSlab, Range, ReadFrom, Slab, SlabPart, SlabState};
use super::file::File;
use crate::read::{prefetch, source};
use crate::sys::threads::threads;

pub struct Prefetcher(prefetch::Prefetcher);

impl From<ReadFrom> for source::ReadFrom {
    fn from(from: ReadFrom) -> source::ReadFrom {
        match from {
            ReadFrom::Mapping => source::ReadFrom::Mapping,
            _ => source::ReadFrom::File,
        }
    }
}

/// Returns the memory of the slabs, and the number of threads to start. The thread that takes the slabs counts too.
fn slabs_and_threads(slabs: &[Slab]) -> Result<(Vec<*mut u8>, Option<usize>)> {
    Ok((slabs.iter().map(|slab| slab.start).collect(), threads()?.checked_sub(1)))
}

impl File {
    /// # Safety
    ///
    /// As for [`prefetch::Prefetcher::new`].
    pub unsafe fn prefetch(
        &self,
        indices: &[usize],
        from: ReadFrom,
        slabs: &[Slab],
        slab_bytes: usize,
    ) -> Result<Box<Prefetcher>> {
        let (file, (slabs, threads)) = (Arc::clone(&self.0), slabs_and_threads(slabs)?);
        // SAFETY: the slabs are valid, distinct and unused by others; cpp/device/upload.cpp takes them from the pinned pool
        // and returns them after it has dropped the prefetcher.
        Ok(Box::new(Prefetcher(unsafe {
            prefetch::Prefetcher::new(file, indices, from.into(), &slabs, slab_bytes, threads)
        }?)))
    }

    /// # Safety
    ///
    /// As for [`prefetch::Prefetcher::for_slice`].
    pub unsafe fn prefetch_slice(
        &self,
        index: usize,
        ranges: &[Range],
        slabs: &[Slab],
        slab_bytes: usize,
    ) -> Result<Box<Prefetcher>> {
        let slice = self.slice(index, ranges)?;
        let (file, (slabs, threads)) = (Arc::clone(&self.0), slabs_and_threads(slabs)?);
        // SAFETY: the slabs are valid, distinct and unused by others; cpp/device/upload.cpp takes them from the pinned pool
        // and returns them after it has dropped the prefetcher.
        Ok(Box::new(Prefetcher(unsafe {
            prefetch::Prefetcher::for_slice(file, index, slice, &slabs, slab_bytes, threads)
        }?)))
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
        // SAFETY: as in `File::prefetch`: the slab comes from the same pool.
        unsafe { self.0.add_slab(slab.start) }
    }

    pub fn is_starved(&self) -> bool {
        self.0.is_starved()
    }
}
