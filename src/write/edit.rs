//! Changes the metadata of a file and leaves its tensors as they are: by rewriting the file, or in place.
//!
//! `docs/saving.md` describes what other readers of the file see.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{Header, Metadata, TensorInfo, encode_unpadded, pad};
use crate::format::layout::{DEFAULT_ALIGNMENT, MAX_ALIGNMENT};
use crate::read::file::TensorFile;
use crate::read::source::{Backend, OpenFile, Source, open_regular_in, read_exact_at, shrank};
use crate::sys::directory::{Directory, identity, open_parent};
use crate::sys::fork::OwnerProcess;
use crate::sys::signals::block_write_signals;
use crate::write::atomic::{AtomicFile, check_deferred_errors};

/// The most bytes that are copied before the time is looked at.
const STEP_BYTES: u64 = 32 << 20;

/// Entries to be set, and with `None` to be removed.
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
/// Those of [`TensorFile::open`] and [`AtomicFile`]; [`ErrorKind::HeaderTooLarge`]; [`ErrorKind::InvalidArgument`] if the
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

/// An edit that is checked, and done in steps. Dropped before it is done, it leaves the file as it was.
#[derive(Debug)]
pub struct MetadataEdit {
    path: PathBuf,
    place: Place,
    metadata: Option<Metadata>,
    durable: bool,
    work: Work,
    /// The file that was opened, as it was then.
    before: fs::Metadata,
    process: OwnerProcess,
    total_bytes: u64,
    done_bytes: u64,
}

/// A name in a directory, whatever the path leads to later.
#[derive(Debug)]
struct Place {
    directory: Arc<Directory>,
    name: OsString,
    /// The file or the symbolic link that has the name.
    entry: File,
    is_link: bool,
}

/// What is left to do.
#[derive(Debug)]
enum Work {
    Nothing,
    /// To write the header over the old one.
    Header {
        file: File,
        old: Vec<u8>,
        new: Vec<u8>,
    },
    /// To copy the data behind the header that is in the new file already.
    Copy {
        file: AtomicFile,
        source: Box<TensorFile>,
        data_start: u64,
    },
}

impl MetadataEdit {
    /// Checks the file and the changes, and settles how they are made; nothing of the file changes yet.
    ///
    /// # Errors
    ///
    /// As [`edit_metadata`].
    pub fn begin(path: &Path, changes: &MetadataChanges, options: EditOptions) -> Result<MetadataEdit> {
        let fail = |source| Error::io("open", path, source);
        let (directory, name) = open_parent(path, "open")?;
        let entry = directory.open_entry(&name).map_err(fail)?;
        let entry = entry.ok_or_else(|| fail(io::Error::from_raw_os_error(libc::ENOENT)))?;
        let opened = open_regular_in(&directory, &name, path)?;
        // Before the header is read, so that whatever changes the file from then on is found.
        let before = opened.0.metadata().map_err(|source| Error::io("inspect", path, source))?;
        let source = TensorFile::read_header(opened, path, Backend::Pread)?;
        let is_link = entry.metadata().map_err(fail)?.is_symlink();
        let place = Place { directory: Arc::new(directory), name, entry, is_link };
        let header = source.header();
        let metadata = changed(header.metadata(), changes);
        let mut entries: Vec<TensorInfo<'_>> = header.iter().collect();
        // Of those without bytes a place has several, which a layout has by dtype, then by name.
        entries.sort_by_key(|entry| (entry.begin, entry.end, entry.dtype.layout_rank()));
        let open = encode_unpadded(entries.into_iter(), metadata.as_ref());
        let needed = (open.len() as u64).saturating_add(options.reserve);
        let has_room = needed <= header.data_start();
        let mut edit = MetadataEdit {
            path: path.to_path_buf(),
            place,
            durable: options.durable,
            work: Work::Nothing,
            before,
            process: OwnerProcess::current(),
            total_bytes: 0,
            done_bytes: 0,
            metadata,
        };
        if has_room && edit.metadata.as_ref() == header.metadata() {
            return Ok(edit);
        }
        if options.in_place {
            if !has_room {
                let detail = format!(
                    "the new header takes {} bytes and reserve is {}, but the old header has {} bytes; leave in_place \
                     out, or make room first with an edit that sets reserve",
                    open.len(),
                    options.reserve,
                    header.data_start()
                );
                return Err(Error::new(ErrorKind::InvalidArgument, detail).in_file(path));
            }
            let file = edit.open_in_place()?;
            let new = pad(open, header.data_start()).map_err(|error| error.in_file(path))?;
            let mut old = vec![0; new.len()];
            read_exact_at(&file, path, &mut old, 0)?;
            edit.total_bytes = new.len() as u64;
            edit.work = Work::Header { file, old, new };
            return Ok(edit);
        }
        let padded = needed.checked_next_multiple_of(alignment_of(header)).unwrap_or(u64::MAX);
        let new = pad(open, padded).map_err(|error| error.in_file(path))?;
        let data_start = header.data_start();
        edit.total_bytes = new.len() as u64 + data_bytes(header);
        let Place { directory, name, .. } = &edit.place;
        let mut file = AtomicFile::create_in(Arc::clone(directory), name.clone(), path, edit.total_bytes)?;
        file.write([&new[..]])?;
        edit.done_bytes = new.len() as u64;
        edit.work = Work::Copy { file, source: Box::new(source), data_start };
        Ok(edit)
    }

    /// Goes on until the file is changed, or `until` has passed; whether it is.
    ///
    /// # Errors
    ///
    /// As [`edit_metadata`].
    pub fn advance(&mut self, until: Option<Instant>) -> Result<bool> {
        self.process.check("edit").map_err(|error| error.in_file(&self.path))?;
        match &mut self.work {
            Work::Nothing => {}
            Work::Header { file, old, new } => {
                self.place.check_unchanged(&self.path, &self.before)?;
                block_write_signals(|| write_over(file, &self.path, old, new, self.durable))?;
                self.done_bytes = self.total_bytes;
            }
            Work::Copy { file, source, data_start } => {
                let from = open_file(source);
                // The header is written, so that what is done of the data is what is done beyond it.
                let header_bytes = self.total_bytes - data_bytes(source.header());
                while self.done_bytes < self.total_bytes {
                    let offset = *data_start + (self.done_bytes - header_bytes);
                    let length = (self.total_bytes - self.done_bytes).min(STEP_BYTES);
                    match file.copy_from(&from.file, &self.path, offset, length)? {
                        0 => return Err(shrank(&self.path)),
                        copied => self.done_bytes += copied,
                    }
                    if until.is_some_and(|until| Instant::now() >= until) {
                        return Ok(false);
                    }
                }
            }
        }
        if let Work::Copy { mut file, .. } = std::mem::replace(&mut self.work, Work::Nothing) {
            file.commit_if(self.durable, || self.place.check_unchanged(&self.path, &self.before))?;
        }
        Ok(true)
    }

    /// The metadata that the file has once the edit is done.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }

    /// The bytes that are to be written.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// The bytes that are written.
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes
    }
}

/// The metadata with the changes made.
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

fn open_file(source: &TensorFile) -> &OpenFile {
    match source.source() {
        Source::File(file) => file,
        Source::Mapped(_) | Source::Memory(_) => unreachable!("it was opened to be read"),
    }
}

/// The bytes behind the header, all of which are tensors' (validated).
fn data_bytes(header: &Header) -> u64 {
    header.iter().map(|tensor| tensor.end).max().unwrap_or(0)
}

/// What the data's start is aligned to, and so will be again.
fn alignment_of(header: &Header) -> u64 {
    (1u64 << header.data_start().trailing_zeros().min(63)).clamp(DEFAULT_ALIGNMENT, MAX_ALIGNMENT)
}

impl MetadataEdit {
    /// Opens the file for writing in place. Refuses a file that has another name, because its contents would change
    /// under that name too.
    fn open_in_place(&self) -> Result<File> {
        let refuse = |detail: String| Error::new(ErrorKind::InvalidArgument, detail).in_file(&self.path);
        if self.place.is_link {
            let detail = "a symbolic link cannot be edited in place, because the file it leads to would change; edit \
                          that file, or leave in_place out";
            return Err(refuse(detail.into()));
        }
        let flags = libc::O_RDWR | libc::O_NONBLOCK | libc::O_NOFOLLOW;
        let file = self.place.directory.open_at(&self.place.name, flags, 0);
        let file = file.map_err(|source| Error::io("write", &self.path, source))?;
        check_unchanged(&self.path, file.metadata().map(Some), &self.before)?;
        if self.before.nlink() > 1 {
            return Err(refuse(format!(
                "the file has {} names (hard links), and an edit in place would change it under all of them; leave \
                 in_place out",
                self.before.nlink()
            )));
        }
        Ok(file)
    }
}

impl Place {
    /// Refuses if another file or link has the name now, or what it leads to is not as `before`.
    fn check_unchanged(&self, path: &Path, before: &fs::Metadata) -> Result<()> {
        let look = || {
            let same =
                |now: File| io::Result::Ok(identity(&now.metadata()?) == identity(&self.entry.metadata()?));
            let is_same = self.directory.open_entry(&self.name)?.map_or(Ok(false), same)?;
            let now = self.directory.open_link_target(&self.name)?;
            now.filter(|_| is_same).map(|now| now.metadata()).transpose()
        };
        check_unchanged(path, look(), before)
    }
}

/// Refuses if something else has replaced, removed (`None`) or written to the file since it was as `before`. What it does
/// in the instant after this is not seen.
fn check_unchanged(path: &Path, now: io::Result<Option<fs::Metadata>>, before: &fs::Metadata) -> Result<()> {
    let stamp = |of: &fs::Metadata| (of.dev(), of.ino(), of.len(), of.mtime(), of.mtime_nsec());
    match now.map_err(|error| Error::io("inspect", path, error))? {
        Some(now) if stamp(&now) == stamp(before) => Ok(()),
        _ => {
            let detail = "the file was replaced, removed or written to while its metadata was edited, and stays as that \
                          left it: run the edit again";
            Err(Error::new(ErrorKind::FileChanged, detail).in_file(path))
        }
    }
}

/// Writes the part of `new` that differs from `old` with one call, and puts `old` back should that fail, or should the
/// disk, with `durable`, or the filesystem refuse it later: left in place, it would be taken for an edit that is done
/// already.
fn write_over(file: &File, path: &Path, old: &[u8], new: &[u8], durable: bool) -> Result<()> {
    let differs = |(index, (old, new)): (usize, (&u8, &u8))| (old != new).then_some(index);
    let mut differences = old.iter().zip(new).enumerate().filter_map(differs);
    let Some(first) = differences.next() else { return Ok(()) };
    let end = differences.next_back().unwrap_or(first) + 1;
    let written = file.write_all_at(&new[first..end], first as u64);
    written.map_err(|source| put_back(file, path, old, first..end, source))?;
    let synchronized = if durable { file.sync_all() } else { Ok(()) };
    synchronized.and_then(|()| check_deferred_errors(file)).map_err(|source| {
        put_back(file, path, old, first..end, source).with_remedy(
            "after a loss of power it may have the new metadata all the same: run the edit again",
        )
    })
}

/// Restores a header of which some was written over before `source` happened; gives the error.
fn put_back(file: &File, path: &Path, old: &[u8], range: std::ops::Range<usize>, source: io::Error) -> Error {
    let error = Error::io("write", path, source);
    match file.write_all_at(&old[range.clone()], range.start as u64) {
        Ok(()) => error.with_remedy("the old header is in its place again"),
        Err(second) => error.with_remedy(&format!(
            "nor could its old header be restored, which may be written over in part: {second}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_written_and_comes_back() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let read = || std::fs::read(&path).expect("there");
        std::fs::write(&path, b"0123456789").expect("written");
        let file = File::options().read(true).write(true).open(&path).expect("opened");
        // The bytes outside of what differs are told wrong, and stay what they are.
        write_over(&file, &path, b"..2345..", b"..a34b..", true).expect("written");
        assert_eq!(read(), b"01a34b6789");
        write_over(&file, &path, b"same", b"same", false).expect("nothing to do");
        assert_eq!(read(), b"01a34b6789");
        let error = put_back(&file, &path, b"0123456789", 2..6, io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(read(), b"0123456789");
        assert!(error.to_string().contains("the old header is in its place again"), "{error}");

        let closed = File::open(&path).expect("opened for reading alone");
        let error = write_over(&closed, &path, b"0", b"1", false).expect_err("refused");
        assert_eq!(error.os_error(), Some(libc::EBADF));
        assert!(error.to_string().contains("nor could its old header be restored"), "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");

        // It takes every byte, and cannot be synchronized.
        let null = File::options().read(true).write(true).open("/dev/null").expect("opened");
        write_over(&null, &path, b"0", b"1", false).expect("written");
        let error = write_over(&null, &path, b"0", b"1", true).expect_err("refused");
        assert_eq!(error.os_error(), Some(libc::EINVAL));
        assert!(
            error.to_string().contains("in its place again; after a loss of power it may have the new"),
            "{error}"
        );
    }

    #[test]
    fn another_process_does_not_go_on() {
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
