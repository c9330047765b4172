//! The bridge to `cpp/`: what C++ may ask of the core. The declarations; `bridge/` has
//! a few lines of forwarding for each.
//!
//! Calls go from C++ to Rust only. An `Err` arrives in C++ as `rust::Error`, its text `CODE ERRNO MESSAGE`.

mod checkpoint;
mod edit;
mod file;
mod incremental;
mod prefetch;
mod save;

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, ErrorKind};
use crate::format::dtype::Dtype;
use crate::read::source::Mapping;
use crate::sys::buffers::Block;
use crate::sys::threads::set_threads;
use checkpoint::{
    Checkpoint, PendingOpen, ShardPlan, ShardedWriter, begin_open, create_shards, finish_open, plan_shards,
};
use edit::{MetadataEdit, begin_edit};
use file::{File, PendingRead, open_file, open_memory, release_block, release_mapping};
use incremental::{IncrementalWriter, TensorWriter, create_incremental_writer, finish_tensor};
use prefetch::Prefetcher;
use save::{FileWriter, MemoryWriter, SavePlan, commit_file, create_file, fill_memory, plan_save};

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

    /// Memory that is filled with parts of tensors.
    struct Slab {
        start: *mut u8,
    }

    /// Bytes of one tensor in a slab: of request number `request`, from `offset` on.
    struct SlabPart {
        request: usize,
        offset: usize,
        slab_offset: usize,
        length: usize,
    }

    #[repr(u8)]
    enum SlabState {
        Filled,
        NotReady,
        /// All slabs were returned.
        End,
    }

    /// A slab and its parts, if it is filled.
    struct NextSlab {
        state: SlabState,
        slab: usize,
        parts: Vec<SlabPart>,
    }

    /// What reads of a mapped file return.
    #[repr(u8)]
    enum ReadFrom {
        /// The bytes of the file.
        File,
        /// The bytes of the mapping, with the changes that tensors over it have made.
        Mapping,
    }

    /// Which tensor of which file.
    struct Place {
        shard: usize,
        index: usize,
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
        /// Where the tensor's bytes begin, from the start of the file.
        fn begin(self: &File, index: usize) -> u64;
        fn has_metadata(self: &File) -> bool;
        fn metadata(self: &File) -> Vec<Entry>;

        /// The tensor's bytes if they are in memory, else null. They may be at any address.
        fn data(self: &File, index: usize) -> *mut u8;
        /// Keeps the mapping alive until `release_mapping`; for a file with the mmap backend.
        fn share_mapping(self: &File) -> *const Mapping;
        /// Brings the pages of a mapping in: before this returns, or in the background.
        fn prefault(self: &File, wait: bool) -> Result<()>;
        /// For the tensor at `index`, which is about to be used.
        fn read_ahead(self: &File, index: usize) -> Result<()>;
        /// For `length` bytes at `address`, of which `used` are about to be used.
        fn read_ahead_at(self: &File, address: usize, length: usize, used: usize);
        /// Begins to read tensors into memory made for them, a place for each of `indices`.
        fn load(self: &File, indices: &[usize]) -> Result<Box<PendingRead>>;
        /// Begins to read tensors into memory of the caller's; as tensors over a mapping show them.
        unsafe fn read(self: &File, requests: &[Request]) -> Result<Box<PendingRead>>;
        fn slice_shape(self: &File, index: usize, ranges: &[Range]) -> Result<Vec<u64>>;
        unsafe fn read_slice(
            self: &File,
            index: usize,
            ranges: &[Range],
            destination: *mut u8,
            length: usize,
        ) -> Result<()>;

        /// Reads on until all is done, or `milliseconds` have passed.
        type PendingRead;
        fn advance(self: &mut PendingRead, milliseconds: u64) -> Result<()>;
        fn total_bytes(self: &PendingRead) -> u64;
        fn done_bytes(self: &PendingRead) -> u64;
        /// For what `load` began: the memory at a place.
        fn data(self: &PendingRead, place: usize) -> *mut u8;
        /// Keeps the place's memory alive until `release_block`.
        fn share_block(self: &PendingRead, place: usize) -> *const Block;

        /// Reads tensors through slabs, which must live, and be touched by nobody else, until the prefetch is gone.
        unsafe fn prefetch(
            self: &File,
            indices: &[usize],
            from: ReadFrom,
            slabs: &[Slab],
            slab_bytes: usize,
        ) -> Result<Box<Prefetcher>>;
        unsafe fn prefetch_slice(
            self: &File,
            index: usize,
            ranges: &[Range],
            slabs: &[Slab],
            slab_bytes: usize,
        ) -> Result<Box<Prefetcher>>;

        type Prefetcher;
        fn next_slab(self: &Prefetcher, microseconds: u64) -> Result<NextSlab>;
        fn release_slab(self: &Prefetcher, slab: usize);
        unsafe fn add_slab(self: &Prefetcher, slab: Slab) -> usize;
        fn is_starved(self: &Prefetcher) -> bool;

        type Mapping;
        unsafe fn release_mapping(mapping: *const Mapping);
        type Block;
        unsafe fn release_block(block: *const Block);
    }

    // The tensors of one file or several.
    extern "Rust" {
        type PendingOpen;
        /// Without `has_variant`, that of no variant.
        fn begin_open(
            path: &[u8],
            backend: &[u8],
            has_variant: bool,
            variant: &[u8],
            extra: &[u8],
        ) -> Result<Box<PendingOpen>>;
        /// Goes on until the checkpoint is open, or a save was waited for so long; whether it is open.
        fn advance(self: &mut PendingOpen, milliseconds: u64) -> Result<bool>;
        fn finish_open(pending: &mut PendingOpen) -> Result<Box<Checkpoint>>;

        type Checkpoint;
        /// The number of tensors.
        fn count(self: &Checkpoint) -> usize;
        fn shard_count(self: &Checkpoint) -> usize;
        fn shard_name(self: &Checkpoint, shard: usize) -> &str;
        fn shard_file(self: &Checkpoint, shard: usize) -> Box<File>;
        fn find(self: &Checkpoint, name: &[u8]) -> Result<Place>;
        fn contains(self: &Checkpoint, name: &[u8]) -> bool;
        fn sorted_by_name(self: &Checkpoint) -> Vec<Place>;
        fn prefault(self: &Checkpoint, wait: bool) -> Result<()>;
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
        /// Returns how many bytes were written: all, unless a pipe has taken no more for so long.
        fn write(self: &mut FileWriter, pieces: &[Piece], milliseconds: u64) -> Result<u64>;
        fn commit_file(writer: Box<FileWriter>, durable: bool) -> Result<()>;

        type ShardPlan;
        fn plan_shards(sizes: &[u64], stem: &[u8], max_shard_size: u64) -> Result<Box<ShardPlan>>;
        fn count(self: &ShardPlan) -> usize;
        /// The file of each tensor.
        fn shard_of(self: &ShardPlan) -> &[usize];

        type ShardedWriter;
        fn create_shards(directory: &[u8], plan: &ShardPlan, names: &[Piece]) -> Result<Box<ShardedWriter>>;
        fn create(self: &ShardedWriter, shard: usize, length: u64) -> Result<Box<FileWriter>>;
        /// Takes the next file once it is written, in the order of their numbers.
        fn keep(self: &mut ShardedWriter, file: Box<FileWriter>);
        /// Puts all files in place, unless another save has been waited for so long; whether they are.
        fn commit(self: &mut ShardedWriter, durable: bool, milliseconds: u64) -> Result<bool>;
        /// The names of the files, the index last.
        fn file_names(self: &ShardedWriter) -> Vec<String>;

        type MemoryWriter;
        unsafe fn fill_memory(start: *mut u8, length: usize) -> Box<MemoryWriter>;
        fn write(self: &mut MemoryWriter, pieces: &[Piece]) -> Result<()>;
    }

    // Files that are written tensor by tensor, by any thread.
    extern "Rust" {
        type IncrementalWriter;
        fn create_incremental_writer(
            specs: &[Spec],
            metadata: &[Entry],
            has_metadata: bool,
            path: &[u8],
            durable: bool,
        ) -> Result<Box<IncrementalWriter>>;
        fn begin(self: &IncrementalWriter, spec: &Spec) -> Result<Box<TensorWriter>>;
        fn missing(self: &IncrementalWriter) -> Result<Vec<String>>;
        fn is_open(self: &IncrementalWriter) -> bool;
        fn commit(self: &IncrementalWriter) -> Result<()>;
        fn discard(self: &IncrementalWriter);

        type TensorWriter;
        fn write(self: &mut TensorWriter, pieces: &[Piece]) -> Result<()>;
        fn finish_tensor(writer: Box<TensorWriter>) -> Result<()>;
    }

    // Changes of the metadata of a file.
    extern "Rust" {
        type MetadataEdit;
        fn begin_edit(
            path: &[u8],
            set: &[Entry],
            removed: &[Piece],
            in_place: bool,
            reserve: u64,
            durable: bool,
        ) -> Result<Box<MetadataEdit>>;
        /// Goes on until all is done, or `milliseconds` have passed; whether all is.
        fn advance(self: &mut MetadataEdit, milliseconds: u64) -> Result<bool>;
        fn total_bytes(self: &MetadataEdit) -> u64;
        fn done_bytes(self: &MetadataEdit) -> u64;
        /// What the file has once it is done.
        fn metadata(self: &MetadataEdit) -> Vec<Entry>;
    }

    extern "Rust" {
        /// The most threads that one call uses; 0 for as many as suit.
        fn threads() -> Result<usize>;
        fn set_threads(most: usize);
        /// The number that an environment variable holds, or `otherwise`.
        fn env_number(name: &str, otherwise: u64) -> Result<u64>;
        /// The code of a dtype number, such as `F32`.
        fn dtype_code(number: u8) -> &'static str;
        /// The number of a dtype code; the code must be one of the format's.
        fn dtype_number(code: &str) -> Result<u8>;
    }
}

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

fn threads() -> Result<usize> {
    Ok(crate::sys::threads::threads()?)
}

fn env_number(name: &str, otherwise: u64) -> Result<u64> {
    Ok(crate::sys::threads::env_number(name, otherwise)?)
}

fn dtype_code(number: u8) -> &'static str {
    Dtype::from_number(u32::from(number)).map_or("unknown", Dtype::code)
}

fn dtype_number(code: &str) -> Result<u8> {
    let dtype = Dtype::from_code(code)
        .ok_or_else(|| Error::new(ErrorKind::UnknownDtype, format!("unknown dtype {code:?}")))?;
    Ok(dtype as u8)
}
