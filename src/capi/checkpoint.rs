//! `sft_checkpoint`: the tensors of one file or several, opened together; each file is an `sft_file`.

use std::ffi::c_char;
use std::sync::Arc;

use super::boundary::boundary;
use super::handle::sft_file;
use super::options::{sft_checkpoint_options, sft_sharded_options};
use super::pointer::{self, Out, invalid};
use super::types::{sft_status, sft_str};
use crate::checkpoint::{Checkpoint, TensorLocation, consolidate};
use crate::error::Result;

pub struct sft_checkpoint {
    checkpoint: Checkpoint,
    /// One for each shard; callers borrow them.
    files: Vec<sft_file>,
}

impl sft_checkpoint {
    pub(super) fn new(checkpoint: Checkpoint) -> sft_checkpoint {
        let files = checkpoint.shards().iter().map(|shard| sft_file::new(Arc::clone(&shard.file))).collect();
        sft_checkpoint { checkpoint, files }
    }
}

/// The two results that locate a tensor.
struct LocationOut<'a> {
    shard: Out<'a, usize>,
    index: Out<'a, usize>,
}

impl LocationOut<'_> {
    /// # Safety
    ///
    /// As for [`Out::new`], for both.
    unsafe fn new(shard: *mut usize, index: *mut usize) -> Result<Self> {
        // SAFETY: this function has the contract of `Out::new`, twice.
        unsafe { Ok(LocationOut { shard: Out::new(shard, "shard")?, index: Out::new(index, "index")? }) }
    }

    fn set(&self, location: TensorLocation) {
        self.shard.set(location.shard as usize);
        self.index.set(location.index as usize);
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_open(
    path: *const c_char,
    options: *const sft_checkpoint_options,
    checkpoint: *mut *mut sft_checkpoint,
) -> sft_status {
    boundary!({
        // SAFETY: a handle to set, options or NULL (header, "Pointers", "Versions"); a string ("Text").
        let (out, path, (options, prefault)) = unsafe {
            (Out::null(checkpoint, "checkpoint")?, pointer::path(path)?, pointer::options(options)?.parse()?)
        };
        let opened = Checkpoint::open(path, options)?;
        if let Some(when) = prefault {
            opened.prefault(when)?;
        }
        out.set(pointer::new_handle(sft_checkpoint::new(opened)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_free(checkpoint: *mut sft_checkpoint) {
    boundary!((); {
        // SAFETY: NULL or a live handle (header, "Ownership") that no other thread uses ("Threads").
        unsafe { pointer::free_handle(checkpoint) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_get_shard_count(
    checkpoint: *const sft_checkpoint,
    count: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a number to set ("Pointers").
        let (checkpoint, out) =
            unsafe { (pointer::shared(checkpoint, "checkpoint")?, Out::new(count, "count")?) };
        out.set(checkpoint.files.len());
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_get_shard(
    checkpoint: *const sft_checkpoint,
    shard: usize,
    name: *mut sft_str,
    file: *mut *const sft_file,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a text and a handle to set ("Pointers").
        let (checkpoint, name, out) = unsafe {
            (pointer::shared(checkpoint, "checkpoint")?, Out::new(name, "name")?, Out::new(file, "file")?)
        };
        let shards = checkpoint.checkpoint.shards();
        let one = shards.get(shard).ok_or_else(|| {
            let detail = format!("shard {shard}: the checkpoint has {} shard(s)", shards.len());
            invalid(detail).in_file(checkpoint.checkpoint.path())
        })?;
        name.set(one.name.as_str().into());
        out.set(&checkpoint.files[shard]);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_get_tensor_count(
    checkpoint: *const sft_checkpoint,
    count: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); a number to set ("Pointers").
        let (checkpoint, out) =
            unsafe { (pointer::shared(checkpoint, "checkpoint")?, Out::new(count, "count")?) };
        out.set(checkpoint.checkpoint.len());
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_get_sorted_tensor(
    checkpoint: *const sft_checkpoint,
    position: usize,
    shard: *mut usize,
    index: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); two numbers to set ("Pointers").
        let (checkpoint, out) =
            unsafe { (pointer::shared(checkpoint, "checkpoint")?, LocationOut::new(shard, index)?) };
        let sorted = checkpoint.checkpoint.sorted_by_name();
        let &found = sorted.get(position).ok_or_else(|| {
            let detail = format!("position {position}: the checkpoint has {} tensor(s)", sorted.len());
            invalid(detail).in_file(checkpoint.checkpoint.path())
        })?;
        out.set(found);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_checkpoint_find_tensor(
    checkpoint: *const sft_checkpoint,
    name: *const c_char,
    name_length: usize,
    shard: *mut usize,
    index: *mut usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); `name_length` bytes, two numbers to set ("Pointers").
        let (checkpoint, name, out) = unsafe {
            (
                pointer::shared(checkpoint, "checkpoint")?,
                pointer::text(name, name_length, "name")?,
                LocationOut::new(shard, index)?,
            )
        };
        out.set(checkpoint.checkpoint.require(name)?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_consolidate(
    input: *const c_char,
    output: *const c_char,
    options: *const sft_sharded_options,
) -> sft_status {
    boundary!({
        // SAFETY: two strings ("Text"); options or NULL (header, "Pointers", "Versions").
        let (input, output, options) =
            unsafe { (pointer::path(input)?, pointer::path(output)?, pointer::options(options)?.parse()?) };
        consolidate(input, output, options)?;
        Ok(())
    })
}
