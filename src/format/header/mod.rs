//! The header of a file: which tensors it holds, of which dtype and shape, and where their bytes lie.
//!
//! `parse` reads the JSON, `validate` checks what it says against the data, `foreign` recognises other formats,
//! `encode` writes the JSON. No file is touched here: bytes come in, bytes go out.

mod encode;
mod foreign;
mod parse;
mod validate;

pub use encode::{close, encode, encode_open};
pub(crate) use foreign::recognise;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
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
    tensors: Vec<Entry>,
    /// Indices into `tensors`, sorted by name.
    by_name: Vec<u32>,
    /// All names, one after the other.
    names: String,
    /// All shapes, one after the other.
    dims: Vec<u64>,
    metadata: Option<Metadata>,
    data_start: u64,
}

/// One tensor, its name and shape as spans of the header's arenas: a million tensors are four allocations.
#[derive(Clone, Copy, Debug)]
struct Entry {
    name: Span,
    shape: Span,
    dtype: Dtype,
    begin: u64,
    end: u64,
}

/// A range of an arena. A header is smaller than 4 GiB, so 32 bits do.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u32,
    end: u32,
}

impl Span {
    fn new(start: usize, end: usize) -> Span {
        debug_assert!(start <= end && end <= MAX_HEADER_BYTES as usize);
        Span { start: start as u32, end: end as u32 }
    }

    fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

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

impl Header {
    /// Reads the length that the first 8 bytes give, and checks it against the whole file's length in bytes.
    ///
    /// `start` is the beginning of the file: at least 8 bytes, or the whole file if it is shorter. The more of it
    /// there is (up to 512 bytes), the better an error can say what else the file may be.
    pub fn length(start: &[u8], file_length: u64) -> Result<u64> {
        let Some((length, rest)) = start.split_first_chunk::<8>() else {
            return Err(foreign::recognise(start).unwrap_or_else(|| {
                Error::new(
                    ErrorKind::FileTooSmall,
                    format!(
                        "a safetensors file begins with 8 bytes of header length, but this has {file_length} byte(s) \
                         in all; it was probably cut short: fetch or save it again"
                    ),
                )
            }));
        };
        let length = u64::from_le_bytes(*length);
        // Behind a length that means anything comes JSON; a short header of ours may begin like another format.
        let json_follows = rest.first().is_some_and(|byte| b" \t\r\n{".contains(byte));
        if !(length <= MAX_HEADER_BYTES && json_follows)
            && let Some(error) = foreign::recognise(start)
        {
            return Err(error);
        }
        check_length(length, file_length)?;
        Ok(length)
    }

    /// Parses and validates the JSON of a header, given the whole file's length in bytes.
    pub fn parse(json: &[u8], file_length: u64) -> Result<Header> {
        check_length(json.len() as u64, file_length)?;
        let mut header = parse::parse(json)?;
        header.data_start = LENGTH_BYTES + json.len() as u64;
        validate::validate(&mut header, file_length)?;
        Ok(header)
    }

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
        self.find(name).ok_or_else(|| absent(name))
    }

    /// The tensors in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|entry| self.info(entry))
    }

    /// The places in file order of the tensors, sorted by name.
    pub fn sorted_by_name(&self) -> &[u32] {
        &self.by_name
    }

    fn info(&self, entry: &Entry) -> TensorInfo<'_> {
        TensorInfo {
            name: &self.names[entry.name.range()],
            dtype: entry.dtype,
            shape: &self.dims[entry.shape.range()],
            begin: entry.begin,
            end: entry.end,
        }
    }

    fn name_at(&self, index: u32) -> &str {
        &self.names[self.tensors[index as usize].name.range()]
    }
}

/// Checks that a header of `length` bytes is allowed, and that a file of `file_length` bytes has room for it.
fn check_length(length: u64, file_length: u64) -> Result<()> {
    let available = file_length.saturating_sub(LENGTH_BYTES);
    if length > MAX_HEADER_BYTES {
        return Err(Error::new(
            ErrorKind::HeaderTooLarge,
            format!(
                "the first 8 bytes give a header length of {length} bytes, more than the {MAX_HEADER_BYTES} \
                 allowed: this is no safetensors file, or a damaged one"
            ),
        ));
    }
    if length > available {
        return Err(Error::new(
            ErrorKind::HeaderTruncated,
            format!(
                "the header should have {length} bytes, but only {available} follow its length: the file was cut short, \
                 or is no safetensors file"
            ),
        ));
    }
    Ok(())
}

/// The error for a name that no tensor of a file has.
pub(crate) fn absent(name: &str) -> Error {
    Error::new(ErrorKind::TensorNotFound, format!("File does not contain tensor {name}"))
}

/// The number of bytes that a tensor of `dtype` and `shape` takes, or why there can be no such tensor.
///
/// Refuses what torch can make no tensor of either: dimensions, element counts or contiguous strides of 2^63 and more,
/// and dimensions whose product overflows before a zero among them is reached.
pub fn tensor_bytes(name: &str, dtype: Dtype, shape: &[u64]) -> Result<u64> {
    shape_bytes(dtype, shape).map_err(|(kind, fault)| Error::new(kind, format!("tensor {name:?}: {fault}")))
}

/// The same for no tensor in particular: the fault is told as a kind and a text.
pub(crate) fn shape_bytes(dtype: Dtype, shape: &[u64]) -> std::result::Result<u64, (ErrorKind, String)> {
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
