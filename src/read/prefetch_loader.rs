//! Reads tensors into host memory ahead of the caller, who takes each as soon as its bytes have landed.
//!
//! Threads take chunks of tensors about in the order of the requests. `prefetch_schedule` chooses the chunks.

use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::read::prefetch_plan::{PrefetchOptions, PrefetchRequest};
use crate::read::prefetch_schedule::{Chunk, PrefetchedTensor, Progress, Schedule};
use crate::sys::mutex::{Guard, Mutex};
use crate::sys::workers::{Workers, catch_panic};

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
    schedule: Schedule,
    state: Mutex<State>,
    /// Notified when a batch may have become startable, and at the end.
    startable: Condvar,
    /// Notified when a batch has landed, when a read failed, and at the end.
    landed: Condvar,
}

#[derive(Debug)]
struct State {
    progress: Progress,
    /// The first error, until a call returns it.
    failure: Option<Error>,
    /// Nothing is read after an error or at the end.
    stopped: bool,
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
        let (schedule, progress) = Schedule::new(requests, options)?;
        let threads = schedule.thread_count();
        let state = Mutex::new(State { progress, failure: None, stopped: false });
        let (startable, landed) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { schedule, state, startable, landed });
        let of_threads = Arc::clone(&shared);
        // If no thread can be started, the calls that wait read.
        let workers = Workers::start(threads, move || of_threads.work());
        Ok(PrefetchLoader { shared, workers })
    }

    /// Returns the number of requests.
    pub fn len(&self) -> usize {
        self.shared.schedule.plan.requests.len()
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
            if let Some(tensor) = shared.schedule.hand_out_next(&mut state.progress) {
                shared.handed_out(state);
                return Some(NextTensor::Ready(tensor));
            }
            state.progress.is_finished().then_some(NextTensor::End)
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
        let taken = self.wait(wait, |state| {
            if state.progress.is_taken(request) {
                return Some(Err(shared.already_delivered(request)));
            }
            match shared.schedule.prioritize(&mut state.progress, request, /*is_poll=*/ wait.is_zero()) {
                Ok(true) => shared.startable.notify_one(),
                Ok(false) => {}
                Err(error) => shared.fail(state, error),
            }
            let tensor = shared.schedule.hand_out(&mut state.progress, request)?;
            shared.handed_out(state);
            Some(Ok(tensor))
        })?;
        taken.transpose()
    }

    /// Returns whether request number `request` was handed out.
    #[cfg_attr(not(feature = "bridge"), expect(dead_code, reason = "only C++ shares a loader among threads"))]
    pub(crate) fn is_taken(&self, request: usize) -> bool {
        self.workers.check("prefetch").is_ok() && self.shared.state.lock().progress.is_taken(request)
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
            if self.workers.is_empty()
                && (!has_read || !left.is_zero())
                && let Some(chunk) = shared.next_chunk(&mut state)
            {
                state = shared.read_chunk(state, &chunk);
                has_read = true;
            } else if state.failure.is_some() {
                // There was no memory to start a batch.
                continue;
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
    fn already_delivered(&self, request: usize) -> Error {
        let plan = &self.schedule.plan;
        let detail = format!("tensor {:?}: already delivered; each is handed out once", plan.name(request));
        plan.locate(Error::new(ErrorKind::InvalidArgument, detail), request)
    }

    /// Notifies the threads that a request was handed out.
    fn handed_out(&self, state: &State) {
        // One thread starts the next batch, and wakes the others for its chunks.
        self.startable.notify_one();
        if state.progress.is_finished() {
            self.landed.notify_all();
        }
    }

    /// Ends all reading and releases the memory of everything that was not handed out.
    fn stop(&self, state: &mut State) {
        state.stopped = true;
        state.progress.clear();
        self.schedule.plan.end();
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
            } else if state.stopped || self.schedule.is_all_started(&state.progress) {
                break;
            } else {
                state.wait(&self.startable);
            }
        }
        // The other threads have nothing to wait for either.
        self.startable.notify_all();
    }

    /// Takes the next chunk that may be read.
    fn next_chunk(&self, state: &mut State) -> Option<Chunk> {
        self.schedule.next_chunk(&mut state.progress).unwrap_or_else(|error| {
            self.fail(state, error);
            None
        })
    }

    /// Reads a chunk, with the lock released.
    fn read_chunk<'a>(&'a self, state: Guard<'a, State>, chunk: &Chunk) -> Guard<'a, State> {
        drop(state);
        // SAFETY: the memory is alive: `chunk` owns it, or it belongs to destinations, which are valid until the loader is
        // dropped (contract of `PrefetchLoader::new`), and that joins this thread. No other thread has this chunk
        // (`Schedule::next_chunk`).
        let outcome = catch_panic(|| unsafe { self.schedule.read(chunk) });
        let mut state = self.state.lock();
        if let Err(error) = outcome {
            self.fail(&mut state, error);
        }
        if state.stopped {
            // This read may have opened the file after `stop` had closed it.
            self.schedule.plan.end();
        }
        if self.schedule.finish(&mut state.progress, chunk) {
            self.landed.notify_all();
        }
        state
    }
}
