//! The source of a file's bytes: a mapping, an open file, or memory. Knows nothing of headers and tensors.

use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};

use crate::error::{Error, ErrorKind, Result};
use crate::read::external::ExternalSource;
use crate::sys::direct_io::{DirectFile, StorageSpeed};
use crate::sys::directory::{Directory, identity, nul_in_path};
use crate::sys::mutex::OnceLock;
use crate::sys::page_cache::WindowReader;

/// How tensors are read from a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// By mapping it, private and writable: nothing is copied, and writes to tensors do not reach the file.
    #[default]
    Mmap,
    /// By reading it into memory of the caller's.
    Pread,
}

impl FromStr for Backend {
    type Err = Error;

    fn from_str(name: &str) -> Result<Backend> {
        match name {
            "mmap" => Ok(Backend::Mmap),
            "pread" => Ok(Backend::Pread),
            _ => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("unknown backend {name:?}: choose \"mmap\" or \"pread\""),
            )),
        }
    }
}

/// A private, copy-on-write mapping of a whole file. It needs no descriptor, and lives until its last owner drops it.
///
/// Pages that this process has not written to are those of the file: they change if another process changes the file in
/// place, and touching them raises SIGBUS if it truncates the file. Replacing the file by rename, as this library does,
/// is safe.
#[derive(Debug)]
pub struct Mapping {
    map: MmapRaw,
    path: PathBuf,
    /// Device and inode number. No other file has them while this one is mapped.
    identity: (u64, u64),
    is_owned: bool,
    storage_speed: Arc<StorageSpeed>,
    /// Whether pages that were copied are unmapped.
    is_transient: bool,
}

impl Mapping {
    pub(crate) fn new(file: &OpenFile, length: u64) -> Result<Mapping> {
        let OpenFile { file, path, storage_speed, .. } = file;
        let length = usize::try_from(length)
            .map_err(|_| Error::new(ErrorKind::Io, format!("{} is too large to map", path.display())))?;
        let metadata = file.metadata().map_err(|source| Error::io("inspect", path, source))?;
        // Without reserved swap, a model larger than memory can be mapped: most of it is never written to.
        // SAFETY: the pages may change, but no reference to them is made: reads copy by address, saves take `RawBytes`.
        let map = unsafe { MmapOptions::new().len(length).no_reserve_swap().map_copy(file) };
        let map = map.map_err(|source| cannot_map(path, source))?;
        // SAFETY: the call has no preconditions.
        let user = unsafe { libc::geteuid() };
        Ok(Mapping {
            map: map.into(),
            path: path.clone(),
            identity: identity(&metadata),
            is_owned: user == 0 || user == metadata.uid(),
            storage_speed: Arc::clone(storage_speed),
            is_transient: false,
        })
    }

    /// Maps the file once more, for a copy that leaves few of its pages resident. Returns `None` as
    /// [`Mapping::reopen`] does, or if the file cannot be mapped.
    pub(crate) fn transient(&self) -> Option<Mapping> {
        let mapping = Mapping::new(&self.reopen()?, self.len() as u64).ok()?;
        Some(Mapping { is_transient: true, ..mapping })
    }

    /// Unmaps the pages of `length` bytes from `start` on, which must be inside, if the mapping is transient.
    pub(crate) fn release(&self, start: usize, length: usize) {
        if self.is_transient {
            // Without it, the pages stay resident until the mapping is dropped.
            // SAFETY: the pages are those of the file, and the next access maps them again: `transient` gives the mapping
            // to code that only reads it.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, length) };
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether `mincore` tells which pages are in memory. It calls all pages of other users' files resident.
    pub(crate) fn is_residency_known(&self) -> bool {
        self.is_owned
    }

    /// Opens the file again. Returns `None` if it was replaced or removed, or cannot be opened.
    pub(crate) fn reopen(&self) -> Option<OpenFile> {
        let file = open_to_read(&self.path).ok()?;
        let is_same = file.metadata().is_ok_and(|metadata| identity(&metadata) == self.identity);
        is_same.then(|| OpenFile::with_speed(file, &self.path, &self.storage_speed))
    }

    /// Returns the address of the first byte. [`Mapping::len`] bytes are readable and writable there.
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Calls `madvise` for `length` bytes from `start` on, which must be inside the mapping.
    pub(crate) fn advise(&self, advice: Advice, start: usize, length: usize) -> io::Result<()> {
        self.map.advise_range(advice, start, length)
    }

    /// Returns the length of the file in bytes when it was mapped.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Returns whether the mapping has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Smaller copies are not worth opening the file again.
const REOPEN_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub(crate) struct ExternalMemory {
    pub(crate) start: *const u8,
    pub(crate) length: usize,
}

// SAFETY: the bytes are only read, and the contract of `ExternalMemory::new` covers every thread.
unsafe impl Send for ExternalMemory {}
// SAFETY: as above.
unsafe impl Sync for ExternalMemory {}

impl ExternalMemory {
    /// Returns the `length` bytes at `start`.
    ///
    /// # Safety
    ///
    /// The bytes must stay valid for reads on every thread, and nobody may write to them, until the result is dropped.
    pub(crate) unsafe fn new(start: *const u8, length: usize) -> ExternalMemory {
        ExternalMemory { start, length }
    }

    /// Copies the bytes from `offset` on to `buffer`. Panics if they are fewer.
    pub(crate) fn copy_to(&self, buffer: &mut [u8], offset: usize) {
        assert!(offset <= self.length && buffer.len() <= self.length - offset, "the range is inside");
        let source = self.start.wrapping_add(offset);
        // SAFETY: inside the memory (checked), which `new` requires to be valid. Nobody writes to it, so it cannot
        // overlap `buffer`.
        unsafe { std::ptr::copy_nonoverlapping(source, buffer.as_mut_ptr(), buffer.len()) }
    }
}

#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    /// The same file for direct reads, opened by the first one; `None` if its filesystem has none.
    direct: OnceLock<Option<DirectFile>>,
    /// Shared by all descriptors of the file that one handle opens.
    pub(crate) storage_speed: Arc<StorageSpeed>,
    /// `None` if the kernel does not read windows.
    windows: OnceLock<Option<WindowReader>>,
}

impl OpenFile {
    pub(crate) fn new(file: File, path: &Path) -> OpenFile {
        OpenFile::with_speed(file, path, &Arc::default())
    }

    fn with_speed(file: File, path: &Path, storage_speed: &Arc<StorageSpeed>) -> OpenFile {
        OpenFile {
            file,
            path: path.to_path_buf(),
            direct: OnceLock::new(),
            storage_speed: Arc::clone(storage_speed),
            windows: OnceLock::new(),
        }
    }

    pub(crate) fn direct(&self) -> Option<&DirectFile> {
        self.direct.get_or_init(|| DirectFile::reopen(&self.file)).as_ref()
    }

    pub(crate) fn windows(&self) -> Option<&WindowReader> {
        self.windows.get_or_init(|| WindowReader::new(&self.file)).as_ref()
    }
}

/// Where the bytes of a safetensors file are.
#[derive(Debug)]
pub(crate) enum Source {
    Mapped(Arc<Mapping>),
    File(OpenFile),
    Memory(ExternalMemory),
    External(ExternalSource),
}

/// What reads of a mapped file return. It makes no difference for other files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// The bytes of the file; of the mapping if they are less than 1 MiB together.
    File,
    /// The bytes of the mapping, with the changes that tensors over it have made.
    Mapping,
}

/// How bytes are copied out of a source.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ReadMethod<'a> {
    /// By reading the file.
    File(&'a OpenFile),
    /// By copying from the mapping. The file, if it could be reopened, is used to read pages that are not in memory.
    Mapping(&'a Mapping, Option<&'a OpenFile>),
    /// By copying from memory.
    Memory(&'a ExternalMemory),
    /// By requests to a source of the program.
    External(&'a ExternalSource),
}

impl Source {
    /// Reopens a file before `bytes` of it are copied, if they are many. Reading pages of a mapping that are not in memory
    /// is faster than touching them, and the descriptor for direct reads is closed when the copy is done. Pass the result
    /// to [`Source::method`].
    pub(crate) fn reopen(&self, bytes: usize) -> Option<OpenFile> {
        match self {
            Source::Mapped(mapping) if bytes >= REOPEN_BYTES => mapping.reopen(),
            // Without a descriptor for it, the file itself is used.
            Source::File(file) if bytes >= REOPEN_BYTES => {
                let clone = file.file.try_clone().ok()?;
                Some(OpenFile::with_speed(clone, &file.path, &file.storage_speed))
            }
            _ => None,
        }
    }

    /// Maps a mapped file once more before `bytes` of it are copied, if they are many, as [`Mapping::transient`].
    pub(crate) fn transient_mapping(&self, bytes: usize) -> Option<Mapping> {
        match self {
            Source::Mapped(mapping) if bytes >= REOPEN_BYTES => mapping.transient(),
            _ => None,
        }
    }

    /// Returns the address of the first byte, or `None` if the source is not in memory.
    pub(crate) fn as_ptr(&self) -> Option<*const u8> {
        match self {
            Source::Mapped(mapping) => Some(mapping.as_ptr().cast_const()),
            Source::Memory(memory) => Some(memory.start),
            Source::File(_) | Source::External(_) => None,
        }
    }

    /// Returns how many threads may read at once.
    pub(crate) fn max_requests(&self) -> usize {
        match self {
            Source::External(source) => source.max_requests(),
            Source::Mapped(_) | Source::File(_) | Source::Memory(_) => usize::MAX,
        }
    }

    /// Returns how to read the source. `reopened` is the result of [`Source::reopen`].
    pub(crate) fn method<'a>(&'a self, from: ReadFrom, reopened: Option<&'a OpenFile>) -> ReadMethod<'a> {
        match (self, from, reopened) {
            (Source::Mapped(_), ReadFrom::File, Some(file)) => ReadMethod::File(file),
            (Source::Mapped(mapping), ..) => ReadMethod::Mapping(mapping, reopened),
            (Source::File(file), ..) => ReadMethod::File(reopened.unwrap_or(file)),
            (Source::Memory(memory), ..) => ReadMethod::Memory(memory),
            (Source::External(source), ..) => ReadMethod::External(source),
        }
    }
}

/// Opens a regular file for reading. Returns its length in bytes too. `EISDIR` for a directory, `ENODEV` for a pipe, a
/// socket or a device.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    regular(open_to_read(path), path)
}

/// As [`open_regular`], for the file `name` in an open directory. `path` is for the errors.
pub(crate) fn open_regular_in(directory: &Directory, name: &OsStr, path: &Path) -> Result<(File, u64)> {
    regular(directory.open_at(name, libc::O_RDONLY | libc::O_NONBLOCK, 0), path)
}

fn regular(opened: io::Result<File>, path: &Path) -> Result<(File, u64)> {
    let file = opened.map_err(|source| match source.kind() {
        io::ErrorKind::InvalidInput => nul_in_path(path),
        _ => Error::io("open", path, source),
    })?;
    let metadata = file.metadata().map_err(|source| Error::io("inspect", path, source))?;
    refuse_irregular(path, &metadata)?;
    Ok((file, metadata.len()))
}

fn open_to_read(path: &Path) -> io::Result<File> {
    // Without O_NONBLOCK, opening a pipe would wait for a writer.
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)
}

/// Makes the kernel read further ahead in `file`, also when a mapping of it is touched.
pub(crate) fn expect_sequential(file: &File) {
    // It is only a hint, so errors do not matter.
    // SAFETY: no pointers are passed, and `file` keeps the descriptor open.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_SEQUENTIAL) };
}

fn refuse_irregular(path: &Path, metadata: &Metadata) -> Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(());
    }
    let (errno, remedy) = if kind.is_dir() {
        (libc::EISDIR, "a directory with a checkpoint is for load_sharded, or sft_checkpoint_open in C")
    } else if kind.is_fifo() {
        let remedy =
            "it is a pipe: read it to its end and pass the bytes to load, or to sft_file_open_buffer in C";
        (libc::ENODEV, remedy)
    } else {
        (libc::ENODEV, "it is a device or a socket: copy its data to a file first")
    };
    Err(Error::io("open as a regular file", path, io::Error::from_raw_os_error(errno)).with_remedy(remedy))
}

/// Returns the error for a file that the kernel cannot map.
fn cannot_map(path: &Path, source: io::Error) -> Error {
    const READ: &str = "read it with the backend \"pread\" (SFT_BACKEND_PREAD in C)";
    let remedy = match source.raw_os_error() {
        Some(libc::ENODEV) => format!("its filesystem does not support mappings: {READ}"),
        Some(libc::ENOMEM) => match full_map_count() {
            Some(most) => format!(
                "this process has reached the limit of mappings (vm.max_map_count is {most}): close files and drop \
                 mapped tensors, {READ}, or raise the limit (sysctl -w vm.max_map_count=...)"
            ),
            None => format!("the limit of address space is too small (ulimit -v): raise it, or {READ}"),
        },
        _ => READ.to_string(),
    };
    Error::io("map", path, source).with_remedy(&remedy)
}

/// Returns the limit of mappings per process if this one has reached it.
fn full_map_count() -> Option<usize> {
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok()?.trim().parse().ok()?;
    let (mut list, mut part, mut lines) = (File::open("/proc/self/maps").ok()?, [0; 8192], 0);
    // In small parts: a large buffer would need a mapping of its own.
    loop {
        match list.read(&mut part).ok()? {
            0 => break,
            count => lines += part[..count].iter().filter(|&&byte| byte == b'\n').count(),
        }
    }
    // The list is not exact: some mappings that count are not listed, and the other way round.
    (lines + 16 >= most).then_some(most)
}

/// Reads exactly `buffer.len()` bytes at `offset`.
pub(crate) fn read_exact_at(file: &File, path: &Path, buffer: &mut [u8], offset: u64) -> Result<()> {
    file.read_exact_at(buffer, offset).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => shrank(path),
        _ => Error::io("read", path, source),
    })
}

/// Returns the error for a file that was truncated after it was opened.
pub(crate) fn shrank(path: &Path) -> Error {
    let detail = "the file became shorter while it was read: something is writing to it; read it again when \
                  that is done";
    Error::new(ErrorKind::FileChanged, detail).in_file(path)
}
