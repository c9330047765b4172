//! The incremental writer.

use super::ffi::{Entry, Piece, Spec};
use super::save::{as_metadata, as_spec, raw_bytes};
use super::{Result, as_path};
use crate::error::Error;
use crate::format::layout::{DEFAULT_ALIGNMENT, TensorSpec};
use crate::write::incremental;
use crate::write::save::SaveOptions;

pub struct IncrementalWriter(incremental::IncrementalWriter);

pub fn create_incremental_writer(
    specs: &[Spec<'_>],
    metadata: &[Entry],
    has_metadata: bool,
    path: &[u8],
    durable: bool,
) -> Result<Box<IncrementalWriter>> {
    let tensors = specs.iter().map(as_spec).collect::<Result<Vec<TensorSpec<'_>>>>()?;
    let metadata = as_metadata(metadata)?;
    let options = SaveOptions { alignment: DEFAULT_ALIGNMENT, durable };
    let writer = incremental::IncrementalWriter::create(
        &tensors,
        has_metadata.then_some(&metadata),
        as_path(path),
        options,
    );
    Ok(Box::new(IncrementalWriter(writer.map_err(|error: Error| error.in_file(as_path(path)))?)))
}

impl IncrementalWriter {
    pub fn begin(&self, spec: &Spec<'_>) -> Result<Box<TensorWriter>> {
        Ok(Box::new(TensorWriter(self.0.begin(as_spec(spec)?)?)))
    }

    pub fn missing(&self) -> Result<Vec<String>> {
        Ok(self.0.missing()?.into_iter().map(str::to_owned).collect())
    }

    pub fn is_open(&self) -> bool {
        self.0.is_open()
    }

    pub fn commit(&self) -> Result<()> {
        Ok(self.0.commit()?)
    }

    pub fn make_joinable(&self) -> Result<Vec<u8>> {
        Ok(self.0.make_joinable()?.into_os_string().into_encoded_bytes())
    }

    pub fn commit_joined(&self) -> Result<()> {
        Ok(self.0.commit_joined()?)
    }

    pub fn discard(&self) {
        self.0.discard();
    }
}

/// One tensor of it that is being written.
pub struct TensorWriter(incremental::TensorWriter);

impl TensorWriter {
    /// # Safety
    ///
    /// The bytes of `pieces` must be valid for reads during the call.
    pub unsafe fn write(&mut self, pieces: &[Piece]) -> Result<()> {
        // SAFETY: the clause above.
        Ok(unsafe { raw_bytes(pieces) }.try_for_each(|bytes| self.0.write(bytes))?)
    }
}

// By value, because the bridge transfers ownership of a Box.
#[allow(clippy::boxed_local)]
pub fn finish_tensor(writer: Box<TensorWriter>) -> Result<()> {
    Ok(writer.0.finish()?)
}
