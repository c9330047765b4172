//! Which bytes a prefetch loader reads next, and which tensors have landed.
//!
//! Requests are grouped into batches: small neighbours together, a large tensor or a slice alone. A batch whose chunks are
//! all read has landed, and its tensors are ready.
//!
//! `prefetch_plan` says how far ahead is read. Batches are what the budget starts: a started batch lands without the caller,
//! because its memory exists, and its chunks are taken before other batches start.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::read::prefetch_plan::{
    Budget, Destination, Plan, PrefetchOptions, PrefetchRequest, ReadPart, Request,
};
use crate::sys::buffers::{Block, Buffers};
use crate::sys::parallel::{CHUNK_BYTES, Chunks};

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

/// The batches of a plan.
#[derive(Debug)]
pub(super) struct Schedule {
    pub(super) plan: Plan,
    batches: Vec<Batch>,
}

/// Neighbours among the requests, all of one file, that are read together. Several are whole tensors, and all or none of
/// them has a destination.
#[derive(Debug)]
struct Batch {
    requests: Range<usize>,
    chunks: Chunks,
    cost: usize,
}

/// How far the batches are: which were started, which have landed, and which tensors were handed out.
#[derive(Debug)]
pub(super) struct Progress {
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
pub(super) struct Chunk {
    batch: usize,
    number: usize,
    memory: Option<Arc<Buffers>>,
}

impl Batch {
    /// Returns the number of chunks. A batch without bytes has an empty one.
    fn chunk_count(&self) -> usize {
        self.chunks.len().max(1)
    }
}

impl Progress {
    /// Returns whether all requests were handed out.
    pub(super) fn is_finished(&self) -> bool {
        self.left == 0
    }

    /// Returns whether a request was handed out.
    pub(super) fn is_taken(&self, request: usize) -> bool {
        matches!(self.phases.get(request), Some(Phase::Taken))
    }

    /// Releases the memory of everything that was not handed out. Reads in progress land nothing then.
    pub(super) fn clear(&mut self) {
        self.started.clear();
        self.ready.clear();
        self.phases.fill_with(|| Phase::Waiting);
    }
}

impl Schedule {
    pub(super) fn new(
        requests: Vec<PrefetchRequest>,
        options: PrefetchOptions,
    ) -> Result<(Schedule, Progress)> {
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
        let progress = Progress {
            phases: plan.requests.iter().map(|_| Phase::Waiting).collect(),
            next_batch: 0,
            started: VecDeque::new(),
            ready: VecDeque::new(),
            budget: Budget::new(options.buffer_bytes),
            left: plan.requests.len(),
        };
        Ok((Schedule { plan, batches }, progress))
    }

    /// Returns the batch of a request.
    fn batch_of(&self, request: usize) -> usize {
        self.batches.partition_point(|batch| batch.requests.end <= request)
    }

    /// Returns how many threads are to read.
    pub(super) fn thread_count(&self) -> usize {
        self.plan.thread_count(self.batches.iter().map(|batch| batch.chunks.len()).sum())
    }

    /// Returns whether all batches are started.
    pub(super) fn is_all_started(&self, progress: &Progress) -> bool {
        progress.next_batch == self.batches.len()
    }

    /// Hands out a request if it is ready.
    pub(super) fn hand_out(&self, progress: &mut Progress, request: usize) -> Option<PrefetchedTensor> {
        let phase = &mut progress.phases[request];
        if !matches!(phase, Phase::Ready(_)) {
            return None;
        }
        let Phase::Ready(tensor) = std::mem::replace(phase, Phase::Taken) else { return None };
        progress.left -= 1;
        progress.budget.hand_out(self.plan.requests[request].cost);
        Some(tensor)
    }

    /// Hands out the request that has landed first.
    pub(super) fn hand_out_next(&self, progress: &mut Progress) -> Option<PrefetchedTensor> {
        while let Some(request) = progress.ready.pop_front() {
            if let Some(tensor) = self.hand_out(progress, request) {
                return Some(tensor);
            }
        }
        None
    }

    /// Starts a request, whose chunks go first. Returns false if it is started already, or not yet: a poll starts it only
    /// within the budget, or if all started batches have landed.
    pub(super) fn prioritize(&self, progress: &mut Progress, request: usize, is_poll: bool) -> Result<bool> {
        let batch = self.batch_of(request);
        let may_start =
            !is_poll || progress.started.is_empty() || progress.budget.allows(self.batches[batch].cost);
        if !may_start || self.is_started(progress, batch) {
            return Ok(false);
        }
        let started = self.start(progress, batch)?;
        progress.started.push_front(started);
        Ok(true)
    }

    /// Takes the next chunk; starts a batch if none has chunks left and the budget allows it.
    pub(super) fn next_chunk(&self, progress: &mut Progress) -> Result<Option<Chunk>> {
        loop {
            for started in &mut progress.started {
                let number = started.next_chunk;
                if number < self.batches[started.batch].chunk_count() {
                    started.next_chunk += 1;
                    let memory = started.memory.clone();
                    return Ok(Some(Chunk { batch: started.batch, number, memory }));
                }
            }
            while !self.is_all_started(progress) && self.is_started(progress, progress.next_batch) {
                progress.next_batch += 1;
            }
            match self.batches.get(progress.next_batch) {
                Some(batch) if progress.budget.allows(batch.cost) => {
                    let started = self.start(progress, progress.next_batch)?;
                    progress.started.push_back(started);
                }
                _ => return Ok(None),
            }
        }
    }

    fn is_started(&self, progress: &Progress, batch: usize) -> bool {
        !matches!(progress.phases[self.batches[batch].requests.start], Phase::Waiting)
    }

    /// Allocates the memory of a batch that is not started.
    fn start(&self, progress: &mut Progress, batch: usize) -> Result<StartedBatch> {
        let Batch { requests, cost, .. } = &self.batches[batch];
        let of = &self.plan.requests[requests.clone()];
        let memory = if of.iter().all(|request| request.destination.is_some()) {
            None
        } else {
            let memory = self.plan.allocate(requests.clone());
            Some(Arc::new(memory.map_err(|error| self.plan.explain(error, requests.start, of.len()))?))
        };
        progress.budget.start(requests.len(), *cost);
        progress.phases[requests.clone()].fill_with(|| Phase::Started);
        Ok(StartedBatch { batch, memory, next_chunk: 0, left: self.batches[batch].chunk_count() })
    }

    /// Reads a chunk.
    ///
    /// # Safety
    ///
    /// The memory of the chunk must be valid for writes, and no other thread may use it.
    pub(super) unsafe fn read(&self, chunk: &Chunk) -> Result<()> {
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

    /// Notes that a chunk is read. Returns whether this was the last one of its batch, whose requests are then ready; false
    /// after [`Progress::clear`].
    pub(super) fn finish(&self, progress: &mut Progress, chunk: &Chunk) -> bool {
        let Some(found) = progress.started.iter().position(|started| started.batch == chunk.batch) else {
            return false;
        };
        progress.started[found].left -= 1;
        if progress.started[found].left > 0 {
            return false;
        }
        let Some(started) = progress.started.remove(found) else { return false };
        for (place, request) in self.batches[started.batch].requests.clone().enumerate() {
            let start = start_of(&self.plan.requests[request], started.memory.as_deref(), place);
            let owner = started.memory.as_ref().map(|memory| memory.owner(place));
            progress.phases[request] = Phase::Ready(PrefetchedTensor { request, start, owner });
            progress.ready.push_back(request);
        }
        true
    }
}

/// Returns the first byte of a request's memory: its destination, or that of place `place` in the memory of its batch.
fn start_of(request: &Request, memory: Option<&Buffers>, place: usize) -> *mut u8 {
    match (request.destination, memory) {
        (Some(Destination(start)), _) => start,
        (None, Some(memory)) => memory.start(place),
        (None, None) => unreachable!("`Schedule::start` allocates memory for requests without destinations"),
    }
}
