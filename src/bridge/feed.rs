//! Reading tensors through slabs.

use std::sync::Arc;
use std::time::Duration;

use super::Result;
use super::ffi::{Part, Progress, Range, Slab, Taken};
use super::file::File;
use crate::feed;
use crate::threads::threads;

/// A feed as C++ sees it.
pub struct Feed(feed::Feed);

fn starts(slabs: &[Slab]) -> Vec<*mut u8> {
    slabs.iter().map(|slab| slab.start).collect()
}

/// The threads of a feed's own: the one that takes its slabs is one of those that the process may use.
fn own_threads() -> Result<Option<usize>> {
    Ok(threads()?.checked_sub(1))
}

impl File {
    /// # Safety
    ///
    /// As for [`feed::Feed::new`].
    pub unsafe fn feed(
        &self,
        indices: &[usize],
        shown: bool,
        slabs: &[Slab],
        slab_bytes: usize,
    ) -> Result<Box<Feed>> {
        let (file, slabs, threads) = (Arc::clone(&self.0), starts(slabs), own_threads()?);
        // SAFETY: as the caller promised.
        Ok(Box::new(Feed(unsafe { feed::Feed::new(file, indices, shown, &slabs, slab_bytes, threads) }?)))
    }

    /// # Safety
    ///
    /// As for [`feed::Feed::of_slice`].
    pub unsafe fn feed_slice(
        &self,
        index: usize,
        ranges: &[Range],
        slabs: &[Slab],
        slab_bytes: usize,
    ) -> Result<Box<Feed>> {
        let slice = self.slice(index, ranges)?;
        let (file, slabs, threads) = (Arc::clone(&self.0), starts(slabs), own_threads()?);
        // SAFETY: as the caller promised.
        Ok(Box::new(Feed(unsafe { feed::Feed::of_slice(file, index, slice, &slabs, slab_bytes, threads) }?)))
    }
}

impl Feed {
    pub fn take(&self, microseconds: u64) -> Result<Taken> {
        let (progress, slab, parts) = match self.0.take(Duration::from_micros(microseconds))? {
            feed::Taken::Slab(slab, parts) => (Progress::Filled, slab, parts),
            feed::Taken::Later => (Progress::Later, 0, Vec::new()),
            feed::Taken::End => (Progress::End, 0, Vec::new()),
        };
        let parts = parts.into_iter().map(|part| {
            let feed::Part { request, offset, start, length } = part;
            Part { request, offset, start, length }
        });
        Ok(Taken { progress, slab, parts: parts.collect() })
    }

    pub fn give(&self, slab: usize) {
        self.0.give(slab);
    }

    /// # Safety
    ///
    /// As for [`feed::Feed::add`].
    pub unsafe fn add(&self, slab: Slab) -> usize {
        // SAFETY: as the caller promised.
        unsafe { self.0.add(slab.start) }
    }

    pub fn is_starved(&self) -> bool {
        self.0.is_starved()
    }
}
