//! Filesystems of C programs, and of other languages: the struct of `include/safetensors_torch.h`.

// The names and the documentation are those of the header.
#![allow(missing_docs, non_camel_case_types)]

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::filesystem::Filesystem;
use crate::error::{Error, ErrorKind, Result};
use crate::read::caller_source::{CallerSource, Lifetime, Status, call, sft_source, sft_source_error};
use crate::read::external::ByteSource;

pub type sft_filesystem_open = Option<
    unsafe extern "C" fn(
        context: *mut c_void,
        path: *const c_char,
        source: *mut sft_source,
        error: *mut sft_source_error,
    ) -> Status,
>;

pub type sft_filesystem_list = Option<
    unsafe extern "C" fn(
        context: *mut c_void,
        directory: *const c_char,
        names: *mut *const *const c_char,
        count: *mut usize,
        error: *mut sft_source_error,
    ) -> Status,
>;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_filesystem {
    pub struct_size: usize,
    pub context: *mut c_void,
    pub open: sft_filesystem_open,
    pub list: sft_filesystem_list,
}

/// A filesystem whose functions the caller has given.
#[derive(Debug)]
pub(crate) struct CallerFilesystem(sft_filesystem, Lifetime);

// SAFETY: several threads call the functions at once (header, `sft_filesystem`).
unsafe impl Sync for CallerFilesystem {}

impl CallerFilesystem {
    /// # Safety
    ///
    /// The functions keep the contract of the header (`sft_filesystem`), as long as the result is used.
    pub(crate) unsafe fn new(filesystem: sft_filesystem, lifetime: Lifetime) -> Result<CallerFilesystem> {
        if filesystem.open.is_none() {
            return Err(Error::new(ErrorKind::InvalidArgument, "sft_filesystem: open must be set"));
        }
        Ok(CallerFilesystem(filesystem, lifetime))
    }
}

impl Filesystem for CallerFilesystem {
    fn open(&self, path: &Path) -> Result<Box<dyn ByteSource>> {
        let open = self.0.open.expect("checked by `new`");
        let path = c_path(path)?;
        let mut source = sft_source {
            struct_size: size_of::<sft_source>(),
            context: std::ptr::null_mut(),
            get_length: None,
            get_identity: None,
            read: None,
            free: None,
            get_max_requests: None,
        };
        call(self.1, "the filesystem cannot open the file", |error| {
            // SAFETY: the function keeps the contract of the header (`new`); path and source are valid during the call.
            unsafe { open(self.0.context, path.as_ptr(), &raw mut source, error) }
        })?;
        // SAFETY: the function has set the source to one that keeps the contract of the header (header,
        // `sft_filesystem_open`).
        Ok(Box::new(unsafe { CallerSource::new(source, self.1) }?))
    }

    fn list(&self, directory: &Path) -> Result<Option<Vec<String>>> {
        let Some(list) = self.0.list else { return Ok(None) };
        let directory = c_path(directory)?;
        let (mut names, mut count) = (std::ptr::null(), 0);
        call(self.1, "the filesystem cannot list the directory", |error| {
            // SAFETY: as in `open`.
            unsafe { list(self.0.context, directory.as_ptr(), &raw mut names, &raw mut count, error) }
        })?;
        if count == 0 {
            return Ok(Some(Vec::new()));
        }
        if names.is_null() {
            let detail = format!("the filesystem has returned {count} names at NULL; fix its list function");
            return Err(Error::new(ErrorKind::InvalidArgument, detail));
        }
        // SAFETY: `count` strings that stay until the next call on this thread (header, `sft_filesystem_list`).
        let names = unsafe { std::slice::from_raw_parts(names, count) };
        let names = names.iter().filter(|name| !name.is_null());
        // SAFETY: each is a string, as above.
        let texts = names.map(|&name| unsafe { CStr::from_ptr(name) }.to_str());
        // No checkpoint has a name that is not UTF-8.
        Ok(Some(texts.filter_map(|text| text.ok().map(str::to_owned)).collect()))
    }
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| {
        let detail = format!("a path with a null byte names no file: {}; remove it", path.display());
        Error::new(ErrorKind::InvalidArgument, detail)
    })
}
