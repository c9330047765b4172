//! Asks the kernel to read pages of a mapping that are about to be used. Waits for none of them.
//!
//! This keeps many requests in flight. Touching the pages sends one or two at a time and waits for each.

use std::ops::Range;
use std::sync::Arc;

use memmap2::Advice;

use crate::read::source::Mapping;
use crate::sys::huge_pages::is_resident;
use crate::sys::memory_limit::available_memory;
use crate::sys::parallel::CHUNK_BYTES;
use crate::sys::threads::ThreadLimit;

/// From this size on, a thread sends the requests.
const BACKGROUND_BYTES: usize = 16 << 20;

/// The bytes of one request. The kernel reads as many around a page that is touched, and no more for one `madvise`.
const REQUEST_BYTES: usize = 128 << 10;

/// The number of attempts: a filesystem with many requests in flight (FUSE) drops the last ones.
const ROUNDS: usize = 3;

/// Starts to read `bytes` if they are not in memory.
pub(crate) fn read_ahead(mapping: &Arc<Mapping>, bytes: Range<usize>) {
    if bytes.len() < BACKGROUND_BYTES {
        request(mapping, bytes);
        return;
    }
    if looks_resident(mapping, &bytes) {
        return;
    }
    // Sending that many requests takes a while, so this thread does not do it itself.
    if !ThreadLimit::current().is_ok_and(|threads| threads.cap_background(1) > 0) {
        return;
    }
    let mapping = Arc::downgrade(mapping);
    spawn(move || {
        if available_memory().is_none_or(|available| bytes.len() as u64 > available / 2) {
            return;
        }
        for start in bytes.clone().step_by(CHUNK_BYTES) {
            let Some(mapping) = mapping.upgrade() else { return };
            request(&mapping, start..bytes.end.min(start + CHUNK_BYTES));
        }
    });
}

/// Asks the kernel to read `bytes`, unless they look resident or are few.
pub(super) fn request(mapping: &Mapping, bytes: Range<usize>) {
    if bytes.len() < REQUEST_BYTES || looks_resident(mapping, &bytes) {
        return;
    }
    for _ in 0..ROUNDS {
        for start in bytes.clone().step_by(REQUEST_BYTES) {
            let length = REQUEST_BYTES.min(bytes.end - start);
            if !looks_resident(mapping, &(start..start + length)) {
                // Without it, the pages are read when they are touched.
                let _ = mapping.advise(Advice::WillNeed, start, length);
            }
        }
    }
}

/// Returns whether both ends and the middle of `bytes` are in memory: asking about every page takes longer than reading
/// ahead. The kernel answers yes for a file that this process neither owns nor may write to.
fn looks_resident(mapping: &Mapping, bytes: &Range<usize>) -> bool {
    [bytes.start, bytes.start.midpoint(bytes.end), bytes.end - 1]
        .into_iter()
        .all(|at| is_resident(mapping.as_ptr().wrapping_add(at)))
}

/// Runs `work` on a thread of its own. Does nothing if there is no thread for it.
pub(super) fn spawn(work: impl FnOnce() + Send + 'static) {
    let _ = std::thread::Builder::new().name("sft-prefault".into()).spawn(work);
}
