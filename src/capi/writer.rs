//! `sft_writer`: tensors and metadata that are collected, then written to a file or into memory.

use std::ffi::{c_char, c_void};

use super::boundary;
use super::dtype::{self, sft_dtype};
use super::options::{sft_save_options, sft_sharded_options};
use super::pointer::{self, Out};
use super::status::sft_status;
use crate::checkpoint::save_sharded;
use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;
use crate::format::header::{Metadata, tensor_nbytes};
use crate::format::layout::{Layout, TensorSpec};
use crate::write::save::{save_file, save_into_raw};

/// What is to be written.
#[derive(Default)]
pub struct sft_writer {
    tensors: Vec<Tensor>,
    metadata: Option<Metadata>,
}

/// One tensor: name and shape of our own, bytes of the caller's.
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    data: Data,
}

/// Where a tensor's bytes come from.
enum Data {
    /// From memory of the caller's.
    Lent { start: *const c_void, nbytes: usize },
    /// They are given to an `sft_incremental_writer`.
    Streamed,
}

impl sft_writer {
    pub(super) fn specs(&self) -> Vec<TensorSpec<'_>> {
        self.tensors
            .iter()
            .map(|tensor| TensorSpec { name: &tensor.name, dtype: tensor.dtype, shape: &tensor.shape })
            .collect()
    }

    /// The bytes of every tensor.
    ///
    /// # Safety
    ///
    /// The data of every tensor is still there, and nobody changes it while the result is in use.
    unsafe fn data(&self) -> Result<Vec<&[u8]>> {
        let mut all = Vec::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            let Data::Lent { start, nbytes } = tensor.data else {
                let detail = format!(
                    "tensor {:?} was declared without data: write the file with sft_incremental_writer_create",
                    tensor.name
                );
                return Err(pointer::invalid(detail));
            };
            // SAFETY: the caller's promise.
            all.push(unsafe { pointer::bytes(start, nbytes, "data") }?);
        }
        Ok(all)
    }

    /// The name and the bytes of every tensor that has some.
    ///
    /// # Safety
    ///
    /// As for [`sft_writer::data`].
    pub(super) unsafe fn lent(&self) -> Result<Vec<(&str, &[u8])>> {
        let mut all = Vec::new();
        for tensor in &self.tensors {
            if let Data::Lent { start, nbytes } = tensor.data {
                // SAFETY: the caller's promise.
                all.push((tensor.name.as_str(), unsafe { pointer::bytes(start, nbytes, "data") }?));
            }
        }
        Ok(all)
    }

    pub(super) fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }
}

/// A writer without tensors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_new(writer: *mut *mut sft_writer) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a place for a handle (header).
        let out = unsafe { Out::new(writer, "writer") }?;
        out.set(pointer::hand_over(sft_writer::default()));
        Ok(())
    })
}

/// Frees the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_free(writer: *mut sft_writer) {
    boundary!((); {
        // SAFETY: the caller gives NULL, or a handle that nobody uses any more (header).
        unsafe { pointer::release(writer) }
    })
}

/// Adds a tensor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_add_tensor(
    writer: *mut sft_writer,
    name: *const c_char,
    name_length: usize,
    dtype: sft_dtype,
    shape: *const u64,
    rank: usize,
    data: *const c_void,
    nbytes: usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle that nobody else uses now, `name_length` bytes, `rank` dimensions, and
        // `nbytes` bytes of data (header).
        let (writer, name, shape, given) = unsafe {
            (
                pointer::exclusive(writer, "writer")?,
                pointer::text(name, name_length, "name")?,
                pointer::array(shape, rank, "shape")?,
                pointer::bytes(data, nbytes, "data")?.len(),
            )
        };
        let dtype = dtype::require(dtype)?;
        let needed = tensor_nbytes(name, dtype, shape)?;
        if needed != given as u64 {
            let detail = format!("tensor {name:?} takes {needed} bytes, but {given} were given");
            return Err(Error::new(ErrorKind::BufferSize, detail));
        }
        let data = Data::Lent { start: data, nbytes };
        writer.tensors.push(Tensor { name: name.to_string(), dtype, shape: shape.to_vec(), data });
        Ok(())
    })
}

/// Adds a tensor whose bytes are given to an `sft_incremental_writer`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_declare_tensor(
    writer: *mut sft_writer,
    name: *const c_char,
    name_length: usize,
    dtype: sft_dtype,
    shape: *const u64,
    rank: usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle that nobody else uses now, `name_length` bytes, and `rank` dimensions
        // (header).
        let (writer, name, shape) = unsafe {
            (
                pointer::exclusive(writer, "writer")?,
                pointer::text(name, name_length, "name")?,
                pointer::array(shape, rank, "shape")?,
            )
        };
        let dtype = dtype::require(dtype)?;
        tensor_nbytes(name, dtype, shape)?;
        let (name, shape) = (name.to_string(), shape.to_vec());
        writer.tensors.push(Tensor { name, dtype, shape, data: Data::Streamed });
        Ok(())
    })
}

/// Has metadata written, even if no entry is added.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_enable_metadata(writer: *mut sft_writer) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle that nobody else uses now (header).
        unsafe { pointer::exclusive(writer, "writer") }?.metadata.get_or_insert_default();
        Ok(())
    })
}

/// Adds an entry to the metadata.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_add_metadata(
    writer: *mut sft_writer,
    key: *const c_char,
    key_length: usize,
    value: *const c_char,
    value_length: usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle that nobody else uses now, and two texts of these lengths (header).
        let (writer, key, value) = unsafe {
            (
                pointer::exclusive(writer, "writer")?,
                pointer::text(key, key_length, "key")?,
                pointer::text(value, value_length, "value")?,
            )
        };
        let metadata = writer.metadata.get_or_insert_default();
        if metadata.contains_key(key) {
            let detail = format!("the metadata has the key {key:?} already");
            return Err(Error::new(ErrorKind::Duplicate, detail));
        }
        metadata.insert(key.to_string(), value.to_string());
        Ok(())
    })
}

/// The size of the whole file in bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_get_size(
    writer: *const sft_writer,
    options: *const sft_save_options,
    nbytes: *mut u64,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle, options or NULL, and a place for a number (header).
        let (writer, options, out) = unsafe {
            (
                pointer::shared(writer, "writer")?,
                sft_save_options::read(options)?,
                Out::new(nbytes, "nbytes")?,
            )
        };
        let layout = Layout::plan(&writer.specs(), writer.metadata.as_ref(), options.alignment)?;
        out.set(layout.total_bytes());
        Ok(())
    })
}

/// Writes the file at `path`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_write_file(
    writer: *const sft_writer,
    path: *const c_char,
    options: *const sft_save_options,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle, a string, and options or NULL (header).
        let (writer, path, options) = unsafe {
            (pointer::shared(writer, "writer")?, pointer::path(path)?, sft_save_options::read(options)?)
        };
        // SAFETY: the caller keeps the data of every tensor, unchanged, until the write has returned (header).
        let data = unsafe { writer.data() }?;
        save_file(&writer.specs(), &data, writer.metadata.as_ref(), path, options)
    })
}

/// Writes a checkpoint of one file or several into `directory`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_write_sharded(
    writer: *const sft_writer,
    directory: *const c_char,
    options: *const sft_sharded_options,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle, a string, and options or NULL (header).
        let (writer, directory, options) = unsafe {
            (
                pointer::shared(writer, "writer")?,
                pointer::path(directory)?,
                sft_sharded_options::read(options)?,
            )
        };
        // SAFETY: the caller keeps the data of every tensor, unchanged, until the write has returned (header).
        let data = unsafe { writer.data() }?;
        save_sharded(&writer.specs(), &data, writer.metadata.as_ref(), directory, options)?;
        Ok(())
    })
}

/// Writes the file into `buffer`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_write_buffer(
    writer: *const sft_writer,
    options: *const sft_save_options,
    buffer: *mut c_void,
    nbytes: usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle, and options or NULL (header).
        let (writer, options) =
            unsafe { (pointer::shared(writer, "writer")?, sft_save_options::read(options)?) };
        let buffer = pointer::destination(buffer.cast(), nbytes, "buffer")?;
        // SAFETY: the caller keeps the data of every tensor, unchanged, until the write has returned (header).
        let data = unsafe { writer.data() }?;
        let specs = writer.specs();
        // SAFETY: `buffer` is valid for writes of `nbytes` and apart from the data (header; not NULL, checked).
        unsafe { save_into_raw(&specs, &data, writer.metadata.as_ref(), buffer, nbytes, options.alignment) }
    })
}
