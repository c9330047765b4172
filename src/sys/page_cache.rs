//! What of a file is in memory already, and how to read what is not.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// How many threads read a file that is not in the page cache; most of the time they wait.
pub const COLD_READERS: usize = 4;

/// The bytes of one read of such a file. The disk is asked for more than that ahead, and goes on while these are copied.
pub const COLD_READ_BYTES: usize = 1 << 20;

/// In how many places [`residency`] looks, and at how many bytes in each.
const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 1 << 20;

/// `cachestat(2)`, Linux 6.5 and later: one number on every architecture that Rust has a libc for.
const SYS_CACHESTAT: libc::c_long = 451;

/// The kernel's `struct cachestat_range`.
#[repr(C)]
struct CachestatRange {
    offset: u64,
    length: u64,
}

/// The kernel's `struct cachestat`: numbers of pages.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Where the bytes of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// In memory, as far as one looked.
    Cached,
    /// Some of them on the disk alone.
    Cold,
    /// The kernel does not say: it is too old, the file belongs to somebody else, or lies on a filesystem over another.
    Unknown,
}

/// Where the bytes in `range` of `file` are, of which the first page was read just now. Looks at a few places only, as
/// asking about every page of a large file can take milliseconds.
pub fn residency(file: &File, range: Range<u64>) -> Residency {
    // Filesystems that keep their files in another one answer that nothing is ever cached.
    if cached_bytes(file, 0..1).is_none_or(|cached| cached == 0) {
        return Residency::Unknown;
    }
    let length = range.end.saturating_sub(range.start);
    let window = SAMPLE_BYTES.min(length);
    let cold = (0..SAMPLES).any(|sample| {
        // From the start of the range to its end, both included.
        let start =
            range.start + (u128::from(length - window) * u128::from(sample) / u128::from(SAMPLES - 1)) as u64;
        !is_cached(file, start..start + window)
    });
    if cold { Residency::Cold } else { Residency::Cached }
}

/// Whether all of `range` is in memory, of a file whose residency is known.
pub fn is_cached(file: &File, range: Range<u64>) -> bool {
    let length = range.end.saturating_sub(range.start);
    cached_bytes(file, range).is_none_or(|cached| cached >= length)
}

/// How many bytes of `range` of `file` are in the page cache, in whole pages; `None` where the kernel does not say.
fn cached_bytes(file: &File, range: Range<u64>) -> Option<u64> {
    // A length of 0 would mean all the rest of the file.
    if range.is_empty() {
        return Some(0);
    }
    let asked = CachestatRange { offset: range.start, length: range.end - range.start };
    let mut told = Cachestat::default();
    // SAFETY: both structs are laid out as the kernel's, live across the call, and only `told` is written to.
    let status = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const asked, &raw mut told, 0 as libc::c_uint)
    };
    (status == 0).then(|| told.cached.saturating_mul(page_size() as u64))
}

/// The size of a page.
pub fn page_size() -> usize {
    // SAFETY: a call without pointers.
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
    fn what_was_just_written_is_cached() {
        let file = written();
        // Where the kernel says anything of this filesystem.
        if residency(&file, 0..LENGTH) != Residency::Unknown {
            assert_eq!(residency(&file, 0..LENGTH), Residency::Cached);
            let cached = cached_bytes(&file, 0..LENGTH).expect("known");
            assert!((LENGTH..LENGTH + page_size() as u64).contains(&cached), "{cached}");
            assert_eq!(cached_bytes(&file, 5..5), Some(0));
        }
    }

    #[test]
    fn what_was_dropped_from_memory_is_cold() {
        let file = written();
        let page = page_size() as u64;
        // All but the first page, as after a header was read.
        // SAFETY: a call without pointers on a descriptor that `file` keeps open.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), page as i64, 0, libc::POSIX_FADV_DONTNEED) };
        // A filesystem in memory drops nothing.
        let dropped = cached_bytes(&file, LENGTH - page..LENGTH) == Some(0);
        if dropped && residency(&file, 0..LENGTH) != Residency::Unknown {
            assert_eq!(residency(&file, 0..LENGTH), Residency::Cold);
            assert_eq!(residency(&file, LENGTH - 5..LENGTH), Residency::Cold);
            assert_eq!(residency(&file, 0..1), Residency::Cached);
            assert!(!is_cached(&file, LENGTH - 5..LENGTH));
        }
    }

    #[test]
    fn where_the_kernel_says_nothing_is_cached_nothing_is_known() {
        // As a filesystem over another has it: the first page is not there, though somebody must have read it.
        let file = written();
        // SAFETY: a call without pointers on a descriptor that `file` keeps open.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        if cached_bytes(&file, 0..1) == Some(0) {
            assert_eq!(residency(&file, 0..LENGTH), Residency::Unknown);
        }
    }
}
