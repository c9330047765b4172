//! Asks the kernel to read parts of a mapped file that are about to be used. Waits for none of them.
//!
//! This keeps many requests in flight. Touching the pages sends one or two at a time and waits for each. On network
//! filesystems even a tensor is too small for that, so the next tensors are requested too if the program takes them one
//! after the other, or the same part of each.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::format::header::{Header, TensorInfo};
use crate::read::source::{Mapping, expect_sequential};
use crate::sys::filesystem::{Filesystem, Scope};
use crate::sys::huge_pages::is_resident;
use crate::sys::memory_limit::available_memory;
use crate::sys::page_cache::{cached_bytes, page_size};
use crate::sys::threads::ThreadLimit;

/// From this size on, a thread sends the requests.
const BACKGROUND_BYTES: u64 = 16 << 20;

/// The bytes of one request. The kernel reads no more for one call, if the file is expected to be read sequentially.
const REQUEST_BYTES: u64 = 256 << 10;

/// Smaller parts of files on a disk are left to page faults.
const MIN_BYTES: u64 = 128 << 10;

/// How far the next tensors are requested, as a distance in the file.
const WINDOW_BYTES: u64 = 64 << 20;

/// Tensors up to this size are requested as a whole.
const SMALL_BYTES: u64 = 64 << 10;

/// The most tensors of which parts are requested at once.
const WINDOW_TENSORS: usize = 1024;

/// What an open file has been asked for. Wrong values, left by several threads at once, cost reads and nothing else.
#[derive(Debug, Default)]
pub(crate) struct ReadAhead {
    /// [`UNKNOWN`], [`LOCAL`] or [`REMOTE`].
    scope: AtomicU8,
    /// The last part that was asked for.
    previous: AtomicU64,
    /// The offset up to which this run of parts was requested; 0 without a run.
    requested: AtomicU64,
}

const UNKNOWN: u8 = 0;
const LOCAL: u8 = 1;
const REMOTE: u8 = 2;

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
        let is_remote = self.scope.load(Ordering::Relaxed) == REMOTE;
        if bytes < MIN_BYTES && !is_remote {
            return;
        }
        let has_run = self.requested.load(Ordering::Relaxed) > 0;
        if !has_run && mapping.is_residency_known() && looks_resident(mapping, &part) {
            return;
        }
        let may_start = ThreadLimit::current().is_ok_and(|threads| threads.cap_background(1) > 0);
        let ranges = match self.scope_of(mapping) {
            REMOTE if may_start => self.extend(mapping, header, index, part),
            // The kernel calls every page resident, so cached files would be asked for too.
            LOCAL if !mapping.is_residency_known() => return,
            _ => vec![part],
        };
        send(mapping, ranges, may_start);
    }

    /// Returns the scope of the filesystem, which is looked up once.
    fn scope_of(&self, mapping: &Mapping) -> u8 {
        let known = self.scope.load(Ordering::Relaxed);
        if known != UNKNOWN {
            return known;
        }
        let is_remote =
            mapping.reopen().is_some_and(|opened| Filesystem::of(&opened.file).scope == Scope::Remote);
        let scope = if is_remote { REMOTE } else { LOCAL };
        self.scope.store(scope, Ordering::Relaxed);
        scope
    }

    /// Notes that `part` of the tensor at `index` is needed. Returns what to request: the part, and those that follow if
    /// the program takes one after the other.
    fn extend(&self, mapping: &Mapping, header: &Header, index: usize, part: Range<u64>) -> Vec<Range<u64>> {
        let tensor_range =
            |tensor: &TensorInfo<'_>| header.data_start() + tensor.begin..header.data_start() + tensor.end;
        let Some(tensor) = header.get(index).map(|tensor| tensor_range(&tensor)) else { return vec![part] };
        let is_small = tensor.end - tensor.start <= SMALL_BYTES;
        let previous = Part::unpack(self.previous.load(Ordering::Relaxed));
        let mut current = Part::new(index, &part, &tensor);
        let follows = previous.index.checked_add(1) == Some(current.index);
        if is_small && follows {
            // Parts of small tensors are rounded too much to be compared.
            (current.begin, current.end) = (previous.begin, previous.end);
        }
        self.previous.store(current.pack(), Ordering::Relaxed);
        if !follows || (current.begin, current.end) != (previous.begin, previous.end) {
            self.requested.store(part.end, Ordering::Relaxed);
            return vec![part];
        }
        let requested = self.requested.load(Ordering::Relaxed);
        let window = part.end.saturating_add(WINDOW_BYTES).min(mapping.len() as u64);
        let is_enough = requested >= window || requested >= part.end.saturating_add(WINDOW_BYTES / 2);
        if is_enough || is_small && !current.is_whole() {
            return Vec::new();
        }
        self.requested.store(window, Ordering::Relaxed);
        if current.is_whole() {
            let rest = requested.max(part.start)..window;
            return vec![rest];
        }
        let mut ranges = if requested < part.end { vec![part.clone()] } else { Vec::new() };
        for next in (index + 1..header.len()).take(WINDOW_TENSORS).filter_map(|index| header.get(index)) {
            let next = tensor_range(&next);
            if next.start >= window {
                break;
            }
            if next.start < requested {
                continue;
            }
            let length = next.end - next.start;
            ranges.push(if length <= SMALL_BYTES {
                next
            } else {
                let at = |offset: u64| {
                    next.start + scale(offset - tensor.start, tensor.end - tensor.start, length)
                };
                at(part.start)..at(part.end)
            });
        }
        ranges
    }
}

/// Requests `ranges`, on a thread of its own if they are many bytes and it may be started.
fn send(mapping: &Arc<Mapping>, ranges: Vec<Range<u64>>, may_start: bool) {
    let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let is_long = bytes >= BACKGROUND_BYTES || ranges.len() > 1;
    if ranges.is_empty() || is_long && !may_start {
        return;
    }
    let Some(opened) = mapping.reopen() else { return };
    expect_sequential(&opened.file);
    if !is_long {
        ranges.into_iter().for_each(|range| request(&opened.file, range));
        return;
    }
    let mapping = Arc::downgrade(mapping);
    spawn(move || {
        if available_memory().is_none_or(|available| bytes > available / 2) {
            return;
        }
        for range in ranges {
            for start in range.clone().step_by(BACKGROUND_BYTES as usize) {
                if mapping.strong_count() == 0 {
                    return;
                }
                request(&opened.file, start..range.end.min(start + BACKGROUND_BYTES));
            }
        }
    });
}

/// Asks the kernel to read `range` of `file`, except what is cached.
pub(super) fn request(file: &File, range: Range<u64>) {
    let start = range.start - range.start % page_size() as u64;
    for start in (start..range.end).step_by(REQUEST_BYTES as usize) {
        let length = REQUEST_BYTES.min(range.end - start);
        if cached_bytes(file, start..start + length).is_some_and(|cached| cached >= length) {
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
