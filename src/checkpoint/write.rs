//! Puts the files of a checkpoint in place together: all of them are complete before the first one gets its name.
//!
//! The order in which names change is what keeps a reader, or a process that is killed, from taking files of two saves
//! for one checkpoint; `docs/saving.md` has it in words.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::index;
use super::plan::{DEFAULT_MAX_SHARD_BYTES, DEFAULT_STEM, ShardPlan};
use crate::error::{Error, Result};
use crate::header::Metadata;
use crate::layout::{self, Layout, TensorSpec};
use crate::serialize::{self, SaveOptions};
use crate::writer::{AtomicFile, sync_folder};

/// How a checkpoint is divided and written.
#[derive(Clone, Copy, Debug)]
pub struct ShardedOptions<'a> {
    /// What the names of the files begin with.
    pub stem: &'a str,
    /// The most bytes of tensors in one file, unless one tensor alone has more.
    pub max_shard_bytes: u64,
    /// How each file is written.
    pub save: SaveOptions,
}

impl Default for ShardedOptions<'_> {
    fn default() -> Self {
        ShardedOptions {
            stem: DEFAULT_STEM,
            max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
            save: SaveOptions::default(),
        }
    }
}

/// Writes `tensors`, whose bytes are in `data` at the same index, as a checkpoint into `folder`, which is made if it is
/// not there: one file, or several and their index. Files of an earlier checkpoint of the same stem are replaced or
/// removed. Gives the names of the files, the index last.
///
/// # Errors
///
/// As [`crate::save_file`], and those of [`ShardPlan::new`]. Up to the point where all files are complete, the folder
/// stays as it was.
pub fn save_sharded(
    tensors: &[TensorSpec<'_>],
    data: &[&[u8]],
    metadata: Option<&Metadata>,
    folder: &Path,
    options: ShardedOptions<'_>,
) -> Result<Vec<String>> {
    let fail = |error: Error| error.in_file(folder);
    // No shard alone would find a name that stands twice.
    layout::check_names(tensors).map_err(fail)?;
    let sizes = data.iter().map(|bytes| bytes.len() as u64);
    let plan = ShardPlan::new(sizes, options.stem, options.max_shard_bytes)?;
    let shards = plan.members().into_iter().map(|members| {
        let specs: Vec<TensorSpec<'_>> = members.iter().map(|&tensor| tensors[tensor]).collect();
        let bytes: Vec<&[u8]> = members.iter().map(|&tensor| data[tensor]).collect();
        let layout = serialize::plan(&specs, &bytes, metadata, options.save.alignment).map_err(fail)?;
        Ok((layout, bytes))
    });
    let shards = shards.collect::<Result<Vec<(Layout, Vec<&[u8]>)>>>()?;
    let names = tensors.iter().map(|tensor| tensor.name);
    let mut writer = ShardedWriter::new(folder, &plan, names)?;
    for (shard, (layout, bytes)) in shards.iter().enumerate() {
        let mut file = writer.create(shard, layout.total_bytes())?;
        let pieces = layout.order().iter().map(|place| bytes[place.index]);
        file.write(std::iter::once(layout.header()).chain(pieces))?;
        writer.keep(file);
    }
    writer.commit(options.save.sync)
}

/// The files of a checkpoint that is being written. Dropped before [`ShardedWriter::commit`], it leaves the folder as it
/// was.
#[derive(Debug)]
pub struct ShardedWriter {
    folder: Folder,
    /// What the files will be called.
    names: Vec<String>,
    /// Files that are complete, in the order of their names.
    complete: Vec<AtomicFile>,
    /// The index, where there is more than one file.
    index: Option<Vec<u8>>,
    index_name: String,
    /// Names in the folder that belong to an earlier checkpoint.
    stale: Vec<String>,
}

impl ShardedWriter {
    /// Begins the checkpoint that `plan` describes, of tensors called `names`, in `folder`, which is made if it is not
    /// there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) where the folder cannot be made or read.
    pub fn new<'a>(
        folder: &Path,
        plan: &ShardPlan,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<ShardedWriter> {
        let file_names: Vec<String> = (0..plan.count()).map(|shard| plan.file_name(shard)).collect();
        let index = (plan.count() > 1).then(|| {
            let entries = names.zip(plan.shard_of()).map(|(name, &shard)| (name, file_names[shard].as_str()));
            index::encode(entries, plan.total_bytes())
        });
        let folder = Folder::make(folder)?;
        let read = |source| Error::io("read the folder", &folder.path, source);
        let mut stale = Vec::new();
        for entry in fs::read_dir(&folder.path).map_err(read)? {
            if let Ok(name) = entry.map_err(read)?.file_name().into_string()
                && plan.makes_stale(&name)
            {
                stale.push(name);
            }
        }
        let (complete, index_name) = (Vec::new(), plan.index_name());
        Ok(ShardedWriter { folder, names: file_names, complete, index, index_name, stale })
    }

    /// Begins file number `shard`, of exactly `length` bytes.
    ///
    /// # Errors
    ///
    /// Those of [`AtomicFile::create`].
    pub fn create(&self, shard: usize, length: u64) -> Result<AtomicFile> {
        AtomicFile::create(&self.folder.path.join(&self.names[shard]), length)
    }

    /// Takes the next file, all of which is written, in the order of their numbers.
    pub fn keep(&mut self, file: AtomicFile) {
        self.complete.push(file);
    }

    /// What the files are called, the index last.
    pub fn file_names(&self) -> Vec<String> {
        let index = self.index.iter().map(|_| &self.index_name);
        self.names.iter().chain(index).cloned().collect()
    }

    /// Gives all files their names, and removes those of an earlier checkpoint. With `sync`, returns once everything is on
    /// the disk. Gives the names.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io). If that is at the first file, the folder is as it was; later, the error says what is missing.
    pub fn commit(mut self, sync: bool) -> Result<Vec<String>> {
        assert_eq!(self.complete.len(), self.names.len(), "every file was kept");
        let names = self.file_names();
        let index = match &self.index {
            Some(bytes) => Some(self.write_index(bytes)?),
            None => None,
        };
        if sync {
            self.complete.iter().chain(&index).try_for_each(AtomicFile::synchronize)?;
        }
        let old_index = self.set_index_aside(sync)?;
        let mut done = 0;
        for file in std::mem::take(&mut self.complete) {
            if let Err(error) = file.commit(false) {
                return Err(self.explain(error, done, old_index));
            }
            done += 1;
        }
        self.folder.keep();
        if let Some(index) = index {
            index.commit(false).map_err(|error| self.explain(error, done, None))?;
        }
        if sync {
            sync_folder(&self.folder.path)?;
        }
        for name in &self.stale {
            let path = self.folder.path.join(name);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    let remedy = "the new checkpoint is complete, but this file of the one before is still there: remove it";
                    return Err(Error::io("remove", &path, source).with_remedy(remedy));
                }
                _ => {}
            }
        }
        if sync {
            sync_folder(&self.folder.path)?;
        }
        Ok(names)
    }

    fn write_index(&self, bytes: &[u8]) -> Result<AtomicFile> {
        let mut file = AtomicFile::create(&self.folder.path.join(&self.index_name), bytes.len() as u64)?;
        file.write([bytes])?;
        Ok(file)
    }

    /// Takes the old index away where files that it lists are about to change one by one: without it they are no
    /// checkpoint, where with it they could be taken for one. Gives its bytes.
    fn set_index_aside(&self, sync: bool) -> Result<Option<Vec<u8>>> {
        let path = self.folder.path.join(&self.index_name);
        let replaces_shards =
            self.names.len() > 1 && self.names.iter().any(|name| self.folder.path.join(name).exists());
        if !replaces_shards {
            return Ok(None);
        }
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::io("read", &path, source)),
        };
        fs::remove_file(&path).map_err(|source| Error::io("remove", &path, source))?;
        if sync {
            sync_folder(&self.folder.path)?;
        }
        Ok(Some(bytes))
    }

    /// Says of an error during the commit what state it leaves; where nothing has changed yet, the old index goes back.
    fn explain(&self, error: Error, done: usize, old_index: Option<Vec<u8>>) -> Error {
        if done == 0 {
            let Some(bytes) = old_index else { return error };
            return match self.write_index(&bytes).and_then(|file| file.commit(false)) {
                Ok(()) => error,
                Err(second) => error.with_remedy(&format!("and the index could not be put back: {second}")),
            };
        }
        error.with_remedy(&format!(
            "{done} of {} files are in place, and no index: the checkpoint in {} is not complete; save it again",
            self.names.len(),
            self.folder.path.display()
        ))
    }
}

/// A folder, and those that had to be made for it.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// The innermost first.
    made: Vec<PathBuf>,
}

impl Folder {
    fn make(path: &Path) -> Result<Folder> {
        let fail = |source| Error::io("create the folder", path, source);
        if path.as_os_str().is_empty() {
            return Err(fail(io::Error::from_raw_os_error(libc::ENOENT)));
        }
        let missing: Vec<PathBuf> =
            path.ancestors().take_while(|folder| !folder.exists()).map(Path::to_path_buf).collect();
        fs::create_dir_all(path).map_err(fail)?;
        Ok(Folder { path: path.to_path_buf(), made: missing })
    }

    /// The folders stay, whatever comes.
    fn keep(&mut self) {
        self.made.clear();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        for folder in &self.made {
            // Not where somebody has put something in meanwhile; there is nobody to tell.
            let _ = fs::remove_dir(folder);
        }
    }
}
