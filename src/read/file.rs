//! An open safetensors file: its header, and the source of its bytes.

use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::byte_order;
use crate::format::header::{Header, LENGTH_BYTES, TensorInfo};
use crate::format::slice::{AxisRange, Slice};
use crate::read::byte_ranges::ReadRange;
use crate::read::external::{ByteSource, ExternalSource};
use crate::read::prefault::{self, Prefault};
use crate::read::read_ahead::ReadAhead;
use crate::read::reader::{self, PendingRead, ReadList};
use crate::read::source::{
    Backend, ExternalMemory, Mapping, OpenFile, ReadFrom, Source, expect_sequential, open_regular,
    open_regular_in, read_exact_at,
};
use crate::read::strided_read::StridedRead;
use crate::sys::buffers::Buffers;
use crate::sys::directory::Directory;
use crate::sys::filesystem::Filesystem;

/// The bytes from the start of a file that suffice to recognize other formats.
const PROBE_BYTES: u64 = 512;

/// A safetensors file with a validated header, or a buffer with the contents of one.
#[derive(Debug)]
pub struct TensorFile {
    header: Header,
    source: Source,
    path: Option<PathBuf>,
    read_ahead: ReadAhead,
}

/// A slice to read, and its destination.
#[derive(Clone, Copy, Debug)]
pub struct SliceRequest<'a> {
    /// The index of the tensor, in file order.
    pub index: usize,
    /// A slice that was made for the tensor.
    pub slice: &'a Slice,
    /// The first element of the destination.
    pub destination: *mut u8,
    /// The bytes of the destination: the size of the slice, or at least those from the first element to the last if there are
    /// strides.
    pub nbytes: usize,
    /// The distance between neighbours in each dimension of the destination, in elements; `None` if it is row-major.
    pub strides: Option<&'a [u64]>,
}

/// Reads and validates the header of a file of `length` bytes. `read` fills a buffer with the bytes from an offset on.
fn read_header(length: u64, read: impl Fn(&mut [u8], u64) -> Result<()>) -> Result<Header> {
    let mut start = vec![0; length.min(PROBE_BYTES) as usize];
    read(&mut start, 0)?;
    let mut json = vec![0; Header::length(&start, length)? as usize];
    read(&mut json, LENGTH_BYTES)?;
    let header = Header::parse(&json, length)?;
    byte_order::check(header.iter().map(|tensor| (tensor.name, tensor.dtype)))?;
    Ok(header)
}

impl TensorFile {
    /// Opens the file at `path` and validates its header. A mapped file needs no descriptor once this has returned.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] if the file cannot be opened, read or mapped; the kinds from [`ErrorKind::FileTooSmall`] to
    /// [`ErrorKind::ReservedName`] if it does not follow the format; [`ErrorKind::UnsupportedDtype`] on a big-endian
    /// machine, for elements of several bytes.
    ///
    /// ```no_run
    /// # fn main() -> safetensors_torch::Result<()> {
    /// use safetensors_torch::{Backend, TensorFile};
    ///
    /// let file = TensorFile::open("model.safetensors".as_ref(), Backend::Pread)?;
    /// let index = file.require("weight")?;
    /// let mut bytes = vec![0; file.tensor(index)?.nbytes() as usize];
    /// // SAFETY: the buffer is valid for writes of its length.
    /// unsafe { file.read_tensors(&[(index, bytes.as_mut_ptr(), bytes.len())]) }?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn open(path: &Path, backend: Backend) -> Result<TensorFile> {
        TensorFile::from_opened(open_regular(path), path, backend)
    }

    /// As [`TensorFile::open`], for the file `name` in an open directory. `path` is for the errors.
    pub(crate) fn open_in(
        directory: &Directory,
        name: &OsStr,
        path: &Path,
        backend: Backend,
    ) -> Result<TensorFile> {
        TensorFile::from_opened(open_regular_in(directory, name, path), path, backend)
    }

    fn from_opened(opened: Result<(File, u64)>, path: &Path, backend: Backend) -> Result<TensorFile> {
        let opened = opened.map_err(|error| match (error.os_error(), backend) {
            (Some(libc::EMFILE), Backend::Pread) => {
                error.with_remedy("or use the backend \"mmap\", which keeps no file open")
            }
            _ => error,
        })?;
        TensorFile::from_file(opened, path, backend)
    }

    /// As [`TensorFile::open`], for a file that is open, and its length.
    pub(crate) fn from_file(
        (file, length): (File, u64),
        path: &Path,
        backend: Backend,
    ) -> Result<TensorFile> {
        let header = read_header(length, |buffer, offset| read_exact_at(&file, path, buffer, offset))
            .map_err(|error| error.in_file(path))?;
        expect_sequential(&file);
        let file = OpenFile::new(file, path);
        let source = match backend {
            Backend::Mmap => Source::Mapped(Arc::new(Mapping::new(&file, length)?)),
            Backend::Pread => Source::File(file),
        };
        Ok(TensorFile { header, source, path: Some(path.to_path_buf()), read_ahead: ReadAhead::default() })
    }

    /// Opens a buffer that holds the contents of a file.
    ///
    /// # Errors
    ///
    /// As [`TensorFile::open`], except those of the operating system.
    ///
    /// # Safety
    ///
    /// The bytes must stay valid for reads, and nobody may write to them, until the result is dropped.
    pub unsafe fn from_memory(start: *const u8, length: usize) -> Result<TensorFile> {
        // SAFETY: this function has the contract of `ExternalMemory::new`.
        let memory = unsafe { ExternalMemory::new(start, length) };
        let header = read_header(length as u64, |buffer, offset| {
            memory.copy_to(buffer, offset as usize);
            Ok(())
        })?;
        Ok(TensorFile {
            header,
            source: Source::Memory(memory),
            path: None,
            read_ahead: ReadAhead::default(),
        })
    }

    /// Opens a file that the program reads by its own means, in requests of up to 8 MiB, 32 at once. `name`, a URL for
    /// example, stands for the path in errors.
    ///
    /// # Errors
    ///
    /// Those of the source, and those of [`TensorFile::open`] about the format.
    pub fn from_source(source: Box<dyn ByteSource>, name: &Path) -> Result<TensorFile> {
        let mut source = ExternalSource::open(source, name)?;
        let header = read_header(source.len(), |buffer, offset| source.read_exact(buffer, offset))
            .map_err(|error| error.in_file(name))?;
        source.forget_start();
        Ok(TensorFile {
            header,
            source: Source::External(source),
            path: Some(name.to_path_buf()),
            read_ahead: ReadAhead::default(),
        })
    }

    /// Returns the header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// Returns the mapping, or `None` if the file is not mapped.
    pub fn mapping(&self) -> Option<&Arc<Mapping>> {
        match &self.source {
            Source::Mapped(mapping) => Some(mapping),
            Source::File(_) | Source::Memory(_) | Source::External(_) => None,
        }
    }

    /// Returns the path that the file was opened by, or `None` for a buffer.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Returns the index, in file order, of the tensor `name`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TensorNotFound`].
    pub fn require(&self, name: &str) -> Result<usize> {
        self.header.require(name).map_err(|error| self.locate(error))
    }

    /// Returns the tensor at `index` in file order.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] if the file has fewer tensors.
    pub fn tensor(&self, index: usize) -> Result<TensorInfo<'_>> {
        self.header.get(index).ok_or_else(|| {
            let detail = format!("tensor index {index}: the file has {} tensor(s)", self.header.len());
            self.locate(Error::new(ErrorKind::InvalidArgument, detail))
        })
    }

    /// Returns the range of a tensor's bytes, from the start of the file.
    pub fn byte_range(&self, tensor: &TensorInfo<'_>) -> Range<u64> {
        self.header.data_start() + tensor.begin..self.header.data_start() + tensor.end
    }

    /// Returns the address of a tensor's bytes, or `None` if the file is neither mapped nor a buffer.
    pub fn data_ptr(&self, tensor: &TensorInfo<'_>) -> Option<*const u8> {
        // The header was checked against the source's length, so the address is inside.
        self.source.as_ptr().map(|start| start.wrapping_add(self.byte_range(tensor).start as usize))
    }

    /// Brings the pages of a mapped file into memory and maps them, so that touching them neither faults nor waits for
    /// the disk. Does nothing for other files.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] and [`ErrorKind::FileChanged`], with [`Prefault::Wait`] only: in the background, the error shows
    /// when the page is touched.
    pub fn prefault(&self, when: Prefault) -> Result<()> {
        let Some(mapping) = self.mapping() else { return Ok(()) };
        match when {
            Prefault::Background => prefault::start(&[mapping]),
            Prefault::Wait => self.wait_for(mapping, 0..mapping.len()),
        }
    }

    /// As [`TensorFile::prefault`] with [`Prefault::Wait`], for the pages of the tensor at `index`.
    pub(crate) fn prefault_tensor(&self, index: usize) -> Result<()> {
        let bytes = self.byte_range(&self.tensor(index)?);
        let Some(mapping) = self.mapping() else { return Ok(()) };
        self.wait_for(mapping, bytes.start as usize..bytes.end as usize)
    }

    fn wait_for(&self, mapping: &Mapping, bytes: Range<usize>) -> Result<()> {
        prefault::wait(mapping, bytes, |error, part| {
            let (first, last) = (self.index_at(part.start), self.index_at(part.end - 1));
            self.explain_read(error, first, last - first + 1)
        })
    }

    /// Starts to read the tensor at `index` of a mapped file that is not in memory; does not wait. On a network filesystem,
    /// starts to read the tensors after it too if the one before it was asked for last. Does nothing for other files.
    ///
    /// # Errors
    ///
    /// As [`TensorFile::tensor`].
    pub fn read_ahead(&self, index: usize) -> Result<()> {
        let bytes = self.byte_range(&self.tensor(index)?);
        if let Some(mapping) = self.mapping()
            && !bytes.is_empty()
        {
            self.read_ahead.part(mapping, &self.header, index, bytes);
        }
        Ok(())
    }

    /// As [`TensorFile::read_ahead`], for `length` bytes at `address` in the mapping. Does nothing if less than half of
    /// them, `used`, are needed.
    #[cfg_attr(not(feature = "bridge"), expect(dead_code, reason = "only C++ has views"))]
    pub(crate) fn read_ahead_at(&self, index: usize, address: usize, length: usize, used: usize) {
        let (Some(mapping), Ok(tensor)) = (self.mapping(), self.tensor(index)) else { return };
        let bytes = self.byte_range(&tensor);
        let Some(begin) = address.checked_sub(mapping.as_ptr().addr()) else { return };
        let part = begin as u64..(begin + length) as u64;
        if length > 0 && bytes.start <= part.start && part.end <= bytes.end && used >= length / 2 {
            self.read_ahead.part(mapping, &self.header, index, part);
        }
    }

    /// Reads the tensors at `indices` (in file order) into new memory, in parallel if they are large. A mapped file is
    /// read too if they are at least 1 MiB together: changes that were made to its mapping then do not show.
    ///
    /// # Errors
    ///
    /// As [`TensorFile::read_tensors`], and [`ErrorKind::Io`] with `ENOMEM` if there is not enough memory.
    pub fn load_tensors(&self, indices: &[usize]) -> Result<Buffers> {
        let (reopened, read) = self.plan_load(indices)?;
        let method = self.source.method(ReadFrom::File, reopened.as_ref());
        // SAFETY: the read has made memory for the tensors.
        unsafe {
            reader::read_all(method, &read, |error, offset, count| self.explain_read_at(error, offset, count))
        }
        .map_err(|error| self.locate(error))?;
        Ok(read.into_memory())
    }

    /// Plans to read the tensors at `indices` into new memory. Returns the file of a mapping, reopened, too.
    pub(crate) fn plan_load(&self, indices: &[usize]) -> Result<(Option<OpenFile>, PendingRead)> {
        let mut tensors = Vec::with_capacity(indices.len());
        for &index in indices {
            let tensor = self.tensor(index)?;
            // At most the size of the file, which was opened or mapped.
            tensors.push((self.byte_range(&tensor).start, tensor.nbytes() as usize));
        }
        let reopened = self.source.reopen(tensors.iter().map(|&(_, length)| length).sum());
        let method = self.source.method(ReadFrom::File, reopened.as_ref());
        let read = PendingRead::load(method, &tensors).map_err(|error| self.locate(error))?;
        Ok((reopened, read))
    }

    /// Reads whole tensors, in parallel if they are large. A request is the tensor's index in file order, its destination
    /// and its size in bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::BufferSize`] if a size is not the tensor's, before anything is read; [`ErrorKind::Io`] and
    /// [`ErrorKind::FileChanged`] while reading: the contents of the destinations are then unspecified.
    ///
    /// # Safety
    ///
    /// Every destination must be valid for writes of its size until the call returns. None may overlap another one, nor
    /// the memory of the file.
    pub unsafe fn read_tensors(&self, requests: &[(usize, *mut u8, usize)]) -> Result<()> {
        // SAFETY: this function's contract covers every destination.
        unsafe { self.read_all(self.read_ranges(requests)?.into()) }
    }

    /// # Safety
    ///
    /// As for [`reader::read`].
    unsafe fn read_all(&self, list: ReadList) -> Result<()> {
        let reopened = self.source.reopen(list.total_bytes());
        let method = self.source.method(ReadFrom::Mapping, reopened.as_ref());
        // SAFETY: this function has the same contract.
        unsafe {
            reader::read(method, list, |error, offset, count| self.explain_read_at(error, offset, count))
        }
        .map_err(|error| self.locate(error))
    }

    /// Returns the ranges to read for `requests`, after checking their sizes.
    pub(crate) fn read_ranges(&self, requests: &[(usize, *mut u8, usize)]) -> Result<Vec<ReadRange>> {
        let mut ranges = Vec::with_capacity(requests.len());
        for &(index, destination, length) in requests {
            let tensor = self.tensor(index)?;
            if tensor.nbytes() != length as u64 {
                return Err(self.wrong_size(tensor.name, tensor.nbytes(), length));
            }
            ranges.push(ReadRange { offset: self.byte_range(&tensor).start, destination, length });
        }
        Ok(ranges)
    }

    /// Reads slices of tensors, in parallel if they are large. Only pages with bytes of the slices are read. A destination with
    /// strides needs no memory for the slice besides it.
    ///
    /// # Errors
    ///
    /// As [`TensorFile::read_tensors`]; before anything is read, [`ErrorKind::InvalidArgument`] if the number of strides is
    /// wrong, elements might share memory, or elements of less than a byte are not row-major.
    ///
    /// # Safety
    ///
    /// As for [`TensorFile::read_tensors`]. With strides, only the elements of the slice are written; none may overlap one of
    /// another destination.
    pub unsafe fn read_slices(&self, requests: &[SliceRequest<'_>]) -> Result<()> {
        // SAFETY: this function's contract covers the destinations; `plan_slices` has checked that the runs are inside them
        // and do not overlap.
        unsafe { self.read_all(self.plan_slices(requests)?) }
    }

    /// Returns whether the file is on a network filesystem; false if its path leads to another file now.
    #[cfg_attr(not(feature = "bridge"), expect(dead_code, reason = "only Python chooses an order of files"))]
    pub(crate) fn is_remote(&self) -> bool {
        if matches!(self.source, Source::External(_)) {
            return true;
        }
        let reopened = self.source.reopen(usize::MAX);
        reopened.is_some_and(|opened| Filesystem::of(&opened.file).scope.is_remote())
    }

    /// Returns what to read for slices, after checking that each element has a place of its own inside its destination.
    pub(crate) fn plan_slices(&self, requests: &[SliceRequest<'_>]) -> Result<ReadList> {
        let mut list = ReadList::default();
        for &SliceRequest { index, slice, destination, nbytes, strides } in requests {
            let tensor = self.tensor(index)?;
            let needed = match strides {
                Some(strides) => slice.check_strides(tensor.name, strides),
                None => Ok(slice.nbytes()),
            };
            let needed = needed.map_err(|error| self.locate(error))?;
            // No memory is larger.
            let given = nbytes.min(isize::MAX as usize) as u64;
            if needed > given || (strides.is_none() && needed < given) {
                return Err(self.wrong_size(tensor.name, needed, nbytes));
            }
            let (runs, offset) = (slice.runs_to(strides), self.byte_range(&tensor).start + slice.first());
            if runs.are_short() {
                list.strided.push(StridedRead::new(offset, destination, runs));
                continue;
            }
            list.ranges.extend((0..runs.count()).map(|run| {
                let [from, to] = runs.offsets(run);
                let destination = destination.wrapping_add(to as usize);
                ReadRange { offset: offset + from, destination, length: runs.length as usize }
            }));
        }
        Ok(list)
    }

    /// Returns the slice of the tensor at `index` that has one range per dimension.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Slice`] if the ranges do not fit the tensor; those of [`TensorFile::tensor`].
    pub fn slice(&self, index: usize, ranges: &[AxisRange]) -> Result<Slice> {
        let tensor = self.tensor(index)?;
        Slice::plan(tensor.name, tensor.dtype, tensor.shape, ranges).map_err(|error| self.locate(error))
    }

    /// Reads `slice`, which was made for the tensor at `index`. Reads only pages that contain bytes of the slice.
    ///
    /// # Errors
    ///
    /// As [`TensorFile::read_tensors`].
    ///
    /// # Safety
    ///
    /// `destination` must be valid for writes of `length` bytes until the call returns, and must not overlap the memory
    /// of the file.
    pub unsafe fn read_slice(
        &self,
        index: usize,
        slice: &Slice,
        destination: *mut u8,
        length: usize,
    ) -> Result<()> {
        let request = SliceRequest { index, slice, destination, nbytes: length, strides: None };
        // SAFETY: this function's contract is that of `read_slices` for one destination.
        unsafe { self.read_slices(&[request]) }
    }

    pub(crate) fn wrong_size(&self, name: &str, needed: u64, given: usize) -> Error {
        let detail = format!("tensor {name:?} takes {needed} bytes, but the buffer has {given}");
        self.locate(Error::new(ErrorKind::BufferSize, detail))
    }

    /// Adds the path of the file, and the tensors that were being read, to an error: the one at `index`, and `count` in all.
    pub(crate) fn explain_read(&self, error: Error, index: usize, count: usize) -> Error {
        let Some(TensorInfo { name, .. }) = self.header.get(index) else { return self.locate(error) };
        let what = match count {
            0 | 1 => format!("the bytes were for tensor {name:?}"),
            count => format!("the bytes were for tensor {name:?} and {} after it", count - 1),
        };
        self.locate(error.with_remedy(&what))
    }

    /// As [`TensorFile::explain_read`], for the tensor that contains the byte at `offset` of the file.
    pub(crate) fn explain_read_at(&self, error: Error, offset: u64, count: usize) -> Error {
        self.explain_read(error, self.index_at(offset), count)
    }

    /// Returns the index of the first tensor that ends after `offset` of the file.
    fn index_at(&self, offset: u64) -> usize {
        let position = offset.saturating_sub(self.header.data_start());
        let is_before = |index: usize| self.header.get(index).is_some_and(|tensor| tensor.end <= position);
        let (mut first, mut end) = (0, self.header.len());
        while first < end {
            let middle = first.midpoint(end);
            if is_before(middle) { first = middle + 1 } else { end = middle }
        }
        first
    }

    /// Adds the path of the file to an error.
    pub fn locate(&self, error: Error) -> Error {
        match &self.path {
            Some(path) => error.in_file(path),
            None => error,
        }
    }
}
