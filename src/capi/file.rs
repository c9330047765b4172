//! Opening files, describing their tensors, and reading whole tensors.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use super::boundary::boundary;
use super::handle::sft_file;
use super::options::sft_open_options;
use super::pointer::{self, Out, Versioned, VersionedOut, invalid};
use super::types::{sft_dtype, sft_status, sft_str};
use crate::error::Result;
use crate::read::file::TensorFile;

/// The description of one tensor.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_tensor_info {
    /// The size of the struct.
    pub struct_size: usize,
    /// The name.
    pub name: sft_str,
    /// The number of dimensions.
    pub rank: usize,
    /// The dimensions, in elements.
    pub shape: *const u64,
    /// The number of bytes.
    pub nbytes: u64,
    /// The offset of its first byte in the file.
    pub begin: u64,
    /// The offset after its last byte.
    pub end: u64,
    /// The element type.
    pub dtype: sft_dtype,
    /// 0.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers and raw pointers, without padding.
unsafe impl Versioned for sft_tensor_info {
    const NAME: &'static str = "sft_tensor_info";
    const FIRST_SIZE: usize = 72;
}

/// One tensor of a call that reads several.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_read_request {
    /// The tensor's index in file order.
    pub index: usize,
    /// The destination of its bytes.
    pub buffer: *mut c_void,
    /// The number of bytes of `buffer`.
    pub nbytes: usize,
}

/// Opens the file at `path`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_open(
    path: *const c_char,
    options: *const sft_open_options,
    file: *mut *mut sft_file,
) -> sft_status {
    boundary!({
        // SAFETY: a handle to set, options or NULL (header, "Pointers", "Versions"); a string ("Text").
        let (out, path, (backend, prefault)) =
            unsafe { (Out::null(file, "file")?, pointer::path(path)?, sft_open_options::read(options)?) };
        let opened = TensorFile::open(path, backend)?;
        if let Some(when) = prefault {
            opened.prefault(when)?;
        }
        out.set(pointer::new_handle(sft_file::new(Arc::new(opened))));
        Ok(())
    })
}

/// Opens a file whose bytes are in memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_open_buffer(
    data: *const c_void,
    nbytes: usize,
    file: *mut *mut sft_file,
) -> sft_status {
    boundary!({
        // SAFETY: a handle to set, `nbytes` bytes at `data` (header, "Pointers"), which stay valid and unchanged until the
        // handle is closed or freed ("Ownership").
        let (out, opened) = unsafe {
            let out = Out::null(file, "file")?;
            let bytes = pointer::bytes(data, nbytes, "data")?;
            (out, TensorFile::from_memory(bytes.as_ptr(), bytes.len())?)
        };
        out.set(pointer::new_handle(sft_file::new(Arc::new(opened))));
        Ok(())
    })
}

/// Closes the file and keeps the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_close(file: *mut sft_file) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::exclusive(file, "file") }?.close();
        Ok(())
    })
}

/// Frees the handle; closes the file if it is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_free(file: *mut sft_file) {
    boundary!((); {
        // SAFETY: NULL or a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::free_handle(file) }
    })
}

/// Returns the number of tensors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_tensor_count(file: *const sft_file, count: *mut usize) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a number to set ("Pointers").
        let (state, out) = unsafe { (sft_file::state(file)?, Out::new(count, "count")?) };
        out.set(state.file.header().len());
        Ok(())
    })
}

/// Describes the tensor at `index` in file order.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_tensor_info(
    file: *const sft_file,
    index: usize,
    info: *mut sft_tensor_info,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a struct of its `struct_size` ("Versions").
        let (state, out) = unsafe { (sft_file::state(file)?, VersionedOut::new(info)?) };
        let tensor = state.file.tensor(index)?;
        let bytes = state.file.byte_range(&tensor);
        out.set(sft_tensor_info {
            struct_size: size_of::<sft_tensor_info>(),
            name: tensor.name.into(),
            rank: tensor.shape.len(),
            shape: tensor.shape.as_ptr(),
            nbytes: tensor.nbytes(),
            begin: bytes.start,
            end: bytes.end,
            dtype: tensor.dtype as u32,
            reserved: 0,
        });
        Ok(())
    })
}

/// Returns the index in file order of the tensor at `position` in the order of names.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_sorted_index(
    file: *const sft_file,
    position: usize,
    index: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a number to set ("Pointers").
        let (state, out) = unsafe { (sft_file::state(file)?, Out::new(index, "index")?) };
        let sorted = state.file.header().sorted_by_name();
        let &found = sorted.get(position).ok_or_else(|| {
            let detail = format!("position {position}: the file has {} tensor(s)", sorted.len());
            state.file.locate(invalid(detail))
        })?;
        out.set(found as usize);
        Ok(())
    })
}

/// Returns the index in file order of the tensor `name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_find_tensor(
    file: *const sft_file,
    name: *const c_char,
    name_length: usize,
    index: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); `name_length` bytes, a number to set ("Pointers").
        let (state, name, out) = unsafe {
            (sft_file::state(file)?, pointer::text(name, name_length, "name")?, Out::new(index, "index")?)
        };
        out.set(state.file.require(name)?);
        Ok(())
    })
}

/// Returns a pointer to the bytes of the tensor at `index`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_data(
    file: *const sft_file,
    index: usize,
    data: *mut *const c_void,
) -> sft_status {
    boundary!({
        // SAFETY: a pointer to set (header, "Pointers"); a live handle ("Ownership", "Threads").
        let (out, state) =
            unsafe { (Out::null(data.cast::<*mut c_void>(), "data")?, sft_file::state(file)?) };
        let tensor = state.file.tensor(index)?;
        let start = state.file.data_ptr(&tensor).ok_or_else(|| {
            let detail = "the file was opened with SFT_BACKEND_PREAD: its tensors are not in memory; read the tensor \
                          into a buffer, or open the file with SFT_BACKEND_MMAP";
            state.file.locate(invalid(detail))
        })?;
        state.file.read_ahead(index)?;
        out.set(start.cast_mut().cast());
        Ok(())
    })
}

/// Reads the tensor at `index` into `buffer`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_read_tensor(
    file: *const sft_file,
    index: usize,
    buffer: *mut c_void,
    nbytes: usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads").
        let state = unsafe { sft_file::state(file) }?;
        let buffer = pointer::buffer(buffer, nbytes, "buffer")?;
        // SAFETY: `buffer` is not NULL (checked), valid for writes of `nbytes` during the call (header, "Pointers").
        unsafe { state.file.read_tensors(&[(index, buffer, nbytes)]) }
    })
}

/// Reads `count` tensors, each into its own buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_read_tensors(
    file: *const sft_file,
    reads: *const sft_read_request,
    count: usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); `count` requests ("Pointers").
        let (state, reads) = unsafe { (sft_file::state(file)?, pointer::array(reads, count, "reads")?) };
        let requests = reads
            .iter()
            .map(|read| {
                let buffer = pointer::buffer(read.buffer, read.nbytes, "reads: a buffer")?;
                Ok((read.index, buffer, read.nbytes))
            })
            .collect::<Result<Vec<_>>>()?;
        // SAFETY: the buffers are not NULL (checked), valid for writes during the call, and do not overlap (header,
        // "Pointers").
        unsafe { state.file.read_tensors(&requests) }
    })
}
