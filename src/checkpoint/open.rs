//! Opens a checkpoint: once, again if a save replaces it at that moment, and in steps.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use super::index::Index;
use super::locate::{CheckpointPath, OpenFailure, locate};
use super::lock::{WaitOutcome, wait_for_save};
use super::shards::{Checkpoint, Shard, sorted_locations};
use super::verify::{check_equal, listed_locations};
use crate::error::{Error, ErrorKind, Result};
use crate::read::file::TensorFile;
use crate::read::source::Backend;
use crate::sys::directory::{Directory, identity, open_parent};

/// How often a checkpoint is opened again because it was replaced.
pub(super) const OPEN_ATTEMPTS: usize = 20;

/// Options for [`Checkpoint::open`].
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckpointOptions<'a> {
    /// How the files are read.
    pub backend: Backend,
    /// Which checkpoint of a directory to open: `fp16` means `model.fp16.safetensors`, or shards and indexes with such
    /// names.
    pub variant: Option<&'a str>,
    /// What to do about tensors that the index does not list.
    pub extra: Extra,
}

/// What to do about tensors that shards contain and their index does not list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Extra {
    /// Refuse the checkpoint: index and shards may be of two checkpoints.
    #[default]
    Error,
    /// Leave them out.
    Ignore,
}

impl FromStr for Extra {
    type Err = Error;

    fn from_str(name: &str) -> Result<Extra> {
        match name {
            "error" => Ok(Extra::Error),
            "ignore" => Ok(Extra::Ignore),
            _ => {
                let detail = format!("unknown extra {name:?}: choose \"error\" or \"ignore\"");
                Err(Error::new(ErrorKind::InvalidArgument, detail))
            }
        }
    }
}

impl Checkpoint {
    /// Opens the checkpoint at `path`: a file, an index (a name that ends in `.json`), or a directory with either. Checks
    /// an index against its files: they must contain the tensors that it lists, where it lists them, and no others unless
    /// [`Extra::Ignore`] leaves those out.
    ///
    /// In a directory, `model.safetensors` comes first, then `model.safetensors.index.json`, as with Hugging Face's tools,
    /// then the only file or index with another name. With a variant, only names of that variant count. Without one, a
    /// variant does not count beside the checkpoint that it is a variant of. Links in a directory may lead out of it, names
    /// in an index may not.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Index`] if the index is malformed, names files outside its directory or does not match them, and if a
    /// directory contains no checkpoint or several. [`ErrorKind::InvalidArgument`] for a variant of a file.
    /// [`ErrorKind::FileChanged`] if it is replaced again and again. Those of [`TensorFile::open`] for each file.
    ///
    /// # Examples
    ///
    /// ```
    /// use safetensors_torch::{Checkpoint, CheckpointOptions, Metadata, ShardedOptions, save_sharded};
    ///
    /// let directory = std::env::temp_dir().join(format!("safetensors-doc-{}", std::process::id()));
    /// save_sharded(&[], &[], Some(&Metadata::new()), &directory, ShardedOptions::default())?;
    /// let checkpoint = Checkpoint::open(&directory, CheckpointOptions::default())?;
    /// assert_eq!(checkpoint.shards()[0].name, "model.safetensors");
    /// # std::fs::remove_dir_all(&directory).unwrap();
    /// # Ok::<(), safetensors_torch::Error>(())
    /// ```
    pub fn open(path: &Path, options: CheckpointOptions<'_>) -> Result<Checkpoint> {
        let mut pending = PendingOpen::new(path, options);
        loop {
            if let Some(checkpoint) = pending.advance(None)? {
                return Ok(checkpoint);
            }
        }
    }
}

/// An open in progress: [`Checkpoint::open`] in steps.
#[derive(Debug)]
pub(crate) struct PendingOpen {
    path: PathBuf,
    backend: Backend,
    variant: Option<String>,
    extra: Extra,
    attempts: usize,
    /// When the first wait began.
    since: Option<Instant>,
    /// The error of the last attempt, if that found no checkpoint and no save has run since.
    missing: Option<String>,
}

impl PendingOpen {
    pub(crate) fn new(path: &Path, options: CheckpointOptions<'_>) -> PendingOpen {
        let CheckpointOptions { backend, variant, extra } = options;
        let (path, variant) = (path.to_path_buf(), variant.map(str::to_owned));
        PendingOpen { path, backend, variant, extra, attempts: 0, since: None, missing: None }
    }

    /// Opens the checkpoint. Returns `None` if there is none, but a save that may create one still runs at `deadline`.
    pub(crate) fn advance(&mut self, deadline: Option<Instant>) -> Result<Option<Checkpoint>> {
        while self.attempts < OPEN_ATTEMPTS {
            let (backend, variant, extra) = (self.backend, self.variant.as_deref(), self.extra);
            match try_open(&self.path, CheckpointOptions { backend, variant, extra }) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(OpenFailure::Changed) => {}
                Err(OpenFailure::Missing(error)) => {
                    // A save may be between removing the old index and creating the new one.
                    let since = *self.since.get_or_insert_with(Instant::now);
                    let (last_missing, missing) = (self.missing.take(), Some(error.to_string()));
                    let outcome = Directory::open(directory_of(&self.path))
                        .map_or(WaitOutcome::NoSave, |directory| wait_for_save(&directory, since, deadline));
                    match outcome {
                        WaitOutcome::StillLocked => return Ok(None),
                        WaitOutcome::Ended => {}
                        // The lock was free before this attempt and is free after it, so it met no save.
                        _ if missing == last_missing => return Err(error),
                        WaitOutcome::NoSave | WaitOutcome::TimedOut => self.missing = missing,
                    }
                }
                Err(OpenFailure::Final(error)) => return Err(error),
            }
            self.attempts += 1;
        }
        Err(replaced_again_and_again(&self.path))
    }
}

pub(super) fn replaced_again_and_again(path: &Path) -> Error {
    let detail =
        "the checkpoint was replaced again and again while it was opened: open it when nothing saves to it";
    Error::new(ErrorKind::FileChanged, detail).in_file(path)
}

fn try_open(path: &Path, options: CheckpointOptions<'_>) -> std::result::Result<Checkpoint, OpenFailure> {
    let is_missing = |error: &Error| error.os_error() == Some(libc::ENOENT);
    let is_directory = |error: &Error| error.os_error() == Some(libc::EISDIR);
    match locate(path, options.variant)? {
        CheckpointPath::File(at) => match TensorFile::open(&at, options.backend) {
            Ok(file) => Ok(single_file(file, at)),
            // Removed since the directory was listed.
            Err(error) if is_missing(&error) && at != path => Err(OpenFailure::Changed),
            // A save has created a directory since `path` was looked at.
            Err(error) if is_directory(&error) && at == path => Err(OpenFailure::Changed),
            Err(error) => Err(OpenFailure::Final(error)),
        },
        CheckpointPath::Index(at) => match OpenIndex::open(&at) {
            Ok(index) => index.open_checkpoint(at, options),
            Err(error) if is_missing(&error) && at != path => Err(OpenFailure::Changed),
            Err(error) if is_missing(&error) => Err(OpenFailure::Missing(error)),
            Err(error) => Err(OpenFailure::Final(error)),
        },
    }
}

pub(super) fn single_file(file: TensorFile, path: PathBuf) -> Checkpoint {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let shards = vec![Shard { name, file: Arc::new(file) }];
    let by_name = sorted_locations(&shards);
    Checkpoint { shards, by_name, path }
}

/// Returns `path` if it is a directory, otherwise the directory that contains it.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        _ if path.is_dir() => path,
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// An index that was read, and the directory that its path led to at that time.
struct OpenIndex {
    index: Index,
    file: File,
    directory: Directory,
    name: OsString,
}

impl OpenIndex {
    fn open(path: &Path) -> Result<OpenIndex> {
        let (directory, name) = open_parent(path, "open")?;
        let (index, file) = Index::read(&directory, &name, path)?;
        Ok(OpenIndex { index, file, directory, name })
    }

    /// Opens the files of the index. A save that replaces the checkpoint removes the index before it changes the first file
    /// and creates another one after the last: if the index is the same once all files are open, they belong together.
    fn open_checkpoint(
        self,
        path: PathBuf,
        options: CheckpointOptions<'_>,
    ) -> std::result::Result<Checkpoint, OpenFailure> {
        let opened = self.open_files(path, options);
        // The index is still open while it is compared, so that no other file can have its inode number.
        if is_same(&self.file, &self.directory, &self.name) {
            opened.map_err(OpenFailure::Final)
        } else {
            Err(OpenFailure::Changed)
        }
    }

    fn open_files(&self, path: PathBuf, options: CheckpointOptions<'_>) -> Result<Checkpoint> {
        let parent = path.parent().unwrap_or(Path::new(""));
        let shards = self.index.shards.iter().map(|name| {
            let opened =
                TensorFile::open_in(&self.directory, name.as_ref(), &parent.join(name), options.backend);
            let file = opened.map_err(|error| explain_missing_shard(error, &path))?;
            Ok(Shard { name: name.clone(), file: Arc::new(file) })
        });
        assemble(&self.index, shards.collect::<Result<_>>()?, path, options.extra)
    }
}

/// Adds the remedy to the error for a shard of the index `path` that does not exist.
pub(super) fn explain_missing_shard(error: Error, path: &Path) -> Error {
    match error.os_error() {
        Some(libc::ENOENT) => error.with_remedy(&format!(
            "the index {} lists this shard: fetch or copy it to there, or save the checkpoint again",
            path.display()
        )),
        _ => error,
    }
}

/// Checks the index at `path` against its open files.
pub(super) fn assemble(index: &Index, shards: Vec<Shard>, path: PathBuf, extra: Extra) -> Result<Checkpoint> {
    let by_name = match extra {
        Extra::Error => {
            let by_name = sorted_locations(&shards);
            check_equal(index, &shards, &by_name).map(|()| by_name)
        }
        Extra::Ignore => listed_locations(index, &shards),
    };
    let by_name = by_name.map_err(|error| error.in_file(&path))?;
    Ok(Checkpoint { shards, by_name, path })
}

/// Returns whether the name in the directory leads to `file`.
fn is_same(file: &File, directory: &Directory, name: &OsStr) -> bool {
    let present = directory.open_link_target(name).ok().flatten().and_then(|present| present.metadata().ok());
    match (file.metadata(), present) {
        (Ok(opened), Some(present)) => identity(&opened) == identity(&present),
        _ => false,
    }
}
