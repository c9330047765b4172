//! Reads tensors of several files as one read, in steps: no thread is idle at the end of a file.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use crate::error::Result;
use crate::read::file::{SliceRequest, TensorFile};
use crate::read::reader::{self, PendingRead, ReadList};
use crate::read::source::{Mapping, OpenFile, ReadFrom, ReadMethod};
use crate::sys::buffers::Block;
use crate::sys::parallel;
use crate::sys::threads::ThreadLimit;

/// The chunks that are planned together: so many that the wait for the last ones is short beside the others. As many files
/// are open at most.
const WINDOW_CHUNKS: usize = 64;

/// Reads of one file or several that share their threads.
pub(crate) struct JointRead(Vec<Part>);

/// Tensors of one file that are being read.
struct Part {
    file: Arc<TensorFile>,
    from: ReadFrom,
    read: PendingRead,
    /// Copied from instead of the mapping that tensors share, so that none of its pages become resident.
    transient: Option<Mapping>,
}

impl Part {
    fn left_bytes(&self) -> usize {
        self.read.total_bytes() - self.read.done_bytes()
    }

    fn method<'a>(&'a self, reopened: Option<&'a OpenFile>) -> ReadMethod<'a> {
        match &self.transient {
            Some(mapping) => ReadMethod::Mapping(mapping, reopened),
            None => self.file.source().method(self.from, reopened),
        }
    }
}

impl JointRead {
    /// Begins to read the tensors at `indices` into new memory.
    pub(crate) fn load(file: &Arc<TensorFile>, indices: &[usize]) -> Result<JointRead> {
        let (_, read) = file.plan_load(indices)?;
        Ok(JointRead(vec![Part { file: Arc::clone(file), from: ReadFrom::File, read, transient: None }]))
    }

    /// Begins to read tensors into the caller's memory; from the mapping, if the file has one. Unless tensors over that one
    /// may have been changed, as `from` says, few of its pages become resident.
    ///
    /// # Safety
    ///
    /// As for [`TensorFile::read_tensors`], until the result is dropped.
    pub(crate) unsafe fn read(
        file: &Arc<TensorFile>,
        requests: &[(usize, *mut u8, usize)],
        from: ReadFrom,
    ) -> Result<JointRead> {
        JointRead::begin(file, file.read_ranges(requests)?.into(), from)
    }

    /// As [`JointRead::read`], for slices of tensors.
    ///
    /// # Safety
    ///
    /// As for [`TensorFile::read_slices`], until the result is dropped.
    pub(crate) unsafe fn read_slices(
        file: &Arc<TensorFile>,
        requests: &[SliceRequest<'_>],
        from: ReadFrom,
    ) -> Result<JointRead> {
        JointRead::begin(file, file.plan_slices(requests)?, from)
    }

    fn begin(file: &Arc<TensorFile>, list: ReadList, wanted: ReadFrom) -> Result<JointRead> {
        let (bytes, source) = (list.total_bytes(), file.source());
        let reopened = source.reopen(bytes);
        let unmapped = source.method(wanted, reopened.as_ref());
        // The page cache has nothing to copy from: reads of the file go to the destinations without a stop.
        let is_cold = wanted == ReadFrom::File
            && reader::is_cold(unmapped, &list).map_err(|error| file.locate(error))?;
        let from = if is_cold { ReadFrom::File } else { ReadFrom::Mapping };
        let transient =
            if is_cold || wanted == ReadFrom::Mapping { None } else { source.transient_mapping(bytes) };
        let read = PendingRead::new(source.method(from, reopened.as_ref()), list);
        let read = read.map_err(|error| file.locate(error))?;
        Ok(JointRead(vec![Part { file: Arc::clone(file), from, read, transient }]))
    }

    /// Adds the parts of `other`. Returns the number of the first.
    pub(crate) fn append(&mut self, other: JointRead) -> usize {
        let first = self.0.len();
        self.0.extend(other.0);
        first
    }

    /// Reads until all parts are done or `deadline` has passed, but at least one chunk. Returns whether they are done.
    pub(crate) fn advance(&mut self, deadline: Option<Instant>) -> Result<bool> {
        loop {
            let window = self.window();
            if window.is_empty() {
                return Ok(true);
            }
            self.advance_window(window, deadline)?;
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(self.window().is_empty());
            }
        }
    }

    /// Returns the first parts that are not done, enough for [`WINDOW_CHUNKS`].
    fn window(&self) -> Range<usize> {
        let is_done = |part: &Part| part.read.chunks_left() == 0;
        let start = self.0.iter().position(|part| !is_done(part)).unwrap_or(self.0.len());
        let mut chunks = 0;
        let end = self.0[start..].iter().position(|part| {
            let is_full = chunks >= WINDOW_CHUNKS;
            chunks += part.read.chunks_left();
            is_full
        });
        start..end.map_or(self.0.len(), |length| start + length)
    }

    fn advance_window(&mut self, window: Range<usize>, deadline: Option<Instant>) -> Result<()> {
        let parts = &self.0[window.clone()];
        // For this step alone: many of these may wait for their turns.
        let reopened: Vec<Option<OpenFile>> =
            parts.iter().map(|part| part.file.source().reopen(part.left_bytes())).collect();
        let methods: Vec<ReadMethod<'_>> =
            parts.iter().zip(&reopened).map(|(part, file)| part.method(file.as_ref())).collect();
        let (mut ends, mut chunks, mut bytes, mut threads) = (Vec::new(), 0, 0, 1);
        let mut most = usize::MAX;
        for (part, &method) in parts.iter().zip(&methods) {
            part.read.check(method).map_err(|error| part.file.locate(error))?;
            chunks += part.read.chunks_left();
            bytes += part.left_bytes();
            threads = part.read.threads().max(threads);
            most = most.min(part.file.source().max_requests());
            ends.push(chunks);
        }
        threads = threads.max(parallel::thread_count(ThreadLimit::current()?, bytes, chunks)).min(most);
        let first_not_started = parallel::for_each_until(deadline, 0..chunks, threads, |chunk| {
            let index = ends.partition_point(|&end| end <= chunk);
            let part = &parts[index];
            // SAFETY: the destinations are valid and do not overlap: `load` made memory for each tensor, or the
            // contract of `read` or `read_slices` lasts until this is dropped. Each chunk is read once; `check` has
            // accepted everything to read.
            let read = unsafe { part.read.read_left(methods[index], ends[index] - chunk) };
            read.map_err(|error| {
                let (offset, count) = part.read.chunk_left(ends[index] - chunk);
                part.file.explain_read_at(error, offset, count)
            })
        })?;
        for (part, end) in self.0[window].iter_mut().zip(ends) {
            let left = end.saturating_sub(first_not_started);
            part.read.keep_left(left);
        }
        Ok(())
    }

    /// Returns the bytes of part number `part`, and those that are read.
    pub(crate) fn bytes(&self, part: usize) -> (usize, usize) {
        let read = &self.0[part].read;
        (read.total_bytes(), read.done_bytes())
    }

    /// Returns the memory of tensor number `place` of a part that [`JointRead::load`] began.
    pub(crate) fn data(&self, part: usize, place: usize) -> *mut u8 {
        self.0[part].read.memory().start(place)
    }

    /// Returns the owner of that memory.
    pub(crate) fn block(&self, part: usize, place: usize) -> Arc<Block> {
        self.0[part].read.memory().owner(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::dtype::Dtype;
    use crate::format::layout::TensorSpec;
    use crate::format::slice::AxisRange;
    use crate::read::source::Backend;
    use crate::sys::parallel::CHUNK_BYTES;
    use crate::write::save::{SaveOptions, save_file};

    /// Returns files of one tensor each, whose bytes are the file's number.
    fn files(directory: &std::path::Path, sizes: &[usize], backend: Backend) -> Vec<Arc<TensorFile>> {
        let make = |(number, &size): (usize, &usize)| {
            let path = directory.join(number.to_string());
            let spec = TensorSpec { name: "t", dtype: Dtype::U8, shape: &[size as u64] };
            save_file(&[spec], &[&vec![number as u8; size]], None, &path, SaveOptions::default())
                .expect("saved");
            Arc::new(TensorFile::open(&path, backend).expect("opened"))
        };
        sizes.iter().enumerate().map(make).collect()
    }

    fn joint(files: &[Arc<TensorFile>]) -> JointRead {
        let mut all = JointRead(Vec::new());
        for (number, file) in files.iter().enumerate() {
            assert_eq!(all.append(JointRead::load(file, &[0]).expect("planned")), number);
        }
        all
    }

    // More chunks than a window has, and files that are empty, smaller than a chunk, and larger.
    fn sizes() -> Vec<usize> {
        let mut sizes = vec![0, 1, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 0];
        sizes.extend([1000; 2 * WINDOW_CHUNKS]);
        sizes
    }

    #[test]
    fn files_are_read_whole_in_steps_of_a_chunk() {
        let directory = tempfile::tempdir().expect("a directory");
        let sizes = sizes();
        for backend in [Backend::Mmap, Backend::Pread] {
            let mut read = joint(&files(directory.path(), &sizes, backend));
            let chunks: usize = read.0.iter().map(|part| part.read.chunks_left()).sum();
            let mut steps = 1;
            while !read.advance(Some(Instant::now())).expect("read") {
                steps += 1;
            }
            assert_eq!(steps, chunks, "the deadline had passed in each step");
            for (part, &size) in sizes.iter().enumerate() {
                assert_eq!(read.bytes(part), (size, size));
                // SAFETY: `Buffers` has made `size` bytes there, and the read has written them.
                let bytes = unsafe { std::slice::from_raw_parts(read.data(part, 0), size) };
                assert!(bytes.iter().all(|&byte| byte == part as u8), "{part}");
            }
        }
    }

    #[test]
    fn the_error_names_the_file_that_became_shorter_and_the_tensor() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut read = joint(&files(directory.path(), &sizes(), Backend::Pread));
        let shortened = directory.path().join("70");
        let file = std::fs::OpenOptions::new().write(true).open(&shortened).expect("opened");
        file.set_len(file.metadata().expect("metadata").len() - 1).expect("shortened");
        let error = read.advance(None).expect_err("a file is too short");
        assert!(error.to_string().contains(shortened.to_str().expect("text")), "{error}");
        assert!(error.to_string().contains("the bytes were for tensor \"t\""), "{error}");
    }

    #[test]
    fn strided_slices_are_read_in_steps_of_a_tile() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("matrix");
        let spec = TensorSpec { name: "t", dtype: Dtype::U8, shape: &[2100, 1000] };
        let data: Vec<u8> = (0..2100 * 1000u32).map(|index| (index % 251) as u8).collect();
        save_file(&[spec], &[&data], None, &path, SaveOptions::default()).expect("saved");
        for backend in [Backend::Mmap, Backend::Pread] {
            let file = Arc::new(TensorFile::open(&path, backend).expect("opened"));
            let all = |dim| AxisRange { start: 0, stop: dim, step: 1 };
            let slice = file.slice(0, &[all(2100), all(1000)]).expect("valid");
            let (mut transposed, mut blocks, mut rows) =
                (vec![0u8; data.len()], vec![0u8; 2 * data.len()], vec![0u8; data.len()]);
            let request = |bytes: &mut [u8], strides| SliceRequest {
                index: 0,
                slice: &slice,
                destination: bytes.as_mut_ptr(),
                nbytes: bytes.len(),
                strides,
            };
            let requests = [
                request(&mut transposed, Some(&[1, 2100][..])),
                request(&mut rows, None),
                request(&mut blocks, Some(&[2000, 1])),
            ];
            // SAFETY: the buffers outlive the read, and nothing else uses them before its end.
            let mut read =
                unsafe { JointRead::read_slices(&file, &requests, ReadFrom::File) }.expect("planned");
            let (total, mut done) = (3 * data.len(), 0);
            let mut steps = 1;
            while !read.advance(Some(Instant::now())).expect("read") {
                let (bytes, now_done) = read.bytes(0);
                assert!(bytes == total && now_done > done && now_done < total, "{now_done} after {done}");
                (done, steps) = (now_done, steps + 1);
            }
            assert!(steps > 5 && read.bytes(0) == (total, total), "{steps}");
            drop(read);
            let is_transposed = |index: usize| transposed[index] == data[index % 2100 * 1000 + index / 2100];
            assert!((0..data.len()).all(is_transposed) && rows == data);
            assert!(blocks.chunks(2000).zip(data.chunks(1000)).all(|(row, data)| &row[..1000] == data));
        }
    }
}
