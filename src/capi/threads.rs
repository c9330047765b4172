//! How many threads one call may use.

use super::boundary;
use super::pointer::Out;
use super::status::sft_status;
use crate::sys::threads;

/// Sets the most threads that one call uses.
#[unsafe(no_mangle)]
pub extern "C" fn sft_set_threads(threads: usize) -> sft_status {
    boundary!({
        threads::set_threads(threads);
        Ok(())
    })
}

/// The most threads that one call uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_get_threads(threads: *mut usize) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a place for a number (header).
        let out = unsafe { Out::new(threads, "threads") }?;
        out.set(threads::threads()?);
        Ok(())
    })
}
