//! The writer of a file, tensor by tensor.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::state::{Declared, Shared, State, Written};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::Metadata;
use crate::format::layout::{Layout, TensorSpec};
use crate::sys::fork::OwnerProcess;
use crate::sys::mutex::Mutex;
use crate::sys::raw_bytes::RawBytes;
use crate::write::atomic::AtomicFile;
use crate::write::save::SaveOptions;

/// A writer of one file, tensor by tensor. The file appears under its name only once [`IncrementalWriter::commit`] has
/// returned; dropped before that, the writer leaves the target as it was and nothing beside it.
///
/// ```
/// # fn main() -> safetensors_torch::Result<()> {
/// use safetensors_torch::{Dtype, SaveOptions, IncrementalWriter, TensorSpec};
///
/// let path = std::env::temp_dir().join(format!("doc-incremental-{}.safetensors", std::process::id()));
/// let first = TensorSpec { name: "first", dtype: Dtype::U8, shape: &[3] };
/// let second = TensorSpec { name: "second", dtype: Dtype::U8, shape: &[2] };
/// let writer = IncrementalWriter::create(&[first, second], None, &path, SaveOptions::default())?;
/// writer.write("second", &[4, 5])?;
/// writer.write("first", &[1, 2, 3])?;
/// writer.commit()?;
/// # std::fs::remove_file(&path).expect("removed");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct IncrementalWriter {
    shared: Arc<Shared>,
}

impl IncrementalWriter {
    /// Creates a file with `tensors` and `metadata` that will be at `path`. Reserves its space and writes its header.
    ///
    /// # Errors
    ///
    /// Those of [`Layout::plan`] and of [`AtomicFile::create`].
    pub fn create(
        tensors: &[TensorSpec<'_>],
        metadata: Option<&Metadata>,
        path: &Path,
        options: SaveOptions,
    ) -> Result<IncrementalWriter> {
        let layout =
            Layout::plan(tensors, metadata, options.alignment).map_err(|error| error.in_file(path))?;
        let file = AtomicFile::create(path, layout.total_bytes())?;
        file.write_at(layout.header(), 0)?;
        let data_start = layout.header().len() as u64;
        let declared = layout.order().iter().map(|place| {
            let spec = tensors[place.index];
            Declared {
                name: spec.name.to_string(),
                dtype: spec.dtype,
                shape: spec.shape.to_vec(),
                begin: data_start + place.begin,
                nbytes: place.end - place.begin,
            }
        });
        let tensors: Vec<Declared> = declared.collect();
        let by_name =
            tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.clone(), index)).collect();
        let written = (0..tensors.len()).map(|_| Written::default()).collect();
        let state = Mutex::new(State { file: Some(Arc::new(file)), written });
        let (path, process) = (path.to_path_buf(), OwnerProcess::current());
        let shared = Shared { path, tensors, by_name, durable: options.durable, process, state };
        Ok(IncrementalWriter { shared: Arc::new(shared) })
    }

    /// Writes all bytes of the tensor `name`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TensorNotFound`]; [`ErrorKind::Duplicate`] if it was written before; [`ErrorKind::BufferSize`];
    /// [`ErrorKind::Closed`]; [`ErrorKind::Io`], after which it may be written again.
    pub fn write<'a>(&self, name: &str, bytes: impl Into<RawBytes<'a>>) -> Result<()> {
        let bytes = bytes.into();
        let index = self.require(name)?;
        let tensor = &self.shared.tensors[index];
        if bytes.len() as u64 != tensor.nbytes {
            let detail =
                format!("tensor {name:?} takes {} bytes, but {} were given", tensor.nbytes, bytes.len());
            return Err(self.shared.fail(ErrorKind::BufferSize, detail));
        }
        self.write_range(index, 0, bytes)
    }

    /// Writes a part of the tensor `name`, from its byte `offset` on. Parts may arrive in any order, and must not overlap.
    ///
    /// # Errors
    ///
    /// As [`IncrementalWriter::write`].
    pub fn write_part<'a>(&self, name: &str, offset: u64, bytes: impl Into<RawBytes<'a>>) -> Result<()> {
        let bytes = bytes.into();
        let index = self.require(name)?;
        let tensor = &self.shared.tensors[index];
        let end = offset.checked_add(bytes.len() as u64).filter(|&end| end <= tensor.nbytes);
        if end.is_none() {
            let detail = format!(
                "tensor {name:?} takes {} bytes, but {} were given for byte {offset} and those behind",
                tensor.nbytes,
                bytes.len()
            );
            return Err(self.shared.fail(ErrorKind::BufferSize, detail));
        }
        self.write_range(index, offset, bytes)
    }

    fn write_range(&self, index: usize, offset: u64, bytes: RawBytes<'_>) -> Result<()> {
        let claim = Claim::new(&self.shared, index, offset..offset + bytes.len() as u64)?;
        claim.write(offset, bytes)?;
        claim.keep();
        Ok(())
    }

    /// Returns a writer for the tensor `spec`, to which its bytes are appended.
    ///
    /// # Errors
    ///
    /// As [`IncrementalWriter::write`]; [`ErrorKind::InvalidArgument`] if the tensor was declared with another dtype or
    /// shape.
    pub fn begin(&self, spec: TensorSpec<'_>) -> Result<TensorWriter> {
        let index = self.require(spec.name)?;
        let tensor = &self.shared.tensors[index];
        if (tensor.dtype, tensor.shape.as_slice()) != (spec.dtype, spec.shape) {
            let detail = format!(
                "tensor {:?} was declared as {} of shape {:?}, but given as {} of shape {:?}; convert it",
                spec.name, tensor.dtype, tensor.shape, spec.dtype, spec.shape
            );
            return Err(self.shared.fail(ErrorKind::InvalidArgument, detail));
        }
        let claim = Claim::new(&self.shared, index, 0..tensor.nbytes)?;
        Ok(TensorWriter { claim, next: 0, nbytes: tensor.nbytes })
    }

    fn require(&self, name: &str) -> Result<usize> {
        self.shared.by_name.get(name).copied().ok_or_else(|| {
            let detail =
                format!("no tensor {name:?} was declared when the file was begun: declare all of them");
            self.shared.fail(ErrorKind::TensorNotFound, detail)
        })
    }

    /// Returns the tensors that are incomplete, in file order.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] in another process.
    pub fn missing(&self) -> Result<Vec<&str>> {
        let state = self.shared.lock()?;
        Ok(self.shared.missing(&state).into_iter().map(|tensor| tensor.name.as_str()).collect())
    }

    /// Whether tensors can be written: the writer belongs to this process, and was neither committed nor discarded.
    pub fn is_open(&self) -> bool {
        self.shared.lock().is_ok_and(|state| state.file.is_some())
    }

    /// Makes the staged file joinable: other processes can write slices of its tensors, as a
    /// [`JoinedFile`](crate::JoinedFile). Returns the path of the staged file, for them.
    ///
    /// # Errors
    ///
    /// Those of [`AtomicFile::make_joinable`]; [`ErrorKind::InvalidArgument`] if another thread is writing a tensor;
    /// [`ErrorKind::Closed`].
    pub fn make_joinable(&self) -> Result<PathBuf> {
        let shared = &self.shared;
        let mut state = shared.lock()?;
        let file = state.file.as_mut().ok_or_else(|| shared.closed())?;
        let file = Arc::get_mut(file).ok_or_else(|| {
            let detail =
                "a tensor is being written; make the file joinable before the first write".to_string();
            shared.fail(ErrorKind::InvalidArgument, detail)
        })?;
        file.make_joinable()
    }

    /// Replaces the target by the file.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLength`] lists the tensors that are missing, and [`ErrorKind::InvalidArgument`] says that another
    /// thread is still writing; the writer then stays open. [`ErrorKind::InvalidArgument`] in another process;
    /// [`ErrorKind::Closed`]; those of [`AtomicFile::commit`].
    pub fn commit(&self) -> Result<()> {
        self.commit_if(|shared, state| shared.check_complete(state))
    }

    /// Replaces the target by the file, to which other processes have written. The caller guarantees that they have finished,
    /// and that they and this writer have written every byte of each tensor: bytes that nobody wrote are zero.
    ///
    /// # Errors
    ///
    /// Those of [`IncrementalWriter::commit`], except for missing tensors.
    pub fn commit_joined(&self) -> Result<()> {
        self.commit_if(|_, _| Ok(()))
    }

    fn commit_if(&self, check: impl Fn(&Shared, &State) -> Result<()>) -> Result<()> {
        let shared = &self.shared;
        let file = {
            let mut state = shared.lock()?;
            if state.file.is_none() {
                return Err(shared.closed());
            }
            if let Some(index) = state.written.iter().position(|written| written.writers > 0) {
                let name = &shared.tensors[index].name;
                let detail = format!("tensor {name:?} is still being written: commit when that has returned");
                return Err(shared.fail(ErrorKind::InvalidArgument, detail));
            }
            check(shared, &state)?;
            // A thread that writes is counted in `writers`, and drops its `Arc` before it is uncounted: this is the last.
            state.file.take().and_then(Arc::into_inner).expect("no claim is left")
        };
        file.commit(shared.durable)
    }

    /// Discards the file: the target stays as it was, and writes in progress have no effect. Does nothing in another
    /// process.
    pub fn discard(&self) {
        // Dropped after the lock is released, because removing a file takes a while.
        let file = self.shared.lock().ok().and_then(|mut state| state.file.take());
        drop(file);
    }
}

/// An exclusive right to write some bytes of a tensor, until it is dropped. The bytes count as written once it is kept.
#[derive(Debug)]
struct Claim {
    shared: Arc<Shared>,
    /// `None` only during the drop.
    file: Option<Arc<AtomicFile>>,
    index: usize,
    bytes: Range<u64>,
    is_kept: bool,
}

impl Claim {
    fn new(shared: &Arc<Shared>, index: usize, bytes: Range<u64>) -> Result<Claim> {
        let tensor = &shared.tensors[index];
        let mut state = shared.lock()?;
        let file = state.file.clone().ok_or_else(|| shared.closed())?;
        let written = &mut state.written[index];
        let is_free = if tensor.nbytes == 0 {
            !std::mem::replace(&mut written.is_written, true)
        } else {
            written.bytes.insert(bytes.clone())
        };
        if !is_free {
            let what = if bytes == (0..tensor.nbytes) {
                String::new()
            } else {
                format!(" in part: bytes {} to {}", bytes.start, bytes.end)
            };
            let detail = format!("tensor {:?} was written already{what}; give each once", tensor.name);
            return Err(shared.fail(ErrorKind::Duplicate, detail));
        }
        written.writers += 1;
        Ok(Claim { shared: Arc::clone(shared), file: Some(file), index, bytes, is_kept: false })
    }

    /// Writes at `offset` of the tensor, within the claimed bytes.
    fn write(&self, offset: u64, bytes: RawBytes<'_>) -> Result<()> {
        let file = self.file.as_ref().expect("there until the claim is dropped");
        file.write_at(bytes, self.shared.tensors[self.index].begin + offset)
    }

    fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // In another process nothing can be written any more.
        let Ok(mut state) = self.shared.lock() else { return };
        self.file = None;
        let written = &mut state.written[self.index];
        written.writers -= 1;
        if !self.is_kept {
            written.bytes.remove(self.bytes.clone());
            written.is_written = false;
        }
    }
}

/// A writer to which the bytes of one tensor are appended. The tensor counts as written once [`TensorWriter::finish`] has
/// returned; dropped before that, it can be written again.
#[derive(Debug)]
pub struct TensorWriter {
    claim: Claim,
    next: u64,
    nbytes: u64,
}

impl TensorWriter {
    /// Appends `bytes`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::BufferSize`] if they are more than the tensor has; [`ErrorKind::Io`].
    pub fn write<'a>(&mut self, bytes: impl Into<RawBytes<'a>>) -> Result<()> {
        let bytes = bytes.into();
        let end = self.next + bytes.len() as u64;
        if end > self.nbytes {
            return Err(self.wrong_size(end));
        }
        self.claim.write(self.next, bytes)?;
        self.next = end;
        Ok(())
    }

    /// Declares the tensor complete.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::BufferSize`] if it is not.
    pub fn finish(self) -> Result<()> {
        if self.next != self.nbytes {
            return Err(self.wrong_size(self.next));
        }
        self.claim.keep();
        Ok(())
    }

    fn wrong_size(&self, given: u64) -> Error {
        let shared = &self.claim.shared;
        let name = &shared.tensors[self.claim.index].name;
        let detail = format!("tensor {name:?} takes {} bytes, but {given} were given", self.nbytes);
        shared.fail(ErrorKind::BufferSize, detail)
    }
}
