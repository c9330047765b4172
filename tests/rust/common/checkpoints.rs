//! Saves and reads checkpoints of U8 tensors.

use std::path::Path;

use safetensors_torch::{Checkpoint, Dtype, Error, Metadata, ShardedOptions, TensorSpec, save_sharded};

use super::read;

pub const INDEX: &str = "model.safetensors.index.json";

/// Saves U8 tensors, in this order.
pub fn save(directory: &Path, tensors: &[(&str, &[u8])], max_shard_size: u64) -> Result<Vec<String>, Error> {
    save_with(directory, tensors, ShardedOptions { max_shard_size, ..ShardedOptions::default() })
}

pub fn save_with(
    directory: &Path,
    tensors: &[(&str, &[u8])],
    options: ShardedOptions<'_>,
) -> Result<Vec<String>, Error> {
    let shapes: Vec<[u64; 1]> = tensors.iter().map(|(_, bytes)| [bytes.len() as u64]).collect();
    let specs = tensors.iter().zip(&shapes);
    let specs: Vec<_> =
        specs.map(|((name, _), shape)| TensorSpec { name, dtype: Dtype::U8, shape }).collect();
    let data: Vec<&[u8]> = tensors.iter().map(|&(_, bytes)| bytes).collect();
    let metadata = Metadata::from([("format".to_string(), "pt".to_string())]);
    save_sharded(&specs, &data, Some(&metadata), directory, options)
}

/// Returns the names and bytes of all tensors, sorted by name.
pub fn contents(checkpoint: &Checkpoint) -> Vec<(String, Vec<u8>)> {
    let tensors = checkpoint.sorted_by_name().iter().map(|place| {
        let file = &checkpoint.shards()[place.shard as usize].file;
        let name = file.tensor(place.index as usize).expect("there").name.to_string();
        assert_eq!(checkpoint.find(&name), Some(*place));
        (name, read(file, place.index as usize))
    });
    tensors.collect()
}
