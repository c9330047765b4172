//! Reading the metadata of an open file, and editing that of a file at a path.

use std::ffi::c_char;

use super::boundary::boundary;
use super::handle::sft_file;
use super::options::sft_edit_options;
use super::pointer::{self, Out, invalid};
use super::types::{sft_status, sft_str};
use crate::error::{Error, ErrorKind};
use crate::write::edit::{MetadataChanges, edit_metadata};

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_metadata_change {
    pub key: sft_str,
    pub value: sft_str,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_has_metadata(file: *const sft_file, present: *mut i32) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a number to set ("Pointers").
        let (state, out) = unsafe { (sft_file::state(file)?, Out::new(present, "present")?) };
        out.set(state.file.header().metadata().is_some().into());
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_metadata_count(file: *const sft_file, count: *mut usize) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a number to set ("Pointers").
        let (state, out) = unsafe { (sft_file::state(file)?, Out::new(count, "count")?) };
        out.set(state.metadata.len());
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_get_metadata_entry(
    file: *const sft_file,
    position: usize,
    key: *mut sft_str,
    value: *mut sft_str,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); two texts to set ("Pointers").
        let (state, key_out, value_out) =
            unsafe { (sft_file::state(file)?, Out::new(key, "key")?, Out::new(value, "value")?) };
        let entries = &state.metadata;
        let &(key, value) = entries.get(position).ok_or_else(|| {
            let detail = format!("position {position}: the metadata has {} entries", entries.len());
            state.file.locate(invalid(detail))
        })?;
        key_out.set(key);
        value_out.set(value);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_find_metadata(
    file: *const sft_file,
    key: *const c_char,
    key_length: usize,
    value: *mut sft_str,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); `key_length` bytes, a text to set ("Pointers").
        let (state, key, out) = unsafe {
            (sft_file::state(file)?, pointer::text(key, key_length, "key")?, Out::new(value, "value")?)
        };
        let found = state.file.header().metadata().and_then(|metadata| metadata.get(key));
        let absent = sft_str { data: std::ptr::null(), length: 0 };
        out.set(found.map_or(absent, |value| value.as_str().into()));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_edit_metadata(
    path: *const c_char,
    changes: *const sft_metadata_change,
    count: usize,
    options: *const sft_edit_options,
) -> sft_status {
    boundary!({
        // SAFETY: a string (header, "Text"); `count` changes, options or NULL ("Pointers", "Versions").
        let (path, given, options) = unsafe {
            (
                pointer::path(path)?,
                pointer::array(changes, count, "changes")?,
                pointer::options(options)?.parse()?,
            )
        };
        let mut changes = MetadataChanges::new();
        for change in given {
            // SAFETY: each text has as many bytes as its length says (header, "Pointers").
            let key = unsafe { pointer::text(change.key.data, change.key.length, "key") }?;
            let value = if change.value.data.is_null() && change.value.length == 0 {
                None
            } else {
                // SAFETY: as for the key.
                Some(unsafe { pointer::text(change.value.data, change.value.length, "value") }?.to_string())
            };
            if changes.insert(key.to_string(), value).is_some() {
                let detail = format!("the changes contain the key {key:?} twice");
                return Err(Error::new(ErrorKind::Duplicate, detail).in_file(path));
            }
        }
        edit_metadata(path, &changes, options)?;
        Ok(())
    })
}
