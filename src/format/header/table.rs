//! The tensors and the metadata of a header, with lookups by position and by name.

use std::collections::BTreeMap;
use std::ops::Range;

use super::tensor::{TensorInfo, tensor_not_found};
use crate::error::Result;
use crate::format::dtype::Dtype;

/// The key of the header's object that holds the metadata, and so can be no tensor's name.
pub const METADATA_KEY: &str = "__metadata__";

/// The most bytes that a header may have, on read and on write.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The bytes before the header: its length, a little-endian u64.
pub const LENGTH_BYTES: u64 = 8;

/// The text entries of `__metadata__`, sorted by key.
pub type Metadata = BTreeMap<String, String>;

/// A parsed and validated header.
///
/// What it says of its tensors is safe to act on: offsets lie inside the data, are consecutive, and fit the shapes.
#[derive(Debug)]
pub struct Header {
    /// In file order: by offset, ties (of zero-size tensors) by name.
    pub(super) tensors: Vec<TensorRecord>,
    /// Indices into `tensors`, sorted by name.
    pub(super) by_name: Vec<u32>,
    /// All names, one after the other.
    pub(super) names: String,
    /// All shapes, one after the other.
    pub(super) dims: Vec<u64>,
    pub(super) metadata: Option<Metadata>,
    pub(super) data_start: u64,
}

/// One tensor, its name and shape as spans of the header's arenas: a million tensors are four allocations.
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorRecord {
    pub(super) name: ArenaRange,
    pub(super) shape: ArenaRange,
    pub(super) dtype: Dtype,
    pub(super) begin: u64,
    pub(super) end: u64,
}

/// A range of an arena. A header is smaller than 4 GiB, so 32 bits do.
#[derive(Clone, Copy, Debug)]
pub(super) struct ArenaRange {
    start: u32,
    end: u32,
}

impl ArenaRange {
    pub(super) fn new(start: usize, end: usize) -> ArenaRange {
        debug_assert!(start <= end && end <= MAX_HEADER_BYTES as usize);
        ArenaRange { start: start as u32, end: end as u32 }
    }

    pub(super) fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

impl Header {
    /// The number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether the file holds no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Where the data begins, in bytes from the start of the file.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// The metadata; `None` where the header has no `__metadata__`.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }

    /// The tensor at `index` in file order; `None` from [`Header::len`] on.
    pub fn get(&self, index: usize) -> Option<TensorInfo<'_>> {
        self.tensors.get(index).map(|entry| self.info(entry))
    }

    /// The place of the tensor `name` in file order.
    pub fn find(&self, name: &str) -> Option<usize> {
        let found = self.by_name.binary_search_by(|&index| self.name_at(index).cmp(name)).ok()?;
        Some(self.by_name[found] as usize)
    }

    /// The place of the tensor `name` in file order, or an error that says so.
    pub fn require(&self, name: &str) -> Result<usize> {
        self.find(name).ok_or_else(|| tensor_not_found(name))
    }

    /// The tensors in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|entry| self.info(entry))
    }

    /// The places in file order of the tensors, sorted by name.
    pub fn sorted_by_name(&self) -> &[u32] {
        &self.by_name
    }

    fn info(&self, entry: &TensorRecord) -> TensorInfo<'_> {
        TensorInfo {
            name: &self.names[entry.name.range()],
            dtype: entry.dtype,
            shape: &self.dims[entry.shape.range()],
            begin: entry.begin,
            end: entry.end,
        }
    }

    pub(super) fn name_at(&self, index: u32) -> &str {
        &self.names[self.tensors[index as usize].name.range()]
    }
}
