//! Opens a checkpoint whose files the program reads by its own means.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use super::index::Index;
use super::locate::{Candidate, CheckpointPath, OpenFailure, choose, variant_of_file};
use super::open::{
    CheckpointOptions, OPEN_ATTEMPTS, assemble, explain_missing_shard, replaced_again_and_again, single_file,
};
use super::plan::{DEFAULT_STEM, INDEX_SUFFIX, SUFFIX};
use super::shards::{Checkpoint, Shard};
use crate::error::{Error, Result};
use crate::read::external::{ByteSource, ExternalSource};
use crate::read::file::TensorFile;
use crate::read::strategy::SOURCE_READERS;
use crate::sys::parallel;
use crate::sys::threads::ThreadLimit;

/// Files that a program reads by its own means, by their paths: the objects of a bucket, for example.
///
/// Several threads call the functions at once. Paths are the program's own: the library only joins the path of a directory
/// and the name of a file with a slash.
pub trait Filesystem: fmt::Debug + Sync {
    /// Returns the file at `path`. If there is none, this or [`ByteSource::length`] fails with `ENOENT`; if a directory is
    /// there, it may fail with `EISDIR`.
    ///
    /// # Errors
    ///
    /// Any; opening the checkpoint returns it.
    fn open(&self, path: &Path) -> Result<Box<dyn ByteSource>>;

    /// Returns the names of the files in a directory, or `None` if directories cannot be listed.
    ///
    /// # Errors
    ///
    /// Any; opening the checkpoint returns it.
    fn list(&self, directory: &Path) -> Result<Option<Vec<String>>> {
        let _ = directory;
        Ok(None)
    }
}

impl Checkpoint {
    /// Opens the checkpoint at a path of `filesystem`, as [`Checkpoint::open`] does: a file, an index or a directory. The
    /// headers of several files are read at once. In a directory that cannot be listed, a checkpoint is found if its stem is
    /// `model`.
    ///
    /// # Errors
    ///
    /// Those of the filesystem and of its sources, and those of [`Checkpoint::open`] about the format and the index.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::path::Path;
    /// use safetensors_torch::{ByteSource, Checkpoint, CheckpointOptions, Error, ErrorKind, Filesystem, Result};
    ///
    /// #[derive(Debug)]
    /// struct EmptyBucket;
    ///
    /// impl Filesystem for EmptyBucket {
    ///     fn open(&self, path: &Path) -> Result<Box<dyn ByteSource>> {
    ///         let missing = std::io::Error::from_raw_os_error(2); // ENOENT
    ///         Err(Error::new(ErrorKind::Io, "404: no such object").with_os_error(missing))
    ///     }
    /// }
    ///
    /// let opened = Checkpoint::open_in(&EmptyBucket, "s3://bucket/model".as_ref(), CheckpointOptions::default());
    /// assert_eq!(opened.unwrap_err().os_error(), Some(2));
    /// ```
    pub fn open_in(
        filesystem: &dyn Filesystem,
        path: &Path,
        options: CheckpointOptions<'_>,
    ) -> Result<Checkpoint> {
        for _ in 0..OPEN_ATTEMPTS {
            match try_open(filesystem, path, options) {
                Ok(checkpoint) => return Ok(checkpoint),
                Err(OpenFailure::Changed) => {}
                Err(OpenFailure::Missing(error) | OpenFailure::Final(error)) => return Err(error),
            }
        }
        Err(replaced_again_and_again(path))
    }
}

type Attempt<T> = std::result::Result<T, OpenFailure>;

fn try_open(filesystem: &dyn Filesystem, path: &Path, options: CheckpointOptions<'_>) -> Attempt<Checkpoint> {
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.ends_with(b".json") {
        return open_index(filesystem, path, options)?.map_err(OpenFailure::Final);
    }
    let missing = if bytes.ends_with(b"/") {
        None
    } else {
        match open_file(filesystem, path) {
            Ok(file) => return check_variant(path, options).map(|()| single_file(file, path.to_path_buf())),
            Err(error) if error.os_error() == Some(libc::EISDIR) => None,
            Err(error) if is_missing(&error) => Some(error),
            Err(error) => return Err(OpenFailure::Final(error)),
        }
    };
    // Changed since the directory was listed.
    let again =
        |error: Error| if is_missing(&error) { OpenFailure::Changed } else { OpenFailure::Final(error) };
    match locate_in(filesystem, path, missing, options.variant)? {
        CheckpointPath::File(at) => {
            open_file(filesystem, &at).map(|file| single_file(file, at)).map_err(again)
        }
        CheckpointPath::Index(at) => open_index(filesystem, &at, options)?.map_err(again),
    }
}

fn open_file(filesystem: &dyn Filesystem, path: &Path) -> Result<TensorFile> {
    TensorFile::from_source(open_source(filesystem, path)?, path)
}

fn open_source(filesystem: &dyn Filesystem, path: &Path) -> Result<Box<dyn ByteSource>> {
    filesystem.open(path).map_err(|error| error.in_source(path))
}

fn is_missing(error: &Error) -> bool {
    error.os_error() == Some(libc::ENOENT)
}

fn check_variant(path: &Path, options: CheckpointOptions<'_>) -> Attempt<()> {
    let Some(variant) = options.variant else { return Ok(()) };
    Err(OpenFailure::Final(variant_of_file(variant).in_file(path)))
}

/// Returns the file or the index of a directory; `missing` is the error if nothing is there.
fn locate_in(
    filesystem: &dyn Filesystem,
    directory: &Path,
    missing: Option<Error>,
    variant: Option<&str>,
) -> Attempt<CheckpointPath> {
    let listed = match filesystem.list(directory) {
        Ok(names) => names,
        Err(error) if error.os_error() == Some(libc::EACCES) => None,
        Err(error) if is_missing(&error) => Some(Vec::new()),
        Err(error) => return Err(OpenFailure::Final(error.in_source(directory))),
    };
    let is_listed = listed.is_some();
    let names = match listed {
        Some(names) => names,
        None => find_default_names(filesystem, directory, variant).map_err(OpenFailure::Final)?,
    };
    match missing {
        Some(error) if names.is_empty() && is_listed => Err(OpenFailure::Missing(error)),
        Some(error) if names.is_empty() => {
            let remedy = "it may be a directory, but its files cannot be listed; name its file or its index";
            Err(OpenFailure::Missing(error.with_remedy(remedy)))
        }
        _ => choose(directory, names.into_iter().filter_map(Candidate::of_name).collect(), variant),
    }
}

/// Returns the first name of a checkpoint that exists in a directory without a listing.
fn find_default_names(
    filesystem: &dyn Filesystem,
    directory: &Path,
    variant: Option<&str>,
) -> Result<Vec<String>> {
    let names = match variant {
        None => vec![format!("{DEFAULT_STEM}{SUFFIX}"), format!("{DEFAULT_STEM}{INDEX_SUFFIX}")],
        Some(variant) => vec![
            format!("{DEFAULT_STEM}.{variant}{SUFFIX}"),
            format!("{DEFAULT_STEM}{SUFFIX}.index.{variant}.json"),
            format!("{DEFAULT_STEM}.{variant}{INDEX_SUFFIX}"),
        ],
    };
    for name in names {
        let path = directory.join(&name);
        let length = open_source(filesystem, &path).and_then(|source| source.length());
        match length.map_err(|error| error.in_source(&path)) {
            Ok(_) => return Ok(vec![name]),
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Vec::new())
}

/// Opens an index and its files. Fails with `OpenFailure::Changed` if it was replaced before all files were open: see
/// [`super::open`]. The result's own error is that of the index alone.
fn open_index(
    filesystem: &dyn Filesystem,
    path: &Path,
    options: CheckpointOptions<'_>,
) -> Attempt<Result<Checkpoint>> {
    let opened = open_source(filesystem, path).and_then(|source| ExternalSource::open(source, path));
    let mut source = match opened {
        Ok(source) => source,
        Err(error) => return Ok(Err(error)),
    };
    let index = Index::read_from(source.len(), path, |json| source.read_exact(json, 0));
    let index = index.map_err(OpenFailure::Final)?;
    let opened = open_shards(filesystem, path, &index)
        .and_then(|shards| assemble(&index, shards, path.to_path_buf(), options.extra));
    match source.is_unchanged() {
        Ok(true) => opened.map(Ok).map_err(OpenFailure::Final),
        Ok(false) => Err(OpenFailure::Changed),
        Err(error) => Err(OpenFailure::Final(error)),
    }
}

fn open_shards(filesystem: &dyn Filesystem, path: &Path, index: &Index) -> Result<Vec<Shard>> {
    let parent = path.parent().unwrap_or(Path::new(""));
    let files: Vec<OnceLock<TensorFile>> = index.shards.iter().map(|_| OnceLock::new()).collect();
    let threads = ThreadLimit::current()?.cap(SOURCE_READERS);
    parallel::for_each(files.len(), threads, |shard| {
        let opened = open_file(filesystem, &parent.join(&index.shards[shard]));
        let file = opened.map_err(|error| explain_missing_shard(error, path))?;
        files[shard].set(file).expect("each shard is opened once");
        Ok(())
    })?;
    let files = files.into_iter().map(|file| file.into_inner().expect("`for_each` has opened every file"));
    Ok(index
        .shards
        .iter()
        .zip(files)
        .map(|(name, file)| Shard { name: name.clone(), file: Arc::new(file) })
        .collect())
}
