//! Collects the complete files of a checkpoint, and commits them together.

use std::path::Path;
use std::time::Instant;

use super::directory::CheckpointDirectory;
use super::lock::SaveLock;
use super::plan::ShardPlan;
use super::replace::Replacement;
use crate::error::Result;
use crate::write::atomic::AtomicFile;

/// A checkpoint in progress. If it is dropped before [`ShardedWriter::commit`], the directory stays as it was.
#[derive(Debug)]
pub struct ShardedWriter {
    names: Vec<String>,
    /// Files that are complete, in the order of their names.
    complete: Vec<AtomicFile>,
    /// The bytes of the index, if the plan has one.
    index: Option<Vec<u8>>,
    /// A commit that waits for the lock: the complete index, and when the wait began.
    pending: Option<(Option<AtomicFile>, Instant)>,
    plan: ShardPlan,
    /// Whether a checkpoint of this stem existed at the beginning.
    replaces: bool,
    /// Dropped last: created directories are removed only if they are empty.
    directory: CheckpointDirectory,
}

impl ShardedWriter {
    /// Begins the checkpoint that `plan` describes, with tensors called `names`. Creates `directory` if it is missing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] if the directory cannot be created or read; [`ErrorKind::InvalidArgument`] unless there are as many
    /// names as the plan has tensors.
    pub fn new<'a>(
        directory: &Path,
        plan: &ShardPlan,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<ShardedWriter> {
        let index = plan.index(names)?;
        let names = plan.shard_names();
        let directory = CheckpointDirectory::create(directory)?;
        let is_own = |name: &str| name == plan.index_name() || names.iter().any(|own| own == name);
        let replaces = !directory.find(|name| plan.makes_stale(name) || is_own(name))?.is_empty();
        let (complete, pending, plan) = (Vec::new(), None, plan.clone());
        Ok(ShardedWriter { names, complete, index, pending, plan, replaces, directory })
    }

    /// Begins the file of number `shard`, of exactly `length` bytes.
    ///
    /// # Errors
    ///
    /// Those of [`AtomicFile::create`].
    pub fn create(&self, shard: usize, length: u64) -> Result<AtomicFile> {
        self.create_file(&self.names[shard], length)
    }

    fn create_file(&self, name: &str, length: u64) -> Result<AtomicFile> {
        let mut file = self.directory.create_file(name, length)?;
        if self.replaces {
            file.mark_replacing();
        }
        Ok(file)
    }

    /// Adds the next file, which must be complete, in the order of the numbers.
    pub fn add(&mut self, file: AtomicFile) {
        self.complete.push(file);
    }

    /// Returns the names of the files, the index last.
    pub fn file_names(&self) -> Vec<String> {
        self.plan.file_names()
    }

    /// Renames all files into place, and removes those of an earlier checkpoint, while it has the directory locked. If
    /// `durable`, returns once everything is on the disk. Returns the names of the files.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`]; `EWOULDBLOCK` if another save keeps the directory locked for a minute. The directory is then as it
    /// was, unless files of the earlier checkpoint were replaced already: the error says so.
    pub fn commit(mut self, durable: bool) -> Result<Vec<String>> {
        while !self.try_commit(durable, None)? {}
        Ok(self.file_names())
    }

    /// Commits as [`ShardedWriter::commit`] does. Returns false if another save still has the directory locked at
    /// `deadline`; call it again. After an error, nothing is left to commit.
    pub(crate) fn try_commit(&mut self, durable: bool, deadline: Option<Instant>) -> Result<bool> {
        self.directory.check_process()?;
        let (index, since) = match self.pending.take() {
            Some(pending) => pending,
            None => (self.complete_all(durable)?, Instant::now()),
        };
        // Names are looked up under the lock: another save may have ended since this one began.
        let Some(lock) = SaveLock::acquire(self.directory.handle(), since, deadline)? else {
            self.pending = Some((index, since));
            return Ok(false);
        };
        let files = std::mem::take(&mut self.complete);
        let (names, plan, directory) = (&self.names[..], &self.plan, &mut self.directory);
        Replacement { directory, plan, names, files, index, durable }.commit()?;
        drop(lock);
        Ok(true)
    }

    /// Writes the index, and flushes all files as far as `durable` demands. Returns the index.
    fn complete_all(&self, durable: bool) -> Result<Option<AtomicFile>> {
        assert_eq!(self.complete.len(), self.names.len(), "every file was added");
        let index = self.index.as_ref().map(|bytes| {
            let mut file = self.create_file(&self.plan.index_name(), bytes.len() as u64)?;
            file.write([bytes.as_slice()]).map(|()| file)
        });
        let index = index.transpose()?;
        for file in self.complete.iter().chain(&index) {
            if durable {
                file.synchronize()?;
            } else if self.replaces {
                file.write_back()?;
            }
            // A network filesystem sends the bytes now, before others wait for the lock.
            file.check_deferred_errors()?;
        }
        Ok(index)
    }
}
