//! The tensors and the metadata of a header, with lookups by position and by name.

use std::collections::BTreeMap;
use std::ops::Range;

use super::tensor::{TensorInfo, tensor_not_found};
use crate::error::Result;
use crate::format::dtype::Dtype;

/// The key of the metadata in a header. No tensor may have this name.
pub const METADATA_KEY: &str = "__metadata__";

/// The maximum size of a header in bytes, for reads and writes.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The bytes before the header, which hold its length as a little-endian u64.
pub const LENGTH_BYTES: u64 = 8;

/// The text entries of `__metadata__`, sorted by key.
pub type Metadata = BTreeMap<String, String>;

/// A parsed and validated header: the offsets lie inside the data, are consecutive, and match the shapes.
///
/// ```
/// # fn main() -> safetensors_torch::Result<()> {
/// let json = br#"{"bias":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#;
/// let file_length = 8 + json.len() as u64 + 4;
/// let header = safetensors_torch::Header::parse(json, file_length)?;
/// assert_eq!(header.get(header.require("bias")?).expect("a tensor").nbytes(), 4);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Header {
    /// In file order: by offset; zero-size tensors share an offset, and are ordered by name.
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

/// One tensor. Name and shape are ranges of the arenas of the header, so a million tensors need four allocations.
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorRecord {
    pub(super) name: ArenaRange,
    pub(super) shape: ArenaRange,
    pub(super) dtype: Dtype,
    pub(super) begin: u64,
    pub(super) end: u64,
}

/// A range of an arena. 32 bits suffice, because a header is smaller than 4 GiB.
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
    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Returns whether the file contains no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Returns the offset of the data in the file.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Returns the metadata, or `None` if the header has no `__metadata__`.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }

    /// Returns the tensor at `index` in file order, or `None` if `index` is [`Header::len`] or more.
    pub fn get(&self, index: usize) -> Option<TensorInfo<'_>> {
        self.tensors.get(index).map(|entry| self.info(entry))
    }

    /// Returns the index of the tensor `name` in file order.
    pub fn find(&self, name: &str) -> Option<usize> {
        let found = self.by_name.binary_search_by(|&index| self.name_at(index).cmp(name)).ok()?;
        Some(self.by_name[found] as usize)
    }

    /// As [`Header::find`], but a missing tensor is an error of kind `TensorNotFound`.
    pub fn require(&self, name: &str) -> Result<usize> {
        self.find(name).ok_or_else(|| tensor_not_found(name))
    }

    /// Returns the tensors in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|entry| self.info(entry))
    }

    /// Returns the indices in file order of the tensors, sorted by name.
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
