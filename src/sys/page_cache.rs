//! Which parts of a file are in the page cache, and how to read the others.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};

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
    /// The kernel does not tell: the file belongs to another user, or its filesystem has no page cache.
    Unknown,
}

/// Samples whether `range` of `file` is cached; the first page of the file must have been read just now. Checking every
/// page of a large file could take milliseconds.
pub fn residency(file: &File, range: Range<u64>) -> Residency {
    // Without a page cache, not even the first page is there.
    if cached_bytes(file, 0..1).is_none_or(|cached| cached == 0) {
        return Residency::Unknown;
    }
    let length = range.end.saturating_sub(range.start);
    let window = SAMPLE_BYTES.min(length);
    let samples = SAMPLES.min(length.div_ceil(SAMPLE_BYTES));
    let cold = (0..samples).any(|sample| {
        // The first sample begins at the start of the range; the last one ends at its end.
        let start = range.start
            + (u128::from(length - window) * u128::from(sample) / u128::from(samples.max(2) - 1)) as u64;
        !is_cached(file, start..start + window)
    });
    if cold { Residency::Cold } else { Residency::Cached }
}

/// Returns whether all of `range` is cached, if the residency of `file` is known.
pub fn is_cached(file: &File, range: Range<u64>) -> bool {
    let length = range.end.saturating_sub(range.start);
    cached_bytes(file, range).is_none_or(|cached| cached >= length)
}

/// Returns whether all of `range` is cached; false if that is unknown, and for stacked filesystems. Maps nothing, so it does
/// not wait for page faults of other threads.
pub fn is_surely_cached(file: &File, range: Range<u64>) -> bool {
    let page = page_size() as u64;
    // The kernel takes a length of 0 for the rest of the file.
    range.is_empty()
        || cachestat(file, &range)
            .is_some_and(|cached| cached >= range.end.div_ceil(page) - range.start / page)
}

/// Returns how many bytes of `range` are cached, in whole pages; `None` if that is unknown.
pub fn cached_bytes(file: &File, range: Range<u64>) -> Option<u64> {
    // The kernel takes a length of 0 for the rest of the file.
    if range.is_empty() {
        return Some(0);
    }
    let pages = match cachestat(file, &range) {
        // A filesystem that is stacked on another has no pages of its own: a mapping shows those below.
        None | Some(0) => mincore(file, &range)?,
        Some(pages) => pages,
    };
    Some(pages.saturating_mul(page_size() as u64))
}

/// Returns the number of pages of `range`, which must not be empty, in the page cache of `file`.
fn cachestat(file: &File, range: &Range<u64>) -> Option<u64> {
    let request = CachestatRange { offset: range.start, length: range.end - range.start };
    let mut answer = Cachestat::default();
    // SAFETY: `file` keeps the descriptor open. Both structs have the layout of linux/mman.h (`repr(C)`, integers of the
    // same widths) and outlive the call, which reads the first and writes the second.
    let status = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const request, &raw mut answer, 0 as libc::c_uint)
    };
    (status == 0).then_some(answer.cached)
}

/// As [`cachestat`], through a mapping; works on every kernel and on stacked filesystems. `None` if this process neither
/// owns the file nor may write to it: the kernel then calls every page resident, even one behind the end of the file.
fn mincore(file: &File, range: &Range<u64>) -> Option<u64> {
    let page = page_size() as u64;
    let resident = |range: Range<u64>| {
        let start = range.start / page * page;
        let length = usize::try_from(range.end - start).ok()?;
        let map = MmapOptions::new().offset(start).len(length).map_raw_read_only(file).ok()?;
        let mut pages = vec![0u8; length.div_ceil(page_size())];
        // SAFETY: `map` is a mapping of `length` bytes, and `pages` has a byte for each of its pages.
        let status = unsafe { libc::mincore(map.as_mut_ptr().cast(), length, pages.as_mut_ptr()) };
        (status == 0).then(|| pages.iter().filter(|&&flags| flags & 1 != 0).count() as u64)
    };
    let found = resident(range.clone())?;
    let behind = file.metadata().ok()?.len().next_multiple_of(page);
    (found == 0 || resident(behind..behind + page)? == 0).then_some(found)
}

/// The unit of [`WindowReader`]: a huge page.
pub const WINDOW_BYTES: u64 = 2 << 20;

/// Reads windows of a file into the page cache, with the largest requests that its filesystem takes. For a mapping that asks
/// for huge pages, the kernel reads a whole window ahead of a page fault, whatever the readahead of the filesystem is.
#[derive(Debug)]
pub struct WindowReader(MmapRaw);

impl WindowReader {
    /// Returns `None` if this kernel does not read windows.
    pub fn new(file: &File) -> Option<WindowReader> {
        // The kernel keeps the size of the last readahead for each open file. After that of a window, FUSE drops other
        // readahead instead of delaying it.
        let own =
            File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok().filter(|_| reads_windows())?;
        let map = MmapOptions::new().map_raw_read_only(&own).ok()?;
        // Random access keeps the kernel from reading the next window too.
        map.advise(Advice::HugePage).and_then(|()| map.advise(Advice::Random)).ok()?;
        Some(WindowReader(map))
    }

    /// Reads the window that begins at `offset`, and waits for it. `EFAULT` if it cannot be read.
    pub fn read(&self, offset: u64) -> io::Result<()> {
        // The file may have become shorter since it was opened.
        let left = self.0.len().checked_sub(offset as usize).filter(|&left| left > 0);
        let left = left.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        let (start, length) = (offset as usize, left.min(WINDOW_BYTES as usize));
        let read = self.0.advise_range(Advice::PopulateRead, start, length);
        // The pages stay in the page cache, and no longer count as memory of this process.
        // SAFETY: nobody reads through this mapping, whose pages are those of the file.
        unsafe { self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, start, length) }?;
        read
    }
}

/// Returns whether the kernel reads windows of [`WINDOW_BYTES`]: Linux 5.18 and later, and pages of 4 KiB. With pages of 64 KiB
/// they would have 512 MiB.
fn reads_windows() -> bool {
    static KNOWN: AtomicU8 = AtomicU8::new(u8::MAX);
    match KNOWN.load(Ordering::Relaxed) {
        u8::MAX => {
            let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
            let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
            let is_new = (numbers.next(), numbers.next()) >= (Some(5), Some(18));
            let reads = is_new && page_size() == 4096;
            KNOWN.store(u8::from(reads), Ordering::Relaxed);
            reads
        }
        known => known == 1,
    }
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
    #[cfg_attr(miri, ignore = "Miri has no pages")]
    fn a_mapping_shows_the_same_as_the_file() {
        let file = written();
        let page = page_size() as u64;
        let range = 3 * SAMPLE_BYTES + 5..4 * SAMPLE_BYTES;
        assert_eq!(mincore(&file, &range), Some(SAMPLE_BYTES / page));
        // SAFETY: `file` keeps the descriptor open, and the call takes no pointer.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        if let Some(cached) = cachestat(&file, &range) {
            assert_eq!(mincore(&file, &range), Some(cached));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pages")]
    fn a_window_is_read_and_nothing_else() {
        let mut file = tempfile::tempfile_in(".").expect("a file");
        file.write_all(&vec![1; LENGTH as usize]).and_then(|()| file.sync_all()).expect("write");
        // SAFETY: `file` keeps the descriptor open, and the call takes no pointer.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        let Some(windows) = WindowReader::new(&file) else { return };
        if cachestat(&file, &(0..LENGTH)) == Some(0) {
            windows.read(2 * WINDOW_BYTES).expect("read");
            assert_eq!(cached_bytes(&file, 0..LENGTH), Some(WINDOW_BYTES));
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
