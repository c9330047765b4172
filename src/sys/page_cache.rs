//! Which parts of a file are in the page cache, and how to read the others.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// The number of threads that read a file outside the page cache; they mostly wait.
pub const COLD_READERS: usize = 4;

/// The bytes of one such read. The kernel reads further ahead, so the disk works during the copy.
pub const COLD_READ_BYTES: usize = 1 << 20;

/// The number of samples that [`residency`] takes, and the bytes of each.
const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 1 << 20;

/// `cachestat(2)`, Linux 6.5 and later; the number is the same on every architecture of Rust's libc.
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    offset: u64,
    length: u64,
}

/// The kernel's `struct cachestat`; counts pages.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Whether the bytes of a file are in the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// All samples are.
    Cached,
    /// A sample is not.
    Cold,
    /// The kernel is too old, the file belongs to another user, or its filesystem is stacked on another.
    Unknown,
}

/// Samples whether `range` of `file` is cached; the first page of the file must have been read just now. Checking every
/// page of a large file could take milliseconds.
pub fn residency(file: &File, range: Range<u64>) -> Residency {
    // A stacked filesystem reports that nothing is cached, not even the first page.
    if cached_bytes(file, 0..1).is_none_or(|cached| cached == 0) {
        return Residency::Unknown;
    }
    let length = range.end.saturating_sub(range.start);
    let window = SAMPLE_BYTES.min(length);
    let cold = (0..SAMPLES).any(|sample| {
        // The first sample begins at the start of the range; the last one ends at its end.
        let start =
            range.start + (u128::from(length - window) * u128::from(sample) / u128::from(SAMPLES - 1)) as u64;
        !is_cached(file, start..start + window)
    });
    if cold { Residency::Cold } else { Residency::Cached }
}

/// Returns whether all of `range` is cached, if the residency of `file` is known.
pub fn is_cached(file: &File, range: Range<u64>) -> bool {
    let length = range.end.saturating_sub(range.start);
    cached_bytes(file, range).is_none_or(|cached| cached >= length)
}

/// Returns how many bytes of `range` are cached, in whole pages; `None` if that is unknown.
fn cached_bytes(file: &File, range: Range<u64>) -> Option<u64> {
    // The kernel takes a length of 0 for the rest of the file.
    if range.is_empty() {
        return Some(0);
    }
    let request = CachestatRange { offset: range.start, length: range.end - range.start };
    let mut answer = Cachestat::default();
    // SAFETY: `file` keeps the descriptor open. Both structs have the layout of linux/mman.h (`repr(C)`, integers of the
    // same widths) and outlive the call, which reads the first and writes the second.
    let status = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const request, &raw mut answer, 0 as libc::c_uint)
    };
    (status == 0).then(|| answer.cached.saturating_mul(page_size() as u64))
}

pub fn page_size() -> usize {
    // SAFETY: sysconf takes no pointer and is defined for every argument.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LENGTH: u64 = 20 * SAMPLE_BYTES + 77;

    fn written() -> File {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&vec![1; LENGTH as usize]).and_then(|()| file.sync_all()).expect("write");
        file
    }

    #[test]
    fn written_bytes_are_cached() {
        let file = written();
        if residency(&file, 0..LENGTH) != Residency::Unknown {
            assert_eq!(residency(&file, 0..LENGTH), Residency::Cached);
            let cached = cached_bytes(&file, 0..LENGTH).expect("known");
            assert!((LENGTH..LENGTH + page_size() as u64).contains(&cached), "{cached}");
            assert_eq!(cached_bytes(&file, 5..5), Some(0));
        }
    }

    #[test]
    fn dropped_bytes_are_cold() {
        let file = written();
        let page = page_size() as u64;
        // All except the first page, which holds the header.
        // SAFETY: `file` keeps the descriptor open, and the call takes no pointer.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), page as i64, 0, libc::POSIX_FADV_DONTNEED) };
        // tmpfs drops nothing.
        let dropped = cached_bytes(&file, LENGTH - page..LENGTH) == Some(0);
        if dropped && residency(&file, 0..LENGTH) != Residency::Unknown {
            assert_eq!(residency(&file, 0..LENGTH), Residency::Cold);
            assert_eq!(residency(&file, LENGTH - 5..LENGTH), Residency::Cold);
            assert_eq!(residency(&file, 0..1), Residency::Cached);
            assert!(!is_cached(&file, LENGTH - 5..LENGTH));
        }
    }

    #[test]
    fn residency_is_unknown_if_the_first_page_is_not_cached() {
        let file = written();
        // SAFETY: `file` keeps the descriptor open, and the call takes no pointer.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        if cached_bytes(&file, 0..1) == Some(0) {
            assert_eq!(residency(&file, 0..LENGTH), Residency::Unknown);
        }
    }
}
