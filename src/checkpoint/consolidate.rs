//! Joins the files that the processes of `torch.distributed.checkpoint` have written.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::chunks::ChunkedTensor;
use super::plan::{SUFFIX, ShardPlan};
use super::save::{ShardedOptions, write_shards};
use super::writer::ShardedWriter;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{Metadata, tensor_nbytes};
use crate::format::layout::{Layout, TensorSpec};
use crate::read::file::TensorFile;
use crate::read::prefault::Prefault;
use crate::read::source::Backend;
use crate::sys::directory::Directory;
use crate::sys::parallel::CHUNK_BYTES;
use crate::sys::raw_bytes::RawBytes;
use crate::write::atomic::AtomicFile;

/// The beginning of the names of the files that processes write: `shard-00001-model-00001-of-00001.safetensors`.
const PREFIX: &str = "shard-";

/// Shorter runs are gathered and written together.
const MIN_WRITE_BYTES: usize = 64 << 10;

/// Writes the tensors whose chunks are in the files `shard-*.safetensors` of the directory `input`, which
/// `torch.distributed.checkpoint` has written, as a checkpoint to `output`. Replaces an earlier checkpoint as
/// [`save_sharded`](crate::save_sharded) does, and writes the same bytes as it would for the whole tensors, sorted by their
/// names, with the metadata `format` = `pt`. Returns the names of the files, the index last.
///
/// Files that this library has written contain the shapes of the whole tensors; torch's do not: there, a tensor ends where its
/// furthest chunk does, and a missing file goes unnoticed if the other chunks of each tensor still form a box. The files are mapped: the process ends with `SIGBUS` if
/// one of them is truncated during the call.
///
/// # Errors
///
/// [`ErrorKind::InvalidArgument`] if `input` has no such file; [`ErrorKind::HeaderJson`] if one lacks the positions of its
/// chunks; [`ErrorKind::Offsets`] if the chunks of a tensor overlap, leave a gap, or differ in their dtype; and those of
/// [`TensorFile::open`] and [`save_sharded`](crate::save_sharded). The files of `output` are then as they were.
pub fn consolidate(input: &Path, output: &Path, options: ShardedOptions<'_>) -> Result<Vec<String>> {
    consolidate_with(input, output, options, None, &Progress::default())
}

/// How far a consolidation is, and whether it is to end.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) done: AtomicU64,
    pub(super) total: AtomicU64,
    pub(super) is_cancelled: AtomicBool,
}

/// As [`consolidate`]; `numbers` has the file of each tensor, from 1 on, instead of a size.
pub(super) fn consolidate_with(
    input: &Path,
    output: &Path,
    options: ShardedOptions<'_>,
    numbers: Option<&HashMap<String, u64>>,
    progress: &Progress,
) -> Result<Vec<String>> {
    let files = open_files(input)?;
    let fail = |error: Error| error.in_file(input);
    let tensors = ChunkedTensor::of_files(&files).map_err(fail)?;
    let sizes = tensors.iter().map(|tensor| tensor_nbytes(tensor.name, tensor.dtype, &tensor.shape));
    let sizes = sizes.collect::<Result<Vec<u64>>>().map_err(fail)?;
    let plan = match numbers {
        None => ShardPlan::new(sizes.into_iter(), options.stem, options.max_shard_size)?,
        Some(numbers) => {
            let files = tensors
                .iter()
                .map(|tensor| file_number(numbers, tensor.name))
                .collect::<Result<Vec<usize>>>();
            ShardPlan::assigned(sizes.into_iter(), &files.map_err(fail)?, options.stem)?
        }
    };
    progress.total.store(plan.total_bytes(), Ordering::Relaxed);
    let members = plan.members();
    let metadata = Metadata::from([("format".to_string(), "pt".to_string())]);
    let layouts = members.iter().map(|members| {
        let specs = members.iter().map(|&tensor| {
            let ChunkedTensor { name, dtype, shape, .. } = &tensors[tensor];
            TensorSpec { name, dtype: *dtype, shape }
        });
        Layout::plan(&specs.collect::<Vec<_>>(), Some(&metadata), options.save.alignment)
    });
    let layouts = layouts.collect::<Result<Vec<Layout>>>().map_err(fail)?;
    let writer = ShardedWriter::new(output, &plan, tensors.iter().map(|tensor| tensor.name))?;
    for file in &files {
        file.prefault(Prefault::Background)?;
    }
    let layouts: Vec<&Layout> = layouts.iter().collect();
    write_shards(writer, &layouts, options.save.durable, |shard, file, has_failed| {
        let mut writer = GatheringWriter { file, buffer: Vec::new() };
        writer.write(layouts[shard].header().into())?;
        for place in layouts[shard].order() {
            if has_failed() {
                return Ok(());
            }
            let tensor = &tensors[members[shard][place.index]];
            tensor.prefault()?;
            tensor.for_each_run(|run| {
                if progress.is_cancelled.load(Ordering::Relaxed) {
                    return Err(Error::new(ErrorKind::Closed, "the consolidation was cancelled"));
                }
                progress.done.fetch_add(run.len() as u64, Ordering::Relaxed);
                if has_failed() { Ok(()) } else { writer.write(run) }
            })?;
        }
        writer.flush()
    })
}

fn file_number(numbers: &HashMap<String, u64>, name: &str) -> Result<usize> {
    let number = numbers.get(name).and_then(|&number| usize::try_from(number).ok()?.checked_sub(1));
    number.ok_or_else(|| {
        let detail =
            format!("tensor {name:?}: it has no file; give each tensor the number of its file, from 1 on");
        Error::new(ErrorKind::InvalidArgument, detail)
    })
}

/// Maps the files of all processes, sorted by name.
fn open_files(directory: &Path) -> Result<Vec<TensorFile>> {
    let fail = |source| Error::io("read the directory", directory, source);
    let names = Directory::open(directory).and_then(|opened| opened.names()).map_err(fail)?;
    let is_chunk_file = |name: &&str| name.starts_with(PREFIX) && name.ends_with(SUFFIX);
    let mut names: Vec<&str> = names.iter().filter_map(|name| name.to_str()).filter(is_chunk_file).collect();
    if names.is_empty() {
        let detail = format!(
            "no file {PREFIX}*{SUFFIX}: pass the directory that torch.distributed.checkpoint has saved to, or its \
             subdirectory \"sharded\""
        );
        return Err(Error::new(ErrorKind::InvalidArgument, detail).in_file(directory));
    }
    names.sort_unstable();
    names.into_iter().map(|name| TensorFile::open(&directory.join(name), Backend::Mmap)).collect()
}

/// Appends to a file. Gathers short runs of bytes, so that each write is long.
struct GatheringWriter<'f> {
    file: &'f mut AtomicFile,
    buffer: Vec<u8>,
}

impl GatheringWriter<'_> {
    fn write(&mut self, run: RawBytes<'_>) -> Result<()> {
        let is_long = run.len() >= MIN_WRITE_BYTES;
        if is_long || self.buffer.len() + run.len() > CHUNK_BYTES {
            self.flush()?;
        }
        if is_long {
            return self.file.write([run]);
        }
        run.append_to(&mut self.buffer);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.file.write([self.buffer.as_slice()])?;
        self.buffer.clear();
        Ok(())
    }
}
