//! A checkpoint: the tensors of one file, or of several files (shards) that an index lists.
//!
//! Names, index and division are those of Hugging Face's tools: `model.safetensors`, or `model-00001-of-00003.safetensors`
//! and so on with `model.safetensors.index.json`. Each file is a [`TensorFile`](crate::TensorFile).
//!
//! To open: `locate` finds the file or the index, `index` reads it, `verify` compares it with its files, `open` does all
//! of it again if a save interferes; `filesystem` does the same with files that the program reads by its own means. To save: `plan` divides, `writer` collects the files, `replace` renames them into
//! place under the `lock`. To consolidate: `chunks` joins the chunks that several processes have written.

#[cfg(feature = "bridge")]
mod background_consolidation;
pub(crate) mod caller_filesystem;
mod chunks;
mod consolidate;
mod directory;
mod filesystem;
mod index;
mod index_backup;
mod locate;
mod lock;
pub(crate) mod open;
mod plan;
mod replace;
mod save;
mod shards;
mod verify;
mod writer;

#[cfg(feature = "bridge")]
pub(crate) use background_consolidation::Consolidation;
pub use consolidate::consolidate;
pub use filesystem::Filesystem;
#[cfg(fuzzing)]
pub use index::parse_index;
pub use open::{CheckpointOptions, Extra};
pub use plan::{DEFAULT_MAX_SHARD_SIZE, DEFAULT_STEM, ShardPlan};
pub(crate) use save::save_sharded_raw;
pub use save::{ShardedOptions, save_sharded};
pub use shards::{Checkpoint, Shard, TensorLocation};
pub use writer::ShardedWriter;
