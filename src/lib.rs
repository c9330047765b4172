//! The safetensors format: reading, validating and writing it, on files and in memory.
//!
//! This is the core under the C ABI (`include/safetensors_torch.h`), and under the C++ and Python layers. It knows
//! nothing of torch. Start at [`TensorFile`] to read and at [`save_file`] to write.

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
    Checkpoint, CheckpointOptions, DEFAULT_MAX_SHARD_SIZE, DEFAULT_STEM, Extra, Shard, ShardPlan,
    ShardedOptions, ShardedWriter, TensorLocation, save_sharded,
};
pub use error::{Error, ErrorKind, Result};
pub use format::dtype::Dtype;
pub use format::header::{Header, MAX_HEADER_BYTES, METADATA_KEY, Metadata, TensorInfo};
pub use format::layout::{DEFAULT_ALIGNMENT, Layout, MAX_ALIGNMENT, Placement, TensorSpec};
pub use format::slice::{AxisRange, Slice};
pub use read::file::TensorFile;
pub use read::prefault::Prefault;
pub use read::prefetch::{NextSlab, Prefetcher};
pub use read::slab_layout::{SLAB_PART_ALIGNMENT, SlabPart};
pub use read::source::{Backend, Mapping, ReadFrom};
pub use sys::buffers::{Block, Buffers};
pub use sys::raw_bytes::RawBytes;
pub use sys::threads::{set_threads, threads};
pub use write::atomic::AtomicFile;
pub use write::edit::{EditOptions, MetadataChanges, MetadataEdit, edit_metadata};
pub use write::incremental::{IncrementalWriter, TensorWriter};
pub use write::save::{SaveOptions, save_file, save_into};
