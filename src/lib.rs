//! The safetensors format: reading, validating and writing it, on files and in memory.
//!
//! This is the core under the C ABI (`include/safetensors_torch.h`), and under the C++ and Python layers. It knows
//! nothing of torch. Start at [`TensorFile`] to read and at [`save_file`] to write.

#![deny(missing_docs)]

mod available;
mod byte_order;
pub mod capi;
mod checkpoint;
mod copy;
mod directory;
mod dtype;
mod edit;
mod error;
mod feed;
mod file;
mod flock;
mod header;
mod json;
mod layout;
mod memory;
mod monitor;
mod page_cache;
mod pages;
mod parallel;
mod prefault;
mod process;
mod reader;
mod serialize;
mod signals;
mod slice;
mod source;
mod stream;
mod threads;
mod writer;

#[cfg(feature = "bridge")]
mod bridge;

#[cfg(fuzzing)]
#[doc(hidden)]
pub use checkpoint::parse_index;
pub use checkpoint::{
    Checkpoint, CheckpointOptions, DEFAULT_MAX_SHARD_BYTES, DEFAULT_STEM, Extra, Shard, ShardPlan,
    ShardedOptions, ShardedWriter, TensorPlace, save_sharded,
};
pub use dtype::Dtype;
pub use edit::{EditOptions, MetadataChanges, MetadataEdit, edit_metadata};
pub use error::{Error, ErrorKind, Result};
pub use feed::{Feed, PART_ALIGNMENT, Part, Taken};
pub use file::TensorFile;
pub use header::{Header, MAX_HEADER_BYTES, METADATA_KEY, Metadata, TensorInfo};
pub use layout::{DEFAULT_ALIGNMENT, Layout, MAX_ALIGNMENT, Place, TensorSpec};
pub use memory::{Block, Memory};
pub use prefault::Prefault;
pub use serialize::{SaveOptions, save_file, save_into};
pub use slice::{AxisRange, Slice};
pub use source::{Backend, Borrowed, Mapping, OpenFile, Source};
pub use stream::{StreamWriter, TensorWriter};
pub use threads::{set_threads, threads};
pub use writer::AtomicFile;
