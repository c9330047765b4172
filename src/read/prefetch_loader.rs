//! Reads tensors into host memory ahead of the caller, who takes each as soon as its bytes have landed.
//!
//! Requests are grouped into batches: small neighbours together, a large tensor or a slice alone. Threads take chunks of
//! the batches in the order of the requests. A batch whose chunks are all read has landed, and its tensors are ready.
//!
//! # Budget
//!
//! The loader counts the bytes of all requests that it has started and not handed out, and those of the last one that it
//! handed out, because a loop still holds that one while it asks for the next. A batch starts if
//!
//! 1. its bytes fit into the rest of the budget, or
//! 2. no request is started and not handed out, or
//! 3. the caller waits for one of its requests by number.
//!
//! No caller waits forever. One that waits for any request finds a started one that is not handed out, or rule 2 starts the
//! next batch. One that waits for a request by number finds its batch started, or rule 3 starts it. A started batch
//! lands without the caller: its memory exists, and its chunks are taken before other batches start.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::format::slice::Slice;
use crate::read::file::TensorFile;
use crate::read::reader::{self, ReadRange};
use crate::read::slice_reader::SliceReader;
use crate::read::source::{OpenFile, ReadFrom};
use crate::read::strategy::ReadStrategy;
use crate::sys::buffers::{Block, Buffers};
use crate::sys::mutex::{Guard, Mutex};
use crate::sys::parallel::{self, CHUNK_BYTES, Chunks, MIN_PARALLEL_BYTES};
use crate::sys::threads::ThreadLimit;
use crate::sys::workers::{MOST_THREADS, Workers, catch_panic};

/// A tensor to read, or a slice of one.
#[derive(Debug)]
pub struct PrefetchRequest {
    /// The file.
    pub file: Arc<TensorFile>,
    /// The index of the tensor in file order.
    pub index: usize,
    /// The part to read, made for this tensor by [`TensorFile::slice`]; `None` for the whole tensor.
    pub slice: Option<Slice>,
    /// The caller's buffer and its size, which must be that of the tensor or slice; `None` to allocate memory.
    pub destination: Option<(*mut u8, usize)>,
    /// Bytes that the caller allocates for the tensor when it is handed out. They count in the budget.
    pub extra_bytes: usize,
}

/// The options of [`PrefetchLoader::new`].
#[derive(Clone, Copy, Debug)]
pub struct PrefetchOptions {
    /// What reads of mapped files return.
    pub read_from: ReadFrom,
    /// The most bytes of tensors that are read ahead, including the one that was handed out last. A larger tensor is read
    /// when no other is waiting to be taken.
    pub buffer_bytes: usize,
    /// The most threads; `None` for as many as suit the machine. With 0, the calls that wait read.
    pub threads: Option<usize>,
}

impl Default for PrefetchOptions {
    fn default() -> PrefetchOptions {
        PrefetchOptions { read_from: ReadFrom::File, buffer_bytes: usize::MAX, threads: None }
    }
}

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
    files: Vec<SourceFile>,
    requests: Vec<Request>,
    batches: Vec<Batch>,
    options: PrefetchOptions,
    state: Mutex<State>,
    /// Notified when a batch may have become startable, and at the end.
    startable: Condvar,
    /// Notified when a batch has landed, when a read failed, and at the end.
    landed: Condvar,
}

#[derive(Debug)]
struct Request {
    index: usize,
    slice: Option<Slice>,
    destination: Option<Destination>,
    bytes: usize,
    /// The bytes that count in the budget.
    cost: usize,
}

impl Request {
    /// Returns the first byte of the destination. `memory` is that of the batch, and `place` the number of the request in it.
    fn start(&self, memory: Option<&Buffers>, place: usize) -> *mut u8 {
        match (self.destination, memory) {
            (Some(Destination(start)), _) => start,
            (None, Some(memory)) => memory.start(place),
            (None, None) => unreachable!("`Shared::start` allocates memory if there are no destinations"),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Destination(*mut u8);

// SAFETY: only `Shared::read` writes to the address. The contract of `PrefetchLoader::new` covers every thread.
unsafe impl Send for Destination {}
// SAFETY: as above.
unsafe impl Sync for Destination {}

/// Neighbours among the requests, all of one file, that are read together. Several are whole tensors, and all or none of
/// them has a destination.
#[derive(Debug)]
struct Batch {
    file: usize,
    requests: Range<usize>,
    chunks: Chunks,
    cost: usize,
}

/// A file of the requests. It is open between its first read and its last.
#[derive(Debug)]
struct SourceFile {
    file: Arc<TensorFile>,
    /// The bytes to read, and the range of the file that contains them.
    bytes: usize,
    extent: Range<u64>,
    open: Mutex<Option<Arc<OpenSource>>>,
}

#[derive(Debug)]
struct OpenSource {
    /// The file of its mapping, reopened.
    reopened: Option<OpenFile>,
    strategy: ReadStrategy,
}

#[derive(Debug)]
struct State {
    phases: Vec<Phase>,
    /// The first batch in order that may not be started. Those before it are started.
    next_batch: usize,
    /// Batches that the caller waits for.
    urgent: VecDeque<usize>,
    /// Batches with chunks that are not read.
    started: VecDeque<StartedBatch>,
    /// The ready requests in the order of their landing, and some that were taken by number.
    ready: VecDeque<usize>,
    /// For each file, its batches that have not landed.
    batches_left: Vec<usize>,
    /// The bytes that count in the budget.
    held: usize,
    /// The number of requests that are started and not handed out.
    untaken: usize,
    /// The bytes of the request that was handed out last.
    last: usize,
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
        let shared = Arc::new(Shared::plan(requests, options)?);
        let bytes: usize = shared.files.iter().map(|file| file.bytes).sum();
        let chunks: usize = shared.batches.iter().map(|batch| batch.chunks.len()).sum();
        let threads = if bytes < MIN_PARALLEL_BYTES {
            0
        } else {
            // The other files are probably where the first one is.
            let first =
                shared.batches.iter().find(|batch| batch.chunks.len() > 0).map_or(0, |batch| batch.file);
            let suitable = shared.open(first)?.strategy.threads;
            suitable.min(options.threads.unwrap_or(MOST_THREADS)).min(chunks).min(MOST_THREADS)
        };
        let of_threads = Arc::clone(&shared);
        // If no thread can be started, the calls that wait read.
        let workers = Workers::start(threads, move || of_threads.work());
        Ok(PrefetchLoader { shared, workers })
    }

    /// Returns the number of requests.
    pub fn len(&self) -> usize {
        self.shared.requests.len()
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
    /// landed. A request that is not started goes first, whatever the budget.
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
        let taken = self.wait(wait, |state| {
            match state.phases[request] {
                Phase::Waiting => {
                    let batch = shared.batch_of(request);
                    if !state.urgent.contains(&batch) {
                        state.urgent.push_back(batch);
                        shared.startable.notify_one();
                    }
                }
                Phase::Started => {}
                Phase::Ready(_) => return shared.hand_out(state, request).map(Ok),
                Phase::Taken => return Some(Err(shared.already_delivered(request))),
            }
            None
        })?;
        taken.transpose()
    }

    /// Calls `poll` until it returns a result or `wait` has passed. Without threads, reads in between, at least one chunk.
    fn wait<T>(&self, wait: Duration, mut poll: impl FnMut(&mut State) -> Option<T>) -> Result<Option<T>> {
        self.workers.check("prefetch")?;
        let deadline = Instant::now() + wait;
        let shared = &*self.shared;
        let mut has_read = false;
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
            } else if left.is_zero() {
                return Ok(None);
            } else {
                state.wait_for(&shared.landed, left);
            }
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
    fn plan(requests: Vec<PrefetchRequest>, options: PrefetchOptions) -> Result<Shared> {
        let mut numbers = HashMap::new();
        let mut files: Vec<SourceFile> = Vec::new();
        let mut planned: Vec<Request> = Vec::with_capacity(requests.len());
        // The file and the number of requests of each batch.
        let mut groups: Vec<(usize, usize)> = Vec::new();
        let most_bytes = CHUNK_BYTES.min(options.buffer_bytes / 8);
        let mut group_cost = 0;
        for PrefetchRequest { file, index, slice, destination, extra_bytes } in requests {
            let tensor = file.tensor(index)?;
            // At most the size of the file, which was opened or mapped.
            let bytes = slice.as_ref().map_or(tensor.nbytes(), Slice::nbytes) as usize;
            if let Some((_, size)) = destination
                && size != bytes
            {
                return Err(file.wrong_size(tensor.name, bytes as u64, size));
            }
            let range = file.byte_range(&tensor);
            let number = *numbers.entry(Arc::as_ptr(&file)).or_insert_with(|| {
                let open = Mutex::new(None);
                files.push(SourceFile { file: Arc::clone(&file), bytes: 0, extent: range.clone(), open });
                files.len() - 1
            });
            let of = &mut files[number];
            of.bytes += bytes;
            of.extent = of.extent.start.min(range.start)..of.extent.end.max(range.end);
            let destination = destination.map(|(start, _)| Destination(start));
            let request =
                Request { index, slice, destination, bytes, cost: bytes.saturating_add(extra_bytes) };
            let joins = |last: &Request| {
                last.slice.is_none()
                    && request.slice.is_none()
                    && last.destination.is_some() == request.destination.is_some()
                    && request.cost <= most_bytes.saturating_sub(group_cost)
            };
            match groups.last_mut() {
                Some((same, count)) if *same == number && planned.last().is_some_and(joins) => *count += 1,
                _ => {
                    groups.push((number, 1));
                    group_cost = 0;
                }
            }
            group_cost = group_cost.saturating_add(request.cost);
            planned.push(request);
        }
        let mut batches = Vec::with_capacity(groups.len());
        let mut batches_left = vec![0; files.len()];
        let mut first = 0;
        for (file, count) in groups {
            let requests = first..first + count;
            first = requests.end;
            let of = &planned[requests.clone()];
            let chunks = Chunks::new(of.iter().map(|request| request.bytes));
            let cost = of.iter().fold(0, |cost: usize, request| cost.saturating_add(request.cost));
            batches_left[file] += 1;
            batches.push(Batch { file, requests, chunks, cost });
        }
        let state = State {
            phases: planned.iter().map(|_| Phase::Waiting).collect(),
            next_batch: 0,
            urgent: VecDeque::new(),
            started: VecDeque::new(),
            ready: VecDeque::new(),
            batches_left,
            held: 0,
            untaken: 0,
            last: 0,
            left: planned.len(),
            failure: None,
            stopped: false,
        };
        let (startable, landed) = (Condvar::new(), Condvar::new());
        Ok(Shared { files, requests: planned, batches, options, state: Mutex::new(state), startable, landed })
    }

    /// Returns the open file number `number`, opening it if it is not.
    fn open(&self, number: usize) -> Result<Arc<OpenSource>> {
        let SourceFile { file, bytes, extent, open } = &self.files[number];
        let mut open = open.lock();
        if let Some(source) = &*open {
            return Ok(Arc::clone(source));
        }
        let reopened = file.source().reopen(*bytes);
        let wanted = parallel::thread_count(ThreadLimit::at_most(0), *bytes, bytes.div_ceil(CHUNK_BYTES));
        let strategy = ReadStrategy::of(
            file.source().method(self.options.read_from, reopened.as_ref()),
            *bytes,
            || extent.clone(),
            wanted,
            ThreadLimit::at_most(0),
        )?;
        Ok(Arc::clone(open.insert(Arc::new(OpenSource { reopened, strategy }))))
    }

    /// Closes file number `number` once no read uses it.
    fn close(&self, number: usize) {
        *self.files[number].open.lock() = None;
    }

    /// Returns the batch of a request.
    fn batch_of(&self, request: usize) -> usize {
        self.batches.partition_point(|batch| batch.requests.end <= request)
    }

    fn already_delivered(&self, request: usize) -> Error {
        let file = &self.files[self.batches[self.batch_of(request)].file].file;
        let name = file.header().get(self.requests[request].index).map_or("", |tensor| tensor.name);
        let detail = format!("tensor {name:?}: already delivered; each is handed out once");
        file.locate(Error::new(ErrorKind::InvalidArgument, detail))
    }

    /// Hands out a request if it is ready.
    fn hand_out(&self, state: &mut State, request: usize) -> Option<PrefetchedTensor> {
        let phase = &mut state.phases[request];
        if !matches!(phase, Phase::Ready(_)) {
            return None;
        }
        let Phase::Ready(tensor) = std::mem::replace(phase, Phase::Taken) else { return None };
        state.untaken -= 1;
        state.left -= 1;
        state.held -= state.last;
        state.last = self.requests[request].cost;
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
        (0..self.files.len()).for_each(|file| self.close(file));
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
            if let Some(batch) = state.urgent.pop_front() {
                self.start(state, batch, /*goes_first=*/ true);
                continue;
            }
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
            let fits = state.held.saturating_add(cost) <= self.options.buffer_bytes;
            if state.stopped || !(fits || state.untaken == 0) {
                return None;
            }
            self.start(state, state.next_batch, /*goes_first=*/ false);
        }
    }

    fn is_started(&self, state: &State, batch: usize) -> bool {
        !matches!(state.phases[self.batches[batch].requests.start], Phase::Waiting)
    }

    /// Allocates the memory of a batch, unless it is started.
    fn start(&self, state: &mut State, batch: usize, goes_first: bool) {
        if state.stopped || self.is_started(state, batch) {
            return;
        }
        let Batch { file, requests, chunks, cost } = &self.batches[batch];
        let of = &self.requests[requests.clone()];
        let memory = if of.iter().all(|request| request.destination.is_some()) {
            None
        } else {
            let sizes: Vec<usize> = of.iter().map(|request| request.bytes).collect();
            match Buffers::new(&sizes) {
                Ok(memory) => Some(Arc::new(memory)),
                Err(error) => {
                    let error = self.files[*file].file.explain_read(error, of[0].index, of.len());
                    return self.fail(state, error);
                }
            }
        };
        state.held = state.held.saturating_add(*cost);
        state.untaken += requests.len();
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
        let Batch { file, requests, .. } = &self.batches[started.batch];
        for (place, request) in requests.clone().enumerate() {
            let start = self.requests[request].start(started.memory.as_deref(), place);
            let owner = started.memory.as_ref().map(|memory| memory.owner(place));
            state.phases[request] = Phase::Ready(PrefetchedTensor { request, start, owner });
            state.ready.push_back(request);
        }
        state.batches_left[*file] -= 1;
        if state.batches_left[*file] == 0 {
            self.close(*file);
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
            self.close(self.batches[chunk.batch].file);
        }
        // After `stop`, none is found.
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
        let Batch { file, requests, chunks, .. } = &self.batches[chunk.batch];
        let of = &self.requests[requests.clone()];
        let source = self.open(*file)?;
        let file = &self.files[*file].file;
        let method = file.source().method(self.options.read_from, source.reopened.as_ref());
        if let Some(memory) = &chunk.memory {
            memory.populate(chunks.parts(chunk.number));
        }
        let mut ranges = Vec::new();
        for (place, part) in chunks.parts(chunk.number) {
            let start = of[place].start(chunk.memory.as_deref(), place);
            let base = file.byte_range(&file.tensor(of[place].index)?).start;
            let destination = start.wrapping_add(part.start);
            if let Some(slice) = &of[place].slice {
                let reader = SliceReader { method, strategy: Some(source.strategy), slice, base };
                // SAFETY: the part is inside the memory of the request (this function's contract).
                unsafe { reader.read(part.start as u64..part.end as u64, destination) }
                    .map_err(|error| file.explain_read(error, of[place].index, 1))?;
            } else {
                let offset = base + part.start as u64;
                ranges.push(ReadRange { offset, destination, length: part.len() });
            }
        }
        // SAFETY: as above; the memory of different requests does not overlap (contract of `PrefetchLoader::new`).
        unsafe { reader::read_here(method, &ranges, source.strategy) }
            .map_err(|error| file.explain_read(error, of[0].index, of.len()))
    }
}
