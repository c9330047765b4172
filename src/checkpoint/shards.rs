//! An open checkpoint: its files, and which of them contains each tensor.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Result;
use crate::format::header::tensor_not_found;
use crate::read::file::TensorFile;
use crate::read::prefault::{self, Prefault};

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    pub(super) shards: Vec<Shard>,
    /// Sorted by the tensors' names.
    pub(super) by_name: Vec<TensorLocation>,
    pub(super) path: PathBuf,
}

/// One file of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    /// Its path relative to the directory of the checkpoint, as in the index.
    pub name: String,
    /// The open file.
    pub file: Arc<TensorFile>,
}

/// The location of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorLocation {
    /// The index of its shard in [`Checkpoint::shards`].
    pub shard: u32,
    /// Its index in the shard, in file order.
    pub index: u32,
}

impl Checkpoint {
    /// Returns the files, sorted by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Returns the number of tensors in all shards.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Returns whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Returns the locations of all tensors, sorted by name.
    pub fn sorted_by_name(&self) -> &[TensorLocation] {
        &self.by_name
    }

    /// Returns the location of the tensor `name`.
    pub fn find(&self, name: &str) -> Option<TensorLocation> {
        let found = self.by_name.binary_search_by(|&at| name_at(&self.shards, at).cmp(name)).ok()?;
        Some(self.by_name[found])
    }

    /// Returns the location of the tensor `name`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TensorNotFound`](crate::ErrorKind::TensorNotFound).
    pub fn require(&self, name: &str) -> Result<TensorLocation> {
        self.find(name).ok_or_else(|| tensor_not_found(name).in_file(&self.path))
    }

    /// Prefaults all shards in turn, as [`TensorFile::prefault`] does.
    ///
    /// # Errors
    ///
    /// Those of [`TensorFile::prefault`].
    pub fn prefault(&self, when: Prefault) -> Result<()> {
        match when {
            Prefault::Wait => self.shards.iter().try_for_each(|shard| shard.file.prefault(when)),
            Prefault::Background => {
                let mapped: Vec<_> = self.shards.iter().filter_map(|shard| shard.file.mapping()).collect();
                prefault::start(&mapped)
            }
        }
    }

    /// Returns the path of the file or the index that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Returns the locations of all tensors, sorted by name, then by shard.
pub(super) fn sorted_locations(shards: &[Shard]) -> Vec<TensorLocation> {
    let locations = shards.iter().enumerate().flat_map(|(shard, one)| {
        let sorted = one.file.header().sorted_by_name();
        sorted.iter().map(move |&index| TensorLocation { shard: shard as u32, index })
    });
    let mut locations: Vec<TensorLocation> = locations.collect();
    // Each shard is a sorted run, which this sort merges.
    locations.sort_by(|&a, &b| name_at(shards, a).cmp(name_at(shards, b)));
    locations
}

pub(super) fn name_at(shards: &[Shard], at: TensorLocation) -> &str {
    let tensor = shards[at.shard as usize].file.header().get(at.index as usize);
    tensor.map_or("", |tensor| tensor.name)
}
