//! Plans a file that is to be written: the order of the tensors, their offsets, and the header.

use crate::error::{Error, ErrorKind, Result};
use crate::format::byte_order;
use crate::format::dtype::Dtype;
use crate::format::header::{METADATA_KEY, Metadata, TensorInfo, encode, tensor_nbytes};

/// A tensor to be written, without its bytes.
#[derive(Clone, Copy, Debug)]
pub struct TensorSpec<'a> {
    /// The name, any string except `__metadata__`.
    pub name: &'a str,
    /// The element type.
    pub dtype: Dtype,
    /// The dimensions, in elements of `dtype`.
    pub shape: &'a [u64],
}

/// The plan of a file.
///
/// ```
/// # fn main() -> safetensors_torch::Result<()> {
/// use safetensors_torch::{DEFAULT_ALIGNMENT, Dtype, Layout, TensorSpec};
///
/// let specs = [
///     TensorSpec { name: "bias", dtype: Dtype::F16, shape: &[3] },
///     TensorSpec { name: "weight", dtype: Dtype::F32, shape: &[3, 2] },
/// ];
/// let layout = Layout::plan(&specs, None, DEFAULT_ALIGNMENT)?;
/// // F32 comes before F16.
/// assert_eq!((layout.order()[0].index, layout.order()[1].begin), (1, 24));
/// assert_eq!(layout.total_bytes(), layout.header().len() as u64 + 30);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Layout {
    header: Vec<u8>,
    order: Vec<Placement>,
    data_bytes: u64,
}

/// The position of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The index of the tensor in the list passed to [`Layout::plan`].
    pub index: usize,
    /// The start of its bytes, relative to the data.
    pub begin: u64,
    /// The end of its bytes, relative to the data.
    pub end: u64,
}

/// The default alignment of the start of the data in bytes, which every reader expects.
pub const DEFAULT_ALIGNMENT: u64 = 8;

/// The largest alignment of the start of the data, in bytes.
pub const MAX_ALIGNMENT: u64 = 1 << 20;

impl Layout {
    /// Sorts `tensors` by dtype, then by name, and places them without gaps. The data starts at a multiple of `alignment`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ReservedName`], [`ErrorKind::Duplicate`], [`ErrorKind::ShapeOverflow`],
    /// [`ErrorKind::SizeMismatch`] (a tensor ends in the middle of a byte), [`ErrorKind::HeaderTooLarge`];
    /// [`ErrorKind::InvalidArgument`] if `alignment` is not a power of two from 8 to [`MAX_ALIGNMENT`];
    /// [`ErrorKind::UnsupportedDtype`] on a big-endian machine, for elements of several bytes.
    pub fn plan(tensors: &[TensorSpec<'_>], metadata: Option<&Metadata>, alignment: u64) -> Result<Layout> {
        if !alignment.is_power_of_two() || !(DEFAULT_ALIGNMENT..=MAX_ALIGNMENT).contains(&alignment) {
            let detail = format!(
                "alignment {alignment}: not a power of two from 8 to {MAX_ALIGNMENT} bytes; pass one"
            );
            return Err(Error::new(ErrorKind::InvalidArgument, detail));
        }
        byte_order::check(tensors.iter().map(|tensor| (tensor.name, tensor.dtype)))?;
        let mut sorted = check_names(tensors)?;
        // The sort is stable: tensors of one dtype stay sorted by name.
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
                    let detail = format!("tensor {:?}: the file would exceed 2^63 bytes", tensor.name);
                    Error::new(ErrorKind::ShapeOverflow, detail)
                })?;
            order.push(Placement { index, begin, end: data_bytes });
        }
        let entries = order.iter().map(|placement| {
            let TensorSpec { name, dtype, shape } = tensors[placement.index];
            TensorInfo { name, dtype, shape, begin: placement.begin, end: placement.end }
        });
        let header = encode(entries, metadata, alignment)?;
        Ok(Layout { header, order, data_bytes })
    }

    /// Returns the bytes before the data: length, JSON, padding.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Returns the tensors in file order.
    pub fn order(&self) -> &[Placement] {
        &self.order
    }

    /// Returns the size of the file in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.header.len() as u64 + self.data_bytes
    }
}

/// Checks that the names are unique and not reserved. Returns the indices of the tensors, sorted by name.
pub(crate) fn check_names(tensors: &[TensorSpec<'_>]) -> Result<Vec<usize>> {
    let mut sorted: Vec<usize> = (0..tensors.len()).collect();
    sorted.sort_by(|&a, &b| tensors[a].name.cmp(tensors[b].name));
    let name = |index: usize| tensors[index].name;
    if let Some(pair) = sorted.windows(2).find(|pair| name(pair[0]) == name(pair[1])) {
        let detail = format!("tensor {:?}: two tensors have this name; rename one", name(pair[0]));
        return Err(Error::new(ErrorKind::Duplicate, detail));
    }
    if sorted.binary_search_by(|&index| name(index).cmp(METADATA_KEY)).is_ok() {
        let detail =
            format!("tensor {METADATA_KEY:?}: the format reserves this name for metadata; rename the tensor");
        return Err(Error::new(ErrorKind::ReservedName, detail));
    }
    Ok(sorted)
}
