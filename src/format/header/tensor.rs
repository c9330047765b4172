//! One tensor of a header, and how many bytes a tensor takes.

use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;

/// A tensor in a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// The name, any string except `__metadata__`.
    pub name: &'a str,
    /// The element type.
    pub dtype: Dtype,
    /// The dimensions, in elements of `dtype`; empty for a scalar.
    pub shape: &'a [u64],
    /// The start of its bytes, relative to the data.
    pub begin: u64,
    /// The end of its bytes, relative to the data.
    pub end: u64,
}

impl TensorInfo<'_> {
    /// Returns the size of the tensor in bytes.
    pub fn nbytes(&self) -> u64 {
        self.end - self.begin
    }
}

pub(crate) fn tensor_not_found(name: &str) -> Error {
    Error::new(ErrorKind::TensorNotFound, format!("File does not contain tensor {name}"))
}

/// Returns the size in bytes of a tensor of `dtype` and `shape`. `name` is for errors.
///
/// Refuses what torch refuses too: a dimension, element count or contiguous stride of 2^63 or more, and a product of
/// dimensions that overflows before a zero.
pub fn tensor_nbytes(name: &str, dtype: Dtype, shape: &[u64]) -> Result<u64> {
    shape_nbytes(dtype, shape).map_err(|(kind, fault)| Error::new(kind, format!("tensor {name:?}: {fault}")))
}

/// As [`tensor_nbytes`], without a name: the error is a kind and a text.
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

/// Returns the bits of all elements, or `None` if a size or a stride overflows.
fn element_bits(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    const LIMIT: u64 = i64::MAX as u64;
    let within = |n: &u64| *n <= LIMIT;
    if !shape.iter().all(within) {
        return None;
    }
    let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim))?;
    // No stride contains the first dimension; a dimension of 0 counts as 1.
    let inner = shape.get(1..).unwrap_or_default();
    inner.iter().try_fold(1u64, |stride, &dim| stride.checked_mul(dim.max(1)).filter(within))?;
    elements.checked_mul(dtype.bits()).filter(within)
}
