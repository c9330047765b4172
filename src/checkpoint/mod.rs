//! A checkpoint: tensors in one file or in several, its shards, which an index lists.
//!
//! `locate` finds the index or the file that a path means, `index` reads and writes the index, `plan` says which tensor
//! goes into which shard, `write` puts the shards of a checkpoint in place, `lock` lets one save at a time do so. The
//! files themselves are [`TensorFile`]s.
//!
//! Names, index and division are those of Hugging Face's tools: `model.safetensors`, or
//! `model-00001-of-00003.safetensors` and so on beside `model.safetensors.index.json`.

mod index;
mod locate;
mod lock;
mod plan;
mod write;

pub use plan::{DEFAULT_MAX_SHARD_SIZE, DEFAULT_STEM, ShardPlan};
pub use write::{ShardedOptions, ShardedWriter, save_sharded};

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::tensor_not_found;
use crate::read::file::TensorFile;
use crate::read::prefault::{self, Prefault};
use crate::read::source::Backend;
use crate::sys::directory::{Directory, identity, open_parent};
use index::Index;
use locate::Location;
use lock::{Waited, wait_for_save};

/// How often a checkpoint that is replaced meanwhile is opened anew.
const OPEN_ATTEMPTS: usize = 20;

/// How often an open that finds no checkpoint waits for the save that may be putting one there.
const MOST_WAITS: usize = 10;

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<Shard>,
    /// Sorted by the tensors' names.
    by_name: Vec<TensorLocation>,
    path: PathBuf,
}

/// One file of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    /// Its path from the directory of the checkpoint, as the index has it.
    pub name: String,
    /// The file, open.
    pub file: Arc<TensorFile>,
}

/// How a checkpoint is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckpointOptions<'a> {
    /// How the bytes of its files become memory.
    pub backend: Backend,
    /// Which of the checkpoints of a directory: `fp16` stands for `model.fp16.safetensors`, and for shards and indexes
    /// of such names.
    pub variant: Option<&'a str>,
    /// What is done about tensors of the shards that the index does not list.
    pub extra: Extra,
}

/// What is done about tensors that shards hold and their index does not list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Extra {
    /// The checkpoint is refused: index and shards may be of two checkpoints.
    #[default]
    Error,
    /// They are left out.
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

/// Why an attempt to open a checkpoint failed.
#[derive(Debug)]
enum Failure {
    /// Another attempt would fare no better.
    Final(Error),
    /// What was found first was gone, or another file, a moment later: something else is there now.
    Changed,
    /// There is no checkpoint, unless a save is just about to put the next one in place.
    Missing(Error),
}

/// What an attempt to open a checkpoint gives.
type Attempt<T> = std::result::Result<T, Failure>;

/// Which tensor of which shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorLocation {
    /// Among [`Checkpoint::shards`].
    pub shard: u32,
    /// In file order.
    pub index: u32,
}

impl Checkpoint {
    /// Opens the checkpoint at `path`: one file, an index (whose name ends in `.json`), or a directory with either. An
    /// index is checked against its files: they have the tensors that it lists, where it says, and no others, unless
    /// [`Extra::Ignore`] leaves those out.
    ///
    /// In a directory, `model.safetensors` counts first, then `model.safetensors.index.json`, as for Hugging Face's tools,
    /// then the one index or file of another name. With a variant, only names of that variant count; without one, a
    /// variant does not count beside the checkpoint that it is a variant of. A link in a directory may lead out of it; a
    /// name in an index may not.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Index`] for an index that is malformed, names files outside its directory, or does not fit them, and
    /// for a directory that holds no checkpoint, or several; [`ErrorKind::InvalidArgument`] for a variant of a file;
    /// [`ErrorKind::FileChanged`] where it is replaced over and over; those of [`TensorFile::open`] for each file. They name the index, the shard and the tensor.
    pub fn open(path: &Path, options: CheckpointOptions<'_>) -> Result<Checkpoint> {
        let mut opening = PendingOpen::new(path, options);
        loop {
            if let Some(checkpoint) = opening.advance(None)? {
                return Ok(checkpoint);
            }
        }
    }

    fn try_open(path: &Path, options: CheckpointOptions<'_>) -> Attempt<Checkpoint> {
        let is_absent = |error: &Error| error.os_error() == Some(libc::ENOENT);
        let is_directory = |error: &Error| error.os_error() == Some(libc::EISDIR);
        match locate::locate(path, options.variant)? {
            Location::File(at) => match TensorFile::open(&at, options.backend) {
                Ok(file) => Ok(Checkpoint::of_file(file, at)),
                // It was in the directory just now.
                Err(error) if is_absent(&error) && at != path => Err(Failure::Changed),
                // It was none just now: a save has made it.
                Err(error) if is_directory(&error) && at == path => Err(Failure::Changed),
                Err(error) => Err(Failure::Final(error)),
            },
            Location::Index(at) => match OpenIndex::open(&at) {
                Ok(index) => Checkpoint::of_index(index, at, options),
                Err(error) if is_absent(&error) && at != path => Err(Failure::Changed),
                Err(error) if is_absent(&error) => Err(Failure::Missing(error)),
                Err(error) => Err(Failure::Final(error)),
            },
        }
    }

    /// A checkpoint of one file.
    fn of_file(file: TensorFile, path: PathBuf) -> Checkpoint {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let shards = vec![Shard { name, file: Arc::new(file) }];
        Checkpoint { by_name: sorted_places(&shards), shards, path }
    }

    /// A checkpoint of several files, whose index was read. A save that replaces it meanwhile takes its
    /// index away before the first of its files changes, and puts another one in place after the last: if the index is
    /// still there once all files are open, they belong together.
    fn of_index(open: OpenIndex, path: PathBuf, options: CheckpointOptions<'_>) -> Attempt<Checkpoint> {
        let OpenIndex { index, file, directory, name } = open;
        let opened = Checkpoint::of_files(index, &directory, path, options);
        // Open for as long as it is compared, so that no other file can have its number.
        if is_at(&file, &directory, &name) { opened.map_err(Failure::Final) } else { Err(Failure::Changed) }
    }

    /// The files that `index` lists, all in the directory that its path led to when it was opened.
    fn of_files(
        index: Index,
        directory: &Directory,
        path: PathBuf,
        options: CheckpointOptions<'_>,
    ) -> Result<Checkpoint> {
        let parent = path.parent().unwrap_or(Path::new(""));
        let shards = index.shards.iter().map(|name| {
            let opened = TensorFile::open_in(directory, name.as_ref(), &parent.join(name), options.backend);
            let file = opened.map_err(|error| match error.os_error() {
                Some(libc::ENOENT) => error.with_remedy(&format!(
                    "the index {} names this shard: fetch or copy it to there, or save the checkpoint again",
                    path.display()
                )),
                _ => error,
            })?;
            Ok(Shard { name: name.clone(), file: Arc::new(file) })
        });
        let shards = shards.collect::<Result<Vec<Shard>>>()?;
        let by_name = match options.extra {
            Extra::Error => {
                let by_name = sorted_places(&shards);
                check(&index, &shards, &by_name).map(|()| by_name)
            }
            Extra::Ignore => listed_places(&index, &shards),
        };
        let by_name = by_name.map_err(|error| error.in_file(&path))?;
        Ok(Checkpoint { shards, by_name, path })
    }

    /// The files, sorted by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The number of tensors in all shards.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Where the tensors are, in the order of their names.
    pub fn sorted_by_name(&self) -> &[TensorLocation] {
        &self.by_name
    }

    /// Where the tensor `name` is.
    pub fn find(&self, name: &str) -> Option<TensorLocation> {
        let found = self.by_name.binary_search_by(|&place| name_at(&self.shards, place).cmp(name)).ok()?;
        Some(self.by_name[found])
    }

    /// Where the tensor `name` is, or an error that says so.
    pub fn require(&self, name: &str) -> Result<TensorLocation> {
        self.find(name).ok_or_else(|| tensor_not_found(name).in_file(&self.path))
    }

    /// As [`TensorFile::prefault`], for all shards, one after the other.
    ///
    /// # Errors
    ///
    /// Those of [`TensorFile::prefault`].
    pub fn prefault(&self, when: Prefault) -> Result<()> {
        let mapped: Vec<_> = self.shards.iter().filter_map(|shard| shard.file.mapping()).collect();
        prefault::prefault(&mapped, when)
    }

    /// The file or the index that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A checkpoint that is being opened, as [`Checkpoint::open`] does, in steps.
#[derive(Debug)]
pub(crate) struct PendingOpen {
    path: PathBuf,
    backend: Backend,
    variant: Option<String>,
    extra: Extra,
    attempts: usize,
    /// How often no checkpoint was found, and since when.
    waits: usize,
    since: Option<Instant>,
}

impl PendingOpen {
    pub(crate) fn new(path: &Path, options: CheckpointOptions<'_>) -> PendingOpen {
        let CheckpointOptions { backend, variant, extra } = options;
        let (path, variant) = (path.to_path_buf(), variant.map(str::to_owned));
        PendingOpen { path, backend, variant, extra, attempts: 0, waits: 0, since: None }
    }

    /// Opens the checkpoint; `None` if there is none, but a save that may put one there is still at it at `until`.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::open`].
    pub(crate) fn advance(&mut self, until: Option<Instant>) -> Result<Option<Checkpoint>> {
        while self.attempts < OPEN_ATTEMPTS {
            let (backend, variant, extra) = (self.backend, self.variant.as_deref(), self.extra);
            match Checkpoint::try_open(&self.path, CheckpointOptions { backend, variant, extra }) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(Failure::Changed) => {}
                Err(Failure::Missing(_)) if self.waits < MOST_WAITS => {
                    // In the moment between two indexes, perhaps.
                    let since = *self.since.get_or_insert_with(Instant::now);
                    let directory = Directory::open(parent_of(&self.path));
                    match directory.map(|directory| wait_for_save(&directory, since, until)) {
                        Ok(Waited::Guard) => return Ok(None),
                        Ok(Waited::Free) => self.waits += 1,
                        Ok(Waited::InVain) | Err(_) => self.waits = MOST_WAITS,
                    }
                }
                Err(Failure::Missing(error) | Failure::Final(error)) => return Err(error),
            }
            self.attempts += 1;
        }
        let detail = "the checkpoint was replaced again and again while it was opened: open it when nothing saves to it";
        Err(Error::new(ErrorKind::FileChanged, detail).in_file(&self.path))
    }
}

/// What an index says, without its files: their names, and for each tensor which of them. For the fuzz targets.
#[cfg(fuzzing)]
pub fn parse_index(json: &[u8]) -> Result<(Vec<String>, Vec<(String, u32)>)> {
    Index::parse(json).map(|index| (index.shards, index.tensors))
}

/// The directory that `path` is, or is in.
fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        _ if path.is_dir() => path,
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// An index that was read, and where it is.
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
}

/// Whether `file` is what the name in the directory leads to.
fn is_at(file: &File, directory: &Directory, name: &OsStr) -> bool {
    let there = directory.open_link_target(name).ok().flatten().and_then(|there| there.metadata().ok());
    match (file.metadata(), there) {
        (Ok(opened), Some(there)) => identity(&opened) == identity(&there),
        _ => false,
    }
}

/// The places of all tensors, sorted by name, and those of one name by shard.
fn sorted_places(shards: &[Shard]) -> Vec<TensorLocation> {
    let places = shards.iter().enumerate().flat_map(|(shard, one)| {
        one.file
            .header()
            .sorted_by_name()
            .iter()
            .map(move |&index| TensorLocation { shard: shard as u32, index })
    });
    let mut places: Vec<TensorLocation> = places.collect();
    // Runs that are sorted already, which this sort merges.
    places.sort_by(|&a, &b| name_at(shards, a).cmp(name_at(shards, b)));
    places
}

fn name_at(shards: &[Shard], place: TensorLocation) -> &str {
    let tensor = shards[place.shard as usize].file.header().get(place.index as usize);
    tensor.map_or("", |tensor| tensor.name)
}

/// The places of the tensors that the index lists, sorted by name.
fn listed_places(index: &Index, shards: &[Shard]) -> Result<Vec<TensorLocation>> {
    let places = index.tensors.iter().map(|(name, shard)| {
        let found = shards[*shard as usize].file.header().find(name);
        let found = found.ok_or_else(|| misplaced(name, *shard, shards))?;
        Ok(TensorLocation { shard: *shard, index: found as u32 })
    });
    places.collect()
}

/// Whether the shards hold what the index says, and nothing else: two lists in the order of names.
fn check(index: &Index, shards: &[Shard], places: &[TensorLocation]) -> Result<()> {
    let mut listed = index.tensors.iter().peekable();
    for &place in places {
        let (name, shard) = (name_at(shards, place), &shards[place.shard as usize].name);
        // What the index lists before this name, no shard has.
        match listed.peek() {
            Some((wanted, at)) if wanted == name && *at == place.shard => {
                listed.next();
            }
            Some((wanted, at)) if wanted.as_str() < name => return Err(misplaced(wanted, *at, shards)),
            Some((wanted, at)) if wanted == name && !holds(&shards[*at as usize], name) => {
                return Err(misplaced(wanted, *at, shards));
            }
            _ => {
                let detail = format!(
                    "shard {shard:?} holds tensor {name:?}, which the index does not have there: index and shards are not \
                     of one checkpoint; save or fetch them again, or set `extra` to \"ignore\" to load only what the index \
                     lists"
                );
                return Err(Error::new(ErrorKind::Index, detail));
            }
        }
    }
    match listed.next() {
        Some((name, at)) => Err(misplaced(name, *at, shards)),
        None => Ok(()),
    }
}

fn holds(shard: &Shard, name: &str) -> bool {
    shard.file.header().find(name).is_some()
}

/// The error for a tensor that is not in the shard that the index names.
fn misplaced(name: &str, shard: u32, shards: &[Shard]) -> Error {
    let elsewhere = shards.iter().find(|one| holds(one, name));
    let found = match elsewhere {
        Some(other) => format!("it is in {:?}", other.name),
        None => "no shard has it".to_string(),
    };
    let detail = format!(
        "the index puts tensor {name:?} into shard {:?}, which does not hold it ({found}): index and shards are not of \
         one checkpoint; save or fetch them again",
        shards[shard as usize].name
    );
    Error::new(ErrorKind::Index, detail)
}
