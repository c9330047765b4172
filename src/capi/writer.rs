//! `sft_writer`: collects tensors and metadata, and writes them to a file, to a checkpoint or to memory.

use std::ffi::{c_char, c_void};

use super::boundary::boundary;
use super::dtype;
use super::options::{sft_save_options, sft_sharded_options};
use super::pointer::{self, Out};
use super::types::{sft_dtype, sft_status};
use crate::checkpoint::save_sharded_raw;
use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;
use crate::format::header::{Metadata, tensor_nbytes};
use crate::format::layout::{Layout, TensorSpec};
use crate::sys::raw_bytes::RawBytes;
use crate::write::save::{save_file_raw, save_into_raw};

#[derive(Default)]
pub struct sft_writer {
    tensors: Vec<Tensor>,
    metadata: Option<Metadata>,
}

/// One tensor. Name and shape are copies.
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    nbytes: u64,
    /// Memory of the caller; `None` if the caller passes the bytes to an `sft_incremental_writer`.
    data: Option<*const c_void>,
}

impl Tensor {
    /// # Safety
    ///
    /// As for [`pointer::text`] and [`pointer::array`].
    unsafe fn new(
        (name, name_length): (*const c_char, usize),
        dtype: sft_dtype,
        (shape, rank): (*const u64, usize),
    ) -> Result<Tensor> {
        // SAFETY: this function has the contracts of both.
        let (name, shape) =
            unsafe { (pointer::text(name, name_length, "name")?, pointer::array(shape, rank, "shape")?) };
        let dtype = dtype::require(dtype)?;
        let nbytes = tensor_nbytes(name, dtype, shape)?;
        Ok(Tensor { name: name.to_string(), dtype, shape: shape.to_vec(), nbytes, data: None })
    }
}

impl sft_writer {
    pub(super) fn specs(&self) -> Vec<TensorSpec<'_>> {
        self.tensors
            .iter()
            .map(|tensor| TensorSpec { name: &tensor.name, dtype: tensor.dtype, shape: &tensor.shape })
            .collect()
    }

    /// Returns the bytes of every tensor, or an error if one was only declared.
    ///
    /// # Safety
    ///
    /// "Ownership": the data of every tensor is valid, and nobody changes it while the result is used.
    unsafe fn data(&self) -> Result<Vec<RawBytes<'_>>> {
        if let Some(tensor) = self.tensors.iter().find(|tensor| tensor.data.is_none()) {
            let detail = format!(
                "tensor {:?} was declared without data; write the file with sft_incremental_writer_create",
                tensor.name
            );
            return Err(pointer::invalid(detail));
        }
        // SAFETY: this function has the contract of `borrowed`.
        Ok(unsafe { self.borrowed() }?.into_iter().map(|(_, bytes)| bytes).collect())
    }

    /// Returns the name and the bytes of every tensor that was added with data.
    ///
    /// # Safety
    ///
    /// As for [`sft_writer::data`].
    pub(super) unsafe fn borrowed(&self) -> Result<Vec<(&str, RawBytes<'_>)>> {
        let mut all = Vec::new();
        for tensor in &self.tensors {
            if let Some(start) = tensor.data {
                // SAFETY: valid and unchanged ("Ownership", this function's contract); `nbytes` was given as a `usize`.
                let bytes = unsafe { pointer::bytes(start, tensor.nbytes as usize, "data") }?;
                all.push((tensor.name.as_str(), bytes));
            }
        }
        Ok(all)
    }

    pub(super) fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_new(writer: *mut *mut sft_writer) -> sft_status {
    boundary!({
        // SAFETY: a handle to set (header, "Pointers").
        let out = unsafe { Out::new(writer, "writer") }?;
        out.set(pointer::new_handle(sft_writer::default()));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_free(writer: *mut sft_writer) {
    boundary!((); {
        // SAFETY: NULL or a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::free_handle(writer) }
    })
}

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
        // SAFETY: a live handle that no other thread uses (header, "Ownership", "Threads"); `name_length` bytes, `rank`
        // dimensions, `nbytes` bytes ("Pointers").
        let (writer, tensor) = unsafe {
            let writer = pointer::exclusive(writer, "writer")?;
            pointer::bytes(data, nbytes, "data")?;
            (writer, Tensor::new((name, name_length), dtype, (shape, rank))?)
        };
        if tensor.nbytes != nbytes as u64 {
            let Tensor { name, nbytes: needed, .. } = tensor;
            let detail =
                format!("tensor {name:?}: dtype and shape need {needed} bytes, but nbytes is {nbytes}");
            return Err(Error::new(ErrorKind::BufferSize, detail));
        }
        writer.tensors.push(Tensor { data: Some(data), ..tensor });
        Ok(())
    })
}

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
        // SAFETY: a live handle that no other thread uses (header, "Ownership", "Threads"); `name_length` bytes, `rank`
        // dimensions ("Pointers").
        let (writer, tensor) = unsafe {
            let writer = pointer::exclusive(writer, "writer")?;
            (writer, Tensor::new((name, name_length), dtype, (shape, rank))?)
        };
        writer.tensors.push(tensor);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_enable_metadata(writer: *mut sft_writer) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::exclusive(writer, "writer") }?.metadata.get_or_insert_default();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_add_metadata(
    writer: *mut sft_writer,
    key: *const c_char,
    key_length: usize,
    value: *const c_char,
    value_length: usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle that no other thread uses (header, "Ownership", "Threads"); two texts of these lengths
        // ("Pointers").
        let (writer, key, value) = unsafe {
            (
                pointer::exclusive(writer, "writer")?,
                pointer::text(key, key_length, "key")?,
                pointer::text(value, value_length, "value")?,
            )
        };
        let metadata = writer.metadata.get_or_insert_default();
        if metadata.contains_key(key) {
            let detail = format!("the metadata already contains the key {key:?}");
            return Err(Error::new(ErrorKind::Duplicate, detail));
        }
        metadata.insert(key.to_string(), value.to_string());
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_get_size(
    writer: *const sft_writer,
    options: *const sft_save_options,
    nbytes: *mut u64,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); options or NULL, a number to set ("Pointers",
        // "Versions").
        let (writer, options, out) = unsafe {
            (
                pointer::shared(writer, "writer")?,
                pointer::options(options)?.parse()?,
                Out::new(nbytes, "nbytes")?,
            )
        };
        let layout = Layout::plan(&writer.specs(), writer.metadata.as_ref(), options.alignment)?;
        out.set(layout.total_bytes());
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_write_file(
    writer: *const sft_writer,
    path: *const c_char,
    options: *const sft_save_options,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a string ("Text"); options or NULL ("Pointers",
        // "Versions").
        let (writer, path, options) = unsafe {
            (pointer::shared(writer, "writer")?, pointer::path(path)?, pointer::options(options)?.parse()?)
        };
        // SAFETY: the data of every tensor is valid and unchanged during a write (header, "Ownership").
        let data = unsafe { writer.data() }?;
        save_file_raw(&writer.specs(), &data, writer.metadata.as_ref(), path, options)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_write_sharded(
    writer: *const sft_writer,
    directory: *const c_char,
    options: *const sft_sharded_options,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a string ("Text"); options or NULL ("Pointers",
        // "Versions").
        let (writer, directory, options) = unsafe {
            (
                pointer::shared(writer, "writer")?,
                pointer::path(directory)?,
                pointer::options(options)?.parse()?,
            )
        };
        // SAFETY: the data of every tensor is valid and unchanged during a write (header, "Ownership").
        let data = unsafe { writer.data() }?;
        save_sharded_raw(&writer.specs(), &data, writer.metadata.as_ref(), directory, options)?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_writer_write_buffer(
    writer: *const sft_writer,
    options: *const sft_save_options,
    buffer: *mut c_void,
    nbytes: usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); options or NULL ("Pointers", "Versions").
        let (writer, options) =
            unsafe { (pointer::shared(writer, "writer")?, pointer::options(options)?.parse()?) };
        let buffer = pointer::buffer(buffer, nbytes, "buffer")?;
        // SAFETY: the data of every tensor is valid and unchanged during a write (header, "Ownership").
        let data = unsafe { writer.data() }?;
        let specs = writer.specs();
        // SAFETY: `buffer` is not NULL (checked), valid for writes of `nbytes`, and apart from the data (header,
        // "Pointers").
        unsafe { save_into_raw(&specs, &data, writer.metadata.as_ref(), buffer, nbytes, options.alignment) }
    })
}
