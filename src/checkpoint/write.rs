//! Puts the files of a checkpoint in place together: all of them are complete before the first one gets its name.
//!
//! The order in which names change is what keeps a reader, or a process that is killed, from taking files of two saves
//! for one checkpoint; a lock keeps two saves from changing them at once. `docs/saving.md` has it in words.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::index;
use super::lock::SaveLock;
use super::plan::{DEFAULT_MAX_SHARD_SIZE, DEFAULT_STEM, NameKind, ShardPlan, parse_name};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::Metadata;
use crate::format::layout::{self, Layout, TensorSpec};
use crate::sys::directory::Directory;
use crate::sys::fork::OwnerProcess;
use crate::write::atomic::{AtomicFile, rename_to_backup};
use crate::write::save::{self, SaveOptions};

/// How a checkpoint is divided and written.
#[derive(Clone, Copy, Debug)]
pub struct ShardedOptions<'a> {
    /// What the names of the files begin with.
    pub stem: &'a str,
    /// The most bytes of tensors in one file, unless one tensor alone has more.
    pub max_shard_size: u64,
    /// How each file is written.
    pub save: SaveOptions,
}

impl Default for ShardedOptions<'_> {
    fn default() -> Self {
        ShardedOptions {
            stem: DEFAULT_STEM,
            max_shard_size: DEFAULT_MAX_SHARD_SIZE,
            save: SaveOptions::default(),
        }
    }
}

/// Writes `tensors`, whose bytes are in `data` at the same index, as a checkpoint into `directory`, which is made if it is
/// not there: one file, or several and their index. Files of an earlier checkpoint of the same stem are replaced or
/// removed. Of several saves at once, the one that ends last stays whole. Gives the names of the files, the index last.
///
/// # Errors
///
/// As [`crate::save_file`], those of [`ShardPlan::new`], and `EWOULDBLOCK` if another save has the directory locked for a
/// minute. Up to the point where all files are complete, the directory stays as it was.
pub fn save_sharded(
    tensors: &[TensorSpec<'_>],
    data: &[&[u8]],
    metadata: Option<&Metadata>,
    directory: &Path,
    options: ShardedOptions<'_>,
) -> Result<Vec<String>> {
    let fail = |error: Error| error.in_file(directory);
    if tensors.len() != data.len() {
        let detail = format!("{} tensors, but the bytes of {}", tensors.len(), data.len());
        return Err(Error::new(ErrorKind::InvalidArgument, detail));
    }
    // No shard alone would find a name that stands twice.
    layout::check_names(tensors).map_err(fail)?;
    let sizes = data.iter().map(|bytes| bytes.len() as u64);
    let plan = ShardPlan::new(sizes, options.stem, options.max_shard_size)?;
    let shards = plan.members().into_iter().map(|members| {
        let specs: Vec<TensorSpec<'_>> = members.iter().map(|&tensor| tensors[tensor]).collect();
        let bytes: Vec<&[u8]> = members.iter().map(|&tensor| data[tensor]).collect();
        let layout = save::plan(&specs, &bytes, metadata, options.save.alignment).map_err(fail)?;
        Ok((layout, bytes))
    });
    let shards = shards.collect::<Result<Vec<(Layout, Vec<&[u8]>)>>>()?;
    let names = tensors.iter().map(|tensor| tensor.name);
    let mut writer = ShardedWriter::new(directory, &plan, names)?;
    for (shard, (layout, bytes)) in shards.iter().enumerate() {
        let mut file = writer.create(shard, layout.total_bytes())?;
        let pieces = layout.order().iter().map(|place| bytes[place.index]);
        file.write(std::iter::once(layout.header()).chain(pieces))?;
        writer.keep(file);
    }
    writer.commit(options.save.durable)
}

/// The files of a checkpoint that is being written. Dropped before [`ShardedWriter::commit`], it leaves the directory as
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
    /// The same as a file that is complete, once the commit has begun, and when it began.
    commit: Option<(Option<AtomicFile>, Instant)>,
    plan: ShardPlan,
    /// Whether there was a checkpoint of this stem when this one was begun.
    replaces: bool,
    /// Dropped last: a directory goes only once it is empty.
    target: TargetDirectory,
}

impl ShardedWriter {
    /// Begins the checkpoint that `plan` describes, of tensors called `names`, in `directory`, which is made if it is not
    /// there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] where the directory cannot be made or read; [`ErrorKind::InvalidArgument`] for more names, or
    /// fewer, than the plan has tensors.
    pub fn new<'a>(
        directory: &Path,
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
        let target = TargetDirectory::make(directory)?;
        let (complete, index_name, plan) = (Vec::new(), plan.index_name(), plan.clone());
        let replaces = false;
        let mut writer = ShardedWriter {
            names: file_names,
            complete,
            index,
            index_name,
            commit: None,
            plan,
            replaces,
            target,
        };
        let is_old = |name: &str| {
            writer.plan.makes_stale(name)
                || name == writer.index_name
                || writer.names.iter().any(|own| own == name)
        };
        writer.replaces = !writer.target.find(is_old)?.is_empty();
        Ok(writer)
    }

    /// Begins file number `shard`, of exactly `length` bytes.
    ///
    /// # Errors
    ///
    /// Those of [`AtomicFile::create`].
    pub fn create(&self, shard: usize, length: u64) -> Result<AtomicFile> {
        self.create_entry(&self.names[shard], length)
    }

    fn create_entry(&self, name: &str, length: u64) -> Result<AtomicFile> {
        let mut file = self.target.create(name, length)?;
        if self.replaces {
            file.mark_replacing();
        }
        Ok(file)
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

    /// Gives all files their names, and removes those of an earlier checkpoint, when no other save does. With `durable`,
    /// returns once everything is on the disk. Gives the names.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`]. The directory is then as it was, unless files of the earlier checkpoint had been replaced
    /// already: the error says so. `EWOULDBLOCK` if another save has the directory locked for a minute.
    pub fn commit(mut self, durable: bool) -> Result<Vec<String>> {
        while !self.try_commit(durable, None)? {}
        Ok(self.file_names())
    }

    /// As [`ShardedWriter::commit`], unless another save still has the directory locked at `until`; returns whether all is
    /// done, and if not, is to be called again.
    ///
    /// # Errors
    ///
    /// As [`ShardedWriter::commit`], after which there is nothing to be committed.
    pub(crate) fn try_commit(&mut self, durable: bool, until: Option<Instant>) -> Result<bool> {
        self.target.check_process()?;
        let (index, since) = match self.commit.take() {
            Some(begun) => begun,
            None => (self.complete_all(durable)?, Instant::now()),
        };
        // From here on names change. What is there now may be of a save that has ended since this one began.
        let Some(lock) = SaveLock::take(&self.target.directory, since, until)? else {
            self.commit = Some((index, since));
            return Ok(false);
        };
        self.put_all_in_place(index, durable)?;
        drop(lock);
        Ok(true)
    }

    /// Has the bytes of all files taken by the filesystem, and those of the index, which is returned.
    fn complete_all(&self, durable: bool) -> Result<Option<AtomicFile>> {
        assert_eq!(self.complete.len(), self.names.len(), "every file was kept");
        let index = self.index.as_ref().map(|bytes| self.write_index(bytes)).transpose()?;
        for file in self.complete.iter().chain(&index) {
            if durable {
                file.synchronize()?;
            } else if self.replaces {
                file.write_back()?;
            }
            // Filesystems of a network send the bytes now, not while others wait.
            file.check_deferred_errors()?;
        }
        Ok(index)
    }

    /// What is done under the lock.
    fn put_all_in_place(&mut self, index: Option<AtomicFile>, durable: bool) -> Result<()> {
        let stale = self.stale()?;
        // Where files are about to change one by one that an old index lists, it is taken away: without it they are no
        // checkpoint, where with it they could be taken for one.
        let replaces = self.names.iter().map(|name| self.exists(name)).collect::<Result<Vec<bool>>>()?;
        if !stale.is_empty() || replaces.contains(&true) {
            self.complete.iter().chain(&index).try_for_each(AtomicFile::write_back)?;
        }
        let mut old_index = Aside::default();
        if self.index.is_some() && replaces.contains(&true) {
            // Other tools have other names for the index of a variant.
            let indexes =
                stale.iter().filter(|name| is_kind(name, NameKind::Index)).chain([&self.index_name]);
            for name in indexes {
                let added = self
                    .exists(name)
                    .and_then(|there| if there { old_index.add(&self.target, name) } else { Ok(()) });
                if let Err(error) = added {
                    return Err(self.roll_back(error, &replaces, &Progress::default(), old_index));
                }
            }
        }
        let mut progress = Progress::default();
        let complete = std::mem::take(&mut self.complete);
        if let Err(error) = self.put_in_place(complete, index, &mut progress, durable) {
            return Err(self.roll_back(error, &replaces, &progress, old_index));
        }
        self.target.keep();
        old_index.discard(&self.target);
        if durable {
            self.target.synchronize().map_err(|error| {
                error.with_remedy(
                    "all new files are in place, but may not survive a loss of power, so that those of the checkpoint before \
                     are still there: save it again",
                )
            })?;
        }
        for name in &stale {
            match self.target.directory.remove(name.as_ref()) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    let remedy = "the new checkpoint is complete, but this file of the one before is still there: remove it";
                    return Err(Error::io("remove", &self.target.path.join(name), source).with_remedy(remedy));
                }
                _ => {}
            }
        }
        if durable {
            self.target.synchronize_names().map_err(|error| {
                error.with_remedy(
                    "the new checkpoint is complete, but files of the one before may be back after a loss of power: save it \
                     again",
                )
            })?;
        }
        Ok(())
    }

    /// Names in the directory that belong to another checkpoint of this stem, in the order in which they are to be
    /// removed.
    fn stale(&self) -> Result<Vec<String>> {
        let mut stale = self.target.find(|name| self.plan.makes_stale(name))?;
        // What would be opened in place of the new checkpoint, or with it, goes first.
        stale.sort_by_key(|name| is_kind(name, NameKind::Shard));
        Ok(stale)
    }

    fn write_index(&self, bytes: &[u8]) -> Result<AtomicFile> {
        let mut file = self.create_entry(&self.index_name, bytes.len() as u64)?;
        file.write([bytes])?;
        Ok(file)
    }

    /// Whether the directory has this name, be it for a link to nowhere.
    fn exists(&self, name: &str) -> Result<bool> {
        // Taken for absent, one that cannot be looked at would be overwritten without a trace, or removed when the rest
        // is taken back.
        let entry = self.target.directory.open_entry(name.as_ref());
        let entry = entry.map_err(|source| Error::io("inspect", &self.target.path.join(name), source))?;
        Ok(entry.is_some())
    }

    /// Gives the files their names, one after the other, then the index, and tells how far it came. With `durable`, no
    /// crash can bring about the new index without them, or the old one with them.
    fn put_in_place(
        &self,
        files: Vec<AtomicFile>,
        index: Option<AtomicFile>,
        progress: &mut Progress,
        durable: bool,
    ) -> Result<()> {
        let synchronize = || if durable { self.target.synchronize_names() } else { Ok(()) };
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
            old_index.discard(&self.target);
            return error.with_remedy(&format!(
                "{done} of {} files are in place, and no index: the checkpoint in {} is not complete; save it again",
                self.names.len(),
                self.target.path.display()
            ));
        }
        let mut failures: Vec<Error> = Vec::new();
        for name in &self.names[..done] {
            let removed = self.target.directory.remove(name.as_ref());
            let fail = |source| Error::io("remove", &self.target.path.join(name), source);
            failures.extend(removed.err().map(fail));
        }
        failures.extend(old_index.put_back(&self.target).err());
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
    names: Vec<(OsString, OsString)>,
}

impl Aside {
    fn add(&mut self, target: &TargetDirectory, name: &str) -> Result<()> {
        let hidden = rename_to_backup(&target.directory, name.as_ref());
        let hidden = hidden.map_err(|source| Error::io("rename", &target.path.join(name), source))?;
        self.names.push((name.into(), hidden));
        Ok(())
    }

    fn put_back(self, target: &TargetDirectory) -> Result<()> {
        self.names.into_iter().try_for_each(|(name, hidden)| {
            let renamed = target.directory.rename(&hidden, &name);
            renamed.map_err(|source| Error::io("restore", &target.path.join(&name), source))
        })
    }

    fn discard(self, target: &TargetDirectory) {
        for (_, hidden) in self.names {
            // It is hidden, and nothing refers to it: no reason to call a save failed that has all in place.
            let _ = target.directory.remove(&hidden);
        }
    }
}

/// A directory that is held, and those that had to be made for it.
#[derive(Debug)]
struct TargetDirectory {
    directory: Arc<Directory>,
    /// What the caller named; for the errors.
    path: PathBuf,
    /// Each with the directory that it is in, and its name there; the innermost first.
    made: Vec<(Arc<Directory>, Arc<Directory>, OsString)>,
    is_kept: bool,
    process: OwnerProcess,
}

impl TargetDirectory {
    fn make(path: &Path) -> Result<TargetDirectory> {
        let fail = |source| Error::io("create the directory", path, source);
        let (directory, missing) = nearest(path).map_err(fail)?;
        let (path, process) = (path.to_path_buf(), OwnerProcess::current());
        let mut target = TargetDirectory {
            directory: Arc::new(directory),
            path,
            made: Vec::new(),
            is_kept: false,
            process,
        };
        for name in missing {
            let parent = Arc::clone(&target.directory);
            let made = parent.create_directory(name);
            match (made, parent.subdirectory(name).map(Arc::new)) {
                (Ok(()), Ok(inner)) => {
                    target.directory = Arc::clone(&inner);
                    // From here on, dropping this removes it.
                    target.made.insert(0, (inner, parent, name.to_os_string()));
                }
                (Ok(()), Err(error)) => {
                    // The error is already on its way.
                    let _ = parent.remove_directory(name);
                    return Err(fail(error));
                }
                // Somebody else was faster.
                (Err(error), Ok(inner)) if error.kind() == io::ErrorKind::AlreadyExists => {
                    target.directory = inner;
                }
                (Err(error), _) => return Err(fail(error)),
            }
        }
        Ok(target)
    }

    /// Begins the file `name`, of `length` bytes.
    fn create(&self, name: &str, length: u64) -> Result<AtomicFile> {
        AtomicFile::create_in(Arc::clone(&self.directory), name.into(), &self.path.join(name), length)
    }

    /// The names in the directory that are `wanted`.
    fn find(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
        let names =
            self.directory.names().map_err(|source| Error::io("read the directory", &self.path, source))?;
        Ok(names.into_iter().filter_map(|name| name.into_string().ok().filter(|name| wanted(name))).collect())
    }

    /// Refuses a process that was forked from the one that began the checkpoint.
    fn check_process(&self) -> Result<()> {
        self.process.check("save").map_err(|error| error.in_file(&self.path))
    }

    /// The directories stay, whatever comes.
    fn keep(&mut self) {
        self.is_kept = true;
    }

    /// Has the entries of the directory put on the disk.
    fn synchronize_names(&self) -> Result<()> {
        synchronize(&self.directory, &self.path)
    }

    /// The same, and the directory among those of its own, if that is new.
    fn synchronize(&self) -> Result<()> {
        self.synchronize_names()?;
        self.made.iter().try_for_each(|(_, parent, _)| synchronize(parent, parent.path()))
    }
}

impl Drop for TargetDirectory {
    fn drop(&mut self) {
        if self.is_kept || !self.process.is_current() {
            return;
        }
        for (directory, parent, name) in &self.made {
            let is_there = || io::Result::Ok(parent.subdirectory(name)?.identity()? == directory.identity()?);
            if is_there().unwrap_or(true) {
                // Not if somebody has put something in meanwhile; there is nobody to tell.
                let _ = parent.remove_directory(name);
            }
        }
    }
}

fn synchronize(directory: &Directory, path: &Path) -> Result<()> {
    directory.synchronize().map_err(|source| Error::io("synchronize the directory", path, source))
}

/// The innermost directory of `path` that is there, and the names of those that are not, the outermost first.
fn nearest(path: &Path) -> io::Result<(Directory, Vec<&OsStr>)> {
    let mut missing = Vec::new();
    for directory in path.ancestors() {
        let (at, name) = match directory.components().next_back() {
            Some(name) => (directory, Some(name.as_os_str())),
            None => (Path::new("."), None),
        };
        match Directory::open(at) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && name.is_some() => missing.extend(name),
            // A path that names nothing at all.
            _ if name.is_none() && missing.is_empty() => break,
            opened => {
                missing.reverse();
                return opened.map(|directory| (directory, missing));
            }
        }
    }
    Err(io::Error::from_raw_os_error(libc::ENOENT))
}
