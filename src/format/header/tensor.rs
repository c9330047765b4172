//! One tensor of a header, and how many bytes a tensor takes.

use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;

/// What the header says of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// The name, any string but `__metadata__`.
    pub name: &'a str,
    /// The element type.
    pub dtype: Dtype,
    /// The dimensions, in elements of `dtype`; empty for a scalar.
    pub shape: &'a [u64],
    /// Where the tensor's bytes begin, counted from the start of the data.
    pub begin: u64,
    /// Where the tensor's bytes end, counted from the start of the data.
    pub end: u64,
}

impl TensorInfo<'_> {
    /// The number of bytes of the tensor.
    pub fn nbytes(&self) -> u64 {
        self.end - self.begin
    }
}

/// The error for a name that no tensor of a file has.
pub(crate) fn tensor_not_found(name: &str) -> Error {
    Error::new(ErrorKind::TensorNotFound, format!("File does not contain tensor {name}"))
}

/// The number of bytes that a tensor of `dtype` and `shape` takes, or why there can be no such tensor.
///
/// Refuses what torch can make no tensor of either: dimensions, element counts or contiguous strides of 2^63 and more,
/// and dimensions whose product overflows before a zero among them is reached.
pub fn tensor_nbytes(name: &str, dtype: Dtype, shape: &[u64]) -> Result<u64> {
    shape_nbytes(dtype, shape).map_err(|(kind, fault)| Error::new(kind, format!("tensor {name:?}: {fault}")))
}

/// The same for no tensor in particular: the fault is told as a kind and a text.
pub(crate) fn shape_nbytes(dtype: Dtype, shape: &[u64]) -> std::result::Result<u64, (ErrorKind, String)> {
    let Some(bits) = element_bits(dtype, shape) else {
        let fault = format!("shape {shape:?} of {dtype} overflows: it needs more than 2^63 - 1");
        return Err((ErrorKind::ShapeOverflow, fault));
    };
    if !bits.is_multiple_of(8) {
        let fault = format!("shape {shape:?} of {dtype} ends in the middle of a byte");
        return Err((ErrorKind::SizeMismatch, fault));
    }
    Ok(bits / 8)
}

/// The bits of all elements; `None` where a size or a stride overflows.
fn element_bits(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    const LIMIT: u64 = i64::MAX as u64;
    let within = |n: &u64| *n <= LIMIT;
    if !shape.iter().all(within) {
        return None;
    }
    let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim))?;
    // The first dimension's size is in no stride; a size of 0 counts as 1 in them.
    let inner = shape.get(1..).unwrap_or_default();
    inner.iter().try_fold(1u64, |stride, &dim| stride.checked_mul(dim.max(1)).filter(within))?;
    elements.checked_mul(dtype.bits()).filter(within)
}
