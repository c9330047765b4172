//! Reading tensors through slabs.

use std::sync::Arc;
use std::time::Duration;

use super::Result;
use super::ffi::{Part, Progress, Range, Slab, Taken};
use super::file::File;
use crate::read::prefetch;
use crate::sys::threads::threads;

/// A prefetch as C++ sees it.
pub struct Prefetcher(prefetch::Prefetcher);

fn starts(slabs: &[Slab]) -> Vec<*mut u8> {
    slabs.iter().map(|slab| slab.start).collect()
}

/// The threads of a prefetch's own: the one that takes its slabs is one of those that the process may use.
fn own_threads() -> Result<Option<usize>> {
    Ok(threads()?.checked_sub(1))
}

impl File {
    /// # Safety
    ///
    /// As for [`prefetch::Prefetcher::new`].
    pub unsafe fn prefetch(
        &self,
        indices: &[usize],
        shown: bool,
        slabs: &[Slab],
        slab_bytes: usize,
    ) -> Result<Box<Prefetcher>> {
        let (file, slabs, threads) = (Arc::clone(&self.0), starts(slabs), own_threads()?);
        // SAFETY: as the caller promised.
        Ok(Box::new(Prefetcher(unsafe {
            prefetch::Prefetcher::new(file, indices, shown, &slabs, slab_bytes, threads)
        }?)))
    }

    /// # Safety
    ///
    /// As for [`prefetch::Prefetcher::of_slice`].
    pub unsafe fn prefetch_slice(
        &self,
        index: usize,
        ranges: &[Range],
        slabs: &[Slab],
        slab_bytes: usize,
    ) -> Result<Box<Prefetcher>> {
        let slice = self.slice(index, ranges)?;
        let (file, slabs, threads) = (Arc::clone(&self.0), starts(slabs), own_threads()?);
        // SAFETY: as the caller promised.
        Ok(Box::new(Prefetcher(unsafe {
            prefetch::Prefetcher::of_slice(file, index, slice, &slabs, slab_bytes, threads)
        }?)))
    }
}

impl Prefetcher {
    pub fn take(&self, microseconds: u64) -> Result<Taken> {
        let (progress, slab, parts) = match self.0.take(Duration::from_micros(microseconds))? {
            prefetch::Taken::Slab(slab, parts) => (Progress::Filled, slab, parts),
            prefetch::Taken::Later => (Progress::Later, 0, Vec::new()),
            prefetch::Taken::End => (Progress::End, 0, Vec::new()),
        };
        let parts = parts.into_iter().map(|part| {
            let prefetch::Part { request, offset, start, length } = part;
            Part { request, offset, start, length }
        });
        Ok(Taken { progress, slab, parts: parts.collect() })
    }

    pub fn give(&self, slab: usize) {
        self.0.give(slab);
    }

    /// # Safety
    ///
    /// As for [`prefetch::Prefetcher::add`].
    pub unsafe fn add(&self, slab: Slab) -> usize {
        // SAFETY: as the caller promised.
        unsafe { self.0.add(slab.start) }
    }

    pub fn is_starved(&self) -> bool {
        self.0.is_starved()
    }
}
