//! Copies memory to memory, on several threads if the data is large.

use crate::error::Result;
use crate::sys::huge_pages::PagePopulator;
use crate::sys::parallel::{self, Chunks};
use crate::sys::threads::ThreadLimit;

/// A run of bytes and its destination.
#[derive(Clone, Copy, Debug)]
pub struct CopyRange {
    pub source: *const u8,
    pub destination: *mut u8,
    pub length: usize,
}

// SAFETY: the pointers are accessed by `copy_ranges` alone, whose contract requires that they are valid on every thread.
unsafe impl Send for CopyRange {}
// SAFETY: as above.
unsafe impl Sync for CopyRange {}

/// Copies `ranges`. If `fresh` is given, it contains all destinations, in increasing order, and is populated first.
///
/// # Safety
///
/// Until the call returns, each source must be valid for reads and each destination for writes of its length, no other code
/// may write to either, and no destination may overlap another destination or a source.
pub unsafe fn copy_ranges(ranges: &[CopyRange], fresh: Option<&PagePopulator>) -> Result<()> {
    let chunks = Chunks::new(ranges.iter().map(|range| range.length));
    let threads = parallel::thread_count(ThreadLimit::current()?, chunks.total_bytes(), chunks.len());
    parallel::for_each(chunks.len(), threads, |chunk| {
        let mut populated = 0;
        for (index, part) in chunks.parts(chunk) {
            let CopyRange { source, destination, .. } = ranges[index];
            if let Some(fresh) = fresh {
                let start = fresh.offset(destination) + part.start;
                if start + part.len() > populated {
                    populated = fresh.populate(start..start + part.len());
                }
            }
            // SAFETY: `Chunks::parts` returns parts inside `0..length` of their range, so both pointers are valid for
            // `part.len()` bytes by this function's contract. No two parts share a byte, and the contract excludes
            // overlaps between ranges, so no other thread accesses this destination.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    source.add(part.start),
                    destination.add(part.start),
                    part.len(),
                );
            }
        }
        Ok(())
    })
}

/// Copies `length` bytes with non-temporal stores, which bypass the processor's caches.
///
/// Faster for destinations larger than the caches, because their lines are not read before they are written. Not faster
/// for unpopulated memory: the kernel's zeroing has just brought it into the caches.
///
/// # Safety
///
/// As for [`std::ptr::copy_nonoverlapping`].
#[cfg(all(target_arch = "x86_64", not(miri)))]
pub unsafe fn copy_nontemporal(source: *const u8, destination: *mut u8, length: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    const LINE: usize = 64;
    const LANE: usize = size_of::<__m128i>();

    let head = destination.align_offset(LINE).min(length);
    let lines = (length - head) / LINE;
    let tail = length - head - lines * LINE;
    // SAFETY: `head + lines * LINE + tail == length` by construction, so every access lies in the `length` bytes that this
    // function's contract makes valid. `align_offset` aligned `to` to `LINE`, as the non-temporal stores require; the fence
    // orders these stores before everything that follows the call.
    unsafe {
        std::ptr::copy_nonoverlapping(source, destination, head);
        let (from, to) = (source.add(head), destination.add(head));
        for line in 0..lines {
            let (from, to) = (from.add(line * LINE).cast::<__m128i>(), to.add(line * LINE).cast::<__m128i>());
            // All loads first, so that the stores fill their line at once.
            let lanes: [__m128i; LINE / LANE] = std::array::from_fn(|lane| _mm_loadu_si128(from.add(lane)));
            for (lane, value) in lanes.into_iter().enumerate() {
                _mm_stream_si128(to.add(lane), value);
            }
        }
        _mm_sfence();
        let done = lines * LINE;
        std::ptr::copy_nonoverlapping(from.add(done), to.add(done), tail);
    }
}

/// Copies `length` bytes. Rust has no non-temporal stores for this architecture, nor for Miri.
///
/// # Safety
///
/// As for [`std::ptr::copy_nonoverlapping`].
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
pub unsafe fn copy_nontemporal(source: *const u8, destination: *mut u8, length: usize) {
    // SAFETY: the contracts of the two functions are the same.
    unsafe { std::ptr::copy_nonoverlapping(source, destination, length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_copied_completely() {
        // Enough for several threads. Miri needs a second for 100,000 bytes.
        let length = if cfg!(miri) { 1 << 16 } else { 20 << 20 };
        let source: Vec<u8> = (0..length).map(|n: u32| (n % 251) as u8).collect();
        let mut target = vec![0; source.len()];
        let mut ranges = Vec::new();
        let (mut at, mut length) = (0, 1);
        while at < source.len() {
            let bytes = length.min(source.len() - at);
            let destination = target.as_mut_ptr().wrapping_add(at);
            ranges.push(CopyRange { source: source[at..].as_ptr(), destination, length: bytes });
            (at, length) = (at + bytes, length * 3 % 5_000_011);
        }
        // SAFETY: the ranges partition `target`, which does not overlap `source`; both live until the call returns.
        unsafe { copy_ranges(&ranges, None) }.expect("memory");
        assert!(target == source);
    }

    #[test]
    fn non_temporal_stores_write_exactly_their_bytes() {
        let source: Vec<u8> = (0..2000).map(|n: u32| (n % 251) as u8).collect();
        for from in [0, 1, 17] {
            for to in [0, 1, 15, 16, 63, 64] {
                for length in [0, 1, 15, 16, 63, 64, 65, 127, 128, 1000, 1900] {
                    let mut target = vec![255; 2100];
                    // SAFETY: 17 + 1900 bytes fit into `source` and 64 + 1900 into `target`, which do not overlap.
                    unsafe { copy_nontemporal(source[from..].as_ptr(), target[to..].as_mut_ptr(), length) };
                    assert!(target[to..to + length] == source[from..from + length], "{from} {to} {length}");
                    assert!(target[..to].iter().chain(&target[to + length..]).all(|&byte| byte == 255));
                }
            }
        }
    }
}
