//! Puts the files of a checkpoint in place together: all of them are complete before the first one gets its name.
//!
//! The order in which names change is what keeps a reader, or a process that is killed, from taking files of two saves
//! for one checkpoint; a lock keeps two saves from changing them at once. `docs/saving.md` has it in words.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::index;
use super::lock::FolderLock;
use super::plan::{DEFAULT_MAX_SHARD_BYTES, DEFAULT_STEM, NameKind, ShardPlan, parse_name};
use super::with_limit;
use crate::error::{Error, ErrorKind, Result};
use crate::header::Metadata;
use crate::layout::{self, Layout, TensorSpec};
use crate::serialize::{self, SaveOptions};
use crate::writer::{AtomicFile, set_aside, sync_folder};

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
/// removed. Of several saves at once, the one that ends last stays whole. Gives the names of the files, the index last.
///
/// # Errors
///
/// As [`crate::save_file`], those of [`ShardPlan::new`], and `EWOULDBLOCK` where others have the folder locked for
/// minutes. Up to the point where all files are complete, the folder stays as it was.
pub fn save_sharded(
    tensors: &[TensorSpec<'_>],
    data: &[&[u8]],
    metadata: Option<&Metadata>,
    folder: &Path,
    options: ShardedOptions<'_>,
) -> Result<Vec<String>> {
    let fail = |error: Error| error.in_file(folder);
    if tensors.len() != data.len() {
        let detail = format!("{} tensors, but the bytes of {}", tensors.len(), data.len());
        return Err(Error::new(ErrorKind::InvalidArgument, detail));
    }
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

/// The files of a checkpoint that is being written. Dropped before [`ShardedWriter::commit`], it leaves the folder as
/// it was.
#[derive(Debug)]
pub struct ShardedWriter {
    /// What the files will be called.
    names: Vec<String>,
    /// Files that are complete, in the order of their names.
    complete: Vec<AtomicFile>,
    /// The index, where there is more than one file.
    index: Option<Vec<u8>>,
    index_name: String,
    plan: ShardPlan,
    /// Dropped last: a folder goes only once it is empty.
    folder: Folder,
}

impl ShardedWriter {
    /// Begins the checkpoint that `plan` describes, of tensors called `names`, in `folder`, which is made if it is not
    /// there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] where the folder cannot be made or read; [`ErrorKind::InvalidArgument`] for more names, or
    /// fewer, than the plan has tensors.
    pub fn new<'a>(
        folder: &Path,
        plan: &ShardPlan,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<ShardedWriter> {
        let file_names: Vec<String> = (0..plan.count()).map(|shard| plan.file_name(shard)).collect();
        let names: Vec<&str> = names.collect();
        if names.len() != plan.shard_of().len() {
            let detail =
                format!("a plan for {} tensors, but the names of {}", plan.shard_of().len(), names.len());
            return Err(Error::new(ErrorKind::InvalidArgument, detail));
        }
        let index = (plan.count() > 1).then(|| {
            let entries = names
                .into_iter()
                .zip(plan.shard_of())
                .map(|(name, &shard)| (name, file_names[shard].as_str()));
            index::encode(entries, plan.total_bytes())
        });
        let folder = Folder::make(folder)?;
        // Before anything is written for a folder that the commit could not look through.
        folder.entries()?;
        let (complete, index_name, plan) = (Vec::new(), plan.index_name(), plan.clone());
        Ok(ShardedWriter { names: file_names, complete, index, index_name, plan, folder })
    }

    /// Begins file number `shard`, of exactly `length` bytes.
    ///
    /// # Errors
    ///
    /// Those of [`AtomicFile::create_entry`].
    pub fn create(&self, shard: usize, length: u64) -> Result<AtomicFile> {
        AtomicFile::create_entry(&self.folder.path.join(&self.names[shard]), length).map_err(with_limit)
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

    /// Gives all files their names, and removes those of an earlier checkpoint, when no other save does. With `sync`,
    /// returns once everything is on the disk. Gives the names.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`]. The folder is then as it was, unless files of the earlier checkpoint had been replaced
    /// already: the error says so. `EWOULDBLOCK` where others have the folder locked for minutes.
    pub fn commit(mut self, sync: bool) -> Result<Vec<String>> {
        assert_eq!(self.complete.len(), self.names.len(), "every file was kept");
        let names = self.file_names();
        let index = match &self.index {
            Some(bytes) => Some(self.write_index(bytes)?),
            None => None,
        };
        for file in self.complete.iter().chain(&index) {
            if sync {
                file.synchronize()?;
            }
            // Filesystems of a network send the bytes now, not while others wait.
            file.hear_of_writes()?;
        }
        // From here on names change. What is there now may be of a save that has ended since this one began.
        let lock = FolderLock::for_save(&self.folder.path).map_err(with_limit)?;
        let stale = self.stale().map_err(with_limit)?;
        // Where files are about to change one by one that an old index lists, it is taken away: without it they are no
        // checkpoint, where with it they could be taken for one.
        let replaces = self.names.iter().map(|name| self.exists(name)).collect::<Result<Vec<bool>>>()?;
        let mut old_index = Aside::default();
        if names.len() > 1 && replaces.contains(&true) {
            // Other tools have other names for the index of a variant.
            let indexes =
                stale.iter().filter(|name| is_kind(name, NameKind::Index)).chain([&self.index_name]);
            for name in indexes {
                if let Err(error) = self
                    .exists(name)
                    .and_then(|there| if there { old_index.add(self.folder.path.join(name)) } else { Ok(()) })
                {
                    return Err(self.roll_back(error, &replaces, &Progress::default(), old_index));
                }
            }
        }
        let mut progress = Progress::default();
        let complete = std::mem::take(&mut self.complete);
        if let Err(error) = self.put_in_place(complete, index, &mut progress, sync) {
            return Err(self.roll_back(error, &replaces, &progress, old_index));
        }
        self.folder.keep();
        old_index.discard();
        if sync {
            self.folder.synchronize().map_err(|error| {
                error.with_remedy(
                    "all new files are in place, but may not survive a loss of power, so that those of the checkpoint before \
                     are still there: save it again",
                )
            })?;
        }
        for name in &stale {
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
            sync_folder(&self.folder.path).map_err(|error| {
                error.with_remedy(
                    "the new checkpoint is complete, but files of the one before may be back after a loss of power: save it \
                     again",
                )
            })?;
        }
        drop(lock);
        Ok(names)
    }

    /// Names in the folder that belong to another checkpoint of this stem, in the order in which they are to be
    /// removed.
    fn stale(&self) -> Result<Vec<String>> {
        let mut stale = Vec::new();
        for entry in self.folder.entries()? {
            let entry = entry.map_err(|source| self.folder.unreadable(source))?;
            if let Ok(name) = entry.file_name().into_string()
                && self.plan.makes_stale(&name)
            {
                stale.push(name);
            }
        }
        // What would be opened in place of the new checkpoint, or with it, goes first.
        stale.sort_by_key(|name| is_kind(name, NameKind::Shard));
        Ok(stale)
    }

    fn write_index(&self, bytes: &[u8]) -> Result<AtomicFile> {
        let path = self.folder.path.join(&self.index_name);
        let mut file = AtomicFile::create_entry(&path, bytes.len() as u64)?;
        file.write([bytes])?;
        Ok(file)
    }

    /// Whether the folder has this name, be it for a link to nowhere.
    fn exists(&self, name: &str) -> Result<bool> {
        let path = self.folder.path.join(name);
        match path.symlink_metadata() {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            // Taken for absent, it would be overwritten without a trace, or removed when the rest is taken back.
            Err(error) => Err(Error::io("inspect", &path, error)),
        }
    }

    /// Gives the files their names, one after the other, then the index, and tells how far it came. With `sync`, no
    /// crash can bring about the new index without them, or the old one with them.
    fn put_in_place(
        &self,
        files: Vec<AtomicFile>,
        index: Option<AtomicFile>,
        progress: &mut Progress,
        sync: bool,
    ) -> Result<()> {
        let synchronize = || if sync { sync_folder(&self.folder.path) } else { Ok(()) };
        synchronize()?;
        for mut file in files {
            file.try_commit(false).inspect_err(|_| progress.is_torn = file.has_overwritten())?;
            progress.done += 1;
        }
        let Some(index) = index else { return Ok(()) };
        synchronize()?;
        index.commit(false)
    }

    /// After an error during the commit: takes back what can be taken back, and says of the error what state it leaves.
    /// `replaces` has for each file whether there was one of its name.
    fn roll_back(&self, error: Error, replaces: &[bool], progress: &Progress, old_index: Aside) -> Error {
        let done = progress.done;
        if progress.is_torn || replaces[..done].contains(&true) {
            old_index.discard();
            return error.with_remedy(&format!(
                "{done} of {} files are in place, and no index: the checkpoint in {} is not complete; save it again",
                self.names.len(),
                self.folder.path.display()
            ));
        }
        let mut failures: Vec<Error> = Vec::new();
        for name in &self.names[..done] {
            let path = self.folder.path.join(name);
            failures.extend(fs::remove_file(&path).err().map(|source| Error::io("remove", &path, source)));
        }
        failures.extend(old_index.put_back().err());
        failures.into_iter().fold(error, |error, failure| {
            error.with_remedy(&format!("and what was there before could not be restored: {failure}"))
        })
    }
}

/// How far a commit has come.
#[derive(Debug, Default)]
struct Progress {
    /// How many files are in place.
    done: usize,
    /// Whether the next one was overwritten in part, as it could not be renamed over.
    is_torn: bool,
}

fn is_kind(name: &str, kind: NameKind) -> bool {
    parse_name(name).is_some_and(|(found, _)| found == kind)
}

/// Files that were renamed out of the way.
#[derive(Debug, Default)]
struct Aside {
    /// Their names before, and now.
    names: Vec<(PathBuf, PathBuf)>,
}

impl Aside {
    fn add(&mut self, path: PathBuf) -> Result<()> {
        let hidden = set_aside(&path)?;
        self.names.push((path, hidden));
        Ok(())
    }

    fn put_back(self) -> Result<()> {
        self.names.into_iter().try_for_each(|(path, hidden)| {
            fs::rename(hidden, &path).map_err(|source| Error::io("restore", &path, source))
        })
    }

    fn discard(self) {
        for (_, hidden) in self.names {
            // It is hidden, and nothing refers to it: no reason to call a save failed that has all in place.
            let _ = fs::remove_file(hidden);
        }
    }
}

/// A folder, and those that had to be made for it.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// The innermost first.
    made: Vec<PathBuf>,
    is_kept: bool,
}

impl Folder {
    fn make(path: &Path) -> Result<Folder> {
        let fail = |source| Error::io("create the folder", path, source);
        if path.as_os_str().is_empty() {
            return Err(fail(io::Error::from_raw_os_error(libc::ENOENT)));
        }
        let mut missing = Vec::new();
        for folder in path.ancestors().filter(|folder| !folder.as_os_str().is_empty()) {
            if folder.try_exists().map_err(fail)? {
                break;
            }
            missing.push(folder.to_path_buf());
        }
        let mut folder = Folder { path: path.to_path_buf(), made: Vec::new(), is_kept: false };
        for new in missing.into_iter().rev() {
            match fs::create_dir(&new) {
                Ok(()) => folder.made.insert(0, new),
                // Somebody else was faster.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && new.is_dir() => {}
                Err(error) => return Err(fail(error)),
            }
        }
        Ok(folder)
    }

    fn entries(&self) -> Result<fs::ReadDir> {
        fs::read_dir(&self.path).map_err(|source| self.unreadable(source))
    }

    fn unreadable(&self, source: io::Error) -> Error {
        Error::io("read the folder", &self.path, source)
    }

    /// The folders stay, whatever comes.
    fn keep(&mut self) {
        self.is_kept = true;
    }

    /// Has the entries of the folder put on the disk, and it among those of its own, if that is new.
    fn synchronize(&self) -> Result<()> {
        let parents = self.made.iter().map(|folder| match folder.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        });
        std::iter::once(self.path.as_path()).chain(parents).try_for_each(sync_folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        for folder in self.made.iter().filter(|_| !self.is_kept) {
            // Not where somebody has put something in meanwhile; there is nobody to tell.
            let _ = fs::remove_dir(folder);
        }
    }
}
