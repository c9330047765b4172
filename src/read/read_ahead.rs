//! Asks the kernel to read parts of a mapped file that are about to be used. Waits for none of them.
//!
//! This keeps many requests in flight. Touching the pages sends one or two at a time and waits for each. On network
//! filesystems even a tensor is too small for that, so the next tensors are requested too if the program takes them one
//! after the other, or the same part of each.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

use crate::format::header::Header;
use crate::read::source::{Mapping, expect_sequential};
use crate::read::strategy::WINDOW_READERS;
use crate::sys::filesystem::{Filesystem, Scope};
use crate::sys::huge_pages::is_resident;
use crate::sys::memory_limit::available_memory;
use crate::sys::page_cache::{WINDOW_BYTES, is_surely_cached, page_size};
use crate::sys::threads::ThreadLimit;

/// From this size on, a thread sends the requests.
const BACKGROUND_BYTES: u64 = 16 << 20;

/// The bytes of one request. The kernel reads no more for one call, if the file is expected to be read sequentially.
const REQUEST_BYTES: u64 = 256 << 10;

/// Smaller parts of files on a disk are left to page faults. Smaller tensors on a network filesystem are requested as a
/// whole, and a program may leave them out.
const SMALL_BYTES: u64 = 128 << 10;

/// How far the next tensors are requested, as a distance in the file.
const AHEAD_BYTES: u64 = 64 << 20;

/// The most tensors that a program may leave out.
const AHEAD_TENSORS: usize = 64;

/// The most threads of this process that read ahead at once: four times as many as one tensor starts. Tensors that find all
/// of them busy are left to page faults.
const MOST_THREADS: u64 = 4 * WINDOW_READERS as u64;

static THREADS: Threads = Threads(AtomicU64::new(0));

/// The number of threads that were started, below the number of the process that has them: a forked child has none.
struct Threads(AtomicU64);

impl Threads {
    /// Returns `wanted` places, or those that are left.
    fn take(&'static self, wanted: usize) -> Places {
        let process = u64::from(std::process::id()) << 32;
        let mut taken = 0;
        let add = |threads: u64| {
            let count = if threads & !COUNT == process { threads & COUNT } else { 0 };
            taken = (wanted as u64).min(MOST_THREADS - count);
            Some(process | (count + taken))
        };
        // Nothing else is published with the number.
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        Places { threads: self, count: taken }
    }
}

const COUNT: u64 = u32::MAX as u64;

/// Threads that may be started. They count until this is dropped.
struct Places {
    threads: &'static Threads,
    count: u64,
}

impl Places {
    fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Removes one place, if there is one.
    fn pop(&mut self) -> Option<Places> {
        self.count = self.count.checked_sub(1)?;
        Some(Places { threads: self.threads, count: 1 })
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        self.threads.0.fetch_sub(self.count, Ordering::Relaxed);
    }
}

/// What an open file has been asked for. Wrong values, left by several threads at once, cost reads and nothing else.
#[derive(Debug, Default)]
pub(crate) struct ReadAhead {
    /// [`UNKNOWN`], [`LOCAL`], [`REMOTE`] or [`FUSE`].
    scope: AtomicU8,
    /// The last part that was asked for.
    previous: AtomicU64,
    /// The offset up to which this run of parts was requested; 0 without a run.
    requested: AtomicU64,
}

const UNKNOWN: u8 = 0;
const LOCAL: u8 = 1;
const REMOTE: u8 = 2;
const FUSE: u8 = 3;

/// Part of a tensor: the index of the tensor, and where the part begins and ends, in units of which a tensor has 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    index: u32,
    begin: u16,
    end: u16,
}

impl Part {
    fn new(index: usize, part: &Range<u64>, tensor: &Range<u64>) -> Part {
        let unit = |offset: u64| scale(offset - tensor.start, tensor.end - tensor.start, u64::from(u16::MAX));
        Part { index: index as u32, begin: unit(part.start) as u16, end: unit(part.end) as u16 }
    }

    fn pack(self) -> u64 {
        u64::from(self.index) << 32 | u64::from(self.begin) << 16 | u64::from(self.end)
    }

    fn unpack(packed: u64) -> Part {
        Part { index: (packed >> 32) as u32, begin: (packed >> 16) as u16, end: packed as u16 }
    }

    fn is_whole(self) -> bool {
        (self.begin, self.end) == (0, u16::MAX)
    }
}

/// Returns `offset` of `from` as an offset of `to`.
fn scale(offset: u64, from: u64, to: u64) -> u64 {
    (u128::from(offset) * u128::from(to) / u128::from(from.max(1))) as u64
}

impl ReadAhead {
    /// Starts to read `part` of the tensor at `index`, offsets in the file, if it is not in memory.
    pub(crate) fn part(&self, mapping: &Arc<Mapping>, header: &Header, index: usize, part: Range<u64>) {
        let bytes = part.end - part.start;
        let is_remote = self.scope.load(Ordering::Relaxed) >= REMOTE;
        if bytes < SMALL_BYTES && !is_remote {
            return;
        }
        let has_run = self.requested.load(Ordering::Relaxed) > 0;
        if !has_run && mapping.is_residency_known() && looks_resident(mapping, &part) {
            return;
        }
        let background = ThreadLimit::current().map_or(0, |threads| threads.cap_background(WINDOW_READERS));
        let scope = self.scope_of(mapping);
        let places = THREADS.take(if scope == FUSE { background } else { background.min(1) });
        let ranges = match scope {
            REMOTE | FUSE if !places.is_empty() => self.extend(mapping, header, index, part),
            // The kernel calls every page resident, so cached files would be asked for too.
            LOCAL if !mapping.is_residency_known() => return,
            _ => vec![part],
        };
        send(mapping, &ranges, places, scope == FUSE);
    }

    /// Returns the scope of the filesystem, which is looked up once.
    fn scope_of(&self, mapping: &Mapping) -> u8 {
        let known = self.scope.load(Ordering::Relaxed);
        if known != UNKNOWN {
            return known;
        }
        let scope = match mapping.reopen().map(|opened| Filesystem::of(&opened.file).scope) {
            Some(Scope::Fuse) => FUSE,
            Some(Scope::Remote) => REMOTE,
            Some(Scope::Local | Scope::Unknown) | None => LOCAL,
        };
        self.scope.store(scope, Ordering::Relaxed);
        scope
    }

    /// Notes that `part` of the tensor at `index` is needed. Returns what to request: the part, and those that follow if
    /// the program takes one after the other.
    fn extend(&self, mapping: &Mapping, header: &Header, index: usize, part: Range<u64>) -> Vec<Range<u64>> {
        let data_start = header.data_start();
        let range_of =
            |index| header.get(index).map(|tensor| data_start + tensor.begin..data_start + tensor.end);
        let is_small = |tensor: &Range<u64>| tensor.end - tensor.start < SMALL_BYTES;
        let Some(tensor) = range_of(index) else { return vec![part] };
        let previous = Part::unpack(self.previous.load(Ordering::Relaxed));
        let current = Part::new(index, &part, &tensor);
        if is_small(&tensor) && !(current.is_whole() && previous.is_whole()) {
            return Vec::new();
        }
        self.previous.store(current.pack(), Ordering::Relaxed);
        let mut between = (previous.index as usize + 1..index).take(AHEAD_TENSORS);
        let follows = (previous.index as usize) < index
            && index - previous.index as usize <= AHEAD_TENSORS
            && between.all(|index| range_of(index).is_some_and(|it| is_small(&it)));
        if !follows || (current.begin, current.end) != (previous.begin, previous.end) {
            let is_cached = mapping.is_residency_known() && looks_resident(mapping, &part);
            self.requested.store(if is_cached { 0 } else { part.end }, Ordering::Relaxed);
            return if is_cached { Vec::new() } else { vec![part] };
        }
        let requested = self.requested.load(Ordering::Relaxed);
        let limit = (part.end + AHEAD_BYTES) / WINDOW_BYTES * WINDOW_BYTES;
        let limit = limit.min(mapping.len() as u64);
        if requested >= limit || requested >= part.end + AHEAD_BYTES / 4 {
            return Vec::new();
        }
        self.requested.store(limit, Ordering::Relaxed);
        if current.is_whole() {
            let rest = requested.max(part.start)..limit;
            return vec![rest];
        }
        let mut ranges = if requested < part.end { vec![part.clone()] } else { Vec::new() };
        for next in (index + 1..header.len()).map_while(range_of) {
            if next.start >= limit {
                break;
            }
            if next.start < requested {
                continue;
            }
            let length = next.end - next.start;
            let at = |offset| next.start + scale(offset - tensor.start, tensor.end - tensor.start, length);
            let wanted = if is_small(&next) { next } else { at(part.start)..at(part.end) };
            match ranges.last_mut() {
                Some(last) if last.end == wanted.start => last.end = wanted.end,
                _ => ranges.push(wanted),
            }
        }
        ranges
    }
}

/// Requests `ranges`, on as many threads as there are `places` if they are many bytes. Without places, long ones are left to
/// page faults.
fn send(mapping: &Arc<Mapping>, ranges: &[Range<u64>], mut places: Places, by_window: bool) {
    let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let is_long = bytes >= BACKGROUND_BYTES || by_window || ranges.len() > 1;
    if bytes == 0 || is_long && places.is_empty() {
        return;
    }
    if is_long && available_memory().is_none_or(|available| bytes > available / 2) {
        return;
    }
    let Some(opened) = mapping.reopen() else { return };
    expect_sequential(&opened.file);
    if !is_long {
        ranges.iter().for_each(|range| request(&opened.file, range.clone()));
        return;
    }
    let pieces: Vec<Range<u64>> = ranges.iter().flat_map(windows_of).collect();
    let work = Arc::new((Arc::downgrade(mapping), opened, pieces, AtomicUsize::new(0)));
    for place in std::iter::from_fn(|| places.pop()).take(work.2.len()) {
        let work = Arc::clone(&work);
        spawn(move || {
            let _place = place;
            let (mapping, opened, pieces, next) = &*work;
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed))
                && mapping.strong_count() > 0
            {
                let is_whole = piece.end - piece.start == WINDOW_BYTES;
                match opened.windows().filter(|_| by_window && is_whole) {
                    // The error shows when the page is touched.
                    Some(windows) => drop(windows.read(piece.start)),
                    None => request(&opened.file, piece.clone()),
                }
            }
        });
    }
}

/// Cuts `range` at multiples of [`WINDOW_BYTES`].
fn windows_of(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let (start, end) = (range.start, range.end);
    (start / WINDOW_BYTES..end.div_ceil(WINDOW_BYTES))
        .map(move |window| start.max(window * WINDOW_BYTES)..end.min((window + 1) * WINDOW_BYTES))
}

/// Asks the kernel to read `range` of `file`, except what is cached.
pub(super) fn request(file: &File, range: Range<u64>) {
    let start = range.start - range.start % page_size() as u64;
    for start in (start..range.end).step_by(REQUEST_BYTES as usize) {
        let length = REQUEST_BYTES.min(range.end - start);
        if is_surely_cached(file, start..start + length) {
            continue;
        }
        // Without it, the pages are read when they are touched.
        // SAFETY: no pointers are passed, and `file` keeps the descriptor open.
        unsafe {
            libc::posix_fadvise(file.as_raw_fd(), start as i64, length as i64, libc::POSIX_FADV_WILLNEED);
        }
    }
}

/// Returns whether both ends and the middle of `bytes` are in memory: asking about every page takes longer than reading
/// ahead.
fn looks_resident(mapping: &Mapping, bytes: &Range<u64>) -> bool {
    [bytes.start, bytes.start.midpoint(bytes.end), bytes.end - 1]
        .into_iter()
        .all(|at| is_resident(mapping.as_ptr().wrapping_add(at as usize)))
}

/// Runs `work` on a thread of its own. Does nothing if there is no thread for it.
pub(super) fn spawn(work: impl FnOnce() + Send + 'static) {
    let _ = std::thread::Builder::new().name("sft-prefault".into()).spawn(work);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_and_given_back() {
        static THREADS: Threads = Threads(AtomicU64::new(0));
        let mut first = THREADS.take(5);
        let rest = THREADS.take(1000);
        assert_eq!((first.count, rest.count), (5, MOST_THREADS - 5));
        assert!(THREADS.take(1).is_empty());
        drop(first.pop().expect("one of five"));
        assert_eq!(THREADS.take(3).count, 1);
        drop((first, rest));
        // As in the child of a process that has started them all.
        let parent = u64::from(std::process::id() ^ 1) << 32;
        THREADS.0.store(parent | MOST_THREADS, Ordering::Relaxed);
        assert_eq!(THREADS.take(1000).count, MOST_THREADS);
    }
}
