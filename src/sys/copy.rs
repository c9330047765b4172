//! Copies memory to memory, on several threads where it pays.

use crate::error::Result;
use crate::sys::parallel::{self, Chunks};
use crate::sys::populate::PagePopulator;
use crate::sys::threads::ThreadLimit;

/// One run of bytes, and where it goes.
#[derive(Clone, Copy, Debug)]
pub struct CopyRange {
    /// The first byte.
    pub source: *const u8,
    /// Where it goes.
    pub destination: *mut u8,
    /// How many bytes.
    pub length: usize,
}

// SAFETY: a plain instruction; `copy` requires of its caller that sources and destinations are valid on any thread.
unsafe impl Send for CopyRange {}
// SAFETY: as above.
unsafe impl Sync for CopyRange {}

/// Carries out `ranges`, all into `fresh` if that is given, in the order of their destinations.
///
/// # Safety
///
/// Every source must be valid for reads and every destination for writes of its length until the call returns, nobody
/// else may write to any of them, and no destination may overlap another or a source.
pub unsafe fn copy_ranges(ranges: &[CopyRange], fresh: Option<&PagePopulator>) -> Result<()> {
    let chunks = Chunks::new(ranges.iter().map(|one| one.length));
    let threads = parallel::thread_count(ThreadLimit::current()?, chunks.bytes(), chunks.len());
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
            // SAFETY: the part lies in the move's length, for which the caller vouches; no other chunk has this part.
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

/// Copies one run past the processor's caches: for destinations too large to stay there, whose lines then need not be
/// read before they are written. Worth it for memory that has pages; fresh ones come through the caches anyway.
///
/// # Safety
///
/// As for [`std::ptr::copy_nonoverlapping`].
#[cfg(all(target_arch = "x86_64", not(miri)))]
pub unsafe fn copy_nontemporal(source: *const u8, destination: *mut u8, length: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    /// What is written to memory at a time.
    const LINE: usize = 64;
    const LANE: usize = size_of::<__m128i>();

    let head = destination.align_offset(LINE).min(length);
    let lines = (length - head) / LINE;
    let tail = length - head - lines * LINE;
    // SAFETY: head, lines and tail make up `length`, for which the caller vouches. The streaming stores are to
    // addresses aligned to `LINE`, and fenced before anybody can learn that this call is over.
    unsafe {
        std::ptr::copy_nonoverlapping(source, destination, head);
        let (from, to) = (source.add(head), destination.add(head));
        for line in 0..lines {
            let (from, to) = (from.add(line * LINE).cast::<__m128i>(), to.add(line * LINE).cast::<__m128i>());
            // All loads first: the stores then fill their line in one go.
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

/// Copies one run; this architecture has no stores past the caches that Rust can name. Neither has Miri.
///
/// # Safety
///
/// As for [`std::ptr::copy_nonoverlapping`].
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
pub unsafe fn copy_nontemporal(source: *const u8, destination: *mut u8, length: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(source, destination, length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_arrives() {
        // Enough for several threads; fewer are enough for Miri, which takes a second for 100,000.
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
        // SAFETY: the parts of `target` are apart from each other and from `source`.
        unsafe { copy_ranges(&ranges, None) }.expect("memory");
        assert!(target == source);
    }

    #[test]
    fn a_stream_writes_its_bytes_and_no_others() {
        let source: Vec<u8> = (0..2000).map(|n: u32| (n % 251) as u8).collect();
        for from in [0, 1, 17] {
            for to in [0, 1, 15, 16, 63, 64] {
                for length in [0, 1, 15, 16, 63, 64, 65, 127, 128, 1000, 1900] {
                    let mut target = vec![255; 2100];
                    // SAFETY: both runs lie in their vectors.
                    unsafe { copy_nontemporal(source[from..].as_ptr(), target[to..].as_mut_ptr(), length) };
                    assert!(target[to..to + length] == source[from..from + length], "{from} {to} {length}");
                    assert!(target[..to].iter().chain(&target[to + length..]).all(|&byte| byte == 255));
                }
            }
        }
    }
}
