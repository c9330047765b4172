//! Functions of the whole library: its version and its threads.

use std::ffi::c_char;

use super::boundary::boundary;
use super::pointer::Out;
use super::types::sft_status;
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
