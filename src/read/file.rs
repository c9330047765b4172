//! An open safetensors file: its header, and the source that its tensors' bytes come from.

use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::byte_order;
use crate::format::header::{Header, LENGTH_BYTES, TensorInfo};
use crate::format::slice::{AxisRange, Slice};
use crate::read::prefault::{self, Prefault};
use crate::read::reader::{self, ReadRange, total_bytes};
use crate::read::source::{
    Backend, Mapping, OpenFile, ReadFrom, Source, expect_sequential, open_regular, open_regular_in,
    read_exact_at,
};
use crate::sys::buffers::Buffers;
use crate::sys::directory::Directory;

/// Enough of a file's start to tell what else it may be.
const PROBE_BYTES: u64 = 512;

/// Runs of a slice that are closer than this, in bytes, come with one read: the kernel reads whole pages anyway.
const GATHER_GAP: u64 = 4096;

/// The most bytes of a slice that are read before they are gathered.
const GATHER_BYTES: u64 = 1 << 20;

/// The most runs of a slice that are noted before they are read: a slice of many small runs needs no more memory.
const SLICE_BATCH: usize = 1 << 16;

/// A safetensors file, or the bytes of one, with a validated header.
#[derive(Debug)]
pub struct TensorFile {
    header: Header,
    source: Source,
    path: Option<PathBuf>,
}

/// The header, if this machine has the byte order of the elements.
fn native(header: Header) -> Result<Header> {
    byte_order::check(header.iter().map(|tensor| (tensor.name, tensor.dtype)))?;
    Ok(header)
}

impl TensorFile {
    /// Opens the file at `path`, reads its header, and checks it against the file's length. The header is read even
    /// where the data is mapped. A mapped file is closed again: it needs no descriptor.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] where the file cannot be opened, read or mapped; the kinds from
    /// [`ErrorKind::FileTooSmall`] to [`ErrorKind::ReservedName`] where it is not what the format asks for;
    /// [`ErrorKind::UnsupportedDtype`] on a big-endian machine, for elements of several bytes.
    pub fn open(path: &Path, backend: Backend) -> Result<TensorFile> {
        TensorFile::of_opened(open_regular(path), path, backend)
    }

    /// As [`TensorFile::open`], for the file `name` in a directory that is held. `path` is for the errors.
    pub(crate) fn open_in(
        directory: &Directory,
        name: &OsStr,
        path: &Path,
        backend: Backend,
    ) -> Result<TensorFile> {
        TensorFile::of_opened(open_regular_in(directory, name, path), path, backend)
    }

    fn of_opened(opened: Result<(File, u64)>, path: &Path, backend: Backend) -> Result<TensorFile> {
        let opened = opened.map_err(|error| match (error.os_error(), backend) {
            (Some(libc::EMFILE), Backend::Pread) => {
                error.with_remedy("or use the backend \"mmap\", which keeps no file open")
            }
            _ => error,
        })?;
        TensorFile::read_header(opened, path, backend)
    }

    /// As [`TensorFile::open`], for a file that is open, with its length.
    pub(crate) fn read_header(
        (file, length): (File, u64),
        path: &Path,
        backend: Backend,
    ) -> Result<TensorFile> {
        let header = {
            let mut start = vec![0; length.min(PROBE_BYTES) as usize];
            read_exact_at(&file, path, &mut start, 0)?;
            let header_length = Header::length(&start, length).map_err(|error| error.in_file(path))?;
            let mut json = vec![0; header_length as usize];
            read_exact_at(&file, path, &mut json, LENGTH_BYTES)?;
            Header::parse(&json, length).and_then(native).map_err(|error| error.in_file(path))?
        };
        expect_sequential(&file);
        let file = OpenFile { file, path: path.to_path_buf() };
        let source = match backend {
            Backend::Mmap => Source::mapped(&file, length)?,
            Backend::Pread => Source::File(file),
        };
        Ok(TensorFile { header, source, path: Some(path.to_path_buf()) })
    }

    /// Reads the header of the file whose bytes lie in memory.
    ///
    /// # Errors
    ///
    /// As [`TensorFile::open`], less those of the operating system.
    ///
    /// # Safety
    ///
    /// The bytes must stay valid, and nobody may write to them, until the result is dropped.
    pub unsafe fn from_memory(start: *const u8, length: usize) -> Result<TensorFile> {
        // A slice wants a pointer that is not null even where it is empty.
        let bytes: &[u8] = if length == 0 {
            &[]
        } else {
            // SAFETY: the caller vouches for the bytes, for longer than this borrow.
            unsafe { std::slice::from_raw_parts(start, length) }
        };
        let header_length = Header::length(bytes, length as u64)?;
        // A copy: should somebody write to the bytes all the same, what was checked is still what is parsed.
        let json = bytes[LENGTH_BYTES as usize..][..header_length as usize].to_vec();
        let header = native(Header::parse(&json, length as u64)?)?;
        // SAFETY: as the caller promised.
        let source = unsafe { Source::external(start, length) };
        Ok(TensorFile { header, source, path: None })
    }

    /// What the file holds.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where the bytes come from.
    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// The path that the file was opened by; `None` for bytes in memory.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The place of the tensor `name` in file order, or an error that says so.
    pub fn require(&self, name: &str) -> Result<usize> {
        self.header.require(name).map_err(|error| self.locate(error))
    }

    /// The tensor at `index` in file order.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] where there are not so many.
    pub fn tensor(&self, index: usize) -> Result<TensorInfo<'_>> {
        self.header.get(index).ok_or_else(|| {
            let detail = format!("tensor index {index}: the file has {} tensor(s)", self.header.len());
            self.locate(Error::new(ErrorKind::InvalidArgument, detail))
        })
    }

    /// Where a tensor's bytes lie, from the start of the file.
    pub fn byte_range(&self, tensor: &TensorInfo<'_>) -> Range<u64> {
        self.header.data_start() + tensor.begin..self.header.data_start() + tensor.end
    }

    /// The address of a tensor's bytes where they are in memory (mapped, or bytes that were handed in); `None` for
    /// a file that is read.
    pub fn data_ptr(&self, tensor: &TensorInfo<'_>) -> Option<*const u8> {
        // The header was checked against the source's length, so this stays inside.
        self.source.as_ptr().map(|start| start.wrapping_add(self.byte_range(tensor).start as usize))
    }

    /// Brings the pages of a mapped file into reach, so that touching them takes no page fault and waits for no disk.
    /// Does nothing for a file that is not mapped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] and [`ErrorKind::FileChanged`], with [`Prefault::Wait`] alone: whoever goes on meanwhile
    /// finds out by touching the page.
    pub fn prefault(&self, when: Prefault) -> Result<()> {
        let mapped: Vec<_> = self.mapping().into_iter().collect();
        prefault::prefault(&mapped, when)
    }

    /// Has the kernel read the tensor at `index` of a mapped file, which is about to be used, if it is not in memory; waits
    /// for nothing. Does nothing for a file that is not mapped.
    ///
    /// # Errors
    ///
    /// As [`TensorFile::tensor`].
    pub fn read_ahead(&self, index: usize) -> Result<()> {
        let bytes = self.byte_range(&self.tensor(index)?);
        if let Some(mapping) = self.mapping() {
            // The header was checked against the length of what is mapped.
            prefault::read_ahead(mapping, bytes.start as usize..bytes.end as usize);
        }
        Ok(())
    }

    /// As [`TensorFile::read_ahead`], for the `length` bytes at `address` in the mapping, of which `used` are about to be
    /// used. Reads nothing ahead if those lie too far apart.
    #[cfg_attr(not(feature = "bridge"), expect(dead_code, reason = "only C++ has views"))]
    pub(crate) fn read_ahead_at(&self, address: usize, length: usize, used: usize) {
        let Some(mapping) = self.mapping() else { return };
        let Some(begin) = address.checked_sub(mapping.as_ptr().addr()) else { return };
        if begin < mapping.len() && length <= mapping.len() - begin && used >= length / 2 {
            prefault::read_ahead(mapping, begin..begin + length);
        }
    }

    /// Returns the mapping, or `None` for a file that is not mapped.
    pub fn mapping(&self) -> Option<&Arc<Mapping>> {
        match &self.source {
            Source::Mapped(mapping) => Some(mapping),
            Source::File(_) | Source::Memory(_) => None,
        }
    }

    /// Reads the tensors at `indices` (in file order) into fresh memory, each into the place of the same number; in
    /// parallel where it pays, and from the file even where it is mapped.
    ///
    /// # Errors
    ///
    /// As [`TensorFile::read_tensors`], and [`ErrorKind::Io`] with `ENOMEM` where there is not so much memory.
    pub fn load_tensors(&self, indices: &[usize]) -> Result<Buffers> {
        let (memory, ranges) = self.plan_load(indices)?;
        let reopened = self.source.reopen(total_bytes(&ranges));
        let method = self.source.method(ReadFrom::File, reopened.as_ref());
        // SAFETY: every place is there for one tensor, has its size, and lives as long as `memory`.
        unsafe { reader::read(method, ranges, Some(&memory)) }.map_err(|error| self.locate(error))?;
        Ok(memory)
    }

    /// Memory for the tensors at `indices`, and what is to be read into it.
    pub(crate) fn plan_load(&self, indices: &[usize]) -> Result<(Buffers, Vec<ReadRange>)> {
        let mut sizes = Vec::with_capacity(indices.len());
        for &index in indices {
            // A size that a header gives is at most that of the file, which the backends can address.
            sizes.push(self.tensor(index)?.nbytes() as usize);
        }
        let memory = Buffers::new(&sizes).map_err(|error| self.locate(error))?;
        let requests: Vec<_> = indices
            .iter()
            .zip(sizes)
            .enumerate()
            .map(|(place, (&index, size))| (index, memory.start(place), size))
            .collect();
        let ranges = self.read_ranges(&requests)?;
        Ok((memory, ranges))
    }

    /// Reads whole tensors, in parallel where it pays: `(index in file order, destination, its bytes)` each.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::BufferSize`] where a destination has not the tensor's size, before anything is read;
    /// [`ErrorKind::Io`] and [`ErrorKind::FileChanged`] while reading: the destinations then hold anything.
    ///
    /// # Safety
    ///
    /// Every destination must be valid for writes of its bytes until the call returns, and no two may overlap.
    pub unsafe fn read_tensors(&self, requests: &[(usize, *mut u8, usize)]) -> Result<()> {
        let ranges = self.read_ranges(requests)?;
        let reopened = self.source.reopen(total_bytes(&ranges));
        let method = self.source.method(ReadFrom::Mapping, reopened.as_ref());
        // SAFETY: as the caller promised.
        unsafe { reader::read(method, ranges, None) }.map_err(|error| self.locate(error))
    }

    /// What is to be read for `requests`, whose sizes are checked.
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

    /// Plans a slice of the tensor at `index`, one range a dimension.
    pub fn slice(&self, index: usize, ranges: &[AxisRange]) -> Result<Slice> {
        let tensor = self.tensor(index)?;
        Slice::plan(tensor.name, tensor.dtype, tensor.shape, ranges).map_err(|error| self.locate(error))
    }

    /// Reads the bytes of `slice`, which was planned for the tensor at `index`. No page of the file is read that the
    /// slice has nothing in.
    ///
    /// # Errors
    ///
    /// As [`TensorFile::read_tensors`].
    ///
    /// # Safety
    ///
    /// `destination` must be valid for writes of `length` bytes until the call returns.
    pub unsafe fn read_slice(
        &self,
        index: usize,
        slice: &Slice,
        destination: *mut u8,
        length: usize,
    ) -> Result<()> {
        let tensor = self.tensor(index)?;
        if slice.nbytes() != length as u64 {
            return Err(self.wrong_size(tensor.name, slice.nbytes(), length));
        }
        let base = self.byte_range(&tensor).start;
        let reopened = self.source.reopen(length);
        let method = self.source.method(ReadFrom::Mapping, reopened.as_ref());
        let read = |ranges: Vec<ReadRange>| {
            // SAFETY: `read_runs` asks for parts of the destination that are apart, as the caller gave it.
            unsafe { reader::read(method, ranges, None) }
        };
        // SAFETY: the destination has the slice's size (checked).
        unsafe { read_runs(slice, 0..slice.nbytes(), base, destination, read) }
            .map_err(|error| self.locate(error))
    }

    fn wrong_size(&self, name: &str, needed: u64, given: usize) -> Error {
        let detail = format!("tensor {name:?} takes {needed} bytes, but the buffer has {given}");
        self.locate(Error::new(ErrorKind::BufferSize, detail))
    }

    /// Says of an error which file it is about.
    pub fn locate(&self, error: Error) -> Error {
        match &self.path {
            Some(path) => error.in_file(path),
            None => error,
        }
    }
}

/// Reads some of the bytes of `slice`, a slice of a tensor whose bytes begin at `base`, one after the other into
/// `destination`. Runs that are close to each other come with one read, and are picked from that. `read` is asked for
/// ranges whose destinations are valid and apart from each other.
///
/// # Errors
///
/// Those of `read`.
///
/// # Safety
///
/// `destination` must be valid for writes of as many bytes.
pub(crate) unsafe fn read_runs(
    slice: &Slice,
    bytes: Range<u64>,
    base: u64,
    destination: *mut u8,
    read: impl Fn(Vec<ReadRange>) -> Result<()>,
) -> Result<()> {
    let mut direct = Vec::new();
    let mut written = 0;
    let mut runs = slice.byte_ranges_of(bytes).peekable();
    while let Some(first) = runs.next() {
        let mut group = vec![first.clone()];
        let mut end = first.end;
        while let Some(next) = runs.next_if(|next| {
            next.start >= end && next.start - end < GATHER_GAP && next.end - first.start <= GATHER_BYTES
        }) {
            end = next.end;
            group.push(next);
        }
        let target = destination.wrapping_add(written);
        written += group.iter().map(|run| (run.end - run.start) as usize).sum::<usize>();
        if let [run] = &group[..] {
            let length = (run.end - run.start) as usize;
            direct.push(ReadRange { offset: base + run.start, destination: target, length });
            if direct.len() == SLICE_BATCH {
                read(std::mem::take(&mut direct))?;
            }
        } else {
            // SAFETY: `written` never passes the number of bytes, for which the caller vouches.
            unsafe { gather(base, &group, target, &read)? };
        }
    }
    read(direct)
}

/// Reads from the first run to the last at once, and copies the runs out.
///
/// # Safety
///
/// `target` must be valid for writes of the runs' bytes.
unsafe fn gather(
    base: u64,
    runs: &[Range<u64>],
    target: *mut u8,
    read: &impl Fn(Vec<ReadRange>) -> Result<()>,
) -> Result<()> {
    let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(()) };
    let mut scratch = vec![0u8; (last.end - first.start) as usize];
    let length = scratch.len();
    read(vec![ReadRange { offset: base + first.start, destination: scratch.as_mut_ptr(), length }])?;
    let mut written = 0;
    for run in runs {
        let bytes = &scratch[(run.start - first.start) as usize..(run.end - first.start) as usize];
        // SAFETY: the caller's target holds all runs one after the other, and is no part of `scratch`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.add(written), bytes.len()) };
        written += bytes.len();
    }
    Ok(())
}
