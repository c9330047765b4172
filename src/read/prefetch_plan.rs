//! What is read ahead: tensors and slices of any files, and how many bytes of them at once.
//!
//! # Budget
//!
//! The budget counts the bytes of all requests that are started and not handed out, and those of the last one that was
//! handed out, because a loop still holds that one while it asks for the next. A request starts if
//!
//! 1. its bytes fit into the rest of the budget, or
//! 2. no request is started and not handed out, or
//! 3. the caller waits for it by number (`PrefetchLoader::take` says what a poll starts).
//!
//! No caller waits forever. One that waits for any request finds a started one that is not handed out, or rule 2 starts the
//! next. One that waits for a request by number finds it started, or rule 3 starts it. A started request lands without the
//! caller.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::format::slice::Slice;
use crate::read::byte_ranges::{ReadRange, read_here};
use crate::read::file::TensorFile;
use crate::read::slice_reader::SliceReader;
use crate::read::source::{OpenFile, ReadFrom, ReadMethod};
use crate::read::strategy::{COLD_READ_BYTES, ReadStrategy};
use crate::sys::buffers::Buffers;
use crate::sys::mutex::Mutex;
use crate::sys::parallel::{self, MIN_PARALLEL_BYTES};
use crate::sys::threads::ThreadLimit;
use crate::sys::workers::MOST_THREADS;

/// The bytes of one read. Reading can end between two of them.
const READ_BYTES: usize = 1 << 20;

/// A tensor to read, or a slice of one.
#[derive(Debug)]
pub struct PrefetchRequest {
    /// The file.
    pub file: Arc<TensorFile>,
    /// The index of the tensor in file order.
    pub index: usize,
    /// The part to read, made for this tensor by [`TensorFile::slice`]; `None` for the whole tensor.
    pub slice: Option<Slice>,
    /// The caller's buffer and its size, which must be that of the tensor or slice; `None` for memory of the reader.
    pub destination: Option<(*mut u8, usize)>,
    /// Bytes that the caller allocates for the tensor besides its own. They count in the budget.
    pub extra_bytes: usize,
}

/// How to read ahead.
#[derive(Clone, Copy, Debug)]
pub struct PrefetchOptions {
    /// What reads of mapped files return.
    pub read_from: ReadFrom,
    /// The most bytes of tensors that are read ahead, including the one that was handed out last. If none waits to be
    /// taken, the next one is read even if it does not fit.
    pub buffer_bytes: usize,
    /// The most threads; `None` for as many as suit the machine. With 0, the calls that wait read.
    pub threads: Option<usize>,
}

impl Default for PrefetchOptions {
    fn default() -> PrefetchOptions {
        PrefetchOptions { read_from: ReadFrom::File, buffer_bytes: usize::MAX, threads: None }
    }
}

/// The requests, and the files that they name.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) requests: Vec<Request>,
    pub(super) options: PrefetchOptions,
    files: Vec<SourceFile>,
    /// The bytes that a thread reads at once.
    piece_bytes: usize,
    limit: ThreadLimit,
    /// Ends reads in progress.
    ended: AtomicBool,
    /// How the largest file is read, and probably the others. `None` if there is little to read.
    likely: Option<ReadStrategy>,
}

#[derive(Debug)]
pub(super) struct Request {
    /// The number of the file.
    pub(super) file: usize,
    pub(super) index: usize,
    pub(super) slice: Option<Slice>,
    pub(super) destination: Option<Destination>,
    /// The offset of the tensor in the file.
    begin: u64,
    pub(super) bytes: usize,
    /// The bytes that count in the budget.
    pub(super) cost: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Destination(pub(super) *mut u8);

// SAFETY: only `Plan::read` writes to the address. The contract of `PrefetchLoader::new` covers every thread.
unsafe impl Send for Destination {}
// SAFETY: as above.
unsafe impl Sync for Destination {}

/// A file of the requests. It is open between its first read and its last.
#[derive(Debug)]
struct SourceFile {
    file: Arc<TensorFile>,
    /// The bytes to read, and the range of the file that contains them.
    bytes: usize,
    extent: Range<u64>,
    reading: Mutex<Reading>,
}

#[derive(Debug)]
struct Reading {
    /// The bytes that were not read yet.
    left: usize,
    source: Option<Arc<OpenSource>>,
}

#[derive(Debug)]
struct OpenSource {
    /// The file of its mapping, reopened.
    reopened: Option<OpenFile>,
    strategy: ReadStrategy,
}

/// Bytes of a request, and the memory to read them to.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadPart {
    pub(super) request: usize,
    pub(super) offset: usize,
    pub(super) length: usize,
    pub(super) destination: *mut u8,
}

/// Ranges of a file that are read together.
#[derive(Default)]
struct ReadBatch {
    ranges: Vec<ReadRange>,
    /// How many more bytes fit.
    room: usize,
    /// The first request with bytes in them.
    first: usize,
}

impl ReadBatch {
    fn add(&mut self, request: usize, range: ReadRange) {
        if self.ranges.is_empty() {
            self.first = request;
        }
        self.room -= range.length;
        self.ranges.push(range);
    }
}

impl Plan {
    pub(super) fn new(
        requests: Vec<PrefetchRequest>,
        options: PrefetchOptions,
        piece_bytes: usize,
    ) -> Result<Plan> {
        let mut numbers = HashMap::new();
        let mut files: Vec<SourceFile> = Vec::new();
        let mut planned = Vec::with_capacity(requests.len());
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
                let reading = Mutex::new(Reading { left: 0, source: None });
                files.push(SourceFile { file: Arc::clone(&file), bytes: 0, extent: range.clone(), reading });
                files.len() - 1
            });
            let of = &mut files[number];
            of.bytes += bytes;
            of.reading.lock().left += bytes;
            of.extent = of.extent.start.min(range.start)..of.extent.end.max(range.end);
            planned.push(Request {
                file: number,
                index,
                slice,
                destination: destination.map(|(start, _)| Destination(start)),
                begin: range.start,
                bytes,
                cost: bytes.saturating_add(extra_bytes),
            });
        }
        let (limit, ended) = (ThreadLimit::current()?, AtomicBool::new(false));
        let mut plan = Plan { requests: planned, options, files, piece_bytes, limit, ended, likely: None };
        let largest = (0..plan.files.len()).min_by_key(|&number| Reverse(plan.files[number].bytes));
        if let Some(number) = largest
            && plan.total_bytes() >= COLD_READ_BYTES
        {
            plan.likely = Some(plan.open(number)?.strategy);
        }
        Ok(plan)
    }

    fn total_bytes(&self) -> usize {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Returns how many threads are to read everything in `pieces` pieces.
    pub(super) fn thread_count(&self, pieces: usize) -> usize {
        // A stream is read in its order.
        let most =
            self.files.iter().map(|file| file.file.source().max_requests()).min().unwrap_or(usize::MAX);
        self.likely.map_or(0, |strategy| {
            thread_count(strategy, self.total_bytes(), pieces, self.limit, self.options.threads).min(most)
        })
    }

    /// Allocates memory for a range of requests.
    pub(super) fn allocate(&self, requests: Range<usize>) -> Result<Buffers> {
        let requests = &self.requests[requests];
        match self.likely {
            Some(strategy) if requests.iter().all(|request| request.slice.is_none()) => {
                let tensors: Vec<_> = requests.iter().map(|request| (request.begin, request.bytes)).collect();
                strategy.allocate(&tensors)
            }
            // Slices do not lie in a file as in memory.
            _ => Buffers::new(&requests.iter().map(|request| request.bytes).collect::<Vec<_>>()),
        }
    }

    /// Returns the open file number `number`, opening it if it is not.
    fn open(&self, number: usize) -> Result<Arc<OpenSource>> {
        let SourceFile { file, bytes, extent, reading } = &self.files[number];
        let mut reading = reading.lock();
        if let Some(source) = &reading.source {
            return Ok(Arc::clone(source));
        }
        let reopened = file.source().reopen(*bytes);
        let method = file.source().method(self.options.read_from, reopened.as_ref());
        let mut strategy = ReadStrategy::of(method, *bytes, || extent.clone(), self.piece_bytes, self.limit)?;
        strategy.threads = strategy.threads.min(self.options.threads.unwrap_or(MOST_THREADS)).max(1);
        Ok(Arc::clone(reading.source.insert(Arc::new(OpenSource { reopened, strategy }))))
    }

    /// Ends reads in progress, and closes all files once no read uses them.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        for file in &self.files {
            file.reading.lock().source = None;
        }
    }

    /// Reads `parts`, on the calling thread. Parts of one file that follow one another are read together. After
    /// [`Plan::end`], the bytes are unspecified.
    ///
    /// # Safety
    ///
    /// Every destination must be valid for writes of its length, and no other thread may use it. None may overlap another.
    pub(super) unsafe fn read(&self, parts: &[ReadPart]) -> Result<()> {
        for parts in parts.chunk_by(|a, b| self.requests[a.request].file == self.requests[b.request].file) {
            let number = self.requests[parts[0].request].file;
            // SAFETY: this function has the same contract.
            unsafe { self.read_from(number, parts) }?;
            let mut reading = self.files[number].reading.lock();
            reading.left -= parts.iter().map(|part| part.length).sum::<usize>();
            if reading.left == 0 {
                reading.source = None;
            }
        }
        Ok(())
    }

    /// # Safety
    ///
    /// As for [`Plan::read`]. All parts must be of file number `number`.
    unsafe fn read_from(&self, number: usize, parts: &[ReadPart]) -> Result<()> {
        let source = self.open(number)?;
        let method =
            self.files[number].file.source().method(self.options.read_from, source.reopened.as_ref());
        let read_bytes = source.strategy.request_bytes.unwrap_or(READ_BYTES);
        let mut batch = ReadBatch::default();
        for &ReadPart { request, offset, length, destination } in parts {
            let Request { begin, slice, .. } = &self.requests[request];
            let mut done = 0;
            while done < length {
                if self.ended.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let (from, destination) = ((offset + done) as u64, destination.wrapping_add(done));
                if batch.ranges.is_empty() {
                    // Reads end where blocks of the file do.
                    batch.room = read_bytes - ((begin + from) % read_bytes as u64) as usize;
                }
                let next = (length - done).min(if slice.is_some() { READ_BYTES } else { batch.room });
                done += next;
                if let Some(slice) = slice {
                    let reader = SliceReader { method, strategy: source.strategy, slice, base: *begin };
                    // SAFETY: the destination is valid (this function's contract).
                    unsafe { reader.read(from..from + next as u64, destination) }
                        .map_err(|error| self.explain(error, request, 1))?;
                    continue;
                }
                batch.add(request, ReadRange { offset: begin + from, destination, length: next });
                if batch.room == 0 {
                    // SAFETY: as above.
                    unsafe { self.read_batch(std::mem::take(&mut batch), method, source.strategy) }?;
                }
            }
        }
        // SAFETY: as above.
        unsafe { self.read_batch(batch, method, source.strategy) }
    }

    /// # Safety
    ///
    /// As for [`Plan::read`].
    unsafe fn read_batch(
        &self,
        batch: ReadBatch,
        method: ReadMethod<'_>,
        strategy: ReadStrategy,
    ) -> Result<()> {
        // SAFETY: this function has the contract of `read_here`.
        unsafe { read_here(method, &batch.ranges, strategy) }
            .map_err(|error| self.explain(error, batch.first, batch.ranges.len()))
    }

    /// Adds the names of the file and of the tensors to an error about `count` requests from `first` on.
    pub(super) fn explain(&self, error: Error, first: usize, count: usize) -> Error {
        let request = &self.requests[first];
        self.files[request.file].file.explain_read(error, request.index, count)
    }

    /// Returns the name of a request's tensor.
    pub(super) fn name(&self, request: usize) -> &str {
        let Request { file, index, .. } = self.requests[request];
        self.files[file].file.header().get(index).map_or("", |tensor| tensor.name)
    }

    /// Adds the path of a request's file to an error.
    pub(super) fn locate(&self, error: Error, request: usize) -> Error {
        match self.requests.get(request) {
            Some(request) => self.files[request.file].file.locate(error),
            None => error,
        }
    }
}

/// Returns how many threads, at most `most`, are to read `bytes` in `pieces` pieces; 0 if the thread that waits reads them.
pub(super) fn thread_count(
    strategy: ReadStrategy,
    bytes: usize,
    pieces: usize,
    limit: ThreadLimit,
    most: Option<usize>,
) -> usize {
    if bytes < MIN_PARALLEL_BYTES && !strategy.scope.is_remote() {
        return 0;
    }
    let suitable = parallel::thread_count(limit, bytes, pieces).max(strategy.threads);
    suitable.min(most.unwrap_or(MOST_THREADS)).min(pieces).min(MOST_THREADS)
}

/// The bytes that are read ahead.
#[derive(Debug)]
pub(super) struct Budget {
    most: usize,
    held: usize,
    /// The number of requests that are started and not handed out.
    untaken: usize,
    /// The bytes of the request that was handed out last.
    last: usize,
}

impl Budget {
    pub(super) fn new(most: usize) -> Budget {
        Budget { most, held: 0, untaken: 0, last: 0 }
    }

    /// Returns whether requests of `cost` bytes may start that nobody waits for by number.
    pub(super) fn allows(&self, cost: usize) -> bool {
        self.held.saturating_add(cost) <= self.most || self.untaken == 0
    }

    /// Counts `requests` requests of `cost` bytes together, which start.
    pub(super) fn start(&mut self, requests: usize, cost: usize) {
        self.held = self.held.saturating_add(cost);
        self.untaken += requests;
    }

    /// Counts a started request of `cost` bytes, which is handed out.
    pub(super) fn hand_out(&mut self, cost: usize) {
        self.untaken = self.untaken.saturating_sub(1);
        self.held = self.held.saturating_sub(self.last);
        self.last = cost;
    }
}
