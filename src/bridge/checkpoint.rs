//! Opens and writes checkpoints.

use std::collections::HashMap;
use std::sync::Arc;

use super::ffi::{self, TensorLocation, Text};
use super::file::{File, lifetime_of, prefault_mode};
use super::save::{FileWriter, until};
use super::{Result, as_path, as_text};
use crate::checkpoint;
use crate::checkpoint::caller_filesystem::{CallerFilesystem, sft_filesystem};
use crate::error::{Error, ErrorKind};
use crate::format::header::tensor_not_found;
use crate::sys::parallel;
use crate::sys::threads::ThreadLimit;
use crate::write::output::Output;

pub struct Checkpoint(checkpoint::Checkpoint);

pub struct PendingOpen {
    opening: checkpoint::open::PendingOpen,
    opened: Option<Box<Checkpoint>>,
}

impl ffi::CheckpointOptions<'_> {
    fn parse(&self) -> Result<checkpoint::CheckpointOptions<'_>> {
        Ok(checkpoint::CheckpointOptions {
            backend: String::from_utf8_lossy(self.backend).parse()?,
            variant: self.has_variant.then(|| as_text("variant", self.variant)).transpose()?,
            extra: String::from_utf8_lossy(self.extra).parse()?,
        })
    }
}

pub fn begin_open(path: &[u8], options: &ffi::CheckpointOptions<'_>) -> Result<Box<PendingOpen>> {
    let opening = checkpoint::open::PendingOpen::new(as_path(path), options.parse()?);
    Ok(Box::new(PendingOpen { opening, opened: None }))
}

/// # Safety
///
/// The address must be that of an `sft_filesystem`, which keeps its contract.
pub unsafe fn open_filesystem(
    address: usize,
    path: &[u8],
    options: &ffi::CheckpointOptions<'_>,
    is_interpreted: bool,
) -> Result<Box<Checkpoint>> {
    let filesystem = std::ptr::with_exposed_provenance::<sft_filesystem>(address);
    // SAFETY: a filesystem that keeps its contract (the clause above).
    let filesystem = unsafe { CallerFilesystem::new(filesystem.read(), lifetime_of(is_interpreted)) }?;
    Ok(Box::new(Checkpoint(checkpoint::Checkpoint::open_in(&filesystem, as_path(path), options.parse()?)?)))
}

impl PendingOpen {
    pub fn advance(&mut self, milliseconds: u64) -> Result<bool> {
        if self.opened.is_none() {
            self.opened =
                self.opening.advance(until(milliseconds))?.map(|opened| Box::new(Checkpoint(opened)));
        }
        Ok(self.opened.is_some())
    }
}

pub fn finish_open(pending: &mut PendingOpen) -> Result<Box<Checkpoint>> {
    let missing = || Error::new(ErrorKind::InvalidArgument, "the checkpoint is not open yet");
    Ok(pending.opened.take().ok_or_else(missing)?)
}

impl From<checkpoint::TensorLocation> for TensorLocation {
    fn from(location: checkpoint::TensorLocation) -> TensorLocation {
        TensorLocation { shard: location.shard as usize, index: location.index as usize }
    }
}

impl Checkpoint {
    pub fn count(&self) -> usize {
        self.0.len()
    }

    pub fn shard_count(&self) -> usize {
        self.0.shards().len()
    }

    fn shard(&self, shard: usize) -> &checkpoint::Shard {
        &self.0.shards()[shard]
    }

    pub fn shard_name(&self, shard: usize) -> &str {
        &self.shard(shard).name
    }

    pub fn shard_file(&self, shard: usize) -> Box<File> {
        Box::new(File(Arc::clone(&self.shard(shard).file)))
    }

    pub fn find(&self, name: &[u8]) -> Result<TensorLocation> {
        match std::str::from_utf8(name) {
            Ok(name) => Ok(self.0.require(name)?.into()),
            Err(_) => Err(tensor_not_found(&String::from_utf8_lossy(name)).in_file(self.0.path()).into()),
        }
    }

    pub fn contains(&self, name: &[u8]) -> bool {
        std::str::from_utf8(name).is_ok_and(|name| self.0.find(name).is_some())
    }

    pub fn prefault(&self, wait: bool) -> Result<()> {
        Ok(self.0.prefault(prefault_mode(wait))?)
    }

    pub fn sorted_by_name(&self) -> Vec<TensorLocation> {
        self.0.sorted_by_name().iter().map(|&location| location.into()).collect()
    }
}

pub struct ShardPlan(checkpoint::ShardPlan);

pub fn plan_shards(sizes: &[u64], stem: &[u8], max_shard_size: u64) -> Result<Box<ShardPlan>> {
    let stem = as_text("stem", stem)?;
    Ok(Box::new(ShardPlan(checkpoint::ShardPlan::new(sizes.iter().copied(), stem, max_shard_size)?)))
}

pub fn assign_shards(sizes: &[u64], files: &[usize], stem: &[u8]) -> Result<Box<ShardPlan>> {
    let stem = as_text("stem", stem)?;
    Ok(Box::new(ShardPlan(checkpoint::ShardPlan::assigned(sizes.iter().copied(), files, stem)?)))
}

impl ShardPlan {
    pub fn count(&self) -> usize {
        self.0.count()
    }

    pub fn shard_of(&self) -> &[usize] {
        self.0.shard_of()
    }

    pub fn file_names(&self) -> Vec<String> {
        self.0.file_names()
    }

    pub fn index(&self, names: &[Text<'_>]) -> Result<Vec<u8>> {
        Ok(self.0.index(as_names(names)?.into_iter())?.unwrap_or_default())
    }

    pub fn makes_stale(&self, name: &[u8]) -> bool {
        std::str::from_utf8(name).is_ok_and(|name| self.0.makes_stale(name))
    }
}

pub fn thread_count(bytes: u64, files: usize) -> Result<usize> {
    Ok(parallel::thread_count(ThreadLimit::current()?, usize::try_from(bytes).unwrap_or(usize::MAX), files))
}

pub struct ShardedWriter(checkpoint::ShardedWriter);

// Several threads call `create` at once.
const _: fn() = || {
    fn is_sync<T: Sync>() {}
    is_sync::<ShardedWriter>();
};

pub fn create_shards(directory: &[u8], plan: &ShardPlan, names: &[Text<'_>]) -> Result<Box<ShardedWriter>> {
    let directory = as_path(directory);
    let writer = checkpoint::ShardedWriter::new(directory, &plan.0, as_names(names)?.into_iter());
    Ok(Box::new(ShardedWriter(writer.map_err(|error: Error| error.in_file(directory))?)))
}

fn as_names<'a>(names: &[Text<'a>]) -> Result<Vec<&'a str>> {
    names.iter().map(|name| as_text("tensor name", name.bytes)).collect()
}

impl ShardedWriter {
    pub fn create(&self, shard: usize, length: u64) -> Result<Box<FileWriter>> {
        Ok(Box::new(FileWriter(Output::Atomic(self.0.create(shard, length)?))))
    }

    // The bridge passes ownership as a `Box`.
    #[allow(clippy::boxed_local)]
    pub fn add(&mut self, file: Box<FileWriter>) {
        let Output::Atomic(file) = file.0 else { unreachable!("`create` returns atomic files only") };
        self.0.add(file);
    }

    pub fn commit(&mut self, durable: bool, milliseconds: u64) -> Result<bool> {
        Ok(self.0.try_commit(durable, until(milliseconds))?)
    }

    pub fn file_names(&self) -> Vec<String> {
        self.0.file_names()
    }
}

pub struct Consolidation {
    work: checkpoint::Consolidation,
    file_names: Vec<String>,
}

pub fn start_consolidation(
    input: &[u8],
    output: &[u8],
    names: &[Text<'_>],
    files: &[u64],
    max_shard_size: u64,
    durable: bool,
) -> Result<Box<Consolidation>> {
    let mut options = checkpoint::ShardedOptions { max_shard_size, ..checkpoint::ShardedOptions::default() };
    options.save.durable = durable;
    let pairs = names
        .iter()
        .zip(files)
        .map(|(name, &file)| Ok((as_text("tensor name", name.bytes)?.to_owned(), file)));
    let numbers = pairs.collect::<Result<HashMap<String, u64>>>()?;
    let numbers = (!names.is_empty()).then_some(numbers);
    let work = checkpoint::Consolidation::start(as_path(input), as_path(output), options, numbers)?;
    Ok(Box::new(Consolidation { work, file_names: Vec::new() }))
}

impl Consolidation {
    pub fn advance(&mut self, milliseconds: u64) -> Result<bool> {
        let names = self.work.advance(until(milliseconds))?;
        let is_done = names.is_some();
        self.file_names = names.unwrap_or_default();
        Ok(is_done)
    }

    pub fn total_bytes(&self) -> u64 {
        self.work.total_bytes()
    }

    pub fn done_bytes(&self) -> u64 {
        self.work.done_bytes()
    }

    pub fn file_names(&self) -> Vec<String> {
        self.file_names.clone()
    }
}
