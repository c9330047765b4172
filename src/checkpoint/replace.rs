//! Renames the complete files of a checkpoint into place, and removes those of an earlier one.
//!
//! The order of the renames is what keeps a reader, and a process that is killed, from mixing the files of two saves;
//! `docs/saving.md` explains it. The caller has locked the directory.

use std::io;

use super::directory::CheckpointDirectory;
use super::index_backup::IndexBackup;
use super::plan::{NameKind, ShardPlan, parse_name};
use crate::error::{Error, Result};
use crate::write::atomic::AtomicFile;

/// The files that replace those of an earlier checkpoint.
pub(super) struct Replacement<'a> {
    pub(super) directory: &'a mut CheckpointDirectory,
    pub(super) plan: &'a ShardPlan,
    /// The names of `files`.
    pub(super) names: &'a [String],
    pub(super) files: Vec<AtomicFile>,
    pub(super) index: Option<AtomicFile>,
    pub(super) durable: bool,
}

#[derive(Debug, Default)]
struct Progress {
    /// How many files are in place.
    done: usize,
    /// Whether the next file was overwritten in part, because it could not be replaced by a rename.
    is_torn: bool,
}

impl Replacement<'_> {
    /// Replaces the files; after an error, restores the earlier checkpoint if that is possible.
    pub(super) fn commit(mut self) -> Result<()> {
        let stale = self.stale_names()?;
        // For each file, whether one of its name exists.
        let replaces =
            self.names.iter().map(|name| self.directory.contains(name)).collect::<Result<Vec<bool>>>()?;
        if !stale.is_empty() || replaces.contains(&true) {
            self.files.iter().chain(&self.index).try_for_each(AtomicFile::write_back)?;
        }
        let mut backup = IndexBackup::default();
        let mut progress = Progress::default();
        // While its files change one by one, an old index would make a mix of two saves look like a checkpoint.
        let replaced = if self.index.is_some() && replaces.contains(&true) {
            self.back_up_indexes(&stale, &mut backup)
        } else {
            Ok(())
        };
        if let Err(error) = replaced.and_then(|()| self.rename_into_place(&mut progress)) {
            return Err(self.roll_back(error, &replaces, &progress, backup));
        }
        self.directory.keep();
        backup.discard(self.directory);
        if self.durable {
            self.directory.synchronize().map_err(|error| {
                error.with_remedy(
                    "all new files are in place, but may be lost with the power, so the files of the earlier checkpoint were \
                     kept: save it again",
                )
            })?;
        }
        self.remove_stale(&stale)
    }

    /// Returns the names that belong to another checkpoint of this stem, in the order of their removal.
    fn stale_names(&self) -> Result<Vec<String>> {
        let mut stale = self.directory.find(|name| self.plan.makes_stale(name))?;
        // Files and indexes first: a reader could open them instead of the new checkpoint.
        stale.sort_by_key(|name| is_kind(name, NameKind::Shard));
        Ok(stale)
    }

    fn back_up_indexes(&self, stale: &[String], backup: &mut IndexBackup) -> Result<()> {
        let own = self.plan.index_name();
        // Other tools have other names for the index of a variant.
        for name in stale.iter().filter(|name| is_kind(name, NameKind::Index)).chain([&own]) {
            if self.directory.contains(name)? {
                backup.add(self.directory, name)?;
            }
        }
        Ok(())
    }

    /// Renames the files in turn, then the index. If durable, no crash can leave the new index without its files, or the
    /// old index with new files.
    fn rename_into_place(&mut self, progress: &mut Progress) -> Result<()> {
        let directory = &*self.directory;
        let synchronize = || if self.durable { directory.synchronize_entries() } else { Ok(()) };
        synchronize()?;
        for mut file in std::mem::take(&mut self.files) {
            file.commit_if(false, || Ok(())).inspect_err(|_| progress.is_torn = file.has_overwritten())?;
            progress.done += 1;
        }
        let Some(index) = self.index.take() else { return Ok(()) };
        synchronize()?;
        index.commit(false)
    }

    fn remove_stale(&self, stale: &[String]) -> Result<()> {
        for name in stale {
            match self.directory.handle().remove(name.as_ref()) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    let remedy = "the new checkpoint is complete, but this file of the earlier one still exists: remove it";
                    return Err(self.directory.error("remove", name, source).with_remedy(remedy));
                }
                _ => {}
            }
        }
        if self.durable {
            self.directory.synchronize_entries().map_err(|error| {
                error.with_remedy(
                    "the new checkpoint is complete, but files of the earlier one may reappear after a loss of power: save \
                     it again",
                )
            })?;
        }
        Ok(())
    }

    /// Restores the state before the commit if no file was replaced; otherwise says in the error what is in place.
    fn roll_back(&self, error: Error, replaces: &[bool], progress: &Progress, backup: IndexBackup) -> Error {
        let done = progress.done;
        if progress.is_torn || replaces[..done].contains(&true) {
            backup.discard(self.directory);
            return error.with_remedy(&format!(
                "{done} of {} files are in place, and no index: the checkpoint in {} is not complete; save it again",
                self.names.len(),
                self.directory.path().display()
            ));
        }
        let mut failures: Vec<Error> = Vec::new();
        for name in &self.names[..done] {
            let removed = self.directory.handle().remove(name.as_ref());
            failures.extend(removed.err().map(|source| self.directory.error("remove", name, source)));
        }
        failures.extend(backup.restore(self.directory).err());
        failures.into_iter().fold(error, |error, failure| {
            error.with_remedy(&format!("and the earlier checkpoint could not be restored: {failure}"))
        })
    }
}

fn is_kind(name: &str, kind: NameKind) -> bool {
    parse_name(name).is_some_and(|(found, _)| found == kind)
}
