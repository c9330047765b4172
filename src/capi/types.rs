//! Types of the ABI that several modules use.

use std::ffi::c_char;

/// 0, or the number of an [`ErrorKind`](crate::error::ErrorKind).
pub type sft_status = i32;

pub const SFT_OK: sft_status = 0;

/// The discriminant of a [`Dtype`](crate::format::dtype::Dtype).
pub type sft_dtype = u32;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_str {
    pub data: *const c_char,
    pub length: usize,
}

impl From<&str> for sft_str {
    /// Borrows `text`, without a lifetime.
    fn from(text: &str) -> sft_str {
        text.as_bytes().into()
    }
}

impl From<&[u8]> for sft_str {
    /// Borrows `text`, without a lifetime.
    fn from(text: &[u8]) -> sft_str {
        sft_str { data: text.as_ptr().cast(), length: text.len() }
    }
}
