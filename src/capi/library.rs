//! Functions of the whole library: its version and its settings.

use std::ffi::c_char;

use super::boundary::boundary;
use super::options::sft_direct;
use super::pointer::{Out, invalid};
use super::types::sft_status;
use crate::sys::direct_io::{self, Direct};
use crate::sys::threads;

#[unsafe(no_mangle)]
pub extern "C" fn sft_get_version() -> *const c_char {
    boundary!(c"".as_ptr(); { concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast() })
}

#[unsafe(no_mangle)]
pub extern "C" fn sft_set_threads(threads: usize) -> sft_status {
    boundary!({
        threads::set_threads(threads);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_get_threads(threads: *mut usize) -> sft_status {
    boundary!({
        // SAFETY: `threads` is valid for a write (header, "Pointers").
        let out = unsafe { Out::new(threads, "threads") }?;
        out.set(threads::threads()?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn sft_set_direct(direct: sft_direct) -> sft_status {
    boundary!({
        let known = u8::try_from(direct).ok().and_then(Direct::from_number);
        direct_io::set_direct(known.ok_or_else(|| {
            invalid(format!(
                "unknown direct {direct}: give SFT_DIRECT_AUTO, SFT_DIRECT_NEVER or SFT_DIRECT_ALWAYS"
            ))
        })?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_get_direct(direct: *mut sft_direct) -> sft_status {
    boundary!({
        // SAFETY: `direct` is valid for a write (header, "Pointers").
        let out = unsafe { Out::new(direct, "direct") }?;
        out.set(direct_io::direct()? as sft_direct);
        Ok(())
    })
}
