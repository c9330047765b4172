//! A consolidation in the background, for callers that report its progress and handle signals.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use super::consolidate::{Progress, consolidate_with};
use super::save::ShardedOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::mutex::Mutex;
use crate::sys::workers::{self, Workers};
use crate::write::save::SaveOptions;

/// A [`consolidate`] on a thread of its own, which ends with this. Dropped before its end, it leaves the output as it was.
#[derive(Debug)]
pub(crate) struct Consolidation {
    shared: Arc<Shared>,
    workers: Workers,
}

#[derive(Debug)]
struct Shared {
    input: PathBuf,
    output: PathBuf,
    stem: String,
    max_shard_size: u64,
    save: SaveOptions,
    numbers: Option<HashMap<String, u64>>,
    progress: Progress,
    /// `None` until it has ended.
    outcome: Mutex<Option<Result<Vec<String>>>>,
    ended: Condvar,
}

impl Shared {
    fn run(&self) {
        let options =
            ShardedOptions { stem: &self.stem, max_shard_size: self.max_shard_size, save: self.save };
        let mut names = Vec::new();
        let run = || {
            let numbers = self.numbers.as_ref();
            names = consolidate_with(&self.input, &self.output, options, numbers, &self.progress)?;
            Ok(())
        };
        let outcome = workers::catch_panic(run);
        *self.outcome.lock() = Some(outcome.map(|()| names));
        self.ended.notify_all();
    }
}

impl Consolidation {
    /// Starts to consolidate as [`consolidate`] does. `numbers` has the file of each tensor, from 1 on; these files are
    /// numbered and have an index even if there is only one.
    pub(crate) fn start(
        input: &Path,
        output: &Path,
        options: ShardedOptions<'_>,
        numbers: Option<HashMap<String, u64>>,
    ) -> Result<Consolidation> {
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|source| Error::io("find the directory", path, source))
        };
        let shared = Arc::new(Shared {
            input: absolute(input)?,
            output: absolute(output)?,
            stem: options.stem.to_string(),
            max_shard_size: options.max_shard_size,
            save: options.save,
            numbers,
            progress: Progress::default(),
            outcome: Mutex::new(None),
            ended: Condvar::new(),
        });
        let work = Arc::clone(&shared);
        let workers = Workers::start(1, move || work.run());
        if workers.is_empty() {
            shared.run();
        }
        Ok(Consolidation { shared, workers })
    }

    /// Waits until it has ended, or until `deadline`; returns the names of the files if it has.
    ///
    /// # Errors
    ///
    /// Those of [`consolidate`], once; [`ErrorKind::Closed`] after that.
    pub(crate) fn advance(&mut self, deadline: Option<Instant>) -> Result<Option<Vec<String>>> {
        self.workers.check("consolidation")?;
        let mut outcome = self.shared.outcome.lock();
        loop {
            match &mut *outcome {
                Some(Ok(names)) => return Ok(Some(names.clone())),
                Some(failed) => {
                    let closed = Err(Error::new(ErrorKind::Closed, "the consolidation has failed"));
                    return std::mem::replace(failed, closed).map(Some);
                }
                None => {}
            }
            match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return Ok(None),
                Some(left) => outcome.wait_for(&self.shared.ended, left),
                None => outcome.wait(&self.shared.ended),
            }
        }
    }

    /// Returns the bytes of all tensors; 0 until the headers are read.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.shared.progress.total.load(Ordering::Relaxed)
    }

    /// Returns the bytes that are written, or will be next.
    pub(crate) fn done_bytes(&self) -> u64 {
        self.shared.progress.done.load(Ordering::Relaxed)
    }
}

impl Drop for Consolidation {
    fn drop(&mut self) {
        self.shared.progress.is_cancelled.store(true, Ordering::Relaxed);
    }
}
