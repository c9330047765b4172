//! Files that replace their target in one step, so that a reader never sees a part of one.
//!
//! `file` writes beside the target and renames over it. `staging` creates and names the file beside the target,
//! `attributes` and `acl` give it the target's owner and permissions, `preallocate` reserves its space, and `file_copy`
//! fills it from another file. `deferred_close` frees the file that was replaced, and `leftovers` removes what killed
//! saves have left. `fallbacks` copies if a link or a rename is impossible, as `docs/saving.md` describes. Nothing here
//! knows headers and tensors.

mod acl;
mod attributes;
mod deferred_close;
mod fallbacks;
mod file;
mod file_copy;
mod leftovers;
mod preallocate;
mod staging;

pub(crate) use attributes::Attributes;
pub use file::AtomicFile;
pub(crate) use leftovers::is_staged_name;
pub(crate) use staging::rename_to_backup;
