//! Brings the pages of a mapped file into reach before they are touched.
//!
//! Touching a mapping costs a page fault every few pages, and where the file is not in memory a wait for the disk. Here
//! threads go through the mapping piece by piece: what the page cache lacks is read, and then the pages are mapped, many
//! with one call (Linux 5.14 and later). Only page tables and the page cache change, never a byte.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use memmap2::Advice;

use crate::error::{Error, Result};
use crate::read::source::{Mapping, OpenFile, shrank};
use crate::sys::memory_limit::available_memory;
use crate::sys::page_cache::{COLD_READ_BYTES, COLD_READERS, Residency, is_cached, residency};
use crate::sys::parallel::{self, CHUNK_BYTES};
use crate::sys::populate::is_resident;
use crate::sys::threads::ThreadLimit;

/// When the pages of a mapping are brought in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefault {
    /// By threads of their own, while the caller goes on.
    Background,
    /// Before the call returns.
    Wait,
}

/// The bytes that are mapped with one call. The kernel keeps the process from changing its mappings meanwhile, so that
/// another thread's allocation may have to wait for it: for some 30 microseconds, and not for 8 times that.
const POPULATE_BYTES: usize = 1 << 20;

/// Smaller mappings are not worth a thread: all their faults together take less than starting it.
const BACKGROUND_BYTES: usize = 16 << 20;

/// Fewer bytes come with the page that is touched: the kernel reads as many around it.
const READ_AHEAD_BYTES: usize = 128 << 10;

/// How often the kernel is asked for what it did not read.
const ROUNDS: usize = 3;

/// Has the kernel read what of `bytes`, which are about to be used, is not in memory. Waits for none of it: many requests
/// are under way at once, where touching the pages sends one or two and waits for them.
pub(crate) fn read_ahead(mapping: &Arc<Mapping>, bytes: Range<usize>) {
    if bytes.len() < BACKGROUND_BYTES {
        request(mapping, bytes);
        return;
    }
    if looks_resident(mapping, &bytes) {
        return;
    }
    // Sending that many requests is waiting too: without a thread for it, the pages come when they are touched.
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

/// Asks the kernel to read `bytes`, unless they seem to be in memory, or hardly worth it.
fn request(mapping: &Mapping, bytes: Range<usize>) {
    if bytes.len() >= READ_AHEAD_BYTES && !looks_resident(mapping, &bytes) {
        // With one call the kernel reads no more than it reads ahead anyway. A filesystem with many requests under way
        // (FUSE) drops the last calls of a round; what no round brings is read when it is touched.
        for _ in 0..ROUNDS {
            for start in bytes.clone().step_by(READ_AHEAD_BYTES) {
                let length = READ_AHEAD_BYTES.min(bytes.end - start);
                if !looks_resident(mapping, &(start..start + length)) {
                    let _ = mapping.advise(Advice::WillNeed, start, length);
                }
            }
        }
    }
}

/// Whether both ends and the middle of `bytes` are in memory. Asking for every page would take longer than using those
/// that are. Of a file that this process may neither own nor write to, the kernel says that all of it is.
fn looks_resident(mapping: &Mapping, bytes: &Range<usize>) -> bool {
    [bytes.start, bytes.start.midpoint(bytes.end), bytes.end - 1]
        .into_iter()
        .all(|at| is_resident(mapping.as_ptr().wrapping_add(at)))
}

/// Brings in all of `mappings`, each of its file, one after the other.
///
/// # Errors
///
/// Those of [`threads`](crate::threads()). With [`Prefault::Wait`] alone: [`ErrorKind::Io`](crate::ErrorKind::Io) where a
/// read fails, [`ErrorKind::FileChanged`](crate::ErrorKind::FileChanged) where the file is shorter than the mapping.
pub(crate) fn prefault(mappings: &[&Arc<Mapping>], when: Prefault) -> Result<()> {
    if when == Prefault::Wait {
        return mappings.iter().try_for_each(|mapping| wait(mapping));
    }
    let total: usize = mappings.iter().map(|mapping| mapping.len()).sum();
    // The caller is one thread, and goes on.
    let threads = ThreadLimit::current()?;
    if total >= BACKGROUND_BYTES && threads.cap_background(1) > 0 {
        Prefaulter::start(mappings, total as u64, threads);
    }
    Ok(())
}

fn wait(mapping: &Mapping) -> Result<()> {
    let pieces = pieces_of(mapping);
    let reopened = mapping.reopen();
    let file = reopened.as_ref();
    let residency = residency_of(mapping, file.map(|opened| &opened.file));
    let threads = ThreadLimit::current()?;
    let readers = if residency == Residency::Cold { threads.cap(COLD_READERS) } else { 1 };
    parallel::for_each(pieces, parallel::thread_count(threads, mapping.len(), pieces).max(readers), |piece| {
        bring_in(mapping, file, bytes_of(mapping, piece), residency)
    })
}

fn residency_of(mapping: &Mapping, file: Option<&File>) -> Residency {
    file.map_or(Residency::Unknown, |file| residency(file, 0..mapping.len() as u64))
}

/// Brings in the pages of `bytes`, from the disk if need be: by reads of `file`, if it was opened again and its
/// `residency` is known.
///
/// # Errors
///
/// [`ErrorKind::Io`](crate::ErrorKind::Io), and [`ErrorKind::FileChanged`](crate::ErrorKind::FileChanged) where the
/// file ends before them.
pub(crate) fn bring_in(
    mapping: &Mapping,
    file: Option<&OpenFile>,
    bytes: Range<usize>,
    residency: Residency,
) -> Result<()> {
    let (end, path) = (bytes.end as u64, mapping.path());
    populate(mapping, file.map(|opened| &opened.file), bytes, residency).map_err(|source| {
        let is_shorter = |file: &OpenFile| file.file.metadata().is_ok_and(|metadata| metadata.len() < end);
        let is_short = || file.map_or_else(|| mapping.reopen().as_ref().is_some_and(is_shorter), is_shorter);
        match source.raw_os_error() {
            // What populating answers where touching would raise a signal: beyond the end, or a disk that fails.
            Some(libc::EFAULT) if is_short() => shrank(path),
            Some(libc::EFAULT) => Error::io("read", path, io::Error::from_raw_os_error(libc::EIO)),
            _ if source.kind() == io::ErrorKind::UnexpectedEof => shrank(path),
            _ => Error::io("read", path, source),
        }
    })
}

/// The threads that bring in one mapping, and what they share.
struct Prefaulter {
    /// Not an `Arc`: whoever owns the mapping decides how long it lives.
    mapping: Weak<Mapping>,
    /// None if it is not at its path any more.
    file: Option<File>,
    next: AtomicUsize,
}

/// How a crew goes about its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    residency: Residency,
    threads: usize,
    /// From the end of the file to its start.
    backwards: bool,
}

impl Plan {
    /// The plan for a mapping, one of several with `bytes` together; `None` where its pages are better left to the touch.
    fn new(residency: Residency, bytes: u64, available: Option<u64>, cores: usize) -> Option<Plan> {
        // What may have to be read stays where it is if it would push out itself, or all else.
        let fits = available.is_some_and(|available| bytes <= available / 2);
        match residency {
            // Whoever goes through the file at once meets this crew half-way, where a race from the same start would
            // have both wait for each other.
            Residency::Cached => {
                Some(Plan { residency, threads: (cores / 2).clamp(1, COLD_READERS), backwards: true })
            }
            // In the order in which it is probably wanted.
            Residency::Cold if fits => Some(Plan { residency, threads: COLD_READERS, backwards: false }),
            Residency::Unknown if fits => Some(Plan { residency, threads: 1, backwards: false }),
            Residency::Cold | Residency::Unknown => None,
        }
    }
}

impl Prefaulter {
    /// Starts the thread that leads the crews of `mappings`, which have `total` bytes together. Without threads to spare
    /// the pages come when they are touched.
    fn start(mappings: &[&Arc<Mapping>], total: u64, threads: ThreadLimit) {
        let mappings: Vec<Weak<Mapping>> = mappings.iter().map(|mapping| Arc::downgrade(mapping)).collect();
        spawn(move || mappings.into_iter().for_each(|mapping| Prefaulter::lead(mapping, total, threads)));
    }

    /// Looks what there is to do, gets help for it, and works too. All mappings that are brought in have `total` bytes.
    fn lead(mapping: Weak<Mapping>, total: u64, threads: ThreadLimit) {
        let Some(mapped) = mapping.upgrade() else { return };
        let file = mapped.reopen().map(|opened| opened.file);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let plan = Plan::new(residency_of(&mapped, file.as_ref()), total, available_memory(), cores);
        drop(mapped);
        let Some(plan) = plan else { return };
        let crew = Arc::new(Prefaulter { mapping, file, next: AtomicUsize::new(0) });
        for _ in 1..threads.cap_background(plan.threads) {
            let crew = Arc::clone(&crew);
            spawn(move || crew.work(plan));
        }
        crew.work(plan);
    }

    /// Brings in pieces until none is left, or nobody wants them any more.
    fn work(&self, plan: Plan) {
        while let Some(mapping) = self.mapping.upgrade() {
            let (pieces, turn) = (pieces_of(&mapping), self.next.fetch_add(1, Ordering::Relaxed));
            if turn >= pieces {
                return;
            }
            let piece = if plan.backwards { pieces - 1 - turn } else { turn };
            let bytes = bytes_of(&mapping, piece);
            // Samples said that all of the file is in memory; what is not, for all that, stays on the disk.
            let range = bytes.start as u64..bytes.end as u64;
            if plan.residency == Residency::Cached
                && self.file.as_ref().is_some_and(|file| !is_cached(file, range))
            {
                continue;
            }
            // An error is for whoever touches the page to see.
            if populate(&mapping, self.file.as_ref(), bytes, plan.residency).is_err() {
                return;
            }
        }
    }
}

/// Has `work` done in the background, if there is a thread for it.
fn spawn(work: impl FnOnce() + Send + 'static) {
    let _ = std::thread::Builder::new().name("sft-prefault".into()).spawn(work);
}

fn pieces_of(mapping: &Mapping) -> usize {
    mapping.len().div_ceil(CHUNK_BYTES)
}

/// The bytes of piece number `piece`.
fn bytes_of(mapping: &Mapping, piece: usize) -> Range<usize> {
    let start = piece * CHUNK_BYTES;
    start..mapping.len().min(start + CHUNK_BYTES)
}

/// Brings in the pages of `bytes`, after it has read what is not in memory, or has asked the kernel to if it cannot know.
fn populate(
    mapping: &Mapping,
    file: Option<&File>,
    bytes: Range<usize>,
    residency: Residency,
) -> io::Result<()> {
    let (from, to) = (bytes.start as u64, bytes.end as u64);
    let known = file.filter(|_| residency != Residency::Unknown);
    if known.is_none() {
        request(mapping, bytes.clone());
    }
    if let Some(file) = known
        && !is_cached(file, from..to)
    {
        let mut scratch = vec![0; COLD_READ_BYTES.min(bytes.len())];
        let mut position = from;
        while position < to {
            let wanted = (scratch.len() as u64).min(to - position) as usize;
            file.read_exact_at(&mut scratch[..wanted], position)?;
            position += wanted as u64;
        }
    }
    for start in bytes.clone().step_by(POPULATE_BYTES) {
        let length = POPULATE_BYTES.min(bytes.end - start);
        match mapping.advise(Advice::PopulateRead, start, length) {
            Ok(()) => {}
            // Linux before 5.14: the pages come when they are touched.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::read::source::Source;
    use std::io::Write;
    use std::time::{Duration, Instant};

    const BYTES: usize = 2 * BACKGROUND_BYTES + 12345;

    /// A mapped file of [`BYTES`] bytes.
    fn mapped() -> (tempfile::NamedTempFile, Source) {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(&vec![7; BYTES]).expect("write");
        let opened =
            OpenFile { file: File::open(file.path()).expect("open"), path: file.path().to_path_buf() };
        let source = Source::mapped(&opened, BYTES as u64).expect("map");
        (file, source)
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
            assert!(Plan::new(residency, 1_000_000, half, 2).is_some_and(|plan| !plan.backwards));
            assert_eq!(Plan::new(residency, 1_000_001, half, 2), None);
            assert_eq!(Plan::new(residency, 1, None, 2), None);
        }
        assert_eq!(Plan::new(Residency::Cold, 1, half, 2).map(|plan| plan.threads), Some(COLD_READERS));
        assert_eq!(Plan::new(Residency::Unknown, 1, half, 64).map(|plan| plan.threads), Some(1));
        for (cores, threads) in [(1, 1), (2, 1), (4, 2), (64, COLD_READERS)] {
            let plan = Plan::new(Residency::Cached, u64::MAX, None, cores).expect("nothing to read");
            assert!(plan.backwards && plan.threads == threads);
        }
    }

    #[test]
    fn only_the_same_file_is_opened_again() {
        let (file, source) = mapped();
        let Source::Mapped(mapping) = &source else { panic!("mapped") };
        let path = file.path().to_path_buf();
        let opened = mapping.reopen().expect("it is there");
        assert_eq!((opened.path, opened.file.metadata().expect("open").len()), (path.clone(), BYTES as u64));
        let aside = path.with_extension("aside");
        std::fs::rename(&path, &aside).expect("renamed");
        assert!(mapping.reopen().is_none(), "gone");
        std::fs::write(&path, vec![7; BYTES]).expect("written");
        assert!(mapping.reopen().is_none(), "another one");
        // Its pages come from the mapping alone.
        prefault(&[mapping], Prefault::Wait).expect("prefault");
        assert!(resident(mapping) >= BYTES as u64);
        std::fs::rename(&aside, &path).expect("renamed");
        assert!(mapping.reopen().is_some(), "back again");
    }

    #[test]
    fn what_is_unknown_is_brought_in_too() {
        let (_file, source) = mapped();
        let Source::Mapped(mapping) = &source else { panic!("mapped") };
        bring_in(mapping, None, 0..BYTES, Residency::Unknown).expect("brought in");
        assert!(resident(mapping) >= BYTES as u64);
    }

    #[test]
    fn a_small_mapping_gets_no_thread() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(BACKGROUND_BYTES as u64 - 1).expect("grow");
        let opened = OpenFile { file, path: "small".into() };
        let source = Source::mapped(&opened, BACKGROUND_BYTES as u64 - 1).expect("map");
        let Source::Mapped(mapping) = &source else { panic!("mapped") };
        prefault(&[mapping], Prefault::Background).expect("prefault");
        assert_eq!((Arc::strong_count(mapping), Arc::weak_count(mapping)), (1, 0));
    }

    #[test]
    fn several_mappings_come_one_after_the_other() {
        let several = [mapped(), mapped(), mapped()];
        let parts: Vec<&Arc<Mapping>> = several
            .iter()
            .map(|(_, source)| match source {
                Source::Mapped(mapping) => mapping,
                _ => panic!("mapped"),
            })
            .collect();
        prefault(&parts, Prefault::Background).expect("prefault");
        let deadline = Instant::now() + Duration::from_secs(20);
        while parts.iter().any(|mapping| resident(mapping) < BYTES as u64) {
            assert!(Instant::now() < deadline, "not all came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn waiting_maps_every_page() {
        let (_file, source) = mapped();
        let Source::Mapped(mapping) = &source else { panic!("mapped") };
        assert_eq!(resident(mapping), 0);
        prefault(&[mapping], Prefault::Wait).expect("prefault");
        assert!(resident(mapping) >= BYTES as u64, "{}", resident(mapping));
    }

    #[test]
    fn the_background_maps_every_page_in_the_end() {
        let (_file, source) = mapped();
        let Source::Mapped(mapping) = &source else { panic!("mapped") };
        prefault(&[mapping], Prefault::Background).expect("prefault");
        let deadline = Instant::now() + Duration::from_secs(20);
        while resident(mapping) < BYTES as u64 {
            assert!(Instant::now() < deadline, "only {} bytes came", resident(mapping));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_file_cut_short_is_an_error_for_who_waits() {
        let (file, source) = mapped();
        let Source::Mapped(mapping) = &source else { panic!("mapped") };
        file.as_file().set_len(100_000).expect("cut");
        let error = prefault(&[mapping], Prefault::Wait).expect_err("cut short");
        assert_eq!(error.kind(), crate::ErrorKind::FileChanged);
        prefault(&[mapping], Prefault::Background).expect("nobody waits");
    }

    #[test]
    fn a_background_thread_lets_go_of_a_mapping_that_nobody_wants() {
        let (_file, source) = mapped();
        let Source::Mapped(mapping) = &source else { panic!("mapped") };
        let watched = Arc::downgrade(mapping);
        prefault(&[mapping], Prefault::Background).expect("prefault");
        drop(source);
        let deadline = Instant::now() + Duration::from_secs(20);
        while watched.strong_count() > 0 {
            assert!(Instant::now() < deadline, "still mapped");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
