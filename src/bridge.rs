//! The bridge to `cpp/`: what C++ may ask of the core. Declarations first, then one line of forwarding each.
//!
//! Calls go from C++ to Rust only. An `Err` arrives in C++ as `rust::Error`, its text `CODE ERRNO MESSAGE`.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind};
use crate::file::TensorFile;
use crate::header::{Metadata, absent};
use crate::layout::{DEFAULT_ALIGNMENT, Layout, TensorSpec};
use crate::memory::{Block, Memory, prefer_huge_pages};
use crate::prefault::Prefault;
use crate::serialize::Filler;
use crate::slice::{AxisRange, Slice};
use crate::source::{Mapping, Source};
use crate::writer::AtomicFile;

#[cxx::bridge(namespace = "safetensors_torch::core")]
mod ffi {
    /// An entry of the metadata.
    struct Entry {
        key: Vec<u8>,
        value: Vec<u8>,
    }

    /// A whole tensor to be read, and where to.
    struct Request {
        index: usize,
        destination: *mut u8,
        length: usize,
    }

    /// The part of one dimension that a slice takes.
    struct Range {
        start: u64,
        stop: u64,
        step: u64,
    }

    /// Bytes to be saved, which are part of a file's.
    struct Piece<'a> {
        bytes: &'a [u8],
    }

    /// A tensor to be saved: everything but its bytes.
    struct Spec<'a> {
        name: &'a [u8],
        dtype: u8,
        shape: &'a [u64],
    }

    // An open file, or the bytes of one. Indices are places in file order, and must be below `count`.
    extern "Rust" {
        type File;
        fn open_file(path: &[u8], backend: &[u8]) -> Result<Box<File>>;
        unsafe fn open_memory(start: *const u8, length: usize) -> Result<Box<File>>;
        fn count(self: &File) -> usize;
        fn find(self: &File, name: &[u8]) -> Result<usize>;
        fn contains(self: &File, name: &[u8]) -> bool;
        fn sorted_by_name(self: &File) -> &[u32];
        fn name(self: &File, index: usize) -> &str;
        fn dtype(self: &File, index: usize) -> u8;
        fn shape(self: &File, index: usize) -> &[u64];
        fn nbytes(self: &File, index: usize) -> u64;
        fn has_metadata(self: &File) -> bool;
        fn metadata(self: &File) -> Vec<Entry>;

        /// The tensor's bytes where they are in memory and aligned to its dtype, else null.
        fn shareable(self: &File, index: usize) -> *mut u8;
        /// Keeps the mapping alive until `release_mapping`; for a file with the mmap backend.
        fn share_mapping(self: &File) -> *const Mapping;
        /// Brings the pages of a mapping in: before this returns, or in the background.
        fn prefault(self: &File, wait: bool) -> Result<()>;
        /// Reads tensors into memory made for them, a place for each of `indices`.
        fn load(self: &File, indices: &[usize]) -> Result<Box<Loaded>>;
        unsafe fn read(self: &File, requests: &[Request]) -> Result<()>;
        fn slice_shape(self: &File, index: usize, ranges: &[Range]) -> Result<Vec<u64>>;
        unsafe fn read_slice(
            self: &File,
            index: usize,
            ranges: &[Range],
            destination: *mut u8,
            length: usize,
        ) -> Result<()>;

        type Loaded;
        fn data(self: &Loaded, place: usize) -> *mut u8;
        /// Keeps the place's memory alive until `release_block`.
        fn share(self: &Loaded, place: usize) -> *const Block;

        type Mapping;
        unsafe fn release_mapping(mapping: *const Mapping);
        type Block;
        unsafe fn release_block(block: *const Block);
    }

    // Where tensors go in a file, and the writing of one.
    extern "Rust" {
        type SavePlan;
        fn plan_save(
            specs: &[Spec],
            metadata: &[Entry],
            has_metadata: bool,
            path: &[u8],
        ) -> Result<Box<SavePlan>>;
        fn total_bytes(self: &SavePlan) -> u64;
        fn header(self: &SavePlan) -> &[u8];
        /// The tensor (its index among the specs) that is written as number `place`.
        fn tensor(self: &SavePlan, place: usize) -> usize;
        /// The bytes of the tensor at `place`.
        fn nbytes(self: &SavePlan, place: usize) -> u64;

        type FileWriter;
        fn create_file(path: &[u8], length: u64) -> Result<Box<FileWriter>>;
        fn write(self: &mut FileWriter, pieces: &[Piece]) -> Result<()>;
        fn commit_file(writer: Box<FileWriter>, sync: bool) -> Result<()>;

        type MemoryWriter;
        unsafe fn fill_memory(start: *mut u8, length: usize) -> Box<MemoryWriter>;
        fn write(self: &mut MemoryWriter, pieces: &[Piece]) -> Result<()>;
    }

    extern "Rust" {
        /// The code of a dtype number, such as `F32`.
        fn dtype_code(number: u8) -> &'static str;
        /// The number of a dtype code; the code must be one of the format's.
        fn dtype_number(code: &str) -> Result<u8>;
    }
}

use ffi::{Entry, Piece, Range, Request, Spec};

/// What C++ gets to see of an [`Error`].
struct BridgeError(Error);

impl From<Error> for BridgeError {
    fn from(error: Error) -> BridgeError {
        BridgeError(error)
    }
}

impl fmt::Display for BridgeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.0.code(), self.0.os_error().unwrap_or(0), self.0)
    }
}

type Result<T> = std::result::Result<T, BridgeError>;

fn as_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

fn as_text<'a>(what: &str, bytes: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|_| {
        let detail = format!("{what} {:?} is not UTF-8", String::from_utf8_lossy(bytes));
        BridgeError(Error::new(ErrorKind::InvalidArgument, detail))
    })
}

fn dtype_code(number: u8) -> &'static str {
    Dtype::from_number(u32::from(number)).map_or("unknown", Dtype::code)
}

fn dtype_number(code: &str) -> Result<u8> {
    let dtype = Dtype::from_code(code)
        .ok_or_else(|| Error::new(ErrorKind::UnknownDtype, format!("unknown dtype {code:?}")))?;
    Ok(dtype as u8)
}

/// An open file as C++ sees it.
struct File(TensorFile);

fn open_file(path: &[u8], backend: &[u8]) -> Result<Box<File>> {
    let backend = String::from_utf8_lossy(backend).parse()?;
    Ok(Box::new(File(TensorFile::open(as_path(path), backend)?)))
}

/// # Safety
///
/// As for [`TensorFile::from_memory`].
unsafe fn open_memory(start: *const u8, length: usize) -> Result<Box<File>> {
    // SAFETY: the C++ caller keeps the tensor that owns the bytes alive for as long as the `File`.
    Ok(Box::new(File(unsafe { TensorFile::from_memory(start, length) }?)))
}

impl File {
    fn count(&self) -> usize {
        self.0.header().len()
    }

    fn find(&self, name: &[u8]) -> Result<usize> {
        // A name that is not UTF-8 is in no file; its readable form might be.
        match std::str::from_utf8(name) {
            Ok(name) => Ok(self.0.require(name)?),
            Err(_) => Err(absent(&String::from_utf8_lossy(name)).into()),
        }
    }

    fn contains(&self, name: &[u8]) -> bool {
        std::str::from_utf8(name).is_ok_and(|name| self.0.header().find(name).is_some())
    }

    fn sorted_by_name(&self) -> &[u32] {
        self.0.header().sorted_by_name()
    }

    fn info(&self, index: usize) -> crate::TensorInfo<'_> {
        self.0.header().get(index).expect("cpp/ takes indices from find, sorted_by_name, or below count")
    }

    fn name(&self, index: usize) -> &str {
        self.info(index).name
    }

    fn dtype(&self, index: usize) -> u8 {
        self.info(index).dtype as u8
    }

    fn shape(&self, index: usize) -> &[u64] {
        self.info(index).shape
    }

    fn nbytes(&self, index: usize) -> u64 {
        self.info(index).nbytes()
    }

    fn has_metadata(&self) -> bool {
        self.0.header().metadata().is_some()
    }

    fn metadata(&self) -> Vec<Entry> {
        let entries = self.0.header().metadata().into_iter().flatten();
        entries.map(|(key, value)| Entry { key: key.clone().into(), value: value.clone().into() }).collect()
    }

    fn shareable(&self, index: usize) -> *mut u8 {
        let tensor = self.info(index);
        match self.0.data_ptr(&tensor) {
            Some(data) if data.addr() % tensor.dtype.alignment() == 0 => data.cast_mut(),
            _ => std::ptr::null_mut(),
        }
    }

    fn share_mapping(&self) -> *const Mapping {
        match self.0.source() {
            Source::Mapped(mapping, _) => Arc::into_raw(Arc::clone(mapping)),
            _ => unreachable!("cpp/ shares the mapping of files that it opened with the mmap backend only"),
        }
    }

    fn prefault(&self, wait: bool) -> Result<()> {
        Ok(self.0.prefault(if wait { Prefault::Wait } else { Prefault::Background })?)
    }

    fn load(&self, indices: &[usize]) -> Result<Box<Loaded>> {
        Ok(Box::new(Loaded(self.0.load_tensors(indices)?)))
    }

    /// # Safety
    ///
    /// As for [`TensorFile::read_tensors`].
    unsafe fn read(&self, requests: &[Request]) -> Result<()> {
        let requests: Vec<_> = requests.iter().map(|r| (r.index, r.destination, r.length)).collect();
        // SAFETY: the C++ caller made each destination for this one tensor, with the length that it gives.
        Ok(unsafe { self.0.read_tensors(&requests) }?)
    }

    fn slice(&self, index: usize, ranges: &[Range]) -> Result<Slice> {
        let ranges: Vec<AxisRange> =
            ranges.iter().map(|r| AxisRange { start: r.start, stop: r.stop, step: r.step }).collect();
        Ok(self.0.slice(index, &ranges)?)
    }

    fn slice_shape(&self, index: usize, ranges: &[Range]) -> Result<Vec<u64>> {
        Ok(self.slice(index, ranges)?.shape().to_vec())
    }

    /// # Safety
    ///
    /// As for [`TensorFile::read_slice`].
    unsafe fn read_slice(
        &self,
        index: usize,
        ranges: &[Range],
        destination: *mut u8,
        length: usize,
    ) -> Result<()> {
        let slice = self.slice(index, ranges)?;
        // SAFETY: the C++ caller made the destination for this slice, with the length that it gives.
        Ok(unsafe { self.0.read_slice(index, &slice, destination, length) }?)
    }
}

/// Tensors that were read.
struct Loaded(Memory);

impl Loaded {
    fn data(&self, place: usize) -> *mut u8 {
        self.0.start(place)
    }

    fn share(&self, place: usize) -> *const Block {
        Arc::into_raw(self.0.owner(place))
    }
}

/// # Safety
///
/// `mapping` must come from [`File::share_mapping`], which this call makes undone.
unsafe fn release_mapping(mapping: *const Mapping) {
    // SAFETY: the pointer of an `Arc` that was given up there, and that nobody else takes back (caller).
    drop(unsafe { Arc::from_raw(mapping) });
}

/// # Safety
///
/// `block` must come from [`Loaded::share`], which this call makes undone.
unsafe fn release_block(block: *const Block) {
    // SAFETY: as in `release_mapping`.
    drop(unsafe { Arc::from_raw(block) });
}

/// A settled layout as C++ sees it.
struct SavePlan(Layout);

fn plan_save(
    specs: &[Spec<'_>],
    metadata: &[Entry],
    has_metadata: bool,
    path: &[u8],
) -> Result<Box<SavePlan>> {
    let mut tensors = Vec::with_capacity(specs.len());
    for spec in specs {
        let name = as_text("tensor name", spec.name)?;
        let dtype = Dtype::from_number(u32::from(spec.dtype)).expect("cpp/ takes numbers from dtype_number");
        tensors.push(TensorSpec { name, dtype, shape: spec.shape });
    }
    let mut entries = Metadata::new();
    for Entry { key, value } in metadata {
        let key = as_text("metadata key", key)?;
        entries.insert(key.to_owned(), as_text("metadata value", value)?.to_owned());
    }
    let layout = Layout::plan(&tensors, has_metadata.then_some(&entries), DEFAULT_ALIGNMENT);
    let in_file = |error: Error| if path.is_empty() { error } else { error.in_file(as_path(path)) };
    Ok(Box::new(SavePlan(layout.map_err(in_file)?)))
}

impl SavePlan {
    fn total_bytes(&self) -> u64 {
        self.0.total_bytes()
    }

    fn header(&self) -> &[u8] {
        self.0.header()
    }

    fn tensor(&self, place: usize) -> usize {
        self.0.order()[place].index
    }

    fn nbytes(&self, place: usize) -> u64 {
        let place = self.0.order()[place];
        place.end - place.begin
    }
}

/// A file that is being written, as C++ sees it.
struct FileWriter(AtomicFile);

fn create_file(path: &[u8], length: u64) -> Result<Box<FileWriter>> {
    Ok(Box::new(FileWriter(AtomicFile::create(as_path(path), length)?)))
}

impl FileWriter {
    fn write(&mut self, pieces: &[Piece<'_>]) -> Result<()> {
        Ok(self.0.write(pieces.iter().map(|piece| piece.bytes))?)
    }
}

// By value, as the bridge hands over a Box: the writer is gone afterwards.
#[allow(clippy::boxed_local)]
fn commit_file(writer: Box<FileWriter>, sync: bool) -> Result<()> {
    Ok(writer.0.commit(sync)?)
}

/// Memory that is being written, as C++ sees it.
struct MemoryWriter(Filler);

/// Of memory that was allocated for this, and that nobody has written to: it may get huge pages.
///
/// # Safety
///
/// As for [`Filler::new`].
unsafe fn fill_memory(start: *mut u8, length: usize) -> Box<MemoryWriter> {
    prefer_huge_pages(start, length);
    // SAFETY: the C++ caller keeps the tensor that owns the bytes, to which nobody else writes, until it is done.
    Box::new(MemoryWriter(unsafe { Filler::new(start, length) }))
}

impl MemoryWriter {
    fn write(&mut self, pieces: &[Piece<'_>]) -> Result<()> {
        Ok(self.0.write(pieces.iter().map(|piece| piece.bytes))?)
    }
}
