//! Reads tensors through a few slabs of memory: threads fill slabs ahead, in file order, small tensors many to a slab,
//! while the caller takes the bytes of earlier slabs elsewhere and gives the slabs back.
//!
//! Owns what goes into which slab, the threads, and whose turn a slab is. What slabs are made of (pinned memory, say) and
//! where the bytes go from there is the caller's business.

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::format::slice::Slice;
use crate::read::file::{TensorFile, read_runs};
use crate::read::reader::{self, ReadRange, ReadStrategy};
use crate::read::source::{OpenFile, ReadFrom};
use crate::sys::fork::OwnerProcess;
use crate::sys::mutex::{Guard, Mutex};
use crate::sys::parallel::{self, MIN_PARALLEL_BYTES};
use crate::sys::threads::ThreadLimit;

/// Where a part begins in its slab, and the lengths that a tensor is cut into: a multiple of every element's size.
pub const SLAB_PART_ALIGNMENT: usize = 16;

/// No machine has a use for more of them.
const MOST_THREADS: usize = 64;

/// Bytes of one tensor in a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlabPart {
    /// Which of the requests.
    pub request: usize,
    /// Where the bytes belong in what was requested.
    pub offset: usize,
    /// Where they are in the slab.
    pub slab_offset: usize,
    /// How many, never 0.
    pub length: usize,
}

/// What [`Prefetcher::next_slab`] gives.
#[derive(Debug, PartialEq, Eq)]
pub enum NextSlab {
    /// A slab, which is the caller's until it is given back, and what is in it.
    Filled(usize, Vec<SlabPart>),
    /// Nothing yet.
    NotReady,
    /// Everything was taken.
    End,
}

/// A tensor to be read, or a slice of one.
#[derive(Debug)]
struct Request {
    index: usize,
    /// Where the tensor begins in the file.
    base: u64,
    bytes: usize,
    slice: Option<Slice>,
}

/// Slabs that are filled with what was requested.
#[derive(Debug)]
pub struct Prefetcher {
    shared: Arc<Shared>,
    /// None for little: then [`Prefetcher::next_slab`] reads.
    threads: Vec<JoinHandle<()>>,
    /// The one that has the threads.
    process: OwnerProcess,
}

#[derive(Debug)]
struct Shared {
    file: Arc<TensorFile>,
    /// What is behind its mapping, while this reads.
    reopened: Option<OpenFile>,
    from: ReadFrom,
    requests: Vec<Request>,
    slab_bytes: usize,
    strategy: ReadStrategy,
    state: Mutex<State>,
    /// A slab became free, or there is no more to do.
    room: Condvar,
    /// A slab was filled, or that failed.
    filled: Condvar,
}

#[derive(Debug)]
struct State {
    cursor: Cursor,
    slabs: Vec<Slab>,
    /// Slabs that nobody uses; the one that was used last, and so may still be in the processor's caches, comes first.
    free: Vec<usize>,
    full: VecDeque<(usize, Vec<SlabPart>)>,
    /// How many slabs are being filled.
    filling: usize,
    /// How many threads wait for a slab.
    waiting: usize,
    failure: Option<Error>,
    stopped: bool,
}

/// The first byte of a slab.
#[derive(Clone, Copy, Debug)]
struct Slab(*mut u8);

// SAFETY: an address; whoever writes there has taken the slab's number from `free` under the lock, and so has it alone.
unsafe impl Send for Slab {}

impl Prefetcher {
    /// Begins to read the tensors at `indices` (in file order), with `threads` threads of its own, or as many as suit the
    /// machine. With 0 the thread that takes the slabs reads.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] where there is no such tensor.
    ///
    /// # Safety
    ///
    /// Every slab must be valid for writes of `slab_bytes`, a multiple of [`SLAB_PART_ALIGNMENT`], until the prefetcher is dropped;
    /// meanwhile nobody else may touch it but the caller, while it has it.
    pub unsafe fn new(
        file: Arc<TensorFile>,
        indices: &[usize],
        from: ReadFrom,
        slabs: &[*mut u8],
        slab_bytes: usize,
        threads: Option<usize>,
    ) -> Result<Prefetcher> {
        let mut requests = Vec::with_capacity(indices.len());
        for &index in indices {
            let tensor = file.tensor(index)?;
            let base = file.byte_range(&tensor).start;
            requests.push(Request { index, base, bytes: tensor.nbytes() as usize, slice: None });
        }
        // SAFETY: as the caller promised.
        Ok(unsafe { Prefetcher::start(file, requests, from, slabs, slab_bytes, threads) })
    }

    /// As [`Prefetcher::new`], for `slice`, which was planned for the tensor at `index`.
    ///
    /// # Errors
    ///
    /// As [`Prefetcher::new`].
    ///
    /// # Safety
    ///
    /// As for [`Prefetcher::new`].
    pub unsafe fn for_slice(
        file: Arc<TensorFile>,
        index: usize,
        slice: Slice,
        slabs: &[*mut u8],
        slab_bytes: usize,
        threads: Option<usize>,
    ) -> Result<Prefetcher> {
        let base = file.byte_range(&file.tensor(index)?).start;
        let request = Request { index, base, bytes: slice.nbytes() as usize, slice: Some(slice) };
        // SAFETY: as the caller promised.
        Ok(unsafe { Prefetcher::start(file, vec![request], ReadFrom::Mapping, slabs, slab_bytes, threads) })
    }

    /// # Safety
    ///
    /// As for [`Prefetcher::new`].
    unsafe fn start(
        file: Arc<TensorFile>,
        requests: Vec<Request>,
        from: ReadFrom,
        slabs: &[*mut u8],
        slab_bytes: usize,
        threads: Option<usize>,
    ) -> Prefetcher {
        assert!(
            slab_bytes > 0 && slab_bytes.is_multiple_of(SLAB_PART_ALIGNMENT),
            "a slab holds whole elements"
        );
        let bytes: usize = requests.iter().map(|request| request.bytes).sum();
        let chunks = bytes.div_ceil(slab_bytes);
        let extent = || extent(&file, &requests);
        let wanted =
            threads.unwrap_or_else(|| parallel::thread_count(ThreadLimit::at_most(0), bytes, chunks));
        let reopened = file.source().reopen(bytes);
        let strategy = ReadStrategy::of(
            file.source().method(from, reopened.as_ref()),
            bytes,
            extent,
            wanted,
            ThreadLimit::at_most(0),
        );
        // Whoever says how many threads there shall be means it.
        let threads = if bytes < MIN_PARALLEL_BYTES {
            0
        } else {
            threads.unwrap_or(strategy.threads).min(chunks).min(MOST_THREADS)
        };
        let state = State {
            cursor: Cursor::new(&requests),
            free: (0..slabs.len()).rev().collect(),
            slabs: slabs.iter().copied().map(Slab).collect(),
            full: VecDeque::new(),
            filling: 0,
            waiting: 0,
            failure: None,
            stopped: false,
        };
        let shared = Arc::new(Shared {
            file,
            reopened,
            from,
            requests,
            slab_bytes,
            strategy,
            state: Mutex::new(state),
            room: Condvar::new(),
            filled: Condvar::new(),
        });
        let work = || {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("safetensors".into()).spawn(move || shared.work())
        };
        // A machine that gives no more threads has at least the caller's.
        let threads = (0..threads).map_while(|_| work().ok()).collect();
        Prefetcher { shared, threads, process: OwnerProcess::current() }
    }

    /// Whether the threads are those of another process, which may have held the lock when this one was forked.
    fn is_orphaned(&self) -> bool {
        !self.threads.is_empty() && !self.process.is_current()
    }

    /// Adds a slab, for which the promises of [`Prefetcher::new`] hold; gives its number.
    ///
    /// # Safety
    ///
    /// As for [`Prefetcher::new`].
    pub unsafe fn add_slab(&self, slab: *mut u8) -> usize {
        let mut state = self.shared.state.lock();
        state.slabs.push(Slab(slab));
        let number = state.slabs.len() - 1;
        state.free.push(number);
        self.shared.room.notify_one();
        number
    }

    /// Whether whoever reads has nothing to do for want of a slab.
    pub fn is_starved(&self) -> bool {
        if self.is_orphaned() {
            return false;
        }
        let state = self.shared.state.lock();
        let wants = state.waiting > 0 || self.threads.is_empty();
        wants && state.free.is_empty() && !state.cursor.is_done()
    }

    /// Gives back a slab that was taken; its bytes are elsewhere.
    pub fn release_slab(&self, slab: usize) {
        if self.is_orphaned() {
            return;
        }
        let mut state = self.shared.state.lock();
        debug_assert!(!state.free.contains(&slab), "given back twice");
        state.free.push(slab);
        self.shared.room.notify_one();
    }

    /// The next slab that is filled; waits for one, but no longer than `wait`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] or [`ErrorKind::FileChanged`] where reading failed, with the tensor's name; and
    /// [`ErrorKind::InvalidArgument`] in a process that was forked meanwhile. Nothing more comes after that.
    pub fn next_slab(&self, wait: Duration) -> Result<NextSlab> {
        if !self.threads.is_empty() {
            self.process.check("load").map_err(|error| self.shared.file.locate(error))?;
        }
        let until = Instant::now() + wait;
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        loop {
            if let Some(failure) = state.failure.take() {
                state.stopped = true;
                return Err(failure);
            }
            if let Some((slab, parts)) = state.full.pop_front() {
                return Ok(NextSlab::Filled(slab, parts));
            }
            let is_over = state.stopped || state.cursor.is_done();
            if is_over && state.filling == 0 {
                return Ok(NextSlab::End);
            }
            if self.threads.is_empty() && !state.free.is_empty() {
                state = shared.fill_next(state);
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(NextSlab::NotReady);
            }
            state.wait_for(&shared.filled, left);
        }
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        if self.is_orphaned() {
            // There is nobody to be waited for, nor anything left of them here that could be freed.
            self.threads.drain(..).for_each(std::mem::forget);
            return;
        }
        self.shared.state.lock().stopped = true;
        self.shared.room.notify_all();
        for thread in self.threads.drain(..) {
            // A panic was caught where it happened.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// What each thread does.
    fn work(&self) {
        let mut state = self.state.lock();
        while !state.stopped && state.failure.is_none() && !state.cursor.is_done() {
            if state.free.is_empty() {
                state.waiting += 1;
                state.wait(&self.room);
                state.waiting -= 1;
            } else {
                state = self.fill_next(state);
            }
        }
        // The others have nothing to wait for either.
        self.room.notify_all();
        self.filled.notify_all();
    }

    /// Fills a free slab, of which there must be one, without holding the lock.
    fn fill_next<'a>(&'a self, mut state: Guard<'a, State>) -> Guard<'a, State> {
        let parts = state.cursor.next(&self.requests, self.slab_bytes);
        let slab = state.free.pop().expect("the caller has looked");
        let Slab(start) = state.slabs[slab];
        state.filling += 1;
        drop(state);
        // SAFETY: the slab is valid for `slab_bytes` (`Prefetcher::new`), which is more than the parts reach, and as its
        // number is no longer among the free ones, nobody else has it.
        let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { self.fill(start, &parts) }));
        let outcome = outcome.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Panic, "a thread that reads panicked: a bug of this library"))
        });
        state = self.state.lock();
        state.filling -= 1;
        match outcome {
            Ok(()) => state.full.push_back((slab, parts)),
            Err(error) => {
                state.failure.get_or_insert(error);
            }
        }
        self.filled.notify_one();
        state
    }

    /// # Safety
    ///
    /// `start` must be valid for writes as far as `parts` reach.
    unsafe fn fill(&self, start: *mut u8, parts: &[SlabPart]) -> Result<()> {
        let method = self.file.source().method(self.from, self.reopened.as_ref());
        let mut ranges = Vec::with_capacity(parts.len());
        for part in parts {
            let request = &self.requests[part.request];
            let destination = start.wrapping_add(part.slab_offset);
            let Some(slice) = &request.slice else {
                let offset = request.base + part.offset as u64;
                ranges.push(ReadRange { offset, destination, length: part.length });
                continue;
            };
            let bytes = part.offset as u64..(part.offset + part.length) as u64;
            // SAFETY: `read_runs` asks for destinations that are valid and apart.
            let read = |ranges: Vec<_>| unsafe { reader::read_here(method, &ranges, self.strategy) };
            // SAFETY: the part lies in the slab (caller).
            unsafe { read_runs(slice, bytes, request.base, destination, read) }
                .map_err(|error| self.explain(error, parts))?;
        }
        // SAFETY: the parts lie in the slab, one behind the other (caller).
        unsafe { reader::read_here(method, &ranges, self.strategy) }
            .map_err(|error| self.explain(error, parts))
    }

    /// Says of an error which file and tensors it is about.
    fn explain(&self, error: Error, parts: &[SlabPart]) -> Error {
        let name = parts.first().and_then(|part| self.file.header().get(self.requests[part.request].index));
        let name = name.map_or("", |tensor| tensor.name);
        let what = match parts.len() {
            0 | 1 => format!("the bytes were for tensor {name:?}"),
            count => format!("the bytes were for tensor {name:?} and {} behind it", count - 1),
        };
        self.file.locate(error.with_remedy(&what))
    }
}

/// From where to where the requests reach in the file.
fn extent(file: &TensorFile, requests: &[Request]) -> Range<u64> {
    let end = |request: &Request| file.header().get(request.index).map_or(0, |tensor| tensor.nbytes());
    let first = requests.iter().map(|request| request.base).min().unwrap_or(0);
    let last = requests.iter().map(|request| request.base + end(request)).max().unwrap_or(first);
    first..last
}

/// How far the requests are handed out: in file order, whatever order they came in.
#[derive(Debug)]
struct Cursor {
    order: Vec<usize>,
    /// The place in `order`, and how much of that request is handed out already.
    next: usize,
    offset: usize,
}

impl Cursor {
    fn new(requests: &[Request]) -> Cursor {
        let mut order: Vec<usize> =
            (0..requests.len()).filter(|&request| requests[request].bytes > 0).collect();
        order.sort_by_key(|&request| requests[request].base);
        Cursor { order, next: 0, offset: 0 }
    }

    fn is_done(&self) -> bool {
        self.next == self.order.len()
    }

    /// What goes into the next slab.
    fn next(&mut self, requests: &[Request], slab_bytes: usize) -> Vec<SlabPart> {
        let mut parts = Vec::new();
        let mut start = 0;
        while let Some(&request) = self.order.get(self.next) {
            let room = slab_bytes.saturating_sub(start);
            let left = requests[request].bytes - self.offset;
            let length = if left <= room { left } else { room / SLAB_PART_ALIGNMENT * SLAB_PART_ALIGNMENT };
            if length == 0 {
                break;
            }
            parts.push(SlabPart { request, offset: self.offset, slab_offset: start, length });
            start = (start + length).next_multiple_of(SLAB_PART_ALIGNMENT);
            if length == left {
                (self.next, self.offset) = (self.next + 1, 0);
            } else {
                self.offset += length;
            }
        }
        parts
    }
}
