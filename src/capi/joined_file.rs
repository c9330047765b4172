//! `sft_joined_file`: writes parts of a file that another process commits.

use std::ffi::{c_char, c_void};

use super::boundary::boundary;
use super::options::flag;
use super::pointer::{self, Out};
use super::slice::{axis_ranges, sft_range};
use super::types::sft_status;
use crate::error::{Error, ErrorKind};
use crate::write::joined::JoinedFile;

/// `None` after `sft_joined_file_finish`.
pub struct sft_joined_file(Option<JoinedFile>);

// Several threads may use one handle at once (header, "Threads").
const _: () = pointer::assert_sync::<JoinedFile>();

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_joined_file_open(
    path: *const c_char,
    file: *mut *mut sft_joined_file,
) -> sft_status {
    boundary!({
        // SAFETY: a handle to set (header, "Pointers"); a string ("Text").
        let (out, path) = unsafe { (Out::null(file, "file")?, pointer::path(path)?) };
        out.set(pointer::new_handle(sft_joined_file(Some(JoinedFile::open(path)?))));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_joined_file_write_slice(
    file: *const sft_joined_file,
    name: *const c_char,
    name_length: usize,
    ranges: *const sft_range,
    rank: usize,
    data: *const c_void,
    nbytes: usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); `name_length` bytes, `rank` ranges, `nbytes` bytes
        // ("Pointers").
        let (file, name, ranges, bytes) = unsafe {
            (
                pointer::shared(file, "file")?,
                pointer::text(name, name_length, "name")?,
                pointer::array(ranges, rank, "ranges")?,
                pointer::bytes(data, nbytes, "data")?,
            )
        };
        let file = file.0.as_ref().ok_or_else(finished)?;
        file.write_slice(name, &axis_ranges(ranges), bytes)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_joined_file_finish(file: *mut sft_joined_file, durable: u32) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership") that no other thread uses ("Threads").
        let file = unsafe { pointer::exclusive(file, "file") }?;
        let durable = flag("sft_joined_file_finish", "durable", durable)?;
        file.0.take().ok_or_else(finished)?.finish(durable)
    })
}

fn finished() -> Error {
    Error::new(ErrorKind::Closed, "the file was finished already: open it again to write more")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_joined_file_free(file: *mut sft_joined_file) {
    boundary!((); {
        // SAFETY: NULL or a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::free_handle(file) }
    })
}
