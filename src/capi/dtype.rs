//! Element types by number.

use std::ffi::c_char;

use super::boundary;
use super::pointer::{self, Out};
use super::status::sft_status;
use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;
use crate::format::header::shape_nbytes;

/// A dtype's number: the discriminant of [`Dtype`].
pub type sft_dtype = u32;

/// The dtype of a number that a caller gave.
pub(super) fn require(dtype: sft_dtype) -> Result<Dtype> {
    Dtype::from_number(dtype).ok_or_else(|| {
        let detail = format!("no dtype has the number {dtype}: give one of the SFT_DTYPE_ constants");
        Error::new(ErrorKind::UnsupportedDtype, detail)
    })
}

macro_rules! codes {
    ($( $variant:ident = $code:literal; )*) => {
        fn c_code(dtype: Dtype) -> *const c_char {
            match dtype {
                $( Dtype::$variant => concat!($code, "\0").as_ptr().cast(), )*
            }
        }
    };
}

codes! {
    U64 = "U64";
    I64 = "I64";
    F64 = "F64";
    C64 = "C64";
    F32 = "F32";
    U32 = "U32";
    I32 = "I32";
    BF16 = "BF16";
    F16 = "F16";
    U16 = "U16";
    I16 = "I16";
    F8E5M2FNUZ = "F8_E5M2FNUZ";
    F8E4M3FNUZ = "F8_E4M3FNUZ";
    F8E8M0 = "F8_E8M0";
    F8E4M3 = "F8_E4M3";
    F8E5M2 = "F8_E5M2";
    I8 = "I8";
    U8 = "U8";
    F6E3M2 = "F6_E3M2";
    F6E2M3 = "F6_E2M3";
    F4 = "F4";
    Bool = "BOOL";
}

/// The code of a dtype in a header; NULL for a number that no dtype has.
#[unsafe(no_mangle)]
pub extern "C" fn sft_dtype_get_code(dtype: sft_dtype) -> *const c_char {
    boundary!(std::ptr::null(); { Dtype::from_number(dtype).map_or(std::ptr::null(), c_code) })
}

/// The width of an element in bits; 0 for a number that no dtype has.
#[unsafe(no_mangle)]
pub extern "C" fn sft_dtype_get_bits(dtype: sft_dtype) -> u32 {
    boundary!(0; { Dtype::from_number(dtype).map_or(0, |dtype| dtype.bits() as u32) })
}

/// The dtype of a code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_dtype_parse(code: *const c_char, dtype: *mut sft_dtype) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a string and a place for a number (header).
        let (code, out) = unsafe { (pointer::c_string(code, "code")?, Out::new(dtype, "dtype")?) };
        let found = code.to_str().ok().and_then(Dtype::from_code).ok_or_else(|| {
            Error::new(ErrorKind::UnknownDtype, format!("unknown dtype {:?}", code.to_string_lossy()))
        })?;
        out.set(found as sft_dtype);
        Ok(())
    })
}

/// The number of bytes of a tensor of `dtype` and `shape`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_dtype_compute_nbytes(
    dtype: sft_dtype,
    shape: *const u64,
    rank: usize,
    nbytes: *mut u64,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives `rank` dimensions and a place for a number (header).
        let (shape, out) = unsafe { (pointer::array(shape, rank, "shape")?, Out::new(nbytes, "nbytes")?) };
        out.set(shape_nbytes(require(dtype)?, shape).map_err(|(kind, fault)| Error::new(kind, fault))?);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[test]
    fn c_codes_are_the_codes() {
        for &dtype in Dtype::ALL {
            // SAFETY: a constant that ends in NUL.
            let code = unsafe { CStr::from_ptr(sft_dtype_get_code(dtype as u32)) };
            assert_eq!(code.to_str(), Ok(dtype.code()));
        }
        assert!(sft_dtype_get_code(99).is_null());
    }
}
