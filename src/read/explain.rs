//! Explains how a file would be read, with the decisions of the loads themselves.

use std::ffi::CStr;

use crate::error::{Error, ErrorKind, Result};
use crate::read::file::TensorFile;
use crate::read::prefault::{self, BACKGROUND_BYTES};
use crate::read::prefetch_plan;
use crate::read::source::{ReadFrom, Source};
use crate::read::strategy::ReadStrategy;
use crate::sys::direct_io::Direct;
use crate::sys::filesystem::{Filesystem, Scope};
use crate::sys::page_cache::{Residency, cached_bytes};
use crate::sys::parallel::CHUNK_BYTES;
use crate::sys::threads::{ThreadLimit, threads};

/// Where a load of a whole file puts its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadTarget {
    /// In a mapping of the file.
    Mapping,
    /// In memory of their own.
    Memory,
    /// On a device.
    Device,
}

/// How a file would be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadPlan {
    /// The name of the filesystem.
    pub filesystem: &'static CStr,
    /// The bytes of the file in the page cache, in whole pages; `None` if that is unknown.
    pub cached_bytes: Option<u64>,
    /// The number of threads that read; 0 if pages are read when they are touched.
    pub readers: usize,
    /// The most bytes of one read; `None` without a limit.
    pub request_bytes: Option<usize>,
    /// Whether reads of bytes that are not in the page cache bypass it.
    pub is_direct: bool,
    /// Why.
    pub reason: &'static CStr,
}

/// The bytes of a slab of pinned memory (`cpp/device/pinned_pool.h`).
const SLAB_BYTES: usize = 2 << 20;

impl TensorFile {
    /// Explains how a load of the whole file to `target` would read it now.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] for bytes in memory; [`ErrorKind::FileChanged`] if the path no longer leads to the file.
    pub fn explain(&self, target: LoadTarget) -> Result<LoadPlan> {
        let opened = match self.source() {
            Source::Memory(_) => {
                let detail = "bytes in memory: there is no file to read; open a file";
                return Err(Error::new(ErrorKind::InvalidArgument, detail));
            }
            Source::External(_) => {
                let detail = "a source of the program: it decides how its bytes are read";
                return Err(self.locate(Error::new(ErrorKind::InvalidArgument, detail)));
            }
            source => source.reopen(usize::MAX),
        };
        let replaced = || {
            let detail = "the path leads to another file, or to none; open the file again";
            self.locate(Error::new(ErrorKind::FileChanged, detail))
        };
        let opened = opened.ok_or_else(replaced)?;
        let metadata = opened.file.metadata().map_err(|source| Error::io("inspect", &opened.path, source))?;
        let (length, bytes) = (metadata.len(), metadata.len() as usize);
        let method = self.source().method(ReadFrom::File, Some(&opened));
        let (limit, extent) = (ThreadLimit::current()?, || 0..length);
        let (strategy, readers) = match target {
            LoadTarget::Mapping => prefault::background_plan(Some(&opened), bytes, length, limit),
            LoadTarget::Memory => {
                let strategy = ReadStrategy::of(method, bytes, extent, CHUNK_BYTES, limit)?;
                (strategy, strategy.threads)
            }
            LoadTarget::Device => {
                let strategy = ReadStrategy::of(method, bytes, extent, SLAB_BYTES, limit)?;
                let (slabs, most) = (bytes.div_ceil(SLAB_BYTES), threads()?.checked_sub(1));
                (strategy, prefetch_plan::thread_count(strategy, bytes, slabs, limit, most))
            }
        };
        let is_direct = strategy.direct != Direct::Never && opened.direct().is_some();
        Ok(LoadPlan {
            filesystem: Filesystem::of(&opened.file).name,
            cached_bytes: cached_bytes(&opened.file, extent()),
            readers,
            request_bytes: strategy.request_bytes.filter(|_| readers > 0),
            is_direct,
            reason: reason(target, bytes, strategy, readers, is_direct),
        })
    }
}

fn reason(
    target: LoadTarget,
    bytes: usize,
    strategy: ReadStrategy,
    readers: usize,
    is_direct: bool,
) -> &'static CStr {
    if target == LoadTarget::Mapping && readers == 0 {
        return if bytes < BACKGROUND_BYTES {
            c"the file is too small for background threads: pages are read when they are touched"
        } else {
            c"the file needs more than half of the available memory, or threads is 1: pages are read when they are touched"
        };
    }
    match (strategy.residency, strategy.scope) {
        _ if strategy.request_bytes.is_none() && strategy.residency != Residency::Cached => {
            c"the file is small"
        }
        _ if is_direct && strategy.direct == Direct::Always => c"the setting of direct reads asks for it",
        (Residency::Cached, _) if !is_direct => c"the page cache has the file",
        (_, Scope::Fuse) if target == LoadTarget::Mapping => {
            c"a process answers each request: windows of 2 MiB make the requests large"
        }
        (_, Scope::Remote | Scope::Fuse) => {
            c"a server answers each request: many requests at once hide the latency"
        }
        (Residency::Unknown, _) => c"the kernel does not tell whether the page cache has the file",
        _ if is_direct => {
            c"reads past the page cache save a copy; slow storage is read through it after 32 MiB"
        }
        _ => c"parts of the file are not in the page cache: several reads keep the disk busy",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::read::source::Backend;

    fn file_of(bytes: usize) -> tempfile::NamedTempFile {
        let mut contents =
            format!(r#"{{"a":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
        contents.extend(std::iter::repeat_n(' ', contents.len().next_multiple_of(8) - contents.len()));
        let mut file = (contents.len() as u64).to_le_bytes().to_vec();
        file.extend(contents.as_bytes());
        file.resize(file.len() + bytes, 1);
        let path = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file");
        std::fs::write(path.path(), file).expect("written");
        path
    }

    #[test]
    fn a_cached_file_is_copied_and_mapped() {
        let file = file_of(20 << 20);
        for backend in [Backend::Mmap, Backend::Pread] {
            let opened = TensorFile::open(file.path(), backend).expect("valid");
            for target in [LoadTarget::Mapping, LoadTarget::Memory, LoadTarget::Device] {
                let plan = opened.explain(target).expect("a plan");
                assert_eq!((plan.filesystem, plan.is_direct), (c"tmpfs", false));
                assert!(plan.cached_bytes.is_none_or(|cached| cached >= 20 << 20));
                assert_eq!((plan.request_bytes, plan.reason), (None, c"the page cache has the file"));
                assert!(plan.readers > 0);
            }
        }
    }

    #[test]
    fn small_files_and_bytes_in_memory() {
        let file = file_of(100);
        let opened = TensorFile::open(file.path(), Backend::Mmap).expect("valid");
        let plan = opened.explain(LoadTarget::Mapping).expect("a plan");
        assert_eq!(plan.readers, 0);
        assert!(plan.reason.to_str().expect("ASCII").contains("too small"));
        let bytes = std::fs::read(file.path()).expect("there");
        // SAFETY: `bytes` outlives the file, and nobody writes to it.
        let opened = unsafe { TensorFile::from_memory(bytes.as_ptr(), bytes.len()) }.expect("valid");
        assert_eq!(
            opened.explain(LoadTarget::Memory).expect_err("no file").kind(),
            ErrorKind::InvalidArgument
        );
    }

    #[test]
    fn a_replaced_file_is_an_error() {
        let file = file_of(100);
        let opened = TensorFile::open(file.path(), Backend::Mmap).expect("valid");
        drop(file);
        assert_eq!(opened.explain(LoadTarget::Memory).expect_err("gone").kind(), ErrorKind::FileChanged);
    }
}
