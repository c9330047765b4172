//! The functions that `cpp/` may call, declared for cxx; `bridge/` implements each in a few lines.
//!
//! C++ calls Rust, never the other way. An `Err` becomes a `rust::Error` with the text `CODE ERRNO MESSAGE`. Strings cross
//! as bytes, because only Rust checks UTF-8.
//!
//! Pending work (`PendingRead`, `PendingOpen`, `Consolidation`, `MetadataEdit`) has one protocol: `advance` works until the work is done or
//! so many milliseconds have passed, and returns whether it is done. Dropping it cancels it. Work on data counts its bytes:
//! `done_bytes` of `total_bytes`.

mod checkpoint;
mod edit;
mod file;
mod incremental;
mod joined;
mod prefetch;
mod prefetch_loader;
mod save;

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, ErrorKind};
use crate::format::dtype::Dtype;
use crate::format::header::Metadata;
use crate::read::source::Mapping;
use crate::sys::buffers::Block;
use crate::sys::direct_io::Direct;
use crate::sys::threads::set_threads;
use checkpoint::{
    Checkpoint, Consolidation, PendingOpen, ShardPlan, ShardedWriter, assign_shards, begin_open,
    create_shards, finish_open, open_filesystem, plan_shards, start_consolidation, thread_count,
};
use edit::{MetadataEdit, begin_edit};
use file::{
    File, PendingRead, end_interpreter, open_file, open_memory, open_source, release_block, release_mapping,
    source_error_setter,
};
use incremental::{IncrementalWriter, TensorWriter, create_incremental_writer, finish_tensor};
use joined::{JoinedWriter, finish_joined, join_file};
use prefetch::Prefetcher;
use prefetch_loader::{PrefetchLoader, PrefetchPlan, plan_prefetch};
use save::{FileWriter, MemoryWriter, SavePlan, commit_file, create_file, fill_memory, plan_save};

#[cxx::bridge(namespace = "safetensors_torch::core")]
mod ffi {
    struct Entry {
        key: Vec<u8>,
        value: Vec<u8>,
    }

    /// A tensor to read, and the memory to read it to.
    struct Request {
        index: usize,
        destination: *mut u8,
        length: usize,
    }

    /// A slice to read, and the memory to read it to: row-major, or with strides. Its ranges and strides are `rank` of two lists,
    /// from `first` on.
    struct SliceRequest {
        index: usize,
        first: usize,
        rank: usize,
        destination: *mut u8,
        length: usize,
        is_strided: bool,
    }

    /// A piece of host memory that a prefetch fills with parts of tensors.
    struct Slab {
        start: *mut u8,
    }

    /// The bytes in a slab of one tensor, that of request number `request`, from its byte `offset` on.
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

    #[repr(u8)]
    enum PrefetchState {
        Ready,
        NotReady,
        /// All tensors were handed out, or the one that was asked for.
        End,
    }

    /// The tensor of request number `request`, if it is ready: `block`, which owns its bytes, lives until `release_block`.
    struct PrefetchedTensor {
        state: PrefetchState,
        request: usize,
        start: *mut u8,
        block: *const Block,
    }

    /// What reads of a mapped file return.
    #[repr(u8)]
    enum ReadFrom {
        File,
        /// The bytes of the mapping, with the changes that tensors over it have made.
        Mapping,
    }

    /// The shard of a tensor, and its index there in file order.
    struct TensorLocation {
        shard: usize,
        index: usize,
    }

    /// The part of one dimension that a slice takes.
    struct Range {
        start: u64,
        stop: u64,
        step: u64,
    }

    /// Bytes to be saved, which must be valid for reads during the call. Others may change them.
    struct Piece {
        start: *const u8,
        length: usize,
    }

    struct Text<'a> {
        bytes: &'a [u8],
    }

    /// A tensor to save, without its bytes.
    struct Spec<'a> {
        name: &'a [u8],
        dtype: u8,
        shape: &'a [u64],
    }

    /// How to open a checkpoint; `variant` counts only if `has_variant`.
    struct CheckpointOptions<'a> {
        backend: &'a [u8],
        has_variant: bool,
        variant: &'a [u8],
        extra: &'a [u8],
    }

    // Reading: an open file, or the bytes of one in memory. An `index` is in file order, and below `count`.
    extern "Rust" {
        type File;
        fn open_file(path: &[u8], backend: &[u8]) -> Result<Box<File>>;
        unsafe fn open_memory(start: *const u8, length: usize) -> Result<Box<File>>;
        /// Opens a file that the `sft_source` at an address reads: in an interpreter, or by compiled code.
        unsafe fn open_source(address: usize, name: &[u8], is_interpreted: bool) -> Result<Box<File>>;
        /// Returns the address of a function as `sft_source_error_set`.
        fn source_error_setter() -> usize;
        /// Ends the sources of an interpreter: waits for running calls, but not longer than the timeout.
        fn end_interpreter(milliseconds: u64);
        fn count(self: &File) -> usize;
        fn find(self: &File, name: &[u8]) -> Result<usize>;
        fn contains(self: &File, name: &[u8]) -> bool;
        fn sorted_by_name(self: &File) -> &[u32];
        fn name(self: &File, index: usize) -> &str;
        fn dtype(self: &File, index: usize) -> u8;
        fn shape(self: &File, index: usize) -> &[u64];
        fn nbytes(self: &File, index: usize) -> u64;
        /// Returns the offset of the tensor's first byte in the file.
        fn begin(self: &File, index: usize) -> u64;
        /// Returns the offset of the data in the file.
        fn data_start(self: &File) -> u64;
        fn has_metadata(self: &File) -> bool;
        fn metadata(self: &File) -> Vec<Entry>;

        /// Returns the tensor's bytes if they are in memory, otherwise null. They may be unaligned.
        fn data(self: &File, index: usize) -> *mut u8;
        /// Shares ownership of the mapping until `release_mapping`. Requires the mmap backend.
        fn share_mapping(self: &File) -> *const Mapping;
        /// Returns whether the file is on a network filesystem.
        fn is_remote(self: &File) -> bool;
        /// Prefaults the mapping: before this returns, or in the background.
        fn prefault(self: &File, wait: bool) -> Result<()>;
        /// Brings the tensor's pages into memory, if the file is mapped.
        fn prefault_tensor(self: &File, index: usize) -> Result<()>;
        fn read_ahead(self: &File, index: usize) -> Result<()>;
        /// Reads ahead `length` bytes at `address`, of which `used` will be used.
        fn read_ahead_at(self: &File, index: usize, address: usize, length: usize, used: usize);
        fn load(self: &File, indices: &[usize]) -> Result<Box<PendingRead>>;
        /// Begins to read tensors into the caller's memory; from the mapping, if the file has one. Unless tensors over
        /// that one may have been changed, as `from` says, few of its pages become resident.
        unsafe fn read(self: &File, requests: &[Request], from: ReadFrom) -> Result<Box<PendingRead>>;
        /// The same, for slices.
        unsafe fn read_slices(
            self: &File,
            requests: &[SliceRequest],
            ranges: &[Range],
            strides: &[i64],
            from: ReadFrom,
        ) -> Result<Box<PendingRead>>;
        /// Returns whether `read_slices` can read a slice to memory with these strides.
        fn takes_strides(self: &File, index: usize, ranges: &[Range], strides: &[i64]) -> bool;
        fn slice_shape(self: &File, index: usize, ranges: &[Range]) -> Result<Vec<u64>>;
        unsafe fn read_slice(
            self: &File,
            index: usize,
            ranges: &[Range],
            destination: *mut u8,
            length: usize,
        ) -> Result<()>;

        /// `load` and `read` return one part, for one file.
        type PendingRead;
        /// Adds the parts of another read, so that they share their threads. Returns the number of the first.
        fn append(self: &mut PendingRead, other: Box<PendingRead>) -> usize;
        /// Reads all parts.
        fn advance(self: &mut PendingRead, milliseconds: u64) -> Result<bool>;
        fn total_bytes(self: &PendingRead, part: usize) -> u64;
        fn done_bytes(self: &PendingRead, part: usize) -> u64;
        /// Returns the memory of tensor number `place` of a `load`.
        fn data(self: &PendingRead, part: usize, place: usize) -> *mut u8;
        /// Shares ownership of that memory until `release_block`.
        fn share_block(self: &PendingRead, part: usize, place: usize) -> *const Block;

        /// Tensors of any files, to be read in this order. `extra_bytes` are those that the caller allocates when the tensor is
        /// handed out.
        type PrefetchPlan;
        fn plan_prefetch() -> Box<PrefetchPlan>;
        fn add(self: &mut PrefetchPlan, file: &File, index: usize, extra_bytes: u64);
        fn add_slice(
            self: &mut PrefetchPlan,
            file: &File,
            index: usize,
            ranges: &[Range],
            extra_bytes: u64,
        ) -> Result<()>;
        /// Starts to read the tensors that were added, which leaves the plan empty.
        fn start(
            self: &mut PrefetchPlan,
            from: ReadFrom,
            buffer_bytes: u64,
            most_threads: u64,
        ) -> Result<Box<PrefetchLoader>>;

        /// The same, through slabs of `slab_bytes`, which the caller adds.
        fn start_slabs(
            self: &mut PrefetchPlan,
            from: ReadFrom,
            buffer_bytes: u64,
            most_threads: u64,
            slab_bytes: usize,
        ) -> Result<Box<Prefetcher>>;

        /// May be used by several threads, except that one takes the slabs.
        type Prefetcher;
        fn next_slab(self: &Prefetcher, microseconds: u64) -> Result<NextSlab>;
        fn release_slab(self: &Prefetcher, slab: usize);
        /// The slab must stay valid, and unused by others, until `stop`, or until the `Prefetcher` is dropped.
        unsafe fn add_slab(self: &Prefetcher, slab: Slab) -> usize;
        /// Returns whether reading waits for a slab.
        fn is_starved(self: &Prefetcher) -> bool;
        fn prioritize(self: &Prefetcher, request: usize);
        fn hand_out(self: &Prefetcher, request: usize);
        fn stop(self: &Prefetcher);
        /// Fails in a process that was forked since; `object` is for the error.
        fn check_process(self: &Prefetcher, object: &str) -> Result<()>;

        type PrefetchLoader;
        fn next(self: &PrefetchLoader, milliseconds: u64) -> Result<PrefetchedTensor>;
        fn take(self: &PrefetchLoader, request: usize, milliseconds: u64) -> Result<PrefetchedTensor>;

        type Mapping;
        unsafe fn release_mapping(mapping: *const Mapping);
        type Block;
        unsafe fn release_block(block: *const Block);
    }

    // Reading: a checkpoint of one file or several.
    extern "Rust" {
        type PendingOpen;
        /// Begins to open a checkpoint.
        fn begin_open(path: &[u8], options: &CheckpointOptions) -> Result<Box<PendingOpen>>;
        fn advance(self: &mut PendingOpen, milliseconds: u64) -> Result<bool>;
        /// Returns the checkpoint, once, after `advance` has returned true.
        fn finish_open(pending: &mut PendingOpen) -> Result<Box<Checkpoint>>;

        type Checkpoint;
        /// Opens a checkpoint in the `sft_filesystem` at an address, as `open_source` opens a file.
        unsafe fn open_filesystem(
            address: usize,
            path: &[u8],
            options: &CheckpointOptions,
            is_interpreted: bool,
        ) -> Result<Box<Checkpoint>>;
        fn count(self: &Checkpoint) -> usize;
        fn shard_count(self: &Checkpoint) -> usize;
        fn shard_name(self: &Checkpoint, shard: usize) -> &str;
        fn shard_file(self: &Checkpoint, shard: usize) -> Box<File>;
        fn find(self: &Checkpoint, name: &[u8]) -> Result<TensorLocation>;
        fn contains(self: &Checkpoint, name: &[u8]) -> bool;
        fn sorted_by_name(self: &Checkpoint) -> Vec<TensorLocation>;
        fn prefault(self: &Checkpoint, wait: bool) -> Result<()>;
    }

    // Writing: layouts, files, checkpoints, memory.
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
        /// Returns the index in `specs` of the tensor that is written as number `place`.
        fn tensor(self: &SavePlan, place: usize) -> usize;
        fn nbytes(self: &SavePlan, place: usize) -> u64;

        type FileWriter;
        fn create_file(path: &[u8], length: u64) -> Result<Box<FileWriter>>;
        /// Returns how many bytes were written: all, unless a pipe accepts no more for `milliseconds`.
        unsafe fn write(self: &mut FileWriter, pieces: &[Piece], milliseconds: u64) -> Result<u64>;
        fn commit_file(writer: Box<FileWriter>, durable: bool) -> Result<()>;
        /// Lets other processes write to the file of a checkpoint. Returns its hidden name, which `number` determines.
        fn make_joinable(self: &mut FileWriter, number: u64) -> Result<Vec<u8>>;

        type ShardPlan;
        fn plan_shards(sizes: &[u64], stem: &[u8], max_shard_size: u64) -> Result<Box<ShardPlan>>;
        fn count(self: &ShardPlan) -> usize;
        /// Returns the file number of each tensor.
        fn shard_of(self: &ShardPlan) -> &[usize];
        /// Returns the names of the files, the index last.
        fn file_names(self: &ShardPlan) -> Vec<String>;
        /// Returns the bytes of the index of tensors called `names`; none if it has no index.
        fn index(self: &ShardPlan, names: &[Text]) -> Result<Vec<u8>>;
        /// Returns whether a file belongs to another checkpoint of the same stem.
        fn makes_stale(self: &ShardPlan, name: &[u8]) -> bool;

        /// Returns how many threads, including the calling one, may write `bytes` to `files`.
        fn thread_count(bytes: u64, files: usize) -> Result<usize>;

        type ShardedWriter;
        fn create_shards(directory: &[u8], plan: &ShardPlan, names: &[Text]) -> Result<Box<ShardedWriter>>;
        /// May be called by several threads at once.
        fn create(self: &ShardedWriter, shard: usize, length: u64) -> Result<Box<FileWriter>>;
        /// Adds the next complete file, in the order of the numbers.
        fn add(self: &mut ShardedWriter, file: Box<FileWriter>);
        /// Renames all files into place; returns false if another save has the directory locked for `milliseconds`.
        fn commit(self: &mut ShardedWriter, durable: bool, milliseconds: u64) -> Result<bool>;
        fn file_names(self: &ShardedWriter) -> Vec<String>;

        /// Puts each tensor into the file of its number; the files are numbered from 0, and have an index.
        fn assign_shards(sizes: &[u64], files: &[usize], stem: &[u8]) -> Result<Box<ShardPlan>>;

        /// Joins the files of the processes of torch.distributed.checkpoint. Each of `names` has its file in `files`,
        /// counted from 1; without names, `max_shard_size` divides the tensors. `done_bytes` may run ahead of the disk.
        type Consolidation;
        fn start_consolidation(
            input: &[u8],
            output: &[u8],
            names: &[Text],
            files: &[u64],
            max_shard_size: u64,
            durable: bool,
        ) -> Result<Box<Consolidation>>;
        fn advance(self: &mut Consolidation, milliseconds: u64) -> Result<bool>;
        fn total_bytes(self: &Consolidation) -> u64;
        fn done_bytes(self: &Consolidation) -> u64;
        /// Returns the names of the files, the index last, once `advance` has returned true.
        fn file_names(self: &Consolidation) -> Vec<String>;

        type MemoryWriter;
        unsafe fn fill_memory(start: *mut u8, length: usize) -> Box<MemoryWriter>;
        unsafe fn write(self: &mut MemoryWriter, pieces: &[Piece]) -> Result<()>;
    }

    // Writing tensor by tensor, on any thread.
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
        /// Lets other processes write to the file. Returns the path of the hidden file.
        fn make_joinable(self: &IncrementalWriter) -> Result<Vec<u8>>;
        /// Commits without checking that every byte was written.
        fn commit_joined(self: &IncrementalWriter) -> Result<()>;
        fn discard(self: &IncrementalWriter);

        type TensorWriter;
        unsafe fn write(self: &mut TensorWriter, pieces: &[Piece]) -> Result<()>;
        fn finish_tensor(writer: Box<TensorWriter>) -> Result<()>;
    }

    // Writing a part of a file that another process commits.
    extern "Rust" {
        type JoinedWriter;
        fn join_file(path: &[u8]) -> Result<Box<JoinedWriter>>;
        /// Adds a slice of the shape and dtype of `spec`, which begins at `starts`; its bytes follow those of the slices that
        /// were added before.
        fn add(self: &mut JoinedWriter, spec: &Spec, starts: &[u64]) -> Result<()>;
        unsafe fn write(self: &mut JoinedWriter, pieces: &[Piece]) -> Result<()>;
        fn finish_joined(writer: Box<JoinedWriter>, durable: bool) -> Result<()>;
    }

    // Editing metadata.
    extern "Rust" {
        type MetadataEdit;
        fn begin_edit(
            path: &[u8],
            set: &[Entry],
            removed: &[Text],
            in_place: bool,
            reserve: u64,
            durable: bool,
        ) -> Result<Box<MetadataEdit>>;
        fn advance(self: &mut MetadataEdit, milliseconds: u64) -> Result<bool>;
        fn total_bytes(self: &MetadataEdit) -> u64;
        fn done_bytes(self: &MetadataEdit) -> u64;
        fn metadata(self: &MetadataEdit) -> Vec<Entry>;
    }

    // Process-wide settings, and dtypes.
    extern "Rust" {
        /// Returns the most threads that one call uses; 0 means automatic.
        fn threads() -> Result<usize>;
        fn set_threads(most: usize);
        /// Returns whether reads bypass the page cache: 0 if the file is not in it, 1 never, 2 always.
        fn direct() -> Result<u8>;
        fn set_direct(number: u8);
        /// Returns the number in an environment variable, or `otherwise` if it is not set.
        fn env_number(name: &str, otherwise: u64) -> Result<u64>;
        /// Returns the code of a dtype number, such as `F32`.
        fn dtype_code(number: u8) -> &'static str;
        fn dtype_number(code: &str) -> Result<u8>;
    }
}

/// An [`Error`] as text for C++.
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

fn entries(metadata: Option<&Metadata>) -> Vec<ffi::Entry> {
    let entries = metadata.into_iter().flatten();
    entries.map(|(key, value)| ffi::Entry { key: key.clone().into(), value: value.clone().into() }).collect()
}

fn direct() -> Result<u8> {
    Ok(crate::sys::direct_io::direct()? as u8)
}

fn set_direct(number: u8) {
    crate::sys::direct_io::set_direct(Direct::from_number(number).expect("cpp/ has checked the number"));
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
