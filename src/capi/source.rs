//! `sft_source` and `sft_filesystem`: files that the program reads by its own means.

use std::ffi::c_char;
use std::sync::Arc;

use super::boundary::boundary;
use super::checkpoint::sft_checkpoint;
use super::handle::sft_file;
use super::options::sft_checkpoint_options;
use super::pointer::{self, Out, invalid, versioned};
use super::types::sft_status;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::caller_filesystem::CallerFilesystem;
pub use crate::checkpoint::caller_filesystem::sft_filesystem;
use crate::read::caller_source::{CallerSource, Lifetime};
pub use crate::read::caller_source::{sft_buffer, sft_source, sft_source_error};
use crate::read::file::TensorFile;

// SAFETY: `repr(C)`, begins with its size, without padding; integers, a raw pointer, and function pointers, of which the
// caller gives valid ones or NULL (header, "Pointers").
versioned!(unsafe sft_source, 56);
// SAFETY: as above.
versioned!(unsafe sft_filesystem, 32);

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_source_error_set(
    error: *mut sft_source_error,
    os_error: i32,
    message: *const c_char,
) -> sft_status {
    boundary!({
        // SAFETY: the error that the library has passed to the calling function (header, "Ownership"), which has it alone
        // ("Threads"); a string ("Text").
        let (error, message) =
            unsafe { (pointer::exclusive(error, "error")?, pointer::c_string(message, "message")?) };
        error.set(os_error, message.to_string_lossy().into_owned());
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_open_source(
    source: *const sft_source,
    name: *const c_char,
    file: *mut *mut sft_file,
) -> sft_status {
    boundary!({
        if source.is_null() {
            return Err(invalid("source is NULL"));
        }
        // SAFETY: a struct ("Pointers", "Versions") of functions that keep the contract of its documentation.
        let source = unsafe { CallerSource::new(pointer::options(source)?, Lifetime::Process) }?;
        // SAFETY: a handle to set ("Pointers"); a string ("Text").
        let (out, name) = unsafe { (Out::null(file, "file")?, pointer::path(name)?) };
        let opened = TensorFile::from_source(Box::new(source), name)?;
        out.set(pointer::new_handle(sft_file::new(Arc::new(opened))));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_open_in(
    filesystem: *const sft_filesystem,
    path: *const c_char,
    options: *const sft_checkpoint_options,
    checkpoint: *mut *mut sft_checkpoint,
) -> sft_status {
    boundary!({
        if filesystem.is_null() {
            return Err(invalid("filesystem is NULL"));
        }
        // SAFETY: a struct ("Pointers", "Versions") of functions that keep the contract of its documentation.
        let filesystem = unsafe { CallerFilesystem::new(pointer::options(filesystem)?, Lifetime::Process) }?;
        // SAFETY: a handle to set, options or NULL (header, "Pointers", "Versions"); a string ("Text").
        let (out, path, (options, _)) = unsafe {
            (Out::null(checkpoint, "checkpoint")?, pointer::path(path)?, pointer::options(options)?.parse()?)
        };
        out.set(pointer::new_handle(sft_checkpoint::new(Checkpoint::open_in(&filesystem, path, options)?)));
        Ok(())
    })
}
