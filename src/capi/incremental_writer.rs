//! `sft_incremental_writer`: a file that is written tensor by tensor.

use std::ffi::{c_char, c_void};

use super::boundary;
use super::options::sft_save_options;
use super::pointer::{self, Out};
use super::status::sft_status;
use super::writer::sft_writer;
use crate::error::Result;
use crate::write::incremental::IncrementalWriter;

/// A file that is being written.
pub struct sft_incremental_writer(IncrementalWriter);

impl sft_incremental_writer {
    /// The writer behind a handle.
    ///
    /// # Safety
    ///
    /// As for [`pointer::shared`].
    unsafe fn writer<'a>(writer: *const sft_incremental_writer) -> Result<&'a IncrementalWriter> {
        // SAFETY: the caller's promise.
        Ok(&unsafe { pointer::shared(writer, "writer") }?.0)
    }
}

// Several threads may use one handle at a time, as the header says.
const _: () = {
    const fn shared_between_threads<T: Sync>() {}
    shared_between_threads::<IncrementalWriter>();
};

/// Begins the file at `path`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_create(
    writer: *const sft_writer,
    path: *const c_char,
    options: *const sft_save_options,
    incremental: *mut *mut sft_incremental_writer,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a place for a handle (header).
        let out = unsafe { Out::new(incremental, "incremental") }?;
        out.set(std::ptr::null_mut());
        // SAFETY: the caller gives a handle, a string, and options or NULL (header).
        let (writer, path, options) = unsafe {
            (pointer::shared(writer, "writer")?, pointer::path(path)?, sft_save_options::read(options)?)
        };
        // SAFETY: the caller keeps the data of every tensor that has some, unchanged, until this returns (header).
        let lent = unsafe { writer.lent() }?;
        let created = IncrementalWriter::create(&writer.specs(), writer.metadata(), path, options)?;
        for (name, bytes) in lent {
            created.write(name, bytes)?;
        }
        out.set(pointer::hand_over(sft_incremental_writer(created)));
        Ok(())
    })
}

/// Writes one tensor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_write_tensor(
    writer: *const sft_incremental_writer,
    name: *const c_char,
    name_length: usize,
    data: *const c_void,
    nbytes: usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle, `name_length` bytes, and `nbytes` bytes of data (header).
        let (writer, name, bytes) = unsafe {
            (
                sft_incremental_writer::writer(writer)?,
                pointer::text(name, name_length, "name")?,
                pointer::bytes(data, nbytes, "data")?,
            )
        };
        writer.write(name, bytes)
    })
}

/// Writes a part of one tensor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_write_part(
    writer: *const sft_incremental_writer,
    name: *const c_char,
    name_length: usize,
    offset: u64,
    data: *const c_void,
    nbytes: usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle, `name_length` bytes, and `nbytes` bytes of data (header).
        let (writer, name, bytes) = unsafe {
            (
                sft_incremental_writer::writer(writer)?,
                pointer::text(name, name_length, "name")?,
                pointer::bytes(data, nbytes, "data")?,
            )
        };
        writer.write_part(name, offset, bytes)
    })
}

/// Puts the file in place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_commit(writer: *mut sft_incremental_writer) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle that nobody else uses now (header).
        unsafe { sft_incremental_writer::writer(writer) }?.commit()
    })
}

/// Frees the handle; the file is given up unless it was committed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_free(writer: *mut sft_incremental_writer) {
    boundary!((); {
        // SAFETY: the caller gives NULL, or a handle that nobody uses any more (header).
        unsafe { pointer::release(writer) }
    })
}
