//! Element types by number.

use std::ffi::c_char;

use super::boundary::boundary;
use super::pointer::{self, Out};
use super::types::{sft_dtype, sft_status};
use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;
use crate::format::header::shape_nbytes;

/// Returns the dtype of a number.
pub(super) fn require(dtype: sft_dtype) -> Result<Dtype> {
    Dtype::from_number(dtype).ok_or_else(|| {
        let detail = format!("unknown dtype number {dtype}; pass an SFT_DTYPE_ constant");
        Error::new(ErrorKind::UnsupportedDtype, detail)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn sft_dtype_get_code(dtype: sft_dtype) -> *const c_char {
    boundary!(std::ptr::null(); { Dtype::from_number(dtype).map_or(std::ptr::null(), |dtype| dtype.c_code().as_ptr()) })
}

#[unsafe(no_mangle)]
pub extern "C" fn sft_dtype_get_bits(dtype: sft_dtype) -> u32 {
    boundary!(0; { Dtype::from_number(dtype).map_or(0, |dtype| dtype.bits() as u32) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_dtype_parse(code: *const c_char, dtype: *mut sft_dtype) -> sft_status {
    boundary!({
        // SAFETY: a string (header, "Text"); a number to set ("Pointers").
        let (code, out) = unsafe { (pointer::c_string(code, "code")?, Out::new(dtype, "dtype")?) };
        let found = code.to_str().ok().and_then(Dtype::from_code).ok_or_else(|| {
            Error::new(ErrorKind::UnknownDtype, format!("unknown dtype {:?}", code.to_string_lossy()))
        })?;
        out.set(found as sft_dtype);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_dtype_compute_nbytes(
    dtype: sft_dtype,
    shape: *const u64,
    rank: usize,
    nbytes: *mut u64,
) -> sft_status {
    boundary!({
        // SAFETY: `rank` dimensions, a number to set (header, "Pointers").
        let (shape, out) = unsafe { (pointer::array(shape, rank, "shape")?, Out::new(nbytes, "nbytes")?) };
        out.set(shape_nbytes(require(dtype)?, shape).map_err(|(kind, fault)| Error::new(kind, fault))?);
        Ok(())
    })
}
