//! Reads elements of tensors in small parts, and adds each to statistics while the processor's caches hold it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;
use crate::format::statistics::{Histogram, Statistics};
use crate::read::byte_ranges::{ReadRange, check_within, read_parts};
use crate::read::file::TensorFile;
use crate::read::source::{ReadFrom, ReadMethod};
use crate::read::strategy::ReadStrategy;
use crate::sys::mutex::Mutex;
use crate::sys::parallel;
use crate::sys::threads::ThreadLimit;

/// A tensor is divided into parts of this size from its first byte on. Their statistics are merged in order, so the last bits
/// of the result depend neither on the threads nor on where the elements of a request end.
const PART_BYTES: u64 = 1 << 20;

/// The most bytes of one request to a source, because many are in memory at once.
const SOURCE_REQUEST_BYTES: usize = 2 << 20;

/// Elements of a tensor, and what they are added to.
#[derive(Debug)]
pub struct StatisticsRequest<'a> {
    /// The index of the tensor, in file order.
    pub index: usize,
    /// The first element.
    pub first: u64,
    /// The number of elements.
    pub count: u64,
    /// The statistics of the elements before the first.
    pub statistics: &'a mut Statistics,
    /// The histogram of the elements before the first.
    pub histogram: Option<&'a mut Histogram>,
}

/// Bytes that are added at once.
#[derive(Debug)]
struct Part {
    /// The number of its request.
    request: usize,
    dtype: Dtype,
    offset: u64,
    length: usize,
    has_histogram: bool,
}

/// The result of a part. A histogram is larger than the rest.
type Sums = (Statistics, Option<Box<Histogram>>);

impl TensorFile {
    /// Adds elements of tensors to statistics, in parallel. Tensors that are adjacent in the file are read with one read. A
    /// thread needs a few mebibytes of memory.
    ///
    /// The result depends on neither the number of threads nor, if each request but the last of a tensor ends at a multiple of
    /// 1 MiB of it, on the division into requests. Otherwise that changes the last bits of mean and deviations.
    ///
    /// # Errors
    ///
    /// Before anything is read, [`ErrorKind::UnsupportedDtype`] if [`Statistics::supports`] excludes the dtype,
    /// [`ErrorKind::Slice`] if the elements are not within the tensor, or begin or end in the middle of a byte, and
    /// [`ErrorKind::InvalidArgument`] for an index beyond the last tensor. [`ErrorKind::Io`] and [`ErrorKind::FileChanged`]
    /// while reading: the statistics are then unspecified.
    ///
    /// ```
    /// # fn main() -> safetensors_torch::Result<()> {
    /// use safetensors_torch::{Backend, Dtype, SaveOptions, Statistics, StatisticsRequest, TensorFile, TensorSpec};
    ///
    /// # let directory = tempfile::tempdir().expect("a directory");
    /// # let path = directory.path().join("model.safetensors");
    /// # let spec = TensorSpec { name: "bias", dtype: Dtype::U8, shape: &[4] };
    /// # safetensors_torch::save_file(&[spec], &[&[1, 2, 3, 6]], None, &path, SaveOptions::default())?;
    /// let file = TensorFile::open(&path, Backend::Pread)?;
    /// let mut statistics = Statistics::default();
    /// let request =
    ///     StatisticsRequest { index: 0, first: 0, count: 4, statistics: &mut statistics, histogram: None };
    /// file.compute_statistics(&mut [request])?;
    /// assert_eq!((statistics.minimum, statistics.maximum, statistics.mean), (1.0, 6.0, 3.0));
    /// # Ok(())
    /// # }
    /// ```
    pub fn compute_statistics(&self, requests: &mut [StatisticsRequest<'_>]) -> Result<()> {
        let mut parts = Vec::new();
        for (number, request) in requests.iter().enumerate() {
            self.add_parts(number, request, &mut parts)?;
        }
        self.add_all(&parts, requests).map_err(|error| self.locate(error))
    }

    /// Divides the elements of a request.
    fn add_parts(&self, number: usize, request: &StatisticsRequest<'_>, parts: &mut Vec<Part>) -> Result<()> {
        let &StatisticsRequest { index, first, count, ref histogram, .. } = request;
        let tensor = self.tensor(index)?;
        let refuse = |kind, detail: String| {
            self.locate(Error::new(kind, format!("statistics of tensor {:?}: {detail}", tensor.name)))
        };
        let dtype = tensor.dtype;
        if !Statistics::supports(dtype) {
            let detail =
                format!("the format does not define where the elements of {dtype} are; convert it first");
            return Err(refuse(ErrorKind::UnsupportedDtype, detail));
        }
        // The bits of a validated tensor fit in 63 bits.
        let elements = tensor.nbytes() * 8 / dtype.bits();
        if first > elements || count > elements - first {
            let detail = format!("{count} elements from {first} on are not within its {elements} elements");
            return Err(refuse(ErrorKind::Slice, detail));
        }
        let (begin, end) = (first * dtype.bits(), (first + count) * dtype.bits());
        if !begin.is_multiple_of(8) || !end.is_multiple_of(8) {
            let detail = format!(
                "elements of {dtype} have {} bits, and these begin or end in the middle of a byte; use even numbers",
                dtype.bits()
            );
            return Err(refuse(ErrorKind::Slice, detail));
        }
        let (mut from, to, start) = (begin / 8, end / 8, self.byte_range(&tensor).start);
        while from < to {
            let next = to.min((from / PART_BYTES + 1) * PART_BYTES);
            let (offset, length) = (start + from, (next - from) as usize);
            parts.push(Part { request: number, dtype, offset, length, has_histogram: histogram.is_some() });
            from = next;
        }
        Ok(())
    }

    fn add_all(&self, parts: &[Part], requests: &mut [StatisticsRequest<'_>]) -> Result<()> {
        let bytes: usize = parts.iter().map(|part| part.length).sum();
        let ends = parts.iter().map(|part| part.offset + part.length as u64);
        let extent = parts.iter().map(|part| part.offset).min().unwrap_or(0)..ends.max().unwrap_or(0);
        let reopened = self.source().reopen(bytes);
        let method = self.source().method(ReadFrom::File, reopened.as_ref());
        check_within(method, std::iter::once(extent.clone()))?;
        let limit = ThreadLimit::current()?;
        let strategy = ReadStrategy::of(method, bytes, || extent, PART_BYTES as usize, limit)?;
        let strategy = strategy.through_buffers(limit);
        let items = items(parts, item_bytes(method, strategy));
        let merger = Mutex::new(Merger { requests, waiting: BTreeMap::new(), next: 0 });
        let buffers = Mutex::new(Vec::new());
        parallel::for_each(items.len(), strategy.threads, |item| {
            let parts = &parts[items[item].clone()];
            let mut buffer = buffers.lock().pop().unwrap_or_default();
            let sums = read_and_add(method, strategy, parts, &mut buffer)
                .map_err(|error| self.explain_read_at(error, parts[0].offset, parts.len()))?;
            buffers.lock().push(buffer);
            merger.lock().merge(item, sums);
            Ok(())
        })
    }
}

/// Returns how many bytes a thread reads at a time: those of one part, which stay in its caches, unless larger reads are
/// faster.
fn item_bytes(method: ReadMethod<'_>, strategy: ReadStrategy) -> usize {
    match (method, strategy.request_bytes) {
        (ReadMethod::External(_), _) => strategy.chunk_bytes.min(SOURCE_REQUEST_BYTES),
        (_, Some(_)) => strategy.chunk_bytes,
        (_, None) => PART_BYTES as usize,
    }
}

/// Divides parts into items, each of at most `bytes` or of one part.
fn items(parts: &[Part], bytes: usize) -> Vec<Range<usize>> {
    let (mut items, mut total) = (Vec::<Range<usize>>::new(), 0);
    for (number, part) in parts.iter().enumerate() {
        match items.last_mut() {
            Some(item) if total + part.length <= bytes => item.end = number + 1,
            _ => {
                items.push(number..number + 1);
                total = 0;
            }
        }
        total += part.length;
    }
    items
}

/// Reads `parts` into `buffer`, and returns the number of the request and the sums of each.
fn read_and_add(
    method: ReadMethod<'_>,
    strategy: ReadStrategy,
    parts: &[Part],
    buffer: &mut Vec<u8>,
) -> Result<Vec<(usize, Sums)>> {
    let total: usize = parts.iter().map(|part| part.length).sum();
    if buffer.len() < total {
        buffer.try_reserve_exact(total - buffer.len()).map_err(|_| {
            let detail = format!("cannot allocate {total} bytes to read into; use fewer threads");
            Error::new(ErrorKind::Io, detail).with_os_error(io::Error::from_raw_os_error(libc::ENOMEM))
        })?;
        buffer.resize(total, 0);
    }
    let mut end = buffer.as_mut_ptr();
    let ranges = parts.iter().map(move |&Part { offset, length, .. }| {
        let destination = end;
        end = end.wrapping_add(length);
        ReadRange { offset, destination, length }
    });
    // SAFETY: the ranges follow one another in `buffer`, which has the bytes of all and is borrowed exclusively. They are
    // inside a source of known length: `add_all` has checked the range around them with `check_within`.
    unsafe { read_parts(method, ranges, strategy) }?;
    let mut rest = &buffer[..total];
    let sums = parts.iter().map(|part| {
        let (bytes, after) = rest.split_at(part.length);
        rest = after;
        let (mut statistics, mut histogram) =
            (Statistics::default(), part.has_histogram.then(Box::<Histogram>::default));
        statistics.add(part.dtype, bytes, histogram.as_deref_mut());
        (part.request, (statistics, histogram))
    });
    Ok(sums.collect())
}

/// Merges the sums of items in order. Those that others wait for are few: threads take items in order.
struct Merger<'a, 'b> {
    requests: &'a mut [StatisticsRequest<'b>],
    waiting: BTreeMap<usize, Vec<(usize, Sums)>>,
    /// The first item that is not merged.
    next: usize,
}

impl Merger<'_, '_> {
    fn merge(&mut self, item: usize, sums: Vec<(usize, Sums)>) {
        self.waiting.insert(item, sums);
        while let Some(sums) = self.waiting.remove(&self.next) {
            for (request, (statistics, histogram)) in sums {
                let request = &mut self.requests[request];
                request.statistics.merge(&statistics);
                if let (Some(ours), Some(theirs)) = (&mut request.histogram, histogram) {
                    ours.merge(&theirs);
                }
            }
            self.next += 1;
        }
    }
}
