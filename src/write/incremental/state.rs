//! The state of a file that is written tensor by tensor.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::ranges::Ranges;
use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;
use crate::sys::fork::OwnerProcess;
use crate::sys::mutex::{Guard, Mutex};
use crate::write::atomic::AtomicFile;

const MAX_LISTED: usize = 20;

/// The state that a writer shares with its tensor writers.
#[derive(Debug)]
pub(super) struct Shared {
    /// The caller's path, for errors.
    pub(super) path: PathBuf,
    /// In file order.
    pub(super) tensors: Vec<Declared>,
    pub(super) by_name: HashMap<String, usize>,
    pub(super) durable: bool,
    pub(super) process: OwnerProcess,
    /// Locked by [`Shared::lock`] alone.
    pub(super) state: Mutex<State>,
}

#[derive(Debug)]
pub(super) struct Declared {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    /// Where its bytes begin, from the start of the file.
    pub(super) begin: u64,
    pub(super) nbytes: u64,
}

#[derive(Debug)]
pub(super) struct State {
    /// `None` once the writer is closed.
    pub(super) file: Option<Arc<AtomicFile>>,
    /// For each tensor.
    pub(super) written: Vec<Written>,
}

/// The bytes of a tensor that were written or are being written.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) bytes: Ranges,
    /// How many claims exist.
    pub(super) writers: usize,
    /// Whether a tensor without bytes was written.
    pub(super) is_written: bool,
}

impl Shared {
    /// Locks the state, in the process that created the file only: in a forked child, a thread that does not exist there
    /// may hold the lock forever.
    pub(super) fn lock(&self) -> Result<Guard<'_, State>> {
        self.process.check("save").map_err(|error| error.in_file(&self.path))?;
        Ok(self.state.lock())
    }

    pub(super) fn fail(&self, kind: ErrorKind, detail: String) -> Error {
        Error::new(kind, detail).in_file(&self.path)
    }

    pub(super) fn closed(&self) -> Error {
        self.fail(
            ErrorKind::Closed,
            "the file was committed or discarded already: begin a new one".to_string(),
        )
    }

    pub(super) fn missing(&self, state: &State) -> Vec<&Declared> {
        let pairs = self.tensors.iter().zip(&state.written);
        pairs.filter(|(tensor, written)| !written.contains_all_of(tensor)).map(|(tensor, _)| tensor).collect()
    }

    pub(super) fn check_complete(&self, state: &State) -> Result<()> {
        let missing = self.missing(state);
        if missing.is_empty() {
            return Ok(());
        }
        let names: Vec<String> =
            missing.iter().take(MAX_LISTED).map(|tensor| format!("{:?}", tensor.name)).collect();
        let more = missing.len().saturating_sub(MAX_LISTED);
        let more = if more > 0 { format!(", and {more} more") } else { String::new() };
        let detail = format!(
            "{} of {} tensors are missing, or parts of them: {}{more}; write them before the commit",
            missing.len(),
            self.tensors.len(),
            names.join(", ")
        );
        Err(self.fail(ErrorKind::DataLength, detail))
    }
}

impl Written {
    fn contains_all_of(&self, tensor: &Declared) -> bool {
        self.writers == 0 && self.bytes.reach(tensor.nbytes) && (tensor.nbytes > 0 || self.is_written)
    }
}
