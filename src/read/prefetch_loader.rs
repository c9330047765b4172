//! Reads tensors into host memory ahead of the caller, who takes each as soon as its bytes have landed.
//!
//! Requests are grouped into batches: small neighbours together, a large tensor or a slice alone. Threads take chunks of
//! the batches in the order of the requests. A batch whose chunks are all read has landed, and its tensors are ready.
//!
//! `prefetch_plan` says how far ahead is read. Batches are what the budget starts: a started batch lands without the caller,
//! because its memory exists, and its chunks are taken before other batches start.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::read::prefetch_plan::{
    Budget, Destination, Plan, PrefetchOptions, PrefetchRequest, ReadPart, Request,
};
use crate::sys::buffers::{Block, Buffers};
use crate::sys::mutex::{Guard, Mutex};
use crate::sys::parallel::{CHUNK_BYTES, Chunks};
use crate::sys::workers::{Workers, catch_panic};

/// A tensor or slice whose bytes have landed.
#[derive(Debug)]
pub struct PrefetchedTensor {
    /// The number of the request.
    pub request: usize,
    /// The first byte: of the caller's buffer, or of memory that `owner` owns.
    pub start: *mut u8,
    /// The memory, if the loader allocated it.
    pub owner: Option<Arc<Block>>,
}

// SAFETY: nobody else accesses the bytes once they have landed: `owner` owns them, or they are the caller's buffer.
unsafe impl Send for PrefetchedTensor {}

/// The result of [`PrefetchLoader::next`].
#[derive(Debug)]
pub enum NextTensor {
    /// A tensor that has landed.
    Ready(PrefetchedTensor),
    /// None has landed yet.
    NotReady,
    /// All tensors were handed out.
    End,
}

/// Reads tensors ahead of the caller, and hands out each once.
///
/// ```
/// # fn main() -> safetensors_torch::Result<()> {
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// use safetensors_torch::{
///     Backend, Dtype, NextTensor, PrefetchLoader, PrefetchOptions, PrefetchRequest, SaveOptions, TensorFile,
///     TensorSpec, save_file,
/// };
///
/// # let directory = tempfile::tempdir().expect("a directory");
/// # let path = directory.path().join("model.safetensors");
/// let spec = TensorSpec { name: "bias", dtype: Dtype::U8, shape: &[2] };
/// save_file(&[spec], &[&[7, 8]], None, &path, SaveOptions::default())?;
/// let file = Arc::new(TensorFile::open(&path, Backend::Pread)?);
/// let request = PrefetchRequest { file, index: 0, slice: None, destination: None, extra_bytes: 0 };
/// // SAFETY: no request has a destination.
/// let loader = unsafe { PrefetchLoader::new(vec![request], PrefetchOptions::default()) }?;
/// if let NextTensor::Ready(tensor) = loader.next(Duration::from_secs(10))? {
///     // SAFETY: `tensor.owner` keeps the two bytes allocated.
///     assert_eq!(unsafe { std::slice::from_raw_parts(tensor.start, 2) }, [7, 8]);
/// }
/// assert!(matches!(loader.next(Duration::ZERO)?, NextTensor::End));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct PrefetchLoader {
    shared: Arc<Shared>,
    /// None for small reads: the calls that wait read then.
    workers: Workers,
}

#[derive(Debug)]
struct Shared {
    plan: Plan,
    batches: Vec<Batch>,
    state: Mutex<State>,
    /// Notified when a batch may have become startable, and at the end.
    startable: Condvar,
    /// Notified when a batch has landed, when a read failed, and at the end.
    landed: Condvar,
}

/// Returns the first byte of a request's memory: its destination, or that of place `place` in the memory of its batch.
fn start_of(request: &Request, memory: Option<&Buffers>, place: usize) -> *mut u8 {
    match (request.destination, memory) {
        (Some(Destination(start)), _) => start,
        (None, Some(memory)) => memory.start(place),
        (None, None) => unreachable!("`Shared::start` allocates memory if there are no destinations"),
    }
}

/// Neighbours among the requests, all of one file, that are read together. Several are whole tensors, and all or none of
/// them has a destination.
#[derive(Debug)]
struct Batch {
    requests: Range<usize>,
    chunks: Chunks,
    cost: usize,
}

#[derive(Debug)]
struct State {
    phases: Vec<Phase>,
    /// The first batch in order that may not be started. Those before it are started.
    next_batch: usize,
    /// Batches with chunks that are not read.
    started: VecDeque<StartedBatch>,
    /// The ready requests in the order of their landing, and some that were taken by number.
    ready: VecDeque<usize>,
    budget: Budget,
    /// The number of requests that are not handed out.
    left: usize,
    /// The first error, until a call returns it.
    failure: Option<Error>,
    /// Nothing is read after an error or at the end.
    stopped: bool,
}

#[derive(Debug)]
enum Phase {
    Waiting,
    Started,
    Ready(PrefetchedTensor),
    Taken,
}

#[derive(Debug)]
struct StartedBatch {
    batch: usize,
    /// None if the requests have destinations.
    memory: Option<Arc<Buffers>>,
    /// The first chunk that no thread has taken.
    next_chunk: usize,
    /// The number of chunks that are not read.
    left: usize,
}

/// A chunk of a started batch.
struct Chunk {
    batch: usize,
    number: usize,
    memory: Option<Arc<Buffers>>,
}

impl PrefetchLoader {
    /// Starts to read `requests`, in their order.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] if a file has no such tensor, or an environment variable of the settings is invalid;
    /// [`ErrorKind::BufferSize`] if a destination has the wrong size.
    ///
    /// # Safety
    ///
    /// Every destination must be valid for writes of its size, on any thread, until the loader is dropped. None may
    /// overlap another one or the memory of a file. The caller may use a destination only once its request was handed
    /// out.
    pub unsafe fn new(requests: Vec<PrefetchRequest>, options: PrefetchOptions) -> Result<PrefetchLoader> {
        let shared = Arc::new(Shared::new(requests, options)?);
        let threads = shared.plan.thread_count(shared.batches.iter().map(|batch| batch.chunks.len()).sum());
        let of_threads = Arc::clone(&shared);
        // If no thread can be started, the calls that wait read.
        let workers = Workers::start(threads, move || of_threads.work());
        Ok(PrefetchLoader { shared, workers })
    }

    /// Returns the number of requests.
    pub fn len(&self) -> usize {
        self.shared.plan.requests.len()
    }

    /// Returns whether there are no requests.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the next tensor that has landed. Waits for one, but no longer than `wait`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] or [`ErrorKind::FileChanged`] if a read failed, with the names of file and tensor; every later
    /// call fails too. [`ErrorKind::InvalidArgument`] in a forked process.
    pub fn next(&self, wait: Duration) -> Result<NextTensor> {
        let shared = &*self.shared;
        self.wait(wait, |state| {
            while let Some(request) = state.ready.pop_front() {
                if let Some(tensor) = shared.hand_out(state, request) {
                    return Some(NextTensor::Ready(tensor));
                }
            }
            (state.left == 0).then_some(NextTensor::End)
        })
        .map(|next| next.unwrap_or(NextTensor::NotReady))
    }

    /// Returns the tensor of request number `request`. Waits for it, but no longer than `wait`; returns `None` if it has not
    /// landed. A request that is not started goes first, whatever the budget. If `wait` is zero and the budget is full, the
    /// request is started once all started ones have landed: polls exceed the budget by one batch after another, and
    /// repeating one always succeeds in the end.
    ///
    /// # Errors
    ///
    /// As [`PrefetchLoader::next`], and [`ErrorKind::InvalidArgument`] if there is no such request, or it was handed out.
    pub fn take(&self, request: usize, wait: Duration) -> Result<Option<PrefetchedTensor>> {
        let shared = &*self.shared;
        if request >= self.len() {
            let detail = format!("prefetch request {request}: there are {}", self.len());
            return Err(Error::new(ErrorKind::InvalidArgument, detail));
        }
        let batch = shared.batch_of(request);
        let taken = self.wait(wait, |state| {
            if matches!(state.phases[request], Phase::Waiting) {
                let may_start = !wait.is_zero()
                    || state.started.is_empty()
                    || state.budget.allows(shared.batches[batch].cost);
                if !may_start {
                    return None;
                }
                shared.start(state, batch, /*goes_first=*/ true);
                shared.startable.notify_one();
            }
            match state.phases[request] {
                // If there was no memory for it, the loader has failed.
                Phase::Waiting => state.failure.take().map(Err),
                Phase::Started => None,
                Phase::Ready(_) => shared.hand_out(state, request).map(Ok),
                Phase::Taken => Some(Err(shared.already_delivered(request))),
            }
        })?;
        taken.transpose()
    }

    /// Returns whether request number `request` was handed out.
    #[cfg_attr(not(feature = "bridge"), expect(dead_code, reason = "only C++ shares a loader among threads"))]
    pub(crate) fn is_taken(&self, request: usize) -> bool {
        self.workers.check("prefetch").is_ok()
            && matches!(self.shared.state.lock().phases.get(request), Some(Phase::Taken))
    }

    /// Calls `poll` until it returns a result or `wait` has passed. Without threads, reads in between, at least one chunk.
    fn wait<T>(&self, wait: Duration, mut poll: impl FnMut(&mut State) -> Option<T>) -> Result<Option<T>> {
        self.workers.check("prefetch")?;
        let deadline = Instant::now() + wait;
        let shared = &*self.shared;
        let (mut has_read, mut has_polled_again) = (false, false);
        let mut state = shared.state.lock();
        loop {
            if let Some(failure) = state.failure.take() {
                return Err(failure);
            }
            if state.stopped {
                let detail =
                    "prefetch: an earlier call has returned the error that ended it; begin another one";
                return Err(Error::new(ErrorKind::InvalidArgument, detail));
            }
            if let Some(result) = poll(&mut state) {
                return Ok(Some(result));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let chunk = if self.workers.is_empty() && (!has_read || !left.is_zero()) {
                shared.next_chunk(&mut state)
            } else {
                None
            };
            if let Some(chunk) = chunk {
                state = shared.read_chunk(state, &chunk);
                has_read = true;
            } else if self.workers.is_empty() && !has_polled_again {
                // `next_chunk` may have started a batch without bytes, which has landed, or may have failed.
                has_polled_again = true;
                continue;
            } else if left.is_zero() {
                return Ok(None);
            } else {
                state.wait_for(&shared.landed, left);
            }
            has_polled_again = false;
        }
    }
}

impl Drop for PrefetchLoader {
    fn drop(&mut self) {
        if !self.workers.are_forked() {
            self.shared.stop(&mut self.shared.state.lock());
        }
    }
}

impl Shared {
    fn new(requests: Vec<PrefetchRequest>, options: PrefetchOptions) -> Result<Shared> {
        let plan = Plan::new(requests, options, CHUNK_BYTES)?;
        let most_bytes = CHUNK_BYTES.min(options.buffer_bytes / 8);
        let mut batches: Vec<Batch> = Vec::new();
        let mut first = 0;
        while first < plan.requests.len() {
            let mut end = first + 1;
            let mut cost = plan.requests[first].cost;
            while let Some(next) = plan.requests.get(end) {
                let last = &plan.requests[end - 1];
                let joins = next.file == last.file
                    && next.slice.is_none()
                    && last.slice.is_none()
                    && next.destination.is_some() == last.destination.is_some()
                    && next.cost <= most_bytes.saturating_sub(cost);
                if !joins {
                    break;
                }
                cost += next.cost;
                end += 1;
            }
            let chunks = Chunks::new(plan.requests[first..end].iter().map(|request| request.bytes));
            batches.push(Batch { requests: first..end, chunks, cost });
            first = end;
        }
        let state = State {
            phases: plan.requests.iter().map(|_| Phase::Waiting).collect(),
            next_batch: 0,
            started: VecDeque::new(),
            ready: VecDeque::new(),
            budget: Budget::new(options.buffer_bytes),
            left: plan.requests.len(),
            failure: None,
            stopped: false,
        };
        let (startable, landed) = (Condvar::new(), Condvar::new());
        Ok(Shared { plan, batches, state: Mutex::new(state), startable, landed })
    }

    /// Returns the batch of a request.
    fn batch_of(&self, request: usize) -> usize {
        self.batches.partition_point(|batch| batch.requests.end <= request)
    }

    fn already_delivered(&self, request: usize) -> Error {
        let name = self.plan.name(request);
        let detail = format!("tensor {name:?}: already delivered; each is handed out once");
        self.plan.locate(Error::new(ErrorKind::InvalidArgument, detail), request)
    }

    /// Hands out a request if it is ready.
    fn hand_out(&self, state: &mut State, request: usize) -> Option<PrefetchedTensor> {
        let phase = &mut state.phases[request];
        if !matches!(phase, Phase::Ready(_)) {
            return None;
        }
        let Phase::Ready(tensor) = std::mem::replace(phase, Phase::Taken) else { return None };
        state.left -= 1;
        state.budget.hand_out(self.plan.requests[request].cost);
        // One thread starts the next batch, and wakes the others for its chunks.
        self.startable.notify_one();
        if state.left == 0 {
            self.landed.notify_all();
        }
        Some(tensor)
    }

    /// Ends all reading and releases the memory of everything that was not handed out.
    fn stop(&self, state: &mut State) {
        state.stopped = true;
        state.started.clear();
        state.ready.clear();
        state.phases.fill_with(|| Phase::Waiting);
        self.plan.end();
        self.startable.notify_all();
        self.landed.notify_all();
    }

    fn fail(&self, state: &mut State, error: Error) {
        if !state.stopped {
            state.failure = Some(error);
            self.stop(state);
        }
    }

    /// Reads chunks until all batches are read or the loader is dropped.
    fn work(&self) {
        let mut state = self.state.lock();
        while !state.stopped {
            if let Some(chunk) = self.next_chunk(&mut state) {
                // There may be another one.
                self.startable.notify_one();
                state = self.read_chunk(state, &chunk);
            } else if state.next_batch == self.batches.len() {
                break;
            } else {
                state.wait(&self.startable);
            }
        }
        // The other threads have nothing to wait for either.
        self.startable.notify_all();
    }

    /// Takes the next chunk; starts a batch if none has chunks left and the budget allows it.
    fn next_chunk(&self, state: &mut State) -> Option<Chunk> {
        loop {
            for started in &mut state.started {
                let number = started.next_chunk;
                if number < self.batches[started.batch].chunks.len() {
                    started.next_chunk += 1;
                    return Some(Chunk { batch: started.batch, number, memory: started.memory.clone() });
                }
            }
            while state.next_batch < self.batches.len() && self.is_started(state, state.next_batch) {
                state.next_batch += 1;
            }
            let cost = self.batches.get(state.next_batch)?.cost;
            if state.stopped || !state.budget.allows(cost) {
                return None;
            }
            self.start(state, state.next_batch, /*goes_first=*/ false);
        }
    }

    fn is_started(&self, state: &State, batch: usize) -> bool {
        !matches!(state.phases[self.batches[batch].requests.start], Phase::Waiting)
    }

    /// Allocates the memory of a batch that is not started.
    fn start(&self, state: &mut State, batch: usize, goes_first: bool) {
        let Batch { requests, chunks, cost } = &self.batches[batch];
        let of = &self.plan.requests[requests.clone()];
        let memory = if of.iter().all(|request| request.destination.is_some()) {
            None
        } else {
            match self.plan.allocate(requests.clone()) {
                Ok(memory) => Some(Arc::new(memory)),
                Err(error) => {
                    let error = self.plan.explain(error, requests.start, of.len());
                    return self.fail(state, error);
                }
            }
        };
        state.budget.start(requests.len(), *cost);
        state.phases[requests.clone()].fill_with(|| Phase::Started);
        let started = StartedBatch { batch, memory, next_chunk: 0, left: chunks.len() };
        if started.left == 0 {
            self.land(state, &started);
        } else if goes_first {
            state.started.push_front(started);
        } else {
            state.started.push_back(started);
        }
    }

    /// Makes the requests of a batch ready.
    fn land(&self, state: &mut State, started: &StartedBatch) {
        for (place, request) in self.batches[started.batch].requests.clone().enumerate() {
            let start = start_of(&self.plan.requests[request], started.memory.as_deref(), place);
            let owner = started.memory.as_ref().map(|memory| memory.owner(place));
            state.phases[request] = Phase::Ready(PrefetchedTensor { request, start, owner });
            state.ready.push_back(request);
        }
        self.landed.notify_all();
    }

    /// Reads a chunk, with the lock released.
    fn read_chunk<'a>(&'a self, state: Guard<'a, State>, chunk: &Chunk) -> Guard<'a, State> {
        drop(state);
        // SAFETY: the memory is alive: `chunk` owns it, or it belongs to destinations, which are valid until the loader is
        // dropped (contract of `PrefetchLoader::new`), and that joins this thread. No other thread has this chunk
        // (`next_chunk`).
        let outcome = catch_panic(|| unsafe { self.read(chunk) });
        let mut state = self.state.lock();
        if let Err(error) = outcome {
            self.fail(&mut state, error);
        }
        if state.stopped {
            // This read may have opened the file after `stop` had closed it.
            self.plan.end();
        }
        // After `stop`, which may have cut the read short, none is found.
        let found = state.started.iter().position(|started| started.batch == chunk.batch);
        if let Some(found) = found {
            state.started[found].left -= 1;
            if state.started[found].left == 0
                && let Some(started) = state.started.remove(found)
            {
                self.land(&mut state, &started);
            }
        }
        state
    }

    /// # Safety
    ///
    /// The memory of the chunk must be valid for writes, and no other thread may use it.
    unsafe fn read(&self, chunk: &Chunk) -> Result<()> {
        let Batch { requests, chunks, .. } = &self.batches[chunk.batch];
        if let Some(memory) = &chunk.memory {
            memory.populate(chunks.parts(chunk.number));
        }
        let parts: Vec<ReadPart> = chunks
            .parts(chunk.number)
            .map(|(place, part)| {
                let request = requests.start + place;
                let start = start_of(&self.plan.requests[request], chunk.memory.as_deref(), place);
                let destination = start.wrapping_add(part.start);
                ReadPart { request, offset: part.start, length: part.len(), destination }
            })
            .collect();
        // SAFETY: the parts are inside the memory of the requests (this function's contract), which does not overlap
        // (contract of `PrefetchLoader::new`).
        unsafe { self.plan.read(&parts) }
    }
}
