//! The options structs and their numbers, converted to those of the core.

use std::ffi::c_char;

use super::pointer::{self, Versioned, invalid};
use crate::checkpoint::{CheckpointOptions, Extra, ShardedOptions};
use crate::error::Result;
use crate::format::layout::DEFAULT_ALIGNMENT;
use crate::read::prefault::Prefault;
use crate::read::source::Backend;
use crate::write::edit::EditOptions;
use crate::write::save::SaveOptions;

/// A backend's number.
pub type sft_backend = u32;

/// The number of [`Backend::Mmap`].
pub const SFT_BACKEND_MMAP: sft_backend = 0;

/// The number of [`Backend::Pread`].
pub const SFT_BACKEND_PREAD: sft_backend = 1;

/// The number of a way to bring mapped pages in.
pub type sft_prefault = u32;

/// Pages come when they are touched.
pub const SFT_PREFAULT_NONE: sft_prefault = 0;

/// The number of [`Prefault::Background`].
pub const SFT_PREFAULT_BACKGROUND: sft_prefault = 1;

/// The number of [`Prefault::Wait`].
pub const SFT_PREFAULT_WAIT: sft_prefault = 2;

/// The number of what is done about tensors that an index does not list.
pub type sft_extra = u32;

/// The number of [`Extra::Error`].
pub const SFT_EXTRA_ERROR: sft_extra = 0;

/// The number of [`Extra::Ignore`].
pub const SFT_EXTRA_IGNORE: sft_extra = 1;

/// How a file is opened.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_open_options {
    /// The size of the struct.
    pub struct_size: usize,
    /// How the tensors come into memory.
    pub backend: sft_backend,
    /// When mapped pages are brought in.
    pub prefault: sft_prefault,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers, without padding.
unsafe impl Versioned for sft_open_options {
    const NAME: &'static str = "sft_open_options";
    const FIRST_SIZE: usize = 16;
}

impl sft_open_options {
    /// # Safety
    ///
    /// As for [`pointer::options`].
    pub(super) unsafe fn read(options: *const sft_open_options) -> Result<(Backend, Option<Prefault>)> {
        let defaults = sft_open_options {
            struct_size: size_of::<sft_open_options>(),
            backend: SFT_BACKEND_MMAP,
            prefault: SFT_PREFAULT_NONE,
        };
        // SAFETY: this function has the contract of `pointer::options`.
        let options = unsafe { pointer::options(options, defaults) }?;
        Ok((backend_of(options.backend)?, prefault_of(options.prefault)?))
    }
}

fn backend_of(number: sft_backend) -> Result<Backend> {
    match number {
        SFT_BACKEND_MMAP => Ok(Backend::Mmap),
        SFT_BACKEND_PREAD => Ok(Backend::Pread),
        other => Err(invalid(format!("unknown backend {other}: give SFT_BACKEND_MMAP or SFT_BACKEND_PREAD"))),
    }
}

fn prefault_of(number: sft_prefault) -> Result<Option<Prefault>> {
    match number {
        SFT_PREFAULT_NONE => Ok(None),
        SFT_PREFAULT_BACKGROUND => Ok(Some(Prefault::Background)),
        SFT_PREFAULT_WAIT => Ok(Some(Prefault::Wait)),
        other => {
            let detail = format!(
                "unknown prefault {other}: give SFT_PREFAULT_NONE, SFT_PREFAULT_BACKGROUND or SFT_PREFAULT_WAIT"
            );
            Err(invalid(detail))
        }
    }
}

/// How a checkpoint is opened.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_checkpoint_options {
    /// The size of the struct.
    pub struct_size: usize,
    /// As in [`sft_open_options`], of each file.
    pub backend: sft_backend,
    /// As in [`sft_open_options`], of each file.
    pub prefault: sft_prefault,
    /// Which of the checkpoints of a directory; NULL for the one without a variant.
    pub variant: *const c_char,
    /// What is done about tensors that the index does not list.
    pub extra: sft_extra,
    /// 0.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers and a raw pointer, without padding.
unsafe impl Versioned for sft_checkpoint_options {
    const NAME: &'static str = "sft_checkpoint_options";
    const FIRST_SIZE: usize = 32;
}

impl sft_checkpoint_options {
    /// # Safety
    ///
    /// As for [`pointer::options`]; as for [`pointer::c_string`] for `variant`, while the result is used.
    pub(super) unsafe fn read<'a>(
        options: *const sft_checkpoint_options,
    ) -> Result<(CheckpointOptions<'a>, Option<Prefault>)> {
        let defaults = sft_checkpoint_options {
            struct_size: size_of::<sft_checkpoint_options>(),
            backend: SFT_BACKEND_MMAP,
            prefault: SFT_PREFAULT_NONE,
            variant: std::ptr::null(),
            extra: SFT_EXTRA_ERROR,
            reserved: 0,
        };
        // SAFETY: this function has the contract of `pointer::options`.
        let options = unsafe { pointer::options(options, defaults) }?;
        if options.reserved != 0 {
            return Err(invalid(format!("{}: reserved must be 0", Self::NAME)));
        }
        let extra = match options.extra {
            SFT_EXTRA_ERROR => Extra::Error,
            SFT_EXTRA_IGNORE => Extra::Ignore,
            other => {
                return Err(invalid(format!(
                    "unknown extra {other}: give SFT_EXTRA_ERROR or SFT_EXTRA_IGNORE"
                )));
            }
        };
        // SAFETY: a string or NULL ("Text", this function's contract).
        let variant = unsafe { pointer::optional_string(options.variant, Self::NAME, "variant") }?;
        let backend = backend_of(options.backend)?;
        Ok((CheckpointOptions { backend, variant, extra }, prefault_of(options.prefault)?))
    }
}

/// How a file is written.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_save_options {
    /// The size of the struct.
    pub struct_size: usize,
    /// Where the data begins: at a multiple of so many bytes; 0 for the default.
    pub alignment: u64,
    /// 1 to return only once the bytes are on the disk.
    pub durable: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers, without padding.
unsafe impl Versioned for sft_save_options {
    const NAME: &'static str = "sft_save_options";
    const FIRST_SIZE: usize = 24;
}

impl sft_save_options {
    /// # Safety
    ///
    /// As for [`pointer::options`].
    pub(super) unsafe fn read(options: *const sft_save_options) -> Result<SaveOptions> {
        let defaults = sft_save_options {
            struct_size: size_of::<sft_save_options>(),
            alignment: DEFAULT_ALIGNMENT,
            durable: 0,
            reserved: 0,
        };
        // SAFETY: this function has the contract of `pointer::options`.
        let options = unsafe { pointer::options(options, defaults) }?;
        save_options(Self::NAME, options.alignment, options.durable, options.reserved)
    }
}

/// What the fields that all ways of saving have mean, in the struct called `name`.
fn save_options(name: &str, alignment: u64, durable: u32, reserved: u32) -> Result<SaveOptions> {
    if reserved != 0 {
        return Err(invalid(format!("{name}: reserved must be 0")));
    }
    if durable > 1 {
        return Err(invalid(format!("{name}: durable is {durable}: give 0 or 1")));
    }
    let alignment = if alignment == 0 { DEFAULT_ALIGNMENT } else { alignment };
    Ok(SaveOptions { alignment, durable: durable == 1 })
}

/// How a checkpoint of several files is written.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_sharded_options {
    /// The size of the struct.
    pub struct_size: usize,
    /// What the names of the files begin with; NULL for the default.
    pub stem: *const c_char,
    /// The most bytes of tensors in one file; 0 for the default.
    pub max_shard_size: u64,
    /// As in [`sft_save_options`].
    pub alignment: u64,
    /// As in [`sft_save_options`].
    pub durable: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers and a raw pointer, without padding.
unsafe impl Versioned for sft_sharded_options {
    const NAME: &'static str = "sft_sharded_options";
    const FIRST_SIZE: usize = 40;
}

impl sft_sharded_options {
    /// # Safety
    ///
    /// As for [`pointer::options`]; as for [`pointer::c_string`] for `stem`, while the result is used.
    pub(super) unsafe fn read<'a>(options: *const sft_sharded_options) -> Result<ShardedOptions<'a>> {
        let defaults = sft_sharded_options {
            struct_size: size_of::<sft_sharded_options>(),
            stem: std::ptr::null(),
            max_shard_size: 0,
            alignment: 0,
            durable: 0,
            reserved: 0,
        };
        // SAFETY: this function has the contract of `pointer::options`.
        let options = unsafe { pointer::options(options, defaults) }?;
        let mut result = ShardedOptions {
            save: save_options(Self::NAME, options.alignment, options.durable, options.reserved)?,
            ..ShardedOptions::default()
        };
        if options.max_shard_size != 0 {
            result.max_shard_size = options.max_shard_size;
        }
        // SAFETY: a string or NULL ("Text", this function's contract).
        if let Some(stem) = unsafe { pointer::optional_string(options.stem, Self::NAME, "stem") }? {
            result.stem = stem;
        }
        Ok(result)
    }
}

/// How metadata is changed.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_edit_options {
    /// The size of the struct.
    pub struct_size: usize,
    /// Free bytes to leave in the header for later edits.
    pub reserve: u64,
    /// 1 to overwrite the header instead of rewriting the file.
    pub in_place: u32,
    /// 1 to return only once the bytes are on the disk.
    pub durable: u32,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers, without padding.
unsafe impl Versioned for sft_edit_options {
    const NAME: &'static str = "sft_edit_options";
    const FIRST_SIZE: usize = 24;
}

impl sft_edit_options {
    /// # Safety
    ///
    /// As for [`pointer::options`].
    pub(super) unsafe fn read(options: *const sft_edit_options) -> Result<EditOptions> {
        let defaults = sft_edit_options {
            struct_size: size_of::<sft_edit_options>(),
            reserve: 0,
            in_place: 0,
            durable: 0,
        };
        // SAFETY: this function has the contract of `pointer::options`.
        let options = unsafe { pointer::options(options, defaults) }?;
        for (name, flag) in [("in_place", options.in_place), ("durable", options.durable)] {
            if flag > 1 {
                return Err(invalid(format!("{}: {name} is {flag}: give 0 or 1", Self::NAME)));
            }
        }
        Ok(EditOptions {
            in_place: options.in_place == 1,
            reserve: options.reserve,
            durable: options.durable == 1,
        })
    }
}
