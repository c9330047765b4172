//! Reads and maps the pages of a mapped file before they are touched.
//!
//! Touching a mapping costs a page fault every few pages, and a wait for the disk if the file is not in memory. Here
//! threads read what is missing from the page cache, then map the pages, many with one call (Linux 5.14 and later).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use memmap2::Advice;

use crate::error::{Error, Result};
use crate::read::read_ahead::{self, spawn};
use crate::read::source::{Mapping, OpenFile, shrank};
use crate::read::strategy::{COLD_READ_BYTES, DISK_READERS, ReadStrategy};
use crate::sys::filesystem::Scope;
use crate::sys::memory_limit::available_memory;
use crate::sys::page_cache::{Residency, WINDOW_BYTES, is_cached};
use crate::sys::parallel::{self, CHUNK_BYTES};
use crate::sys::threads::ThreadLimit;

/// When the pages of a mapping are read and mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefault {
    /// After the call returned, by background threads.
    Background,
    /// Before the call returns.
    Wait,
}

/// The bytes that are mapped with one call. Allocations of other threads wait for that call, because it locks the
/// process's mappings: some 30 microseconds for this size.
const POPULATE_BYTES: usize = 1 << 20;

/// Smaller mappings are not worth a thread: starting it takes longer than all their page faults.
pub(super) const BACKGROUND_BYTES: usize = 16 << 20;

/// Starts to read and map all of `mappings`, one after the other. Errors of reads will show when the pages are touched.
pub(crate) fn start(mappings: &[&Arc<Mapping>]) -> Result<()> {
    let total: usize = mappings.iter().map(|mapping| mapping.len()).sum();
    let threads = ThreadLimit::current()?;
    if total >= BACKGROUND_BYTES && threads.cap_background(1) > 0 {
        Prefaulter::start(mappings, total as u64, threads);
    }
    Ok(())
}

/// Reads and maps `bytes` of `mapping` before it returns. `explain` gets the error of a part of them, and that part.
pub(crate) fn wait(
    mapping: &Mapping,
    bytes: Range<usize>,
    explain: impl Fn(Error, Range<u64>) -> Error + Sync,
) -> Result<()> {
    // Opening the file takes longer than faulting in a few pages.
    let reopened = (bytes.len() >= COLD_READ_BYTES).then(|| mapping.reopen()).flatten();
    let file = reopened.as_ref();
    let threads = ThreadLimit::current()?;
    let wanted = parallel::thread_count(threads, bytes.len(), bytes.len().div_ceil(CHUNK_BYTES));
    let strategy = strategy_of(file, bytes.clone(), wanted, threads);
    let first = bytes.start / strategy.chunk_bytes;
    let count = bytes.end.div_ceil(strategy.chunk_bytes) - first;
    parallel::for_each(count, strategy.threads, |chunk| {
        let whole = chunk_range(mapping, strategy, first + chunk);
        let part = whole.start.max(bytes.start)..whole.end.min(bytes.end);
        read_and_map(mapping, file, part.clone(), strategy)
            .map_err(|error| explain(error, part.start as u64..part.end as u64))
    })
}

fn strategy_of(
    file: Option<&OpenFile>,
    bytes: Range<usize>,
    wanted: usize,
    threads: ThreadLimit,
) -> ReadStrategy {
    match file {
        Some(file) => {
            let extent = bytes.start as u64..bytes.end as u64;
            ReadStrategy::of_mapped(file, bytes.len(), || extent, wanted, threads)
        }
        None => ReadStrategy::in_memory(Residency::Unknown, wanted),
    }
}

/// Reads and maps the pages of `bytes`. Reads from `file`, if it was reopened. The kind of the error is `FileChanged` if the
/// file ends before them.
pub(crate) fn read_and_map(
    mapping: &Mapping,
    file: Option<&OpenFile>,
    bytes: Range<usize>,
    strategy: ReadStrategy,
) -> Result<()> {
    let (end, path) = (bytes.end as u64, mapping.path());
    populate(mapping, file, bytes, strategy).map_err(|source| {
        let is_shorter = |file: &OpenFile| file.file.metadata().is_ok_and(|metadata| metadata.len() < end);
        let is_short = || file.map_or_else(|| mapping.reopen().as_ref().is_some_and(is_shorter), is_shorter);
        match source.raw_os_error() {
            // Touching the page would raise SIGBUS: it is beyond the end of the file, or the disk has failed.
            Some(libc::EFAULT) if is_short() => shrank(path),
            Some(libc::EFAULT) => Error::io("read", path, io::Error::from_raw_os_error(libc::EIO)),
            _ if source.kind() == io::ErrorKind::UnexpectedEof => shrank(path),
            _ => Error::io("read", path, source),
        }
    })
}

/// The state that the threads of one mapping share.
struct Prefaulter {
    /// Weak, so that the threads stop when the last tensor is freed.
    mapping: Weak<Mapping>,
    /// None if the file could not be reopened.
    file: Option<OpenFile>,
    next: AtomicUsize,
}

/// Returns how one of several mappings with `total` bytes together is prefaulted in the background, and by how many threads:
/// 0 if demand paging is better.
pub(super) fn background_plan(
    file: Option<&OpenFile>,
    bytes: usize,
    total: u64,
    threads: ThreadLimit,
) -> (ReadStrategy, usize) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let strategy = strategy_of(file, 0..bytes, (cores / 2).clamp(1, DISK_READERS), threads);
    let is_worth_it = total >= BACKGROUND_BYTES as u64 && fits(strategy.residency, total, available_memory());
    (strategy, if is_worth_it { threads.cap_background(strategy.threads) } else { 0 })
}

/// Returns false for files that would evict themselves, or everything else, from memory.
fn fits(residency: Residency, bytes: u64, available: Option<u64>) -> bool {
    residency == Residency::Cached || available.is_some_and(|available| bytes <= available / 2)
}

impl Prefaulter {
    /// Starts a thread that prefaults `mappings`, which have `total` bytes together, one after the other.
    fn start(mappings: &[&Arc<Mapping>], total: u64, threads: ThreadLimit) {
        let mappings: Vec<Weak<Mapping>> = mappings.iter().map(|mapping| Arc::downgrade(mapping)).collect();
        spawn(move || mappings.into_iter().for_each(|mapping| Prefaulter::run(mapping, total, threads)));
    }

    /// Prefaults one mapping on this thread and as many others as are worth it.
    fn run(mapping: Weak<Mapping>, total: u64, threads: ThreadLimit) {
        let Some(mapped) = mapping.upgrade() else { return };
        let file = mapped.reopen();
        let (strategy, readers) = background_plan(file.as_ref(), mapped.len(), total, threads);
        drop(mapped);
        if readers == 0 {
            return;
        }
        let shared = Arc::new(Prefaulter { mapping, file, next: AtomicUsize::new(0) });
        for _ in 1..readers {
            let shared = Arc::clone(&shared);
            spawn(move || shared.work(strategy));
        }
        shared.work(strategy);
    }

    /// Takes chunks until none is left or the mapping is gone.
    fn work(&self, strategy: ReadStrategy) {
        let is_cached_at_start = strategy.residency == Residency::Cached;
        while let Some(mapping) = self.mapping.upgrade() {
            let count = mapping.len().div_ceil(strategy.chunk_bytes);
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            if turn >= count {
                return;
            }
            // Backwards, so that the threads and a caller that reads forwards meet once: from the same end, they would wait
            // for each other all the way. What must be read comes in the order in which tensors are usually read.
            let chunk = if is_cached_at_start { count - 1 - turn } else { turn };
            let bytes = chunk_range(&mapping, strategy, chunk);
            // The residency is that of samples. Chunks that turn out to be cold are left to demand paging.
            let range = bytes.start as u64..bytes.end as u64;
            let file = self.file.as_ref();
            if is_cached_at_start && file.is_some_and(|opened| !is_cached(&opened.file, range)) {
                continue;
            }
            // The error will show when the page is touched.
            if populate(&mapping, file, bytes, strategy).is_err() {
                return;
            }
        }
    }
}

fn chunk_range(mapping: &Mapping, strategy: ReadStrategy, chunk: usize) -> Range<usize> {
    let start = chunk * strategy.chunk_bytes;
    start..mapping.len().min(start + strategy.chunk_bytes)
}

/// Maps the pages of `bytes`, after reading those that are not in memory.
fn populate(
    mapping: &Mapping,
    file: Option<&OpenFile>,
    bytes: Range<usize>,
    strategy: ReadStrategy,
) -> io::Result<()> {
    let (from, to) = (bytes.start as u64, bytes.end as u64);
    if let Some(opened) = file {
        let file = &opened.file;
        // The last window of a file is shorter.
        let is_whole = to - from >= WINDOW_BYTES || bytes.end == mapping.len();
        let windows = (strategy.scope == Scope::Fuse && from.is_multiple_of(WINDOW_BYTES) && is_whole)
            .then(|| opened.windows())
            .flatten();
        match strategy.residency {
            // They are probably cached, and copying them would take as long as a load.
            Residency::Unknown if !strategy.scope.is_remote() => read_ahead::request(file, from..to),
            Residency::Cached | Residency::Cold if is_cached(file, from..to) => {}
            _ => match windows {
                Some(windows) => {
                    (from..to).step_by(WINDOW_BYTES as usize).try_for_each(|at| windows.read(at))?
                }
                None => read_through(file, from..to)?,
            },
        }
    }
    for start in bytes.clone().step_by(POPULATE_BYTES) {
        let length = POPULATE_BYTES.min(bytes.end - start);
        match mapping.advise(Advice::PopulateRead, start, length) {
            Ok(()) => {}
            // Linux before 5.14: the pages are mapped when they are touched.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads `range` into the page cache, and waits for it.
fn read_through(file: &File, range: Range<u64>) -> io::Result<()> {
    let mut scratch = vec![0; COLD_READ_BYTES.min((range.end - range.start) as usize)];
    let mut position = range.start;
    while position < range.end {
        let wanted = (scratch.len() as u64).min(range.end - position) as usize;
        file.read_exact_at(&mut scratch[..wanted], position)?;
        position += wanted as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::path::Path;
    use std::time::{Duration, Instant};

    const BYTES: usize = 2 * BACKGROUND_BYTES + 12345;

    /// A mapped file of [`BYTES`] bytes.
    fn mapped() -> (tempfile::NamedTempFile, Arc<Mapping>) {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(&vec![7; BYTES]).expect("write");
        let opened = file.reopen().expect("open");
        let mapping = map(opened, file.path(), BYTES);
        (file, mapping)
    }

    fn map(file: File, path: &Path, length: usize) -> Arc<Mapping> {
        let file = OpenFile::new(file, path);
        Arc::new(Mapping::new(&file, length as u64).expect("map"))
    }

    fn wait_for(mapping: &Mapping) -> Result<()> {
        wait(mapping, 0..mapping.len(), |error, _| error)
    }

    #[test]
    fn wait_maps_the_pages_of_a_part() {
        let (_file, mapping) = mapped();
        let part = CHUNK_BYTES - 100..CHUNK_BYTES + 100;
        wait(&mapping, part, |error, _| error).expect("prefault");
        let touched = resident(&mapping);
        assert!(touched > 0 && touched < CHUNK_BYTES as u64, "{touched}");
    }

    fn assert_soon(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(Instant::now() < deadline, "not within 20 seconds");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// How many bytes of the mapping this process has page table entries for.
    fn resident(mapping: &Mapping) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
        let head = format!("{:x}-", mapping.as_ptr().addr());
        let entry = smaps.split_once(&head).expect("the mapping is listed").1;
        let line = entry.lines().find_map(|line| line.strip_prefix("Rss:")).expect("Rss");
        line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
    }

    #[test]
    fn what_must_be_read_is_not_where_it_would_fill_the_memory() {
        let half = Some(2_000_000);
        for residency in [Residency::Cold, Residency::Unknown] {
            assert!(fits(residency, 1_000_000, half));
            assert!(!fits(residency, 1_000_001, half) && !fits(residency, 1, None));
        }
        assert!(fits(Residency::Cached, u64::MAX, None));
    }

    #[test]
    fn reopens_only_the_same_file() {
        let (file, mapping) = mapped();
        let path = file.path().to_path_buf();
        let opened = mapping.reopen().expect("exists");
        assert_eq!((opened.path, opened.file.metadata().expect("open").len()), (path.clone(), BYTES as u64));
        let moved = path.with_extension("moved");
        std::fs::rename(&path, &moved).expect("renamed");
        assert!(mapping.reopen().is_none(), "gone");
        std::fs::write(&path, vec![7; BYTES]).expect("written");
        assert!(mapping.reopen().is_none(), "another file");
        // Its pages can only be read through the mapping.
        wait_for(&mapping).expect("prefault");
        assert!(resident(&mapping) >= BYTES as u64);
        std::fs::rename(&moved, &path).expect("renamed");
        assert!(mapping.reopen().is_some(), "back again");
    }

    #[test]
    fn maps_files_of_unknown_residency() {
        let (_file, mapping) = mapped();
        read_and_map(&mapping, None, 0..BYTES, ReadStrategy::in_memory(Residency::Unknown, 1))
            .expect("mapped");
        assert!(resident(&mapping) >= BYTES as u64);
    }

    #[test]
    fn starts_no_thread_for_a_small_mapping() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(BACKGROUND_BYTES as u64 - 1).expect("grow");
        let mapping = map(file, "small".as_ref(), BACKGROUND_BYTES - 1);
        start(&[&mapping]).expect("prefault");
        assert_eq!((Arc::strong_count(&mapping), Arc::weak_count(&mapping)), (1, 0));
    }

    #[test]
    fn prefaults_several_mappings() {
        let several = [mapped(), mapped(), mapped()];
        let mappings: Vec<&Arc<Mapping>> = several.iter().map(|(_, mapping)| mapping).collect();
        start(&mappings).expect("prefault");
        assert_soon(|| mappings.iter().all(|mapping| resident(mapping) >= BYTES as u64));
    }

    #[test]
    fn wait_maps_every_page() {
        let (_file, mapping) = mapped();
        assert_eq!(resident(&mapping), 0);
        wait_for(&mapping).expect("prefault");
        assert!(resident(&mapping) >= BYTES as u64, "{}", resident(&mapping));
    }

    #[test]
    fn background_maps_every_page() {
        let (_file, mapping) = mapped();
        start(&[&mapping]).expect("prefault");
        assert_soon(|| resident(&mapping) >= BYTES as u64);
    }

    #[test]
    fn wait_fails_for_a_truncated_file() {
        let (file, mapping) = mapped();
        file.as_file().set_len(100_000).expect("cut");
        let error = wait_for(&mapping).expect_err("cut short");
        assert_eq!(error.kind(), crate::ErrorKind::FileChanged);
        start(&[&mapping]).expect("errors are ignored");
    }

    #[test]
    fn background_threads_stop_when_the_mapping_is_dropped() {
        let (_file, mapping) = mapped();
        let watched = Arc::downgrade(&mapping);
        start(&[&mapping]).expect("prefault");
        drop(mapping);
        assert_soon(|| watched.strong_count() == 0);
    }
}
