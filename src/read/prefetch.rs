//! Reads tensors through a few slabs of memory. Threads fill slabs ahead while the caller copies earlier slabs elsewhere,
//! to a device for example, and releases them.
//!
//! The caller provides the slabs. `slab_layout` decides which bytes go into which slab.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::format::slice::Slice;
use crate::read::file::TensorFile;
use crate::read::reader::{self, ReadRange};
use crate::read::slab_layout::{Cursor, Request, SLAB_PART_ALIGNMENT, SlabPart, extent};
use crate::read::slice_reader::SliceReader;
use crate::read::source::{OpenFile, ReadFrom};
use crate::read::strategy::ReadStrategy;
use crate::sys::mutex::{Guard, Mutex};
use crate::sys::parallel::{self, MIN_PARALLEL_BYTES};
use crate::sys::threads::ThreadLimit;
use crate::sys::workers::{MOST_THREADS, Workers, catch_panic};

/// The result of [`Prefetcher::next_slab`].
#[derive(Debug, PartialEq, Eq)]
pub enum NextSlab {
    /// The number of a slab and its parts. The slab is the caller's until it is released.
    Filled(usize, Vec<SlabPart>),
    /// No slab is filled yet.
    NotReady,
    /// All slabs were returned.
    End,
}

/// Reads tensors into slabs, ahead of the caller.
#[derive(Debug)]
pub struct Prefetcher {
    shared: Arc<Shared>,
    /// Empty for small reads: [`Prefetcher::next_slab`] reads then.
    workers: Workers,
}

#[derive(Debug)]
struct Shared {
    file: Arc<TensorFile>,
    /// The file of its mapping, reopened.
    reopened: Option<OpenFile>,
    from: ReadFrom,
    requests: Vec<Request>,
    slab_bytes: usize,
    strategy: ReadStrategy,
    state: Mutex<State>,
    /// Notified when a slab was released, and at the end.
    released: Condvar,
    /// Notified when a slab was filled, when that failed, and at the end.
    filled: Condvar,
}

#[derive(Debug, Default)]
struct State {
    cursor: Cursor,
    slabs: Vec<Slab>,
    /// A stack: the slab that was released last may still be in the processor's caches.
    free: Vec<usize>,
    full: VecDeque<(usize, Vec<SlabPart>)>,
    /// The number of slabs that are being filled.
    filling: usize,
    /// The number of threads that wait for a slab.
    waiting: usize,
    failure: Option<Error>,
    stopped: bool,
}

#[derive(Clone, Copy, Debug)]
struct Slab(*mut u8);

// SAFETY: only `fill_next` writes to the address, after it took the slab's number from `free` under the lock: no other
// thread has the slab then.
unsafe impl Send for Slab {}

impl Prefetcher {
    /// Starts to read the tensors at `indices` (in file order) with `threads` threads, or as many as suit the machine. With
    /// 0, the calls of [`Prefetcher::next_slab`] read.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] if the file has no such tensor.
    ///
    /// # Safety
    ///
    /// Every slab must be valid for writes of `slab_bytes`, a multiple of [`SLAB_PART_ALIGNMENT`], on any thread until
    /// the prefetcher is dropped. No two may overlap. The caller may use a slab only between [`Prefetcher::next_slab`]
    /// and [`Prefetcher::release_slab`].
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
            let range = file.byte_range(&tensor);
            requests.push(Request { index, range, bytes: tensor.nbytes() as usize, slice: None });
        }
        // SAFETY: this function has the contract of `start`.
        unsafe { Prefetcher::start(file, requests, from, slabs, slab_bytes, threads) }
    }

    /// As [`Prefetcher::new`], for a `slice` that was made for the tensor at `index`.
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
        let range = file.byte_range(&file.tensor(index)?);
        let request = Request { index, range, bytes: slice.nbytes() as usize, slice: Some(slice) };
        // SAFETY: this function has the contract of `start`.
        unsafe { Prefetcher::start(file, vec![request], ReadFrom::Mapping, slabs, slab_bytes, threads) }
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
    ) -> Result<Prefetcher> {
        assert!(
            slab_bytes > 0 && slab_bytes.is_multiple_of(SLAB_PART_ALIGNMENT),
            "a slab holds whole elements"
        );
        let bytes: usize = requests.iter().map(|request| request.bytes).sum();
        let chunks = bytes.div_ceil(slab_bytes);
        let wanted =
            threads.unwrap_or_else(|| parallel::thread_count(ThreadLimit::at_most(0), bytes, chunks));
        let reopened = file.source().reopen(bytes);
        let strategy = ReadStrategy::of(
            file.source().method(from, reopened.as_ref()),
            bytes,
            || extent(&requests),
            wanted,
            ThreadLimit::at_most(0),
        )?;
        // A number that the caller gave is not raised for cold files.
        let threads = if bytes < MIN_PARALLEL_BYTES && !strategy.is_remote {
            0
        } else {
            threads.unwrap_or(strategy.threads).min(chunks).min(MOST_THREADS)
        };
        let state = State {
            cursor: Cursor::new(&requests),
            free: (0..slabs.len()).rev().collect(),
            slabs: slabs.iter().copied().map(Slab).collect(),
            ..State::default()
        };
        let shared = Arc::new(Shared {
            file,
            reopened,
            from,
            requests,
            slab_bytes,
            strategy,
            state: Mutex::new(state),
            released: Condvar::new(),
            filled: Condvar::new(),
        });
        let of_threads = Arc::clone(&shared);
        // If no thread can be started, `next_slab` reads.
        let workers = Workers::start(threads, move || of_threads.work());
        Ok(Prefetcher { shared, workers })
    }

    /// Adds a slab and returns its number.
    ///
    /// # Safety
    ///
    /// As for [`Prefetcher::new`].
    pub unsafe fn add_slab(&self, slab: *mut u8) -> usize {
        let mut state = self.shared.state.lock();
        state.slabs.push(Slab(slab));
        let number = state.slabs.len() - 1;
        state.free.push(number);
        self.shared.released.notify_one();
        number
    }

    /// Returns whether reading waits for a slab.
    pub fn is_starved(&self) -> bool {
        if self.workers.are_forked() {
            return false;
        }
        let state = self.shared.state.lock();
        let is_waiting = state.waiting > 0 || self.workers.is_empty();
        is_waiting && state.free.is_empty() && !state.cursor.is_done()
    }

    /// Makes a slab that [`Prefetcher::next_slab`] returned available again.
    pub fn release_slab(&self, slab: usize) {
        if self.workers.are_forked() {
            return;
        }
        let mut state = self.shared.state.lock();
        debug_assert!(!state.free.contains(&slab), "released twice");
        state.free.push(slab);
        self.shared.released.notify_one();
    }

    /// Returns the next filled slab. Waits for one, but no longer than `wait`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] or [`ErrorKind::FileChanged`] if a read failed, with the tensor's name; no slab follows it.
    /// [`ErrorKind::InvalidArgument`] in a forked process.
    pub fn next_slab(&self, wait: Duration) -> Result<NextSlab> {
        self.workers.check("load").map_err(|error| self.shared.file.locate(error))?;
        let deadline = Instant::now() + wait;
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
            let is_finished = state.stopped || state.cursor.is_done();
            if is_finished && state.filling == 0 {
                return Ok(NextSlab::End);
            }
            if self.workers.is_empty() && !state.free.is_empty() {
                state = shared.fill_next(state);
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(NextSlab::NotReady);
            }
            state.wait_for(&shared.filled, left);
        }
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        if !self.workers.are_forked() {
            self.shared.state.lock().stopped = true;
            self.shared.released.notify_all();
        }
    }
}

impl Shared {
    /// Fills slabs until all is read or the prefetcher is dropped.
    fn work(&self) {
        let mut state = self.state.lock();
        while !state.stopped && state.failure.is_none() && !state.cursor.is_done() {
            if state.free.is_empty() {
                state.waiting += 1;
                state.wait(&self.released);
                state.waiting -= 1;
            } else {
                state = self.fill_next(state);
            }
        }
        // The other threads have nothing to wait for either.
        self.released.notify_all();
        self.filled.notify_all();
    }

    /// Fills a free slab, with the lock released. There must be one.
    fn fill_next<'a>(&'a self, mut state: Guard<'a, State>) -> Guard<'a, State> {
        let parts = state.cursor.next(&self.requests, self.slab_bytes);
        let slab = state.free.pop().expect("the caller checked that a slab is free");
        let Slab(start) = state.slabs[slab];
        state.filling += 1;
        drop(state);
        // SAFETY: the slab is valid for writes of `slab_bytes` (contract of `Prefetcher::new`), and `Cursor::next` keeps the
        // parts inside. Its number is not in `free`, so no other thread has it.
        let outcome = catch_panic(|| unsafe { self.fill(start, &parts) });
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

    /// Reads `parts` into the slab at `start`.
    ///
    /// # Safety
    ///
    /// The slab must be valid for writes up to the end of the last part, and no other thread may use it.
    unsafe fn fill(&self, start: *mut u8, parts: &[SlabPart]) -> Result<()> {
        let method = self.file.source().method(self.from, self.reopened.as_ref());
        let mut ranges = Vec::with_capacity(parts.len());
        for part in parts {
            let request = &self.requests[part.request];
            let destination = start.wrapping_add(part.slab_offset);
            let Some(slice) = &request.slice else {
                let offset = request.range.start + part.offset as u64;
                ranges.push(ReadRange { offset, destination, length: part.length });
                continue;
            };
            let bytes = part.offset as u64..(part.offset + part.length) as u64;
            let (strategy, base) = (Some(self.strategy), request.range.start);
            let reader = SliceReader { method, strategy, slice, base };
            // SAFETY: the part is inside the slab (this function's contract).
            unsafe { reader.read(bytes, destination) }.map_err(|error| self.explain(error, parts))?;
        }
        // SAFETY: the parts are inside the slab (this function's contract) and follow one another (`Cursor::next`).
        unsafe { reader::read_here(method, &ranges, self.strategy) }
            .map_err(|error| self.explain(error, parts))
    }

    /// Adds the names of the file and of the tensors to an error.
    fn explain(&self, error: Error, parts: &[SlabPart]) -> Error {
        let first = parts.first().map_or(0, |part| self.requests[part.request].index);
        self.file.explain_read(error, first, parts.len())
    }
}
