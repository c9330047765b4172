//! How metadata is edited: checks, options, and the choice between a rewrite and an overwritten header.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use super::entry::Entry;
use super::in_place::HeaderOverwrite;
use super::rewrite::Rewrite;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{Metadata, TensorInfo, encode_unpadded, pad};
use crate::sys::fork::OwnerProcess;

/// New values of entries; `None` removes an entry.
pub type MetadataChanges = BTreeMap<String, Option<String>>;

/// How metadata is changed.
#[derive(Clone, Copy, Debug, Default)]
pub struct EditOptions {
    /// Whether to overwrite the header instead of rewriting the file. A power cut during that write can tear the
    /// header, and with it the file. It is an error if the new header does not fit, or the file has another name (hard
    /// link) or is a symbolic link.
    pub in_place: bool,
    /// Free bytes to leave in the header for later edits, at least.
    pub reserve: u64,
    /// Whether to return only once the bytes are on the disk.
    pub durable: bool,
}

/// Changes the metadata of the file at `path`, and returns the new metadata; `None` if the header has none.
///
/// The file is rewritten beside the old one and renamed over it, unless `in_place` is set. Removing an absent entry is
/// not an error. Metadata stays, empty, after its last entry is removed. Nothing is written if nothing changes and the
/// header already has `reserve` free bytes. A symbolic link is replaced by the changed file; the file it leads to stays
/// as it is.
///
/// # Errors
///
/// Those of [`TensorFile::open`](crate::TensorFile::open) and [`AtomicFile`](crate::AtomicFile); [`ErrorKind::HeaderTooLarge`]; [`ErrorKind::InvalidArgument`] if the
/// edit is impossible in place; [`ErrorKind::FileChanged`] if something else changes the file during the edit.
///
/// ```
/// # fn main() -> safetensors_torch::Result<()> {
/// use safetensors_torch::{EditOptions, MetadataChanges, SaveOptions, edit_metadata, save_file};
///
/// let path = std::env::temp_dir().join(format!("doc-edit-{}.safetensors", std::process::id()));
/// save_file(&[], &[], None, &path, SaveOptions::default())?;
/// let changes = MetadataChanges::from([("epoch".to_string(), Some("3".to_string()))]);
/// let metadata = edit_metadata(&path, &changes, EditOptions::default())?.expect("the file has metadata now");
/// assert_eq!(metadata["epoch"], "3");
/// # std::fs::remove_file(&path).expect("removed");
/// # Ok(())
/// # }
/// ```
pub fn edit_metadata(
    path: &Path,
    changes: &MetadataChanges,
    options: EditOptions,
) -> Result<Option<Metadata>> {
    let mut edit = MetadataEdit::begin(path, changes, options)?;
    while !edit.advance(None)? {}
    Ok(edit.metadata)
}

/// An edit that has been checked, and is done in steps. Dropped before it is done, it leaves the file as it was.
#[derive(Debug)]
pub struct MetadataEdit {
    entry: Entry,
    metadata: Option<Metadata>,
    durable: bool,
    work: Work,
    process: OwnerProcess,
    total_bytes: u64,
    done_bytes: u64,
}

#[derive(Debug)]
enum Work {
    Nothing,
    Overwrite(HeaderOverwrite),
    Rewrite(Box<Rewrite>),
}

impl MetadataEdit {
    /// Checks the file and the changes. The file does not change yet.
    ///
    /// # Errors
    ///
    /// As [`edit_metadata`].
    pub fn begin(path: &Path, changes: &MetadataChanges, options: EditOptions) -> Result<MetadataEdit> {
        let (entry, source) = Entry::open(path)?;
        let old = source.header();
        let metadata = changed(old.metadata(), changes);
        let mut tensors: Vec<TensorInfo<'_>> = old.iter().collect();
        // Tensors without bytes share an offset; a layout orders them by dtype, then by name.
        tensors.sort_by_key(|tensor| (tensor.begin, tensor.end, tensor.dtype.layout_rank()));
        let new = encode_unpadded(tensors.into_iter(), metadata.as_ref());
        let old_length = old.data_start();
        let has_room = (new.len() as u64).saturating_add(options.reserve) <= old_length;
        let work = if has_room && metadata.as_ref() == old.metadata() {
            Work::Nothing
        } else if !options.in_place {
            let block = entry.before.blksize();
            Work::Rewrite(Box::new(Rewrite::create(&entry, source, new, options.reserve, block)?))
        } else if has_room {
            let new = pad(new, old_length).map_err(|error| error.in_file(path))?;
            Work::Overwrite(HeaderOverwrite::open(&entry, new)?)
        } else {
            let detail = format!(
                "the new header takes {} bytes and reserve is {}, but the old header has {old_length} bytes; leave \
                 in_place out, or make room first with an edit that sets reserve",
                new.len(),
                options.reserve
            );
            return Err(Error::new(ErrorKind::InvalidArgument, detail).in_file(path));
        };
        let (done_bytes, total_bytes) = match &work {
            Work::Nothing => (0, 0),
            Work::Overwrite(_) => (0, old_length),
            Work::Rewrite(rewrite) => (rewrite.done_bytes(), rewrite.total_bytes()),
        };
        let process = OwnerProcess::current();
        Ok(MetadataEdit { entry, metadata, durable: options.durable, work, process, total_bytes, done_bytes })
    }

    /// Continues until the file is changed, or until `deadline`; returns whether it is changed.
    ///
    /// # Errors
    ///
    /// As [`edit_metadata`].
    pub fn advance(&mut self, deadline: Option<Instant>) -> Result<bool> {
        self.process.check("edit").map_err(|error| error.in_file(&self.entry.path))?;
        match &mut self.work {
            Work::Nothing => {}
            Work::Overwrite(overwrite) => {
                self.entry.check_unchanged()?;
                overwrite.run(&self.entry.path, self.durable)?;
            }
            Work::Rewrite(rewrite) => {
                while rewrite.done_bytes() < self.total_bytes {
                    rewrite.step(&self.entry)?;
                    self.done_bytes = rewrite.done_bytes();
                    if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                        return Ok(false);
                    }
                }
                rewrite.commit(&self.entry, self.durable)?;
            }
        }
        self.work = Work::Nothing;
        self.done_bytes = self.total_bytes;
        Ok(true)
    }

    /// Returns the metadata that the file has once the edit is done.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }

    /// Returns the bytes to write.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Returns the bytes that are written.
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes
    }
}

fn changed(metadata: Option<&Metadata>, changes: &MetadataChanges) -> Option<Metadata> {
    let mut result = metadata.cloned();
    for (key, value) in changes {
        match value {
            Some(value) => {
                result.get_or_insert_default().insert(key.clone(), value.clone());
            }
            None => {
                result.as_mut().map(|entries| entries.remove(key));
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn another_process_cannot_continue() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let options = crate::write::save::SaveOptions { alignment: 4096, durable: false };
        crate::write::save::save_file(&[], &[], None, &path, options).expect("saved");
        let before = fs::read(&path).expect("there");
        for in_place in [true, false] {
            let changes = MetadataChanges::from([("k".to_string(), Some("v".to_string()))]);
            let options = EditOptions { in_place, ..EditOptions::default() };
            let mut edit = MetadataEdit::begin(&path, &changes, options).expect("begun");
            edit.process = OwnerProcess::other();
            let error = edit.advance(None).expect_err("another process");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains("file: this edit was begun by process"), "{error}");
            drop(edit);
            assert!(fs::read(&path).expect("there") == before);
        }
    }
}
