//! How many threads one call may use.

use super::boundary;
use super::pointer::Out;
use super::status::sft_status;
use crate::threads::{set_threads, threads};

/// Sets the most threads that one call uses.
#[unsafe(no_mangle)]
pub extern "C" fn sft_threads_set(threads: usize) -> sft_status {
    boundary!({
        set_threads(threads);
        Ok(())
    })
}

/// The most threads that one call uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_threads_get(most: *mut usize) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a place for a number (header).
        let out = unsafe { Out::new(most, "threads") }?;
        out.set(threads()?);
        Ok(())
    })
}
