//! Where each tensor goes when a file is written: the order, the offsets and the header.
//!
//! Writes nothing itself; the writer and the serializers follow the plan that is made here.

use crate::error::{Error, ErrorKind, Result};
use crate::format::byte_order;
use crate::format::dtype::Dtype;
use crate::format::header::{METADATA_KEY, Metadata, TensorInfo, encode, tensor_nbytes};

/// A tensor that is to be written: everything but its bytes.
#[derive(Clone, Copy, Debug)]
pub struct TensorSpec<'a> {
    /// The name, any string but `__metadata__`.
    pub name: &'a str,
    /// The element type.
    pub dtype: Dtype,
    /// The dimensions, in elements of `dtype`.
    pub shape: &'a [u64],
}

/// A settled layout.
#[derive(Debug)]
pub struct Layout {
    header: Vec<u8>,
    order: Vec<Placement>,
    data_bytes: u64,
}

/// Where one tensor goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The tensor's index in the list that the layout was made from.
    pub index: usize,
    /// Where its bytes begin, counted from the start of the data.
    pub begin: u64,
    /// Where its bytes end.
    pub end: u64,
}

/// The alignment of the data's start that every reader expects at the least, in bytes.
pub const DEFAULT_ALIGNMENT: u64 = 8;

/// The largest alignment that can be asked for, in bytes.
pub const MAX_ALIGNMENT: u64 = 1 << 20;

impl Layout {
    /// Lays `tensors` out: sorted by dtype, then by name, without gaps; the data starts at a multiple of `alignment`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ReservedName`], [`ErrorKind::Duplicate`], [`ErrorKind::ShapeOverflow`],
    /// [`ErrorKind::SizeMismatch`] (elements that end in the middle of a byte), [`ErrorKind::HeaderTooLarge`], and
    /// [`ErrorKind::InvalidArgument`] where `alignment` is not a power of two from 8 to [`MAX_ALIGNMENT`];
    /// [`ErrorKind::UnsupportedDtype`] on a big-endian machine, for elements of several bytes.
    pub fn plan(tensors: &[TensorSpec<'_>], metadata: Option<&Metadata>, alignment: u64) -> Result<Layout> {
        if !alignment.is_power_of_two() || !(DEFAULT_ALIGNMENT..=MAX_ALIGNMENT).contains(&alignment) {
            let detail =
                format!("alignment {alignment}: give a power of two from 8 to {MAX_ALIGNMENT} bytes");
            return Err(Error::new(ErrorKind::InvalidArgument, detail));
        }
        byte_order::check(tensors.iter().map(|tensor| (tensor.name, tensor.dtype)))?;
        let mut sorted = check_names(tensors)?;
        // Stable: those of one dtype stay sorted by name.
        sorted.sort_by_key(|&index| tensors[index].dtype.layout_rank());

        let mut data_bytes: u64 = 0;
        let mut order = Vec::with_capacity(tensors.len());
        for index in sorted {
            let tensor = &tensors[index];
            let begin = data_bytes;
            data_bytes = tensor_nbytes(tensor.name, tensor.dtype, tensor.shape)?
                .checked_add(begin)
                .filter(|&end| end <= i64::MAX as u64)
                .ok_or_else(|| {
                    let detail = format!("tensor {:?}: the file would pass 2^63 bytes", tensor.name);
                    Error::new(ErrorKind::ShapeOverflow, detail)
                })?;
            order.push(Placement { index, begin, end: data_bytes });
        }
        let entries = order.iter().map(|place| {
            let TensorSpec { name, dtype, shape } = tensors[place.index];
            TensorInfo { name, dtype, shape, begin: place.begin, end: place.end }
        });
        let header = encode(entries, metadata, alignment)?;
        Ok(Layout { header, order, data_bytes })
    }

    /// The bytes before the data: length, JSON, padding.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// The tensors in file order.
    pub fn order(&self) -> &[Placement] {
        &self.order
    }

    /// The bytes of the whole file.
    pub fn total_bytes(&self) -> u64 {
        self.header.len() as u64 + self.data_bytes
    }
}

/// Checks that each name can be written and stands once; gives the tensors' indices sorted by name.
pub(crate) fn check_names(tensors: &[TensorSpec<'_>]) -> Result<Vec<usize>> {
    let mut sorted: Vec<usize> = (0..tensors.len()).collect();
    sorted.sort_by(|&a, &b| tensors[a].name.cmp(tensors[b].name));
    let name = |index: usize| tensors[index].name;
    if let Some(pair) = sorted.windows(2).find(|pair| name(pair[0]) == name(pair[1])) {
        let detail = format!("two tensors are named {:?}: give each its own name", name(pair[0]));
        return Err(Error::new(ErrorKind::Duplicate, detail));
    }
    if sorted.binary_search_by(|&index| name(index).cmp(METADATA_KEY)).is_ok() {
        let detail = format!(
            "a tensor is named {METADATA_KEY:?}, where the format keeps its metadata: nothing could read the file; \
             rename the tensor"
        );
        return Err(Error::new(ErrorKind::ReservedName, detail));
    }
    Ok(sorted)
}
