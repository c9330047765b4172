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
