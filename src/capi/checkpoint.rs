//! `sft_checkpoint`: the tensors of one file or several, opened together; each file is lent as an `sft_file`.

use std::ffi::c_char;
use std::sync::Arc;

use super::boundary;
use super::file::sft_file;
use super::options::{sft_checkpoint_options, sft_str};
use super::pointer::{self, Out, invalid};
use super::status::sft_status;
use crate::checkpoint::{Checkpoint, TensorPlace};
use crate::error::Result;

/// An open checkpoint.
pub struct sft_checkpoint {
    checkpoint: Checkpoint,
    /// One for each shard, lent to callers.
    files: Vec<sft_file>,
}

/// Where a caller wants to be told of a tensor's place.
struct PlaceOut {
    shard: Out<usize>,
    index: Out<usize>,
}

impl PlaceOut {
    /// # Safety
    ///
    /// As for [`Out::new`], of both.
    unsafe fn new(shard: *mut usize, index: *mut usize) -> Result<PlaceOut> {
        // SAFETY: the caller's promise.
        unsafe { Ok(PlaceOut { shard: Out::new(shard, "shard")?, index: Out::new(index, "index")? }) }
    }

    fn set(&self, place: TensorPlace) {
        self.shard.set(place.shard as usize);
        self.index.set(place.index as usize);
    }
}

/// Opens the checkpoint at `path`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_open(
    path: *const c_char,
    options: *const sft_checkpoint_options,
    checkpoint: *mut *mut sft_checkpoint,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a place for a handle, a string, and options or NULL (header).
        let out = unsafe { Out::new(checkpoint, "checkpoint") }?;
        out.set(std::ptr::null_mut());
        // SAFETY: as above.
        let (path, (options, prefault)) =
            unsafe { (pointer::path(path)?, sft_checkpoint_options::read(options)?) };
        let opened = Checkpoint::open(path, options)?;
        if let Some(when) = prefault {
            opened.prefault(when)?;
        }
        let files = opened.shards().iter().map(|shard| sft_file::new(Arc::clone(&shard.file))).collect();
        out.set(pointer::hand_over(sft_checkpoint { checkpoint: opened, files }));
        Ok(())
    })
}

/// Frees the handle, and closes its files.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_free(checkpoint: *mut sft_checkpoint) {
    boundary!((); {
        // SAFETY: the caller gives NULL, or a handle that nobody uses any more (header).
        unsafe { pointer::release(checkpoint) }
    })
}

/// The number of files.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_get_shard_count(
    checkpoint: *const sft_checkpoint,
    count: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle and a place for a number (header).
        let (checkpoint, out) =
            unsafe { (pointer::shared(checkpoint, "checkpoint")?, Out::new(count, "count")?) };
        out.set(checkpoint.files.len());
        Ok(())
    })
}

/// One of the files, and its name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_get_shard(
    checkpoint: *const sft_checkpoint,
    shard: usize,
    name: *mut sft_str,
    file: *mut *const sft_file,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle and places for a text and a handle (header).
        let (checkpoint, name, out) = unsafe {
            (pointer::shared(checkpoint, "checkpoint")?, Out::new(name, "name")?, Out::new(file, "file")?)
        };
        let shards = checkpoint.checkpoint.shards();
        let one = shards.get(shard).ok_or_else(|| {
            let detail = format!("shard {shard}: the checkpoint has {} shard(s)", shards.len());
            invalid(detail).in_file(checkpoint.checkpoint.path())
        })?;
        name.set(pointer::lend(&one.name));
        out.set(&checkpoint.files[shard]);
        Ok(())
    })
}

/// The number of tensors in all files.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_get_tensor_count(
    checkpoint: *const sft_checkpoint,
    count: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle and a place for a number (header).
        let (checkpoint, out) =
            unsafe { (pointer::shared(checkpoint, "checkpoint")?, Out::new(count, "count")?) };
        out.set(checkpoint.checkpoint.len());
        Ok(())
    })
}

/// The place of the tensor at `position` in the order of names.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_get_sorted_tensor(
    checkpoint: *const sft_checkpoint,
    position: usize,
    shard: *mut usize,
    index: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle and places for two numbers (header).
        let (checkpoint, out) =
            unsafe { (pointer::shared(checkpoint, "checkpoint")?, PlaceOut::new(shard, index)?) };
        let sorted = checkpoint.checkpoint.sorted_by_name();
        let &found = sorted.get(position).ok_or_else(|| {
            let detail = format!("position {position}: the checkpoint has {} tensor(s)", sorted.len());
            invalid(detail).in_file(checkpoint.checkpoint.path())
        })?;
        out.set(found);
        Ok(())
    })
}

/// The place of the tensor `name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_find_tensor(
    checkpoint: *const sft_checkpoint,
    name: *const c_char,
    name_length: usize,
    shard: *mut usize,
    index: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: the caller gives a handle, `name_length` bytes and places for two numbers (header).
        let (checkpoint, name, out) = unsafe {
            (
                pointer::shared(checkpoint, "checkpoint")?,
                pointer::text(name, name_length, "name")?,
                PlaceOut::new(shard, index)?,
            )
        };
        out.set(checkpoint.checkpoint.require(name)?);
        Ok(())
    })
}
