//! The header of a file: which tensors it holds, of which dtype and shape, and where their bytes lie.

mod encode;
mod foreign;
mod parse;
mod read;
mod table;
mod tensor;
mod validate;

pub use encode::{encode, encode_unpadded, pad};
pub(crate) use foreign::detect_foreign;
pub use table::{Header, LENGTH_BYTES, MAX_HEADER_BYTES, METADATA_KEY, Metadata};
pub use tensor::{TensorInfo, tensor_nbytes};
pub(crate) use tensor::{shape_nbytes, tensor_not_found};

use crate::error::{Error, ErrorKind};

/// Creates an error about a header that breaks the format.
fn malformed(kind: ErrorKind, detail: impl Into<String>) -> Error {
    Error::new(kind, detail).with_remedy("fetch the file again, or save it again")
}
