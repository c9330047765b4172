//! Brings the pages of a mapped file into reach before they are touched.
//!
//! Touching a mapping costs a page fault every few pages, and where the file is not in memory a wait for the disk. Here
//! threads go through the mapping in file order: what the page cache lacks is read with large reads, and then whole
//! pieces are mapped with one call. Only page tables and the page cache change, never a byte.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use memmap2::Advice;

use crate::error::{Error, Result};
use crate::page_cache::{available_memory, cached_bytes};
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

/// Smaller mappings are not worth a thread: all their faults together take less than starting it.
const BACKGROUND_BYTES: usize = 16 << 20;

/// The bytes of one read of what is not in the page cache; they stay in the processor's cache.
const READ_BYTES: usize = 1 << 20;

/// How many reads of a file are on their way at a time where it is not in the page cache.
const COLD_READERS: usize = 4;

/// Brings in all of `mapping`, which is of `file`.
///
/// # Errors
///
/// With [`Prefault::Wait`] alone: [`ErrorKind::Io`](crate::ErrorKind::Io) where a read fails,
/// [`ErrorKind::FileChanged`](crate::ErrorKind::FileChanged) where the file is shorter than the mapping.
pub fn prefault(mapping: &Arc<Mapping>, file: &OpenFile, when: Prefault) -> Result<()> {
    let pieces = mapping.len().div_ceil(CHUNK_BYTES);
    let cold = is_cold(mapping, &file.file);
    match when {
        Prefault::Wait => {
            let threads = parallel::threads_for(mapping.len(), pieces);
            let threads = if cold { threads.max(COLD_READERS.min(pieces)) } else { threads };
            parallel::pull(pieces, threads, |piece| {
                bring_in(mapping, &file.file, piece, true).map_err(|source| match source.raw_os_error() {
                    // What populating answers where touching would raise a signal.
                    Some(libc::EFAULT) => shrank(&file.path),
                    _ if source.kind() == io::ErrorKind::UnexpectedEof => shrank(&file.path),
                    _ => Error::io("read", &file.path, source),
                })
            })
        }
        Prefault::Background => {
            if mapping.len() < BACKGROUND_BYTES {
                return Ok(());
            }
            // What is cold stays so where it would push out itself, or all else.
            let read_cold = cold && available_memory().is_some_and(|bytes| mapping.len() as u64 <= bytes / 2);
            let threads = if read_cold { COLD_READERS.min(pieces) } else { 1 };
            let next = Arc::new(AtomicUsize::new(0));
            for _ in 0..threads {
                let Ok(file) = file.file.try_clone() else { break };
                let (mapping, next) = (Arc::downgrade(mapping), Arc::clone(&next));
                let work = move || while bring_in_next(&mapping, &file, &next, read_cold) {};
                // Without threads or descriptors to spare the pages come when they are touched.
                if std::thread::Builder::new().name("sft-prefault".into()).spawn(work).is_err() {
                    break;
                }
            }
            Ok(())
        }
    }
}

/// Whether part of the file must come from the disk. Files of which the kernel cannot tell are taken for cached:
/// populating them reads them too, if less well.
fn is_cold(mapping: &Mapping, file: &File) -> bool {
    let length = mapping.len() as u64;
    cached_bytes(file, 0..length).is_some_and(|cached| cached < length)
}

/// One step of a background thread; `false` once there is nothing left to do, or nobody to do it for.
fn bring_in_next(mapping: &Weak<Mapping>, file: &File, next: &AtomicUsize, read_cold: bool) -> bool {
    let Some(mapping) = mapping.upgrade() else { return false };
    let piece = next.fetch_add(1, Ordering::Relaxed);
    // An error is for whoever touches the page to see.
    piece < mapping.len().div_ceil(CHUNK_BYTES) && bring_in(&mapping, file, piece, read_cold).is_ok()
}

/// Brings in piece number `piece`; with `read_cold` also where it must come from the disk.
fn bring_in(mapping: &Mapping, file: &File, piece: usize, read_cold: bool) -> io::Result<()> {
    let start = piece * CHUNK_BYTES;
    let length = CHUNK_BYTES.min(mapping.len() - start);
    let (from, to) = (start as u64, (start + length) as u64);
    if cached_bytes(file, from..to).is_some_and(|cached| cached < length as u64) {
        if !read_cold {
            return Ok(());
        }
        let mut scratch = vec![0; READ_BYTES.min(length)];
        let mut position = from;
        while position < to {
            let wanted = (scratch.len() as u64).min(to - position) as usize;
            file.read_exact_at(&mut scratch[..wanted], position)?;
            position += wanted as u64;
        }
    }
    match mapping.advise(Advice::PopulateRead, start, length) {
        // A kernel before 5.14: the pages come when they are touched.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        outcome => outcome,
    }
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
