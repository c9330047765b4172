//! Opening files, describing their tensors, and reading whole tensors.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use super::boundary::boundary;
use super::handle::sft_file;
use super::options::{
    SFT_LOAD_TARGET_DEVICE, SFT_LOAD_TARGET_MAPPING, SFT_LOAD_TARGET_MEMORY, sft_load_target,
    sft_open_options,
};
use super::pointer::{self, Out, VersionedOut, invalid, versioned};
use super::types::{sft_dtype, sft_status, sft_str};
use crate::error::Result;
use crate::read::explain::LoadTarget;
use crate::read::file::TensorFile;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_tensor_info {
    /// The size of the struct.
    pub struct_size: usize,
    pub name: sft_str,
    pub rank: usize,
    pub shape: *const u64,
    pub nbytes: u64,
    pub begin: u64,
    pub end: u64,
    pub dtype: sft_dtype,
    pub reserved: u32,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers and raw pointers, without padding.
versioned!(unsafe sft_tensor_info, 72);

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_load_plan {
    /// The size of the struct.
    pub struct_size: usize,
    pub filesystem: *const c_char,
    pub reason: *const c_char,
    pub cached_bytes: u64,
    pub request_bytes: u64,
    pub readers: u32,
    pub direct: u32,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers and raw pointers, without padding.
versioned!(unsafe sft_load_plan, 48);

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_read_request {
    pub index: usize,
    pub buffer: *mut c_void,
    pub nbytes: usize,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_open(
    path: *const c_char,
    options: *const sft_open_options,
    file: *mut *mut sft_file,
) -> sft_status {
    boundary!({
        // SAFETY: a handle to set, options or NULL (header, "Pointers", "Versions"); a string ("Text").
        let (out, path, (backend, prefault)) =
            unsafe { (Out::null(file, "file")?, pointer::path(path)?, pointer::options(options)?.parse()?) };
        let opened = TensorFile::open(path, backend)?;
        if let Some(when) = prefault {
            opened.prefault(when)?;
        }
        out.set(pointer::new_handle(sft_file::new(Arc::new(opened))));
        Ok(())
    })
}

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

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_close(file: *mut sft_file) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::exclusive(file, "file") }?.close();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_free(file: *mut sft_file) {
    boundary!((); {
        // SAFETY: NULL or a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::free_handle(file) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_tensor_count(file: *const sft_file, count: *mut usize) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a number to set ("Pointers").
        let (state, out) = unsafe { (sft_file::state(file)?, Out::new(count, "count")?) };
        out.set(state.file.header().len());
        Ok(())
    })
}

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

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_explain_load(
    file: *const sft_file,
    target: sft_load_target,
    plan: *mut sft_load_plan,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a struct of its `struct_size` ("Versions").
        let (state, out) = unsafe { (sft_file::state(file)?, VersionedOut::new(plan)?) };
        let target = match target {
            SFT_LOAD_TARGET_MAPPING => LoadTarget::Mapping,
            SFT_LOAD_TARGET_MEMORY => LoadTarget::Memory,
            SFT_LOAD_TARGET_DEVICE => LoadTarget::Device,
            other => {
                let detail = format!(
                    "unknown target {other}: give SFT_LOAD_TARGET_MAPPING, SFT_LOAD_TARGET_MEMORY or SFT_LOAD_TARGET_DEVICE"
                );
                return Err(invalid(detail));
            }
        };
        let plan = state.file.explain(target)?;
        out.set(sft_load_plan {
            struct_size: size_of::<sft_load_plan>(),
            filesystem: plan.filesystem.as_ptr(),
            reason: plan.reason.as_ptr(),
            cached_bytes: plan.cached_bytes.unwrap_or(u64::MAX),
            request_bytes: plan.request_bytes.unwrap_or(0) as u64,
            readers: plan.readers as u32,
            direct: plan.is_direct.into(),
        });
        Ok(())
    })
}

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
