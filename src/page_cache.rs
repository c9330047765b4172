//! Asks the kernel how much of a file is in memory already.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

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
    (status == 0).then(|| told.cached.saturating_mul(page_bytes()))
}

fn page_bytes() -> u64 {
    // SAFETY: a call without pointers.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(4096)
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
    fn a_machine_has_memory() {
        assert!(available_memory().is_none_or(|bytes| bytes > 1 << 20));
    }
}
