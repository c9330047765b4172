//! `sft_incremental_writer`: writes a file tensor by tensor.

use std::ffi::{c_char, c_void};

use super::boundary::boundary;
use super::options::sft_save_options;
use super::pointer::{self, Out};
use super::types::sft_status;
use super::writer::sft_writer;
use crate::error::Result;
use crate::write::incremental::IncrementalWriter;

/// A file in progress.
pub struct sft_incremental_writer(IncrementalWriter);

impl sft_incremental_writer {
    /// Returns the writer of a handle.
    ///
    /// # Safety
    ///
    /// As for [`pointer::shared`].
    unsafe fn writer<'a>(writer: *const sft_incremental_writer) -> Result<&'a IncrementalWriter> {
        // SAFETY: this function has the contract of `pointer::shared`.
        Ok(&unsafe { pointer::shared(writer, "writer") }?.0)
    }
}

// Several threads may use one handle at once (header, "Threads").
const _: () = pointer::assert_sync::<IncrementalWriter>();

/// Begins the file at `path`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_create(
    writer: *const sft_writer,
    path: *const c_char,
    options: *const sft_save_options,
    incremental: *mut *mut sft_incremental_writer,
) -> sft_status {
    boundary!({
        // SAFETY: a handle to set, options or NULL (header, "Pointers", "Versions"); a live handle ("Ownership",
        // "Threads"); a string ("Text").
        let (out, writer, path, options) = unsafe {
            (
                Out::null(incremental, "incremental")?,
                pointer::shared(writer, "writer")?,
                pointer::path(path)?,
                sft_save_options::read(options)?,
            )
        };
        // SAFETY: the data of every tensor is valid and unchanged during a write (header, "Ownership").
        let borrowed = unsafe { writer.borrowed() }?;
        let created = IncrementalWriter::create(&writer.specs(), writer.metadata(), path, options)?;
        for (name, bytes) in borrowed {
            created.write_raw(name, bytes)?;
        }
        out.set(pointer::new_handle(sft_incremental_writer(created)));
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
        // SAFETY: a live handle (header, "Ownership", "Threads"); `name_length` bytes, `nbytes` bytes ("Pointers").
        let (writer, name, bytes) = unsafe {
            (
                sft_incremental_writer::writer(writer)?,
                pointer::text(name, name_length, "name")?,
                pointer::bytes(data, nbytes, "data")?,
            )
        };
        writer.write_raw(name, bytes)
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
        // SAFETY: a live handle (header, "Ownership", "Threads"); `name_length` bytes, `nbytes` bytes ("Pointers").
        let (writer, name, bytes) = unsafe {
            (
                sft_incremental_writer::writer(writer)?,
                pointer::text(name, name_length, "name")?,
                pointer::bytes(data, nbytes, "data")?,
            )
        };
        writer.write_part_raw(name, offset, bytes)
    })
}

/// Replaces the target by the file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_commit(writer: *mut sft_incremental_writer) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { sft_incremental_writer::writer(writer) }?.commit()
    })
}

/// Frees the handle; discards the file unless it was committed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_free(writer: *mut sft_incremental_writer) {
    boundary!((); {
        // SAFETY: NULL or a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::free_handle(writer) }
    })
}
