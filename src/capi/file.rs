//! `sft_file`: an open file, what it holds, and whole tensors read from it.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use super::boundary;
use super::metadata::MetadataTable;
use super::options::{sft_open_options, sft_read_request, sft_tensor_info};
use super::pointer::{self, Out, VersionedOut, invalid};
use super::status::sft_status;
use crate::error::{Error, ErrorKind, Result};
use crate::read::file::TensorFile;

/// An open file, or the bytes of one in memory.
pub struct sft_file {
    /// `None` once it was closed.
    open: Option<Open>,
}

/// What a file has while it is open.
pub(super) struct Open {
    pub(super) file: Arc<TensorFile>,
    /// Points into `file`, whose header never changes.
    pub(super) metadata: MetadataTable,
}

impl sft_file {
    pub(super) fn new(file: Arc<TensorFile>) -> sft_file {
        let metadata = MetadataTable::new(file.header());
        sft_file { open: Some(Open { file, metadata }) }
    }

    /// The file behind a handle, unless it was closed.
    ///
    /// # Safety
    ///
    /// As for [`pointer::shared`].
    pub(super) unsafe fn open<'a>(file: *const sft_file) -> Result<&'a Open> {
        // SAFETY: the caller's promise.
        let file = unsafe { pointer::shared(file, "file") }?;
        file.open.as_ref().ok_or_else(|| Error::new(ErrorKind::Closed, "File is closed"))
    }
}

// Several threads may use one handle at a time, as the header says.
const _: () = {
    const fn shared_between_threads<T: Sync>() {}
    shared_between_threads::<TensorFile>();
};

/// Opens the file at `path`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_open(
    path: *const c_char,
    options: *const sft_open_options,
    file: *mut *mut sft_file,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a place for a handle, a string, and options or NULL (header).
        let out = unsafe { Out::new(file, "file") }?;
        out.set(std::ptr::null_mut());
        // SAFETY: as above.
        let (path, (backend, prefault)) = unsafe { (pointer::path(path)?, sft_open_options::read(options)?) };
        let opened = TensorFile::open(path, backend)?;
        if let Some(when) = prefault {
            opened.prefault(when)?;
        }
        out.set(pointer::hand_over(sft_file::new(Arc::new(opened))));
        Ok(())
    })
}

/// Opens the bytes of a file that lie in memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_open_buffer(
    data: *const c_void,
    nbytes: usize,
    file: *mut *mut sft_file,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a place for a handle (header).
        let out = unsafe { Out::new(file, "file") }?;
        out.set(std::ptr::null_mut());
        // SAFETY: the caller keeps `nbytes` bytes at `data`, unchanged, until the handle is closed or freed (header).
        let opened = unsafe {
            let bytes = pointer::bytes(data, nbytes, "data")?;
            TensorFile::from_memory(bytes.as_ptr(), bytes.len())?
        };
        out.set(pointer::hand_over(sft_file::new(Arc::new(opened))));
        Ok(())
    })
}

/// Closes the file and keeps the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_close(file: *mut sft_file) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle that nobody else uses now (header).
        unsafe { pointer::exclusive(file, "file") }?.open = None;
        Ok(())
    })
}

/// Frees the handle, and closes the file if it is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_free(file: *mut sft_file) {
    boundary!((); {
        // SAFETY: the caller gives NULL, or a handle that nobody uses any more (header).
        unsafe { pointer::release(file) }
    })
}

/// The number of tensors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_tensor_count(file: *const sft_file, count: *mut usize) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle and a place for a number (header).
        let (open, out) = unsafe { (sft_file::open(file)?, Out::new(count, "count")?) };
        out.set(open.file.header().len());
        Ok(())
    })
}

/// What the file says of the tensor at `index`, in file order.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_tensor_info(
    file: *const sft_file,
    index: usize,
    info: *mut sft_tensor_info,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle and a struct with its size in it (header).
        let (open, out) = unsafe { (sft_file::open(file)?, VersionedOut::new(info)?) };
        let tensor = open.file.tensor(index)?;
        let bytes = open.file.byte_range(&tensor);
        out.set(sft_tensor_info {
            struct_size: size_of::<sft_tensor_info>(),
            name: pointer::lend(tensor.name),
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

/// The index in file order of the tensor at `position` in the order of names.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_sorted_index(
    file: *const sft_file,
    position: usize,
    index: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle and a place for a number (header).
        let (open, out) = unsafe { (sft_file::open(file)?, Out::new(index, "index")?) };
        let sorted = open.file.header().sorted_by_name();
        let &found = sorted.get(position).ok_or_else(|| {
            let detail = format!("position {position}: the file has {} tensor(s)", sorted.len());
            open.file.locate(invalid(detail))
        })?;
        out.set(found as usize);
        Ok(())
    })
}

/// The index in file order of the tensor `name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_find_tensor(
    file: *const sft_file,
    name: *const c_char,
    name_length: usize,
    index: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle, `name_length` bytes and a place for a number (header).
        let (open, name, out) = unsafe {
            (sft_file::open(file)?, pointer::text(name, name_length, "name")?, Out::new(index, "index")?)
        };
        out.set(open.file.require(name)?);
        Ok(())
    })
}

/// A pointer to the bytes of the tensor at `index`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_data(
    file: *const sft_file,
    index: usize,
    data: *mut *const c_void,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a place for a pointer (header).
        let out = unsafe { Out::new(data, "data") }?;
        out.set(std::ptr::null());
        // SAFETY: the caller gives a handle (header).
        let open = unsafe { sft_file::open(file) }?;
        let tensor = open.file.tensor(index)?;
        let start = open.file.data_ptr(&tensor).ok_or_else(|| {
            let detail = "a file opened with SFT_BACKEND_PREAD has no tensor in memory: read it into a buffer, or \
                          open the file with SFT_BACKEND_MMAP";
            open.file.locate(invalid(detail))
        })?;
        open.file.read_ahead(index)?;
        out.set(start.cast());
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
        // SAFETY: the caller gives a handle (header).
        let open = unsafe { sft_file::open(file) }?;
        let buffer = pointer::destination(buffer.cast(), nbytes, "buffer")?;
        // SAFETY: `buffer` is valid for writes of `nbytes` during the call (header; not NULL, checked).
        unsafe { open.file.read_tensors(&[(index, buffer, nbytes)]) }
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
        // SAFETY: the caller gives a handle and `count` requests (header).
        let (open, reads) = unsafe { (sft_file::open(file)?, pointer::array(reads, count, "reads")?) };
        let requests = reads
            .iter()
            .map(|read| {
                let buffer = pointer::destination(read.buffer.cast(), read.nbytes, "reads: a buffer")?;
                Ok((read.index, buffer, read.nbytes))
            })
            .collect::<Result<Vec<_>>>()?;
        // SAFETY: the buffers are valid for writes during the call, and do not overlap (header; not NULL, checked).
        unsafe { open.file.read_tensors(&requests) }
    })
}
