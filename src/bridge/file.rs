//! Open files, and reading them into host memory.

use std::sync::Arc;
use std::time::Duration;

use super::ffi::{self, Entry, Range, Request};
use super::save::until;
use super::{Result, as_path, entries};
use crate::format::header::tensor_not_found;
use crate::format::slice::{AxisRange, Slice};
use crate::read::caller_source::{self, CallerSource, Lifetime, sft_source};
use crate::read::file::{SliceRequest, TensorFile};
use crate::read::joint_read::JointRead;
use crate::read::prefault::Prefault;
use crate::read::source::{Mapping, ReadFrom};
use crate::sys::buffers::Block;

pub struct File(pub(super) Arc<TensorFile>);

pub fn open_file(path: &[u8], backend: &[u8]) -> Result<Box<File>> {
    let backend = String::from_utf8_lossy(backend).parse()?;
    Ok(Box::new(File(Arc::new(TensorFile::open(as_path(path), backend)?))))
}

pub fn prefault_mode(wait: bool) -> Prefault {
    if wait { Prefault::Wait } else { Prefault::Background }
}

fn read_from(from: ffi::ReadFrom) -> ReadFrom {
    match from {
        ffi::ReadFrom::Mapping => ReadFrom::Mapping,
        _ => ReadFrom::File,
    }
}

/// Returns strides for the core. torch has no negative ones.
fn as_unsigned(strides: &[i64]) -> Vec<u64> {
    strides.iter().map(|stride| stride.cast_unsigned()).collect()
}

/// # Safety
///
/// As for [`TensorFile::from_memory`].
pub unsafe fn open_memory(start: *const u8, length: usize) -> Result<Box<File>> {
    // SAFETY: the bytes stay valid and unwritten until the `File` is dropped; cpp/read/open_file.cpp keeps the tensor that
    // owns them as long.
    Ok(Box::new(File(Arc::new(unsafe { TensorFile::from_memory(start, length) }?))))
}

pub(super) fn lifetime_of(is_interpreted: bool) -> Lifetime {
    if is_interpreted { Lifetime::Interpreter } else { Lifetime::Process }
}

/// # Safety
///
/// The address must be that of an `sft_source`, which keeps its contract.
pub unsafe fn open_source(address: usize, name: &[u8], is_interpreted: bool) -> Result<Box<File>> {
    let source = std::ptr::with_exposed_provenance::<sft_source>(address);
    // SAFETY: this function's contract. The struct has the size of this version: C++ and Python use this copy of the library.
    let source = unsafe { CallerSource::new(source.read(), lifetime_of(is_interpreted)) }?;
    Ok(Box::new(File(Arc::new(TensorFile::from_source(Box::new(source), as_path(name))?))))
}

pub fn source_error_setter() -> usize {
    caller_source::set_error as *const () as usize
}

pub fn end_interpreter(milliseconds: u64) {
    caller_source::end_interpreter(Duration::from_millis(milliseconds));
}

impl File {
    pub fn count(&self) -> usize {
        self.0.header().len()
    }

    pub fn find(&self, name: &[u8]) -> Result<usize> {
        // A name that is not UTF-8 is in no file; its readable form might be.
        match std::str::from_utf8(name) {
            Ok(name) => Ok(self.0.require(name)?),
            Err(_) => Err(self.0.locate(tensor_not_found(&String::from_utf8_lossy(name))).into()),
        }
    }

    pub fn contains(&self, name: &[u8]) -> bool {
        std::str::from_utf8(name).is_ok_and(|name| self.0.header().find(name).is_some())
    }

    pub fn sorted_by_name(&self) -> &[u32] {
        self.0.header().sorted_by_name()
    }

    fn info(&self, index: usize) -> crate::TensorInfo<'_> {
        self.0.header().get(index).expect("cpp/ takes indices from find, sorted_by_name, or below count")
    }

    pub fn name(&self, index: usize) -> &str {
        self.info(index).name
    }

    pub fn dtype(&self, index: usize) -> u8 {
        self.info(index).dtype as u8
    }

    pub fn shape(&self, index: usize) -> &[u64] {
        self.info(index).shape
    }

    pub fn nbytes(&self, index: usize) -> u64 {
        self.info(index).nbytes()
    }

    pub fn has_metadata(&self) -> bool {
        self.0.header().metadata().is_some()
    }

    pub fn metadata(&self) -> Vec<Entry> {
        entries(self.0.header().metadata())
    }

    pub fn begin(&self, index: usize) -> u64 {
        self.0.byte_range(&self.info(index)).start
    }

    pub fn data_start(&self) -> u64 {
        self.0.header().data_start()
    }

    pub fn data(&self, index: usize) -> *mut u8 {
        self.0.data_ptr(&self.info(index)).map_or(std::ptr::null_mut(), <*const u8>::cast_mut)
    }

    pub fn share_mapping(&self) -> *const Mapping {
        let mapping = self
            .0
            .mapping()
            .expect("cpp/ shares the mapping of files that it opened with the mmap backend only");
        Arc::into_raw(Arc::clone(mapping))
    }

    pub fn is_remote(&self) -> bool {
        self.0.is_remote()
    }

    pub fn prefault(&self, wait: bool) -> Result<()> {
        Ok(self.0.prefault(prefault_mode(wait))?)
    }

    pub fn prefault_tensor(&self, index: usize) -> Result<()> {
        Ok(self.0.prefault_tensor(index)?)
    }

    pub fn read_ahead(&self, index: usize) -> Result<()> {
        Ok(self.0.read_ahead(index)?)
    }

    pub fn read_ahead_at(&self, index: usize, address: usize, length: usize, used: usize) {
        self.0.read_ahead_at(index, address, length, used);
    }

    pub fn load(&self, indices: &[usize]) -> Result<Box<PendingRead>> {
        Ok(Box::new(PendingRead(JointRead::load(&self.0, indices)?)))
    }

    /// # Safety
    ///
    /// As for [`JointRead::read`].
    pub unsafe fn read(&self, requests: &[Request], from: ffi::ReadFrom) -> Result<Box<PendingRead>> {
        let requests: Vec<_> = requests.iter().map(|r| (r.index, r.destination, r.length)).collect();
        // SAFETY: this function has the contract of `JointRead::read`.
        Ok(Box::new(PendingRead(unsafe { JointRead::read(&self.0, &requests, read_from(from)) }?)))
    }

    /// # Safety
    ///
    /// As for [`JointRead::read_slices`].
    pub unsafe fn read_slices(
        &self,
        requests: &[ffi::SliceRequest],
        ranges: &[Range],
        strides: &[i64],
        from: ffi::ReadFrom,
    ) -> Result<Box<PendingRead>> {
        let strides = as_unsigned(strides);
        let slices = requests.iter().map(|r| self.slice(r.index, &ranges[r.first..r.first + r.rank]));
        let slices = slices.collect::<Result<Vec<_>>>()?;
        let request = |(r, slice)| {
            let &ffi::SliceRequest { index, first, rank, destination, length: nbytes, is_strided } = r;
            let strides = is_strided.then(|| &strides[first..first + rank]);
            SliceRequest { index, slice, destination, nbytes, strides }
        };
        let requests: Vec<_> = requests.iter().zip(&slices).map(request).collect();
        // SAFETY: this function has the contract of `JointRead::read_slices`.
        Ok(Box::new(PendingRead(unsafe { JointRead::read_slices(&self.0, &requests, read_from(from)) }?)))
    }

    pub fn takes_strides(&self, index: usize, ranges: &[Range], strides: &[i64]) -> bool {
        // torch's elements of less than a byte are pairs, whose strides are not those of the elements.
        let has_strides = self.info(index).dtype.bits().is_multiple_of(8);
        let takes = |slice: Slice| slice.check_strides("", &as_unsigned(strides)).is_ok();
        has_strides && self.slice(index, ranges).is_ok_and(takes)
    }

    pub(super) fn slice(&self, index: usize, ranges: &[Range]) -> Result<Slice> {
        let ranges: Vec<AxisRange> =
            ranges.iter().map(|r| AxisRange { start: r.start, stop: r.stop, step: r.step }).collect();
        Ok(self.0.slice(index, &ranges)?)
    }

    pub fn slice_shape(&self, index: usize, ranges: &[Range]) -> Result<Vec<u64>> {
        Ok(self.slice(index, ranges)?.shape().to_vec())
    }

    /// # Safety
    ///
    /// As for [`TensorFile::read_slice`].
    pub unsafe fn read_slice(
        &self,
        index: usize,
        ranges: &[Range],
        destination: *mut u8,
        length: usize,
    ) -> Result<()> {
        let slice = self.slice(index, ranges)?;
        // SAFETY: `destination` is valid for writes of `length` bytes; cpp/read/load.cpp allocates it for this slice.
        Ok(unsafe { self.0.read_slice(index, &slice, destination, length) }?)
    }
}

/// Tensors of one file or several that are being read.
pub struct PendingRead(JointRead);

impl PendingRead {
    // By value, because the bridge transfers ownership of a Box.
    #[allow(clippy::boxed_local)]
    pub fn append(&mut self, other: Box<PendingRead>) -> usize {
        self.0.append(other.0)
    }

    pub fn advance(&mut self, milliseconds: u64) -> Result<bool> {
        Ok(self.0.advance(until(milliseconds))?)
    }

    pub fn total_bytes(&self, part: usize) -> u64 {
        self.0.bytes(part).0 as u64
    }

    pub fn done_bytes(&self, part: usize) -> u64 {
        self.0.bytes(part).1 as u64
    }

    pub fn data(&self, part: usize, place: usize) -> *mut u8 {
        self.0.data(part, place)
    }

    pub fn share_block(&self, part: usize, place: usize) -> *const Block {
        Arc::into_raw(self.0.block(part, place))
    }
}

/// # Safety
///
/// `mapping` must come from [`File::share_mapping`], and be released once.
pub unsafe fn release_mapping(mapping: *const Mapping) {
    // SAFETY: `share_mapping` made the pointer with `Arc::into_raw`, and it is released once (both by the clause above).
    drop(unsafe { Arc::from_raw(mapping) });
}

/// # Safety
///
/// `block` must come from [`PendingRead::share_block`] or a [`super::ffi::PrefetchedTensor`], and be released once.
pub unsafe fn release_block(block: *const Block) {
    // SAFETY: `share_block` or the loader's bridge made the pointer with `Arc::into_raw`, and it is released once (both by the clause above).
    drop(unsafe { Arc::from_raw(block) });
}
