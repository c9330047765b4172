//! The options structs and their numbers, converted to those of the core.

use std::ffi::c_char;

use super::pointer::{self, Versioned, invalid, versioned};
use crate::checkpoint::{CheckpointOptions, Extra, ShardedOptions};
use crate::error::Result;
use crate::format::layout::DEFAULT_ALIGNMENT;
use crate::read::prefault::Prefault;
use crate::read::source::Backend;
use crate::write::edit::EditOptions;
use crate::write::save::SaveOptions;

pub type sft_backend = u32;
pub const SFT_BACKEND_MMAP: sft_backend = 0;
pub const SFT_BACKEND_PREAD: sft_backend = 1;

pub type sft_prefault = u32;
pub const SFT_PREFAULT_NONE: sft_prefault = 0;
pub const SFT_PREFAULT_BACKGROUND: sft_prefault = 1;
pub const SFT_PREFAULT_WAIT: sft_prefault = 2;

pub type sft_direct = u32;
pub const SFT_DIRECT_AUTO: sft_direct = 0;
pub const SFT_DIRECT_NEVER: sft_direct = 1;
pub const SFT_DIRECT_ALWAYS: sft_direct = 2;

pub type sft_load_target = u32;
pub const SFT_LOAD_TARGET_MAPPING: sft_load_target = 0;
pub const SFT_LOAD_TARGET_MEMORY: sft_load_target = 1;
pub const SFT_LOAD_TARGET_DEVICE: sft_load_target = 2;

pub type sft_extra = u32;
pub const SFT_EXTRA_ERROR: sft_extra = 0;
pub const SFT_EXTRA_IGNORE: sft_extra = 1;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_open_options {
    /// The size of the struct.
    pub struct_size: usize,
    pub backend: sft_backend,
    pub prefault: sft_prefault,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers, without padding.
versioned!(unsafe sft_open_options, 16);

impl sft_open_options {
    pub(super) fn parse(self) -> Result<(Backend, Option<Prefault>)> {
        Ok((backend_of(self.backend)?, prefault_of(self.prefault)?))
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

fn check_reserved(name: &str, reserved: u32) -> Result<()> {
    if reserved == 0 { Ok(()) } else { Err(invalid(format!("{name}: reserved must be 0"))) }
}

/// Returns the value of a field that is 0 or 1.
pub(super) fn flag(name: &str, field: &str, value: u32) -> Result<bool> {
    match value {
        0 | 1 => Ok(value == 1),
        _ => Err(invalid(format!("{name}: {field} is {value}: give 0 or 1"))),
    }
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_checkpoint_options {
    /// The size of the struct.
    pub struct_size: usize,
    pub backend: sft_backend,
    pub prefault: sft_prefault,
    pub variant: *const c_char,
    pub extra: sft_extra,
    pub reserved: u32,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers and a raw pointer, without padding.
versioned!(unsafe sft_checkpoint_options, 32);

impl sft_checkpoint_options {
    /// # Safety
    ///
    /// As for [`pointer::c_string`] for `variant`, while the result is used.
    pub(super) unsafe fn parse<'a>(self) -> Result<(CheckpointOptions<'a>, Option<Prefault>)> {
        check_reserved(Self::NAME, self.reserved)?;
        let extra = match self.extra {
            SFT_EXTRA_ERROR => Extra::Error,
            SFT_EXTRA_IGNORE => Extra::Ignore,
            other => {
                let detail = format!("unknown extra {other}: give SFT_EXTRA_ERROR or SFT_EXTRA_IGNORE");
                return Err(invalid(detail));
            }
        };
        // SAFETY: a string or NULL ("Text", this function's contract).
        let variant = unsafe { pointer::optional_string(self.variant, Self::NAME, "variant") }?;
        let backend = backend_of(self.backend)?;
        Ok((CheckpointOptions { backend, variant, extra }, prefault_of(self.prefault)?))
    }
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_save_options {
    /// The size of the struct.
    pub struct_size: usize,
    pub alignment: u64,
    pub durable: u32,
    pub reserved: u32,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers, without padding.
versioned!(unsafe sft_save_options, 24);

impl sft_save_options {
    pub(super) fn parse(self) -> Result<SaveOptions> {
        save_options(Self::NAME, self.alignment, self.durable, self.reserved)
    }
}

/// What the fields that all ways of saving have mean, in the struct called `name`.
fn save_options(name: &str, alignment: u64, durable: u32, reserved: u32) -> Result<SaveOptions> {
    check_reserved(name, reserved)?;
    let alignment = if alignment == 0 { DEFAULT_ALIGNMENT } else { alignment };
    Ok(SaveOptions { alignment, durable: flag(name, "durable", durable)? })
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_sharded_options {
    /// The size of the struct.
    pub struct_size: usize,
    pub stem: *const c_char,
    pub max_shard_size: u64,
    pub alignment: u64,
    pub durable: u32,
    pub reserved: u32,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers and a raw pointer, without padding.
versioned!(unsafe sft_sharded_options, 40);

impl sft_sharded_options {
    /// # Safety
    ///
    /// As for [`pointer::c_string`] for `stem`, while the result is used.
    pub(super) unsafe fn parse<'a>(self) -> Result<ShardedOptions<'a>> {
        let mut result = ShardedOptions {
            save: save_options(Self::NAME, self.alignment, self.durable, self.reserved)?,
            ..ShardedOptions::default()
        };
        if self.max_shard_size != 0 {
            result.max_shard_size = self.max_shard_size;
        }
        // SAFETY: a string or NULL ("Text", this function's contract).
        if let Some(stem) = unsafe { pointer::optional_string(self.stem, Self::NAME, "stem") }? {
            result.stem = stem;
        }
        Ok(result)
    }
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_edit_options {
    /// The size of the struct.
    pub struct_size: usize,
    pub reserve: u64,
    pub in_place: u32,
    pub durable: u32,
}

// SAFETY: `repr(C)`, begins with its size, holds only integers, without padding.
versioned!(unsafe sft_edit_options, 24);

impl sft_edit_options {
    pub(super) fn parse(self) -> Result<EditOptions> {
        Ok(EditOptions {
            in_place: flag(Self::NAME, "in_place", self.in_place)?,
            reserve: self.reserve,
            durable: flag(Self::NAME, "durable", self.durable)?,
        })
    }
}
