//! Old indexes that a commit has renamed to hidden names.

use std::ffi::OsString;

use super::directory::CheckpointDirectory;
use crate::error::{Error, Result};
use crate::write::atomic::rename_to_backup;

#[derive(Debug, Default)]
pub(super) struct IndexBackup {
    /// Pairs of original and hidden names.
    names: Vec<(OsString, OsString)>,
}

impl IndexBackup {
    pub(super) fn add(&mut self, directory: &CheckpointDirectory, name: &str) -> Result<()> {
        let hidden = rename_to_backup(directory.handle(), name.as_ref());
        let hidden = hidden.map_err(|source| directory.error("rename", name, source))?;
        self.names.push((name.into(), hidden));
        Ok(())
    }

    pub(super) fn restore(self, directory: &CheckpointDirectory) -> Result<()> {
        self.names.into_iter().try_for_each(|(name, hidden)| {
            let renamed = directory.handle().rename(&hidden, &name);
            renamed.map_err(|source| Error::io("restore", &directory.path().join(&name), source))
        })
    }

    pub(super) fn discard(self, directory: &CheckpointDirectory) {
        for (_, hidden) in self.names {
            // A hidden file that stays is not a reason to fail a save that is complete.
            let _ = directory.handle().remove(&hidden);
        }
    }
}
