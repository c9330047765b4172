//! Decides how a file is read, given where its bytes are.

use std::ops::Range;

use crate::read::source::ReadMethod;
use crate::sys::page_cache::{COLD_READ_BYTES, COLD_READERS, Residency, residency};
use crate::sys::parallel;
use crate::sys::threads::ThreadLimit;

/// How to read a source: with how many threads, and how much with one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadStrategy {
    pub(crate) residency: Residency,
    /// The threads that its bytes are worth.
    pub(crate) threads: usize,
    /// The most bytes of one read.
    pub(crate) most_bytes: usize,
}

impl ReadStrategy {
    /// Returns the strategy for `bytes` inside `extent`, given that a cached source is read by `wanted` of `threads`.
    pub(crate) fn of(
        method: ReadMethod<'_>,
        bytes: usize,
        extent: impl FnOnce() -> Range<u64>,
        wanted: usize,
        threads: ThreadLimit,
    ) -> ReadStrategy {
        let residency = match method {
            // It makes no difference for small reads.
            ReadMethod::File(file) | ReadMethod::Mapping(_, Some(file))
                if bytes >= parallel::MIN_PARALLEL_BYTES =>
            {
                residency(&file.file, extent())
            }
            _ => Residency::Unknown,
        };
        match residency {
            Residency::Cold => {
                let readers = wanted.max(threads.cap(COLD_READERS));
                ReadStrategy { residency, threads: readers, most_bytes: COLD_READ_BYTES }
            }
            Residency::Cached | Residency::Unknown => {
                ReadStrategy { residency, threads: wanted, most_bytes: usize::MAX }
            }
        }
    }
}
