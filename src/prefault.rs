//! Brings the pages of a mapped file into reach before they are touched.
//!
//! Touching a mapping costs a page fault every few pages, and where the file is not in memory a wait for the disk. Here
//! threads go through the mapping in file order: what the page cache lacks is read with large reads, and then whole
//! pieces are mapped with one call. Only page tables and the page cache change, never a byte.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use memmap2::Advice;

use crate::error::{Error, Result};
use crate::page_cache::{COLD_READ_BYTES, COLD_READERS, available_memory, cached_bytes, looks_cold};
use crate::parallel::{self, CHUNK_BYTES};
use crate::source::{Mapping, OpenFile, shrank};

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

/// Brings in all of `mapping`, which is of `file`.
///
/// # Errors
///
/// With [`Prefault::Wait`] alone: [`ErrorKind::Io`](crate::ErrorKind::Io) where a read fails,
/// [`ErrorKind::FileChanged`](crate::ErrorKind::FileChanged) where the file is shorter than the mapping.
pub fn prefault(mapping: &Arc<Mapping>, file: &OpenFile, when: Prefault) -> Result<()> {
    match when {
        Prefault::Wait => wait(mapping, file),
        Prefault::Background if mapping.len() >= BACKGROUND_BYTES => {
            Crew::start(mapping, &file.file);
            Ok(())
        }
        Prefault::Background => Ok(()),
    }
}

fn wait(mapping: &Mapping, file: &OpenFile) -> Result<()> {
    let pieces = pieces_of(mapping);
    let cold = looks_cold(&file.file, 0..mapping.len() as u64);
    let threads = parallel::threads_for(mapping.len(), pieces).max(if cold { COLD_READERS } else { 1 });
    parallel::pull(pieces, threads, |piece| bring_in(mapping, file, bytes_of(mapping, piece)))
}

/// Brings in the pages of `bytes`, from the disk if need be.
///
/// # Errors
///
/// [`ErrorKind::Io`](crate::ErrorKind::Io), and [`ErrorKind::FileChanged`](crate::ErrorKind::FileChanged) where the
/// file ends before them.
pub(crate) fn bring_in(mapping: &Mapping, file: &OpenFile, bytes: Range<usize>) -> Result<()> {
    populate(mapping, &file.file, bytes, true).map_err(|source| match source.raw_os_error() {
        // What populating answers where touching would raise a signal.
        Some(libc::EFAULT) => shrank(&file.path),
        _ if source.kind() == io::ErrorKind::UnexpectedEof => shrank(&file.path),
        _ => Error::io("read", &file.path, source),
    })
}

/// The threads that bring in one mapping, and what they share.
struct Crew {
    /// Not an `Arc`: whoever owns the mapping decides how long it lives.
    mapping: Weak<Mapping>,
    file: File,
    next: AtomicUsize,
}

impl Crew {
    /// Starts the first thread. Without threads or descriptors to spare the pages come when they are touched.
    fn start(mapping: &Arc<Mapping>, file: &File) {
        let Ok(file) = file.try_clone() else { return };
        let crew = Arc::new(Crew { mapping: Arc::downgrade(mapping), file, next: AtomicUsize::new(0) });
        crew.spawn(|crew| crew.lead());
    }

    fn spawn(self: &Arc<Crew>, work: impl FnOnce(&Arc<Crew>) + Send + 'static) {
        let crew = Arc::clone(self);
        let _ = std::thread::Builder::new().name("sft-prefault".into()).spawn(move || work(&crew));
    }

    /// Looks how much there is to do, gets help for it, and works too.
    fn lead(self: &Arc<Crew>) {
        let Some(mapping) = self.mapping.upgrade() else { return };
        // What is cold stays so where it would push out itself, or all else.
        let cold = looks_cold(&self.file, 0..mapping.len() as u64);
        let read_cold = cold && available_memory().is_some_and(|bytes| mapping.len() as u64 <= bytes / 2);
        drop(mapping);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if read_cold { COLD_READERS } else { (cores / 2).clamp(1, COLD_READERS) };
        for _ in 1..threads {
            self.spawn(move |crew| crew.work(read_cold));
        }
        self.work(read_cold);
    }

    /// Brings in pieces until none is left, or nobody wants them any more.
    fn work(&self, read_cold: bool) {
        while let Some(mapping) = self.mapping.upgrade() {
            let (pieces, turn) = (pieces_of(&mapping), self.next.fetch_add(1, Ordering::Relaxed));
            if turn >= pieces {
                return;
            }
            // What the disk has comes in the order in which it is probably wanted. What is in memory comes from the
            // end on: whoever goes through the file at once meets this thread half-way, where a race from the same
            // start would have both wait for each other.
            let piece = if read_cold { turn } else { pieces - 1 - turn };
            // An error is for whoever touches the page to see.
            if populate(&mapping, &self.file, bytes_of(&mapping, piece), read_cold).is_err() {
                return;
            }
        }
    }
}

fn pieces_of(mapping: &Mapping) -> usize {
    mapping.len().div_ceil(CHUNK_BYTES)
}

/// The bytes of piece number `piece`.
fn bytes_of(mapping: &Mapping, piece: usize) -> Range<usize> {
    let start = piece * CHUNK_BYTES;
    start..mapping.len().min(start + CHUNK_BYTES)
}

/// Brings in the pages of `bytes`; with `read_cold` also where they must come from the disk.
fn populate(mapping: &Mapping, file: &File, bytes: Range<usize>, read_cold: bool) -> io::Result<()> {
    let (from, to) = (bytes.start as u64, bytes.end as u64);
    if cached_bytes(file, from..to).is_some_and(|cached| cached < to - from) {
        if !read_cold {
            return Ok(());
        }
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
            // A kernel before 5.14: the pages come when they are touched.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Source;
    use std::io::Write;
    use std::time::{Duration, Instant};

    const BYTES: usize = 2 * BACKGROUND_BYTES + 12345;

    /// A mapped file of [`BYTES`] bytes.
    fn mapped() -> (tempfile::NamedTempFile, Source) {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(&vec![7; BYTES]).expect("write");
        let opened =
            OpenFile { file: File::open(file.path()).expect("open"), path: file.path().to_path_buf() };
        let source = Source::mapped(opened, BYTES as u64).expect("map");
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
    fn waiting_maps_every_page() {
        let (_file, source) = mapped();
        let Source::Mapped(mapping, opened) = &source else { panic!("mapped") };
        assert_eq!(resident(mapping), 0);
        prefault(mapping, opened, Prefault::Wait).expect("prefault");
        assert!(resident(mapping) >= BYTES as u64, "{}", resident(mapping));
    }

    #[test]
    fn the_background_maps_every_page_in_the_end() {
        let (_file, source) = mapped();
        let Source::Mapped(mapping, opened) = &source else { panic!("mapped") };
        prefault(mapping, opened, Prefault::Background).expect("prefault");
        let deadline = Instant::now() + Duration::from_secs(20);
        while resident(mapping) < BYTES as u64 {
            assert!(Instant::now() < deadline, "only {} bytes came", resident(mapping));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_file_cut_short_is_an_error_for_who_waits() {
        let (file, source) = mapped();
        let Source::Mapped(mapping, opened) = &source else { panic!("mapped") };
        file.as_file().set_len(100_000).expect("cut");
        let error = prefault(mapping, opened, Prefault::Wait).expect_err("cut short");
        assert_eq!(error.kind(), crate::ErrorKind::FileChanged);
        prefault(mapping, opened, Prefault::Background).expect("nobody waits");
    }

    #[test]
    fn a_background_thread_lets_go_of_a_mapping_that_nobody_wants() {
        let (_file, source) = mapped();
        let Source::Mapped(mapping, opened) = &source else { panic!("mapped") };
        let watched = Arc::downgrade(mapping);
        prefault(mapping, opened, Prefault::Background).expect("prefault");
        drop(source);
        let deadline = Instant::now() + Duration::from_secs(20);
        while watched.strong_count() > 0 {
            assert!(Instant::now() < deadline, "still mapped");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
