//! The `sft_file` handle, which several modules take.

use std::sync::Arc;

use super::pointer;
use super::types::sft_str;
use crate::error::{Error, ErrorKind, Result};
use crate::read::file::TensorFile;

/// An open file, or the bytes of one in memory.
pub struct sft_file {
    /// `None` after `sft_file_close`.
    state: Option<OpenState>,
}

/// The contents of a handle while its file is open.
pub(super) struct OpenState {
    pub(super) file: Arc<TensorFile>,
    /// The metadata by position, which the header's map cannot return in constant time. Points into `file`, whose header
    /// never changes.
    pub(super) metadata: Vec<(sft_str, sft_str)>,
}

impl sft_file {
    pub(super) fn new(file: Arc<TensorFile>) -> sft_file {
        let entries = file.header().metadata().into_iter().flatten();
        let metadata = entries.map(|(key, value)| (key.as_str().into(), value.as_str().into())).collect();
        sft_file { state: Some(OpenState { file, metadata }) }
    }

    pub(super) fn close(&mut self) {
        self.state = None;
    }

    /// Returns the state of a handle, or an error if it was closed.
    ///
    /// # Safety
    ///
    /// As for [`pointer::shared`].
    pub(super) unsafe fn state<'a>(file: *const sft_file) -> Result<&'a OpenState> {
        // SAFETY: the caller keeps the contract of `pointer::shared`, which is this function's.
        let file = unsafe { pointer::shared(file, "file") }?;
        file.state.as_ref().ok_or_else(|| Error::new(ErrorKind::Closed, "File is closed"))
    }
}

// Several threads may use one handle at once (header, "Threads").
const _: () = pointer::assert_sync::<TensorFile>();
