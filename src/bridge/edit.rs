//! Edits of metadata.

use super::ffi::{Entry, Text};
use super::save::{as_metadata, until};
use super::{Result, as_path, as_text, entries};
use crate::write::edit::{self, EditOptions};

pub struct MetadataEdit(edit::MetadataEdit);

pub fn begin_edit(
    path: &[u8],
    set: &[Entry],
    removed: &[Text<'_>],
    in_place: bool,
    reserve: u64,
    durable: bool,
) -> Result<Box<MetadataEdit>> {
    let mut changes: edit::MetadataChanges =
        as_metadata(set)?.into_iter().map(|(key, value)| (key, Some(value))).collect();
    for key in removed {
        changes.insert(as_text("metadata key", key.bytes)?.to_owned(), None);
    }
    let options = EditOptions { in_place, reserve, durable };
    Ok(Box::new(MetadataEdit(edit::MetadataEdit::begin(as_path(path), &changes, options)?)))
}

impl MetadataEdit {
    pub fn advance(&mut self, milliseconds: u64) -> Result<bool> {
        Ok(self.0.advance(until(milliseconds))?)
    }

    pub fn total_bytes(&self) -> u64 {
        self.0.total_bytes()
    }

    pub fn done_bytes(&self) -> u64 {
        self.0.done_bytes()
    }

    pub fn metadata(&self) -> Vec<Entry> {
        entries(self.0.metadata())
    }
}
