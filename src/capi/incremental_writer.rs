//! `sft_incremental_writer`: writes a file tensor by tensor.

use std::ffi::{c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::boundary::boundary;
use super::options::sft_save_options;
use super::pointer::{self, Out};
use super::types::{sft_status, sft_str};
use super::writer::sft_writer;
use crate::write::incremental::IncrementalWriter;

pub struct sft_incremental_writer {
    writer: IncrementalWriter,
    /// The path of the joinable file; callers borrow it.
    joinable: Option<PathBuf>,
}

// Several threads may use one handle at once (header, "Threads").
const _: () = pointer::assert_sync::<IncrementalWriter>();

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
                pointer::options(options)?.parse()?,
            )
        };
        // SAFETY: the data of every tensor is valid and unchanged during a write (header, "Ownership").
        let borrowed = unsafe { writer.borrowed() }?;
        let created = IncrementalWriter::create(&writer.specs(), writer.metadata(), path, options)?;
        for (name, bytes) in borrowed {
            created.write(name, bytes)?;
        }
        out.set(pointer::new_handle(sft_incremental_writer { writer: created, joinable: None }));
        Ok(())
    })
}

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
                &pointer::shared(writer, "writer")?.writer,
                pointer::text(name, name_length, "name")?,
                pointer::bytes(data, nbytes, "data")?,
            )
        };
        writer.write(name, bytes)
    })
}

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
                &pointer::shared(writer, "writer")?.writer,
                pointer::text(name, name_length, "name")?,
                pointer::bytes(data, nbytes, "data")?,
            )
        };
        writer.write_part(name, offset, bytes)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_commit(writer: *mut sft_incremental_writer) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::shared(writer, "writer") }?.writer.commit()
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_make_joinable(
    writer: *mut sft_incremental_writer,
    path: *mut sft_str,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership") that no other thread uses ("Threads"); a text to set ("Pointers").
        let (writer, out) = unsafe { (pointer::exclusive(writer, "writer")?, Out::new(path, "path")?) };
        if writer.joinable.is_none() {
            writer.joinable = Some(writer.writer.make_joinable()?);
        }
        let path = writer.joinable.as_ref().expect("set above");
        out.set(path.as_os_str().as_bytes().into());
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_commit_joined(
    writer: *mut sft_incremental_writer,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::shared(writer, "writer") }?.writer.commit_joined()
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_incremental_writer_free(writer: *mut sft_incremental_writer) {
    boundary!((); {
        // SAFETY: NULL or a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::free_handle(writer) }
    })
}
