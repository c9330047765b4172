//! What of a file is in memory already, and how to read what is not.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// How many threads read a file that is not in the page cache; most of the time they wait.
pub const COLD_READERS: usize = 4;

/// The bytes of one read of such a file. The disk is asked for more than that ahead, and goes on while these are copied.
pub const COLD_READ_BYTES: usize = 1 << 20;

/// In how many places [`looks_cold`] looks, and at how many bytes in each.
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

/// How many bytes of `range` of `file` are in the page cache, in whole pages; `None` where the kernel cannot tell.
pub fn cached_bytes(file: &File, range: Range<u64>) -> Option<u64> {
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
    (status == 0).then(|| told.cached.saturating_mul(page_bytes() as u64))
}

/// Whether part of `range` seems to be on the disk alone. Looks at a few places only, as asking about every page of a
/// large file can take milliseconds. Where the kernel cannot tell, the answer is no.
pub fn looks_cold(file: &File, range: Range<u64>) -> bool {
    let length = range.end.saturating_sub(range.start);
    let window = SAMPLE_BYTES.min(length);
    (0..SAMPLES).any(|sample| {
        // From the start of the range to its end, both included.
        let start =
            range.start + (u128::from(length - window) * u128::from(sample) / u128::from(SAMPLES - 1)) as u64;
        cached_bytes(file, start..start + window).is_some_and(|cached| cached < window)
    })
}

/// The size of a page.
pub fn page_bytes() -> usize {
    // SAFETY: a call without pointers.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}

/// The bytes that programs could still use without the machine running out of memory, as `/proc/meminfo` has it;
/// `None` where it cannot be read.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_was_just_written_is_cached() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&[1; 100_000]).expect("write");
        // Kernels before 6.5, and sandboxes, do not answer.
        if let Some(cached) = cached_bytes(&file, 0..100_000) {
            assert!((100_000..200_000).contains(&cached), "{cached}");
            assert_eq!(cached_bytes(&file, 5..5), Some(0));
        }
    }

    #[test]
    fn a_file_that_was_dropped_from_memory_looks_cold() {
        let mut file = tempfile::tempfile().expect("a file");
        let length = 20 * SAMPLE_BYTES + 77;
        file.write_all(&vec![1; length as usize]).and_then(|()| file.sync_all()).expect("write");
        assert!(!looks_cold(&file, 0..length));
        // SAFETY: a call without pointers on a descriptor that `file` keeps open.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        // Kernels before 6.5 do not tell, and a filesystem in memory drops nothing.
        if cached_bytes(&file, 0..length) == Some(0) {
            assert!(looks_cold(&file, 0..length));
            assert!(looks_cold(&file, length - 5..length));
            assert!(!looks_cold(&file, 5..5));
        }
    }

    #[test]
    fn a_machine_has_memory() {
        assert!(available_memory().is_none_or(|bytes| bytes > 1 << 20));
    }
}
