//! Reads, validates and writes the safetensors format, in files and in memory. Knows nothing about torch.
//!
//! Start at [`TensorFile`] to read, and at [`save_file`] to write.
//!
//! ```
//! # fn main() -> safetensors_torch::Result<()> {
//! use safetensors_torch::{Backend, Dtype, SaveOptions, TensorFile, TensorSpec, save_file};
//!
//! # let directory = tempfile::tempdir().expect("a directory");
//! # let path = directory.path().join("model.safetensors");
//! let spec = TensorSpec { name: "bias", dtype: Dtype::F16, shape: &[2] };
//! save_file(&[spec], &[&[0, 60, 0, 64]], None, &path, SaveOptions::default())?;
//! let file = TensorFile::open(&path, Backend::Mmap)?;
//! assert_eq!(file.header().get(0).expect("one tensor").shape, [2]);
//! # Ok(())
//! # }
//! ```
//!
//! Each module depends only on those above it in this list (`tests/layers.py` checks that):
//!
//! - `error`: the error type.
//! - `sys`: the machine. Threads, memory, pages, directories, signals.
//! - `format`: bytes and their meaning. Dtypes, headers, layouts, slices.
//! - `read`: from a file to memory. Mapping, reads, prefault, prefetch.
//! - `write`: from memory to a file. Atomic replacement, saves, the incremental writer, edits of metadata.
//! - `checkpoint`: several files as one.
//! - [`capi`]: the C functions of `include/safetensors_torch.h`; `bridge`: the Rust half of the C++ layer in `cpp/`.

#![deny(missing_docs)]

pub mod capi;
mod checkpoint;
mod error;
mod format;
mod read;
mod sys;
mod write;

#[cfg(feature = "bridge")]
mod bridge;

#[cfg(fuzzing)]
#[doc(hidden)]
pub use checkpoint::parse_index;
pub use checkpoint::{
    Checkpoint, CheckpointOptions, DEFAULT_MAX_SHARD_SIZE, DEFAULT_STEM, Extra, Filesystem, Shard, ShardPlan,
    ShardedOptions, ShardedWriter, TensorLocation, consolidate, save_sharded,
};
pub use error::{Error, ErrorKind, Result};
pub use format::dtype::Dtype;
pub use format::header::{Header, MAX_HEADER_BYTES, METADATA_KEY, Metadata, TensorInfo};
pub use format::layout::{DEFAULT_ALIGNMENT, Layout, MAX_ALIGNMENT, Placement, TensorSpec};
pub use format::slice::{AxisRange, Slice};
pub use format::statistics::{HISTOGRAM_BINS, Histogram, Statistics};
pub use read::explain::{LoadPlan, LoadTarget};
pub use read::external::{ByteSource, Destination, Piece};
pub use read::file::{SliceRequest, TensorFile};
pub use read::prefault::Prefault;
pub use read::prefetch::{NextSlab, Prefetcher};
pub use read::prefetch_loader::{NextTensor, PrefetchLoader};
pub use read::prefetch_plan::{PrefetchOptions, PrefetchRequest};
pub use read::prefetch_schedule::PrefetchedTensor;
pub use read::slab_layout::{SLAB_PART_ALIGNMENT, SlabPart};
pub use read::source::{Backend, Mapping, ReadFrom};
pub use read::statistics::StatisticsRequest;
pub use sys::buffers::{Block, Buffers};
pub use sys::direct_io::{Direct, direct, set_direct};
pub use sys::raw_bytes::RawBytes;
pub use sys::threads::{set_threads, threads};
pub use write::atomic::AtomicFile;
pub use write::edit::{EditOptions, MetadataChanges, MetadataEdit, edit_metadata};
pub use write::incremental::{IncrementalWriter, TensorWriter};
pub use write::joined::JoinedFile;
pub use write::save::{SaveOptions, save_file, save_into};
