//! A file that several processes write: one creates it and commits it, the others join it while it is staged.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::atomic::is_staged_name;
use super::write_back;
use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;
use crate::format::header::Header;
use crate::format::slice::{AxisRange, Slice};
use crate::read::file::TensorFile;
use crate::read::source::Backend;
use crate::sys::fork::OwnerProcess;
use crate::sys::raw_bytes::{self, RawBytes};
use crate::sys::signals::block_write_signals;

/// The staged file of an [`AtomicFile`](crate::AtomicFile) or [`IncrementalWriter`](crate::IncrementalWriter) of another
/// process, to write parts of its tensors. Its owner commits it once all processes have finished.
///
/// ```
/// # fn main() -> safetensors_torch::Result<()> {
/// use safetensors_torch::{AxisRange, Dtype, IncrementalWriter, JoinedFile, SaveOptions, TensorSpec};
///
/// # let directory = tempfile::tempdir().expect("a directory");
/// # let path = directory.path().join("model.safetensors");
/// // One process creates the file, and sends the name of the staged file to the others.
/// let weight = TensorSpec { name: "weight", dtype: Dtype::U8, shape: &[2, 2] };
/// let writer = IncrementalWriter::create(&[weight], None, &path, SaveOptions::default())?;
/// let staged = writer.make_joinable()?;
/// // Each writes its part: here the two columns.
/// for (column, bytes) in [(0, [1, 3]), (1, [2, 4])] {
///     let file = JoinedFile::open(&staged)?;
///     let rows = AxisRange { start: 0, stop: 2, step: 1 };
///     file.write_slice("weight", &[rows, AxisRange { start: column, stop: column + 1, step: 1 }], &bytes)?;
///     file.finish(false)?;
/// }
/// // Once all have finished, the first one commits.
/// writer.commit_joined()?;
/// assert!(std::fs::read(&path).expect("committed").ends_with(&[1, 2, 3, 4]));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct JoinedFile {
    /// Its header is complete; its data is not. It has a descriptor of its own, because NFS reads each page before a write
    /// to a file that is open for both.
    tensors: TensorFile,
    file: File,
    path: PathBuf,
    process: OwnerProcess,
}

impl JoinedFile {
    /// Opens the staged file at `path`, which its owner has returned from
    /// [`IncrementalWriter::make_joinable`](crate::IncrementalWriter::make_joinable).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] if `path` does not have the name of a staged file; those of [`TensorFile::open`].
    pub fn open(path: &Path) -> Result<JoinedFile> {
        // Another file would be overwritten in place.
        if !path.file_name().is_some_and(is_staged_name) {
            let detail = "not a file that another process is saving; pass the path that make_joinable has returned there";
            return Err(Error::new(ErrorKind::InvalidArgument, detail).in_file(path));
        }
        let explain = |error: Error| {
            error.with_remedy(
                "the process that saves it has ended, or has another view of this directory: save to a \
                 directory that all processes share",
            )
        };
        let tensors = TensorFile::open(path, Backend::Pread).map_err(explain)?;
        let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(path);
        let file = file.map_err(|source| explain(Error::io("join", path, source)))?;
        Ok(JoinedFile { tensors, file, path: path.to_path_buf(), process: OwnerProcess::current() })
    }

    /// Returns the header, with all tensors of the file.
    pub fn header(&self) -> &Header {
        self.tensors.header()
    }

    /// Writes a slice of the tensor `name`, given one range per dimension. `bytes` are its elements in row-major order.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TensorNotFound`]; [`ErrorKind::Slice`]; [`ErrorKind::BufferSize`]; [`ErrorKind::Io`];
    /// [`ErrorKind::InvalidArgument`] in another process.
    pub fn write_slice<'a>(
        &self,
        name: &str,
        ranges: &[AxisRange],
        bytes: impl Into<RawBytes<'a>>,
    ) -> Result<()> {
        let bytes = bytes.into();
        let (index, slice) = self.plan_slice(name, None, ranges)?;
        if bytes.len() as u64 != slice.nbytes() {
            let detail = format!(
                "slice of tensor {name:?}: it takes {} bytes, but {} were given",
                slice.nbytes(),
                bytes.len()
            );
            return Err(Error::new(ErrorKind::BufferSize, detail).in_file(&self.path));
        }
        self.write_part(index, &slice, 0, bytes)
    }

    /// Returns the index of the tensor `name`, which must have this dtype if one is given, and a slice of it.
    pub(crate) fn plan_slice(
        &self,
        name: &str,
        dtype: Option<Dtype>,
        ranges: &[AxisRange],
    ) -> Result<(usize, Slice)> {
        let index = self.tensors.require(name)?;
        let found = self.tensors.tensor(index)?.dtype;
        if let Some(dtype) = dtype.filter(|&dtype| dtype != found) {
            let detail = format!("tensor {name:?}: the file has {found}, but {dtype} was given; convert it");
            return Err(Error::new(ErrorKind::InvalidArgument, detail).in_file(&self.path));
        }
        Ok((index, self.tensors.slice(index, ranges)?))
    }

    /// Writes `bytes` of a slice of the tensor number `index`, from byte `offset` of the slice on; they must not exceed it.
    pub(crate) fn write_part(
        &self,
        index: usize,
        slice: &Slice,
        offset: u64,
        bytes: RawBytes<'_>,
    ) -> Result<()> {
        self.process.check("save").map_err(|error| error.in_file(&self.path))?;
        let begin = self.tensors.byte_range(&self.tensors.tensor(index)?).start;
        let mut done = 0;
        let written = block_write_signals(|| {
            slice.byte_ranges_of(offset..offset + bytes.len() as u64).try_for_each(|range| {
                let length = (range.end - range.start) as usize;
                let part = bytes.part(done..done + length);
                done += length;
                raw_bytes::write_all_at(&self.file, part, begin + range.start)
            })
        });
        written.map_err(|source| Error::io("write", &self.path, source))
    }

    /// Returns the errors of earlier writes that the filesystem has kept until now, and sends the bytes to other machines that
    /// share it. With `durable`, returns once the bytes are on the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`].
    pub fn finish(self, durable: bool) -> Result<()> {
        let synchronized = if durable { self.file.sync_data() } else { Ok(()) };
        let finished = synchronized.and_then(|()| write_back::check_deferred_errors(&self.file));
        finished.map_err(|source| Error::io("write", &self.path, source))
    }
}
