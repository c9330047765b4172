//! Changes the metadata of a file and leaves its tensors as they are: by rewriting the file, or in place.
//!
//! `metadata_edit` decides what is written, `rewrite` copies the data into a new file, `in_place` overwrites the header,
//! and `entry` checks that nothing else has changed the file. `docs/saving.md` describes what readers see.

mod entry;
mod in_place;
mod metadata_edit;
mod rewrite;

pub use metadata_edit::{EditOptions, MetadataChanges, MetadataEdit, edit_metadata};
