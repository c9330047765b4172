//! The metadata of an open file, text entries, sorted by key; and that of a file on the disk, which can be changed.

use std::ffi::c_char;

use super::boundary;
use super::file::sft_file;
use super::options::{sft_edit_options, sft_metadata_change, sft_str};
use super::pointer::{self, Out, invalid};
use super::status::sft_status;
use crate::error::{Error, ErrorKind};
use crate::format::header::Header;
use crate::write::edit::{MetadataChanges, edit_metadata};

/// The entries by number, which the header's map cannot give in constant time.
pub(super) struct MetadataTable(Vec<(sft_str, sft_str)>);

impl MetadataTable {
    /// The entries of `header`; they point into it, and are as long valid.
    pub(super) fn new(header: &Header) -> MetadataTable {
        let entries = header.metadata().into_iter().flatten();
        MetadataTable(entries.map(|(key, value)| (pointer::lend(key), pointer::lend(value))).collect())
    }
}

/// Whether the header has metadata, be it empty.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_has_metadata(file: *const sft_file, present: *mut i32) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle and a place for a number (header).
        let (open, out) = unsafe { (sft_file::open(file)?, Out::new(present, "present")?) };
        out.set(open.file.header().metadata().is_some().into());
        Ok(())
    })
}

/// The number of entries of the metadata.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_metadata_count(file: *const sft_file, count: *mut usize) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle and a place for a number (header).
        let (open, out) = unsafe { (sft_file::open(file)?, Out::new(count, "count")?) };
        out.set(open.metadata.0.len());
        Ok(())
    })
}

/// The entry at `position` in the order of keys.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_metadata_entry(
    file: *const sft_file,
    position: usize,
    key: *mut sft_str,
    value: *mut sft_str,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle and two places for text (header).
        let (open, key_out, value_out) =
            unsafe { (sft_file::open(file)?, Out::new(key, "key")?, Out::new(value, "value")?) };
        let entries = &open.metadata.0;
        let &(key, value) = entries.get(position).ok_or_else(|| {
            let detail = format!("position {position}: the metadata has {} entries", entries.len());
            open.file.locate(invalid(detail))
        })?;
        key_out.set(key);
        value_out.set(value);
        Ok(())
    })
}

/// The value of `key`; NULL where there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_find_metadata(
    file: *const sft_file,
    key: *const c_char,
    key_length: usize,
    value: *mut sft_str,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle, `key_length` bytes and a place for text (header).
        let (open, key, out) = unsafe {
            (sft_file::open(file)?, pointer::text(key, key_length, "key")?, Out::new(value, "value")?)
        };
        let found = open.file.header().metadata().and_then(|metadata| metadata.get(key));
        let absent = sft_str { data: std::ptr::null(), length: 0 };
        out.set(found.map_or(absent, |value| pointer::lend(value)));
        Ok(())
    })
}

/// Changes the metadata of the file at `path`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_edit_metadata(
    path: *const c_char,
    changes: *const sft_metadata_change,
    count: usize,
    options: *const sft_edit_options,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a string, `count` changes, and options or NULL (header).
        let (path, given, options) = unsafe {
            (
                pointer::path(path)?,
                pointer::array(changes, count, "changes")?,
                sft_edit_options::read(options)?,
            )
        };
        let mut changes = MetadataChanges::new();
        for change in given {
            // SAFETY: each text of the caller's has so many bytes (header).
            let key = unsafe { pointer::text(change.key.data, change.key.length, "key") }?;
            let value = if change.value.data.is_null() && change.value.length == 0 {
                None
            } else {
                // SAFETY: as above.
                Some(unsafe { pointer::text(change.value.data, change.value.length, "value") }?.to_string())
            };
            if changes.insert(key.to_string(), value).is_some() {
                let detail = format!("the changes have the key {key:?} twice");
                return Err(Error::new(ErrorKind::Duplicate, detail).in_file(path));
            }
        }
        edit_metadata(path, &changes, options)?;
        Ok(())
    })
}
