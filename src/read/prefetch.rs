//! Reads tensors through a few slabs of memory. Threads fill slabs ahead while the caller copies earlier slabs elsewhere,
//! to a device for example, and releases them.
//!
//! The caller provides the slabs. `slab_layout` decides which bytes go into which slab, `prefetch_plan` how far ahead
//! tensors are started.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::read::prefetch_plan::{Budget, Plan, PrefetchOptions, PrefetchRequest, ReadPart};
use crate::read::slab_layout::{Cursor, SLAB_PART_ALIGNMENT, SlabPart};
use crate::sys::mutex::{Guard, Mutex};
use crate::sys::workers::{Workers, catch_panic};

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
    plan: Plan,
    slab_bytes: usize,
    state: Mutex<State>,
    /// Notified when a slab was released, when a request may have become startable, and at the end.
    fillable: Condvar,
    /// Notified when a slab was filled, when that failed, and at the end.
    filled: Condvar,
}

#[derive(Debug)]
struct State {
    cursor: Cursor,
    budget: Budget,
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

impl State {
    /// Returns whether a slab can be filled as soon as one is free.
    fn has_bytes(&mut self, plan: &Plan) -> bool {
        self.cursor.prepare(&plan.requests, &mut self.budget)
    }
}

#[derive(Clone, Copy, Debug)]
struct Slab(*mut u8);

// SAFETY: only `fill_next` writes to the address, after it took the slab's number from `free` under the lock: no other
// thread has the slab then.
unsafe impl Send for Slab {}

impl Prefetcher {
    /// Starts to read `requests`, which have no destinations, in their order. The caller adds slabs. With 0 threads, and for
    /// small reads, the calls of [`Prefetcher::next_slab`] read.
    ///
    /// The budget counts requests until they are [handed out](Prefetcher::hand_out).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) if a file has no such tensor.
    pub fn new(
        requests: Vec<PrefetchRequest>,
        options: PrefetchOptions,
        slab_bytes: usize,
    ) -> Result<Prefetcher> {
        assert!(
            slab_bytes > 0 && slab_bytes.is_multiple_of(SLAB_PART_ALIGNMENT),
            "a slab holds whole elements"
        );
        assert!(requests.iter().all(|request| request.destination.is_none()), "slabs are the destinations");
        let plan = Plan::new(requests, options, slab_bytes)?;
        let bytes: usize = plan.requests.iter().map(|request| request.bytes).sum();
        let threads = plan.thread_count(bytes.div_ceil(slab_bytes));
        let state = State {
            cursor: Cursor::new(&plan.requests),
            budget: Budget::new(options.buffer_bytes),
            slabs: Vec::new(),
            free: Vec::new(),
            full: VecDeque::new(),
            filling: 0,
            waiting: 0,
            failure: None,
            stopped: false,
        };
        let (fillable, filled) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { plan, slab_bytes, state: Mutex::new(state), fillable, filled });
        let of_threads = Arc::clone(&shared);
        // If no thread can be started, `next_slab` reads.
        let workers = Workers::start(threads, move || of_threads.work());
        Ok(Prefetcher { shared, workers })
    }

    /// Adds a slab and returns its number.
    ///
    /// # Safety
    ///
    /// The slab must be valid for writes of `slab_bytes` on any thread until the prefetcher is dropped, and must not
    /// overlap another. The caller may use it only between [`Prefetcher::next_slab`] and [`Prefetcher::release_slab`].
    pub unsafe fn add_slab(&self, slab: *mut u8) -> usize {
        let mut state = self.shared.state.lock();
        state.slabs.push(Slab(slab));
        let number = state.slabs.len() - 1;
        state.free.push(number);
        self.shared.fillable.notify_one();
        number
    }

    /// Returns whether reading waits for a slab.
    pub fn is_starved(&self) -> bool {
        if self.workers.are_forked() {
            return false;
        }
        let mut state = self.shared.state.lock();
        let is_waiting = state.waiting > 0 || self.workers.is_empty();
        is_waiting && state.free.is_empty() && !state.stopped && state.has_bytes(&self.shared.plan)
    }

    /// Makes a request go first that is not started yet.
    pub fn prioritize(&self, request: usize) {
        self.change(|state| state.cursor.prioritize(request));
    }

    /// Ends the counting of a started request in the budget, except that the last one counts until the next.
    pub fn hand_out(&self, request: usize) {
        self.change(|state| state.budget.hand_out(self.shared.plan.requests[request].cost));
    }

    /// Ends all reading. No slab is written to afterwards, and [`Prefetcher::next_slab`] returns [`NextSlab::End`].
    pub fn stop(&self) {
        if self.workers.are_forked() {
            return;
        }
        let mut state = self.shared.state.lock();
        state.stopped = true;
        state.full.clear();
        self.shared.plan.end();
        self.shared.fillable.notify_all();
        self.shared.filled.notify_all();
        while state.filling > 0 {
            state.wait(&self.shared.filled);
        }
    }

    /// Changes what may be read next.
    fn change(&self, change: impl FnOnce(&mut State)) {
        if self.workers.are_forked() {
            return;
        }
        let mut state = self.shared.state.lock();
        let was_possible = state.has_bytes(&self.shared.plan);
        change(&mut state);
        if !was_possible {
            self.shared.fillable.notify_all();
            // Without threads, the call that waits reads.
            self.shared.filled.notify_all();
        }
    }

    /// Checks that this process has started the prefetcher. `object` is for the error.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) in a forked process.
    pub fn check_process(&self, object: &str) -> Result<()> {
        self.workers.check(object)
    }

    /// Makes a slab that [`Prefetcher::next_slab`] returned available again.
    pub fn release_slab(&self, slab: usize) {
        if self.workers.are_forked() {
            return;
        }
        let mut state = self.shared.state.lock();
        debug_assert!(!state.free.contains(&slab), "released twice");
        state.free.push(slab);
        self.shared.fillable.notify_one();
    }

    /// Returns the next filled slab. Waits for one, but no longer than `wait`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] or [`ErrorKind::FileChanged`] if a read failed, with the tensor's name; no slab follows it.
    /// [`ErrorKind::InvalidArgument`] in a forked process.
    pub fn next_slab(&self, wait: Duration) -> Result<NextSlab> {
        self.workers.check("load").map_err(|error| self.shared.plan.locate(error, 0))?;
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
            if self.workers.is_empty() && !state.free.is_empty() && state.has_bytes(&shared.plan) {
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
            self.shared.plan.end();
            self.shared.fillable.notify_all();
        }
    }
}

impl Shared {
    /// Fills slabs until all is read or the prefetcher is dropped.
    fn work(&self) {
        let mut state = self.state.lock();
        while !state.stopped && state.failure.is_none() && !state.cursor.is_done() {
            if !state.free.is_empty() && state.has_bytes(&self.plan) {
                state = self.fill_next(state);
            } else {
                state.waiting += 1;
                state.wait(&self.fillable);
                state.waiting -= 1;
            }
        }
        // The other threads have nothing to wait for either.
        self.fillable.notify_all();
        self.filled.notify_all();
    }

    /// Fills a free slab, with the lock released. There must be one, and bytes for it.
    fn fill_next<'a>(&'a self, mut state: Guard<'a, State>) -> Guard<'a, State> {
        let State { cursor, budget, .. } = &mut *state;
        let parts = cursor.next(&self.plan.requests, budget, self.slab_bytes);
        let slab = state.free.pop().expect("the caller checked that a slab is free");
        let Slab(start) = state.slabs[slab];
        state.filling += 1;
        drop(state);
        // SAFETY: the slab is valid for writes of `slab_bytes` (contract of `Prefetcher::add_slab`), and `Cursor::next` keeps
        // the parts inside. Its number is not in `free`, so no other thread has it.
        let outcome = catch_panic(|| unsafe { self.fill(start, &parts) });
        state = self.state.lock();
        state.filling -= 1;
        match outcome {
            Ok(()) => state.full.push_back((slab, parts)),
            Err(error) => {
                state.failure.get_or_insert(error);
            }
        }
        if state.stopped || state.failure.is_some() {
            // This read may have opened a file again.
            self.plan.end();
            state.full.clear();
        }
        self.filled.notify_all();
        state
    }

    /// Reads `parts` into the slab at `start`.
    ///
    /// # Safety
    ///
    /// The slab must be valid for writes up to the end of the last part, and no other thread may use it.
    unsafe fn fill(&self, start: *mut u8, parts: &[SlabPart]) -> Result<()> {
        let parts: Vec<ReadPart> = parts
            .iter()
            .map(|&SlabPart { request, offset, slab_offset, length }| {
                let destination = start.wrapping_add(slab_offset);
                ReadPart { request, offset, length, destination }
            })
            .collect();
        // SAFETY: the parts are inside the slab (this function's contract) and follow one another (`Cursor::next`).
        unsafe { self.plan.read(&parts) }
    }
}
