//! Saves tensors as a checkpoint.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::plan::{DEFAULT_MAX_SHARD_SIZE, DEFAULT_STEM, ShardPlan};
use super::writer::ShardedWriter;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::Metadata;
use crate::format::layout::{self, Layout, TensorSpec};
use crate::sys::mutex::Mutex;
use crate::sys::parallel::{self, Chunks};
use crate::sys::raw_bytes::RawBytes;
use crate::sys::threads::ThreadLimit;
use crate::write::atomic::AtomicFile;
use crate::write::save::{self, SaveOptions};

/// Options for [`save_sharded`].
#[derive(Clone, Copy, Debug)]
pub struct ShardedOptions<'a> {
    /// The beginning of the file names.
    pub stem: &'a str,
    /// The most bytes of tensors in one file, unless a single tensor is larger.
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

/// Writes `tensors`, whose bytes are in `data` at the same positions, as a checkpoint to `directory`: one file, or several
/// and their index. Creates the directory if it is missing. Replaces or removes the files of an earlier checkpoint with
/// the same stem. If several saves run at once, the last one to end is complete. Returns the names of the files, the index
/// last.
///
/// # Errors
///
/// Those of [`crate::save_file`] and [`ShardPlan::new`], and `EWOULDBLOCK` if another save keeps the directory locked for a
/// minute. Until all files are complete, the directory stays as it was.
pub fn save_sharded(
    tensors: &[TensorSpec<'_>],
    data: &[&[u8]],
    metadata: Option<&Metadata>,
    directory: &Path,
    options: ShardedOptions<'_>,
) -> Result<Vec<String>> {
    save_sharded_raw(tensors, &RawBytes::of_slices(data), metadata, directory, options)
}

/// As [`save_sharded`], for data that others may change.
pub(crate) fn save_sharded_raw(
    tensors: &[TensorSpec<'_>],
    data: &[RawBytes<'_>],
    metadata: Option<&Metadata>,
    directory: &Path,
    options: ShardedOptions<'_>,
) -> Result<Vec<String>> {
    let fail = |error: Error| error.in_file(directory);
    if tensors.len() != data.len() {
        let detail = format!("{} tensors, but the bytes of {}", tensors.len(), data.len());
        return Err(Error::new(ErrorKind::InvalidArgument, detail));
    }
    // The layout of one shard would not find a name that is also in another.
    layout::check_names(tensors).map_err(fail)?;
    let sizes = data.iter().map(|bytes| bytes.len() as u64);
    let plan = ShardPlan::new(sizes, options.stem, options.max_shard_size)?;
    let shards = plan.members().into_iter().map(|members| {
        let specs: Vec<TensorSpec<'_>> = members.iter().map(|&tensor| tensors[tensor]).collect();
        let bytes: Vec<RawBytes<'_>> = members.iter().map(|&tensor| data[tensor]).collect();
        let layout = save::plan(&specs, &bytes, metadata, options.save.alignment).map_err(fail)?;
        Ok((layout, bytes))
    });
    let shards = shards.collect::<Result<Vec<(Layout, Vec<RawBytes<'_>>)>>>()?;
    let names = tensors.iter().map(|tensor| tensor.name);
    let writer = ShardedWriter::new(directory, &plan, names)?;
    let layouts: Vec<&Layout> = shards.iter().map(|(layout, _)| layout).collect();
    write_shards(writer, &layouts, options.save.durable, |shard, file, has_failed| {
        let (layout, bytes) = &shards[shard];
        let pieces = layout.order().iter().map(|place| bytes[place.index]);
        let pieces: Vec<RawBytes<'_>> = std::iter::once(layout.header().into()).chain(pieces).collect();
        let chunks = Chunks::new(pieces.iter().map(|piece| piece.len()));
        for chunk in 0..chunks.len() {
            if has_failed() {
                return Ok(());
            }
            file.write(chunks.parts(chunk).map(|(piece, part)| pieces[piece].part(part)))?;
        }
        Ok(())
    })
}

/// Creates and commits the files of `layouts`. `write` writes the file of a number; it may return early, without an error, if
/// the function that it gets returns true: another file has failed.
pub(super) fn write_shards(
    mut writer: ShardedWriter,
    layouts: &[&Layout],
    durable: bool,
    write: impl Fn(usize, &mut AtomicFile, &dyn Fn() -> bool) -> Result<()> + Sync,
) -> Result<Vec<String>> {
    // Many filesystems admit one writer to a file, so each file has one thread.
    let bytes: u64 = layouts.iter().map(|layout| layout.total_bytes()).sum();
    let threads = parallel::thread_count(ThreadLimit::current()?, bytes as usize, layouts.len());
    let complete: Vec<Mutex<Option<AtomicFile>>> = layouts.iter().map(|_| Mutex::new(None)).collect();
    // An error ends the files of the other threads at their next chunk.
    let has_failed = AtomicBool::new(false);
    let create = |shard: usize| {
        let mut file = writer.create(shard, layouts[shard].total_bytes())?;
        write(shard, &mut file, &|| has_failed.load(Ordering::Relaxed))?;
        *complete[shard].lock() = Some(file);
        Ok(())
    };
    parallel::for_each(layouts.len(), threads, |shard| {
        create(shard).inspect_err(|_| has_failed.store(true, Ordering::Relaxed))
    })?;
    for file in complete {
        writer.add(file.lock().take().expect("every file was written"));
    }
    writer.commit(durable)
}
