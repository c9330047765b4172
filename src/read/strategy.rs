//! Decides how a file is read, given where its bytes are and where they go.

use std::ops::Range;

use crate::error::Result;
use crate::read::external::REQUEST_BYTES;
use crate::read::source::{OpenFile, ReadMethod};
use crate::sys::buffers::Buffers;
use crate::sys::direct_io::{Direct, direct};
use crate::sys::filesystem::{Filesystem, Scope};
use crate::sys::page_cache::{Residency, WINDOW_BYTES, residency};
use crate::sys::parallel::{self, CHUNK_BYTES, MIN_PARALLEL_BYTES};
use crate::sys::threads::ThreadLimit;

/// The bytes of one read outside the page cache, unless it is direct. Network filesystems send no larger requests.
pub(crate) const COLD_READ_BYTES: usize = 1 << 20;

/// The number of threads that read from a disk through the page cache; they mostly wait.
pub(crate) const DISK_READERS: usize = 4;

/// The number of threads that read from a disk past the page cache. Each waits for its own read, which the kernel cuts into
/// several requests.
const DIRECT_READERS: usize = 8;

/// The number of threads that read from a network filesystem, to have as many requests in flight.
pub(crate) const REMOTE_READERS: usize = 16;

/// The number of requests at once to a source, such as a bucket: each connection has a limit of its own, and half of this
/// number took one and a half times as long (docs/remote.md).
pub(crate) const SOURCE_READERS: usize = 32;

/// The least bytes of one of several requests to a source.
const LEAST_REQUEST_BYTES: usize = 1 << 20;

/// The number of threads that read windows through FUSE. Each sends several requests. The kernel allows 12 by default, which
/// five threads use up; filesystems of buckets allow more (64 in mountpoint-s3).
pub(crate) const WINDOW_READERS: usize = 8;

/// How to read a source: with how many threads, and how much with one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReadStrategy {
    pub(crate) residency: Residency,
    /// The scope of the filesystem; `Local` if the file is in the page cache.
    pub(crate) scope: Scope,
    /// The threads that its bytes are worth.
    pub(crate) threads: usize,
    /// The most bytes of one read; `None` for bytes in memory, and for so few that it makes no difference.
    pub(crate) request_bytes: Option<usize>,
    /// The bytes that a thread takes at a time.
    pub(crate) chunk_bytes: usize,
    /// Which reads bypass the page cache: all, those of bytes that it does not have, or none.
    pub(crate) direct: Direct,
}

impl ReadStrategy {
    /// Returns the strategy for `bytes` inside `extent`, which threads take in pieces of `piece_bytes`.
    ///
    /// # Errors
    ///
    /// Those of [`direct`].
    pub(crate) fn of(
        method: ReadMethod<'_>,
        bytes: usize,
        extent: impl FnOnce() -> Range<u64>,
        piece_bytes: usize,
        threads: ThreadLimit,
    ) -> Result<ReadStrategy> {
        let wanted = parallel::thread_count(threads, bytes, bytes.div_ceil(piece_bytes));
        Ok(match method {
            ReadMethod::File(file) => ReadStrategy::choose(file, bytes, extent, direct()?, wanted, threads),
            ReadMethod::Mapping(_, Some(file)) => {
                ReadStrategy::of_mapped(file, bytes, extent, wanted, threads)
            }
            ReadMethod::Mapping(_, None) | ReadMethod::Memory(_) => {
                ReadStrategy::in_memory(Residency::Unknown, wanted)
            }
            ReadMethod::External(source) => ReadStrategy::of_requests(bytes, source.max_requests(), threads),
        })
    }

    /// As [`ReadStrategy::of`], for bytes that must come into the page cache. If they are there, `wanted` threads read.
    pub(crate) fn of_mapped(
        file: &OpenFile,
        bytes: usize,
        extent: impl FnOnce() -> Range<u64>,
        wanted: usize,
        threads: ThreadLimit,
    ) -> ReadStrategy {
        let strategy = ReadStrategy::choose(file, bytes, extent, Direct::Never, wanted, threads);
        match strategy.scope {
            Scope::Fuse => ReadStrategy {
                threads: wanted.max(threads.cap(WINDOW_READERS)),
                chunk_bytes: WINDOW_BYTES as usize,
                ..strategy
            },
            _ => strategy,
        }
    }

    /// Returns the strategy for a source that answers requests, so many at once.
    fn of_requests(bytes: usize, max_requests: usize, threads: ThreadLimit) -> ReadStrategy {
        let threads = threads.cap(SOURCE_READERS).min(max_requests);
        // Requests for few bytes are smaller, so that all threads have one.
        let share = bytes.div_ceil(threads).next_multiple_of(LEAST_REQUEST_BYTES);
        ReadStrategy {
            residency: Residency::Unknown,
            scope: Scope::Remote,
            threads,
            request_bytes: Some(REQUEST_BYTES),
            chunk_bytes: share.clamp(LEAST_REQUEST_BYTES, REQUEST_BYTES),
            direct: Direct::Never,
        }
    }

    fn choose(
        OpenFile { file, .. }: &OpenFile,
        bytes: usize,
        extent: impl FnOnce() -> Range<u64>,
        direct: Direct,
        wanted: usize,
        threads: ThreadLimit,
    ) -> ReadStrategy {
        // It makes no difference for small reads.
        if bytes < COLD_READ_BYTES {
            return ReadStrategy::in_memory(Residency::Unknown, wanted);
        }
        let residency = residency(file, extent());
        // Cached files are not worth a request to a server.
        let scope = if residency == Residency::Cached { Scope::Local } else { Filesystem::of(file).scope };
        if bytes < MIN_PARALLEL_BYTES && !scope.is_remote() {
            return ReadStrategy::in_memory(residency, wanted);
        }
        ReadStrategy::decide(residency, scope, direct, wanted, threads)
    }

    fn decide(
        residency: Residency,
        scope: Scope,
        direct: Direct,
        wanted: usize,
        threads: ThreadLimit,
    ) -> ReadStrategy {
        // If residency is unknown, the file may be cached, and direct reads would take several times as long.
        let direct = match (direct, residency) {
            (Direct::Auto, Residency::Cached | Residency::Unknown) => Direct::Never,
            (direct, _) => direct,
        };
        if residency == Residency::Cached && direct == Direct::Never {
            return ReadStrategy::in_memory(residency, wanted);
        }
        let (readers, request_bytes, chunk_bytes) = match scope {
            Scope::Local | Scope::Unknown if direct == Direct::Never => {
                (DISK_READERS, COLD_READ_BYTES, CHUNK_BYTES)
            }
            // Whole chunks, which were faster than reads of 1 MiB on a fast loop device (docs/performance.md).
            Scope::Local | Scope::Unknown => (DIRECT_READERS, CHUNK_BYTES, CHUNK_BYTES),
            Scope::Remote | Scope::Fuse => (REMOTE_READERS, COLD_READ_BYTES, COLD_READ_BYTES),
        };
        ReadStrategy {
            residency,
            scope,
            threads: wanted.max(threads.cap(readers)),
            request_bytes: Some(request_bytes),
            chunk_bytes,
            direct,
        }
    }

    /// Returns the strategy for memory that does not have the blocks of the file. Direct reads of a disk then end with a copy,
    /// which more threads than this only delay (docs/performance.md).
    pub(crate) fn through_buffers(self, threads: ThreadLimit) -> ReadStrategy {
        if self.direct == Direct::Never || self.scope.is_remote() {
            return self;
        }
        ReadStrategy { threads: self.threads.min(threads.max().max(DISK_READERS)), ..self }
    }

    /// Allocates memory for `tensors`, given as offsets in the file and lengths. It suits direct reads if there may be some.
    pub(crate) fn allocate(&self, tensors: &[(u64, usize)]) -> Result<Buffers> {
        let sizes: Vec<usize> = tensors.iter().map(|&(_, length)| length).collect();
        if self.direct == Direct::Never {
            return Buffers::new(&sizes);
        }
        let offsets: Vec<u64> = tensors.iter().map(|&(offset, _)| offset).collect();
        Buffers::for_direct_reads(&sizes, &offsets)
    }

    /// Returns the strategy for bytes that are in memory, or whose file cannot be read otherwise.
    pub(crate) fn in_memory(residency: Residency, threads: usize) -> ReadStrategy {
        ReadStrategy {
            residency,
            scope: Scope::Local,
            threads,
            request_bytes: None,
            chunk_bytes: CHUNK_BYTES,
            direct: Direct::Never,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(residency: Residency, scope: Scope, direct: Direct) -> ReadStrategy {
        ReadStrategy::decide(residency, scope, direct, 2, ThreadLimit::at_most(0))
    }

    #[test]
    fn direct_reads_of_a_disk_into_any_memory_have_fewer_threads() {
        let direct = decide(Residency::Cold, Scope::Local, Direct::Auto);
        for (limit, threads) in [(0, DISK_READERS), (1, DISK_READERS), (6, 6), (100, DIRECT_READERS)] {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let expected = if limit == 0 { threads.max(cores).min(DIRECT_READERS) } else { threads };
            assert_eq!(direct.through_buffers(ThreadLimit::at_most(limit)).threads, expected, "{limit}");
        }
        for strategy in [
            decide(Residency::Cold, Scope::Local, Direct::Never),
            decide(Residency::Cold, Scope::Remote, Direct::Auto),
        ] {
            assert_eq!(strategy.through_buffers(ThreadLimit::at_most(1)).threads, strategy.threads);
        }
    }

    #[test]
    fn cached_files_are_copied() {
        let strategy = decide(Residency::Cached, Scope::Local, Direct::Auto);
        assert_eq!((strategy.threads, strategy.request_bytes, strategy.direct), (2, None, Direct::Never));
        assert_eq!(decide(Residency::Cached, Scope::Local, Direct::Always).direct, Direct::Always);
    }

    #[test]
    fn other_files_are_read_by_several_threads() {
        for residency in [Residency::Cold, Residency::Unknown] {
            for (scope, buffered, direct) in [
                (Scope::Local, (DISK_READERS, COLD_READ_BYTES), (DIRECT_READERS, CHUNK_BYTES)),
                (Scope::Remote, (REMOTE_READERS, COLD_READ_BYTES), (REMOTE_READERS, COLD_READ_BYTES)),
            ] {
                let reads =
                    |strategy: ReadStrategy| (strategy.threads, strategy.request_bytes.expect("cold"));
                let strategy = decide(residency, scope, Direct::Auto);
                let is_direct = residency == Residency::Cold;
                assert_eq!(reads(strategy), if is_direct { direct } else { buffered });
                assert_eq!(strategy.direct == Direct::Auto, is_direct);
                let strategy = decide(residency, scope, Direct::Never);
                assert_eq!((reads(strategy), strategy.direct), (buffered, Direct::Never));
            }
        }
        let limited =
            ReadStrategy::decide(Residency::Cold, Scope::Fuse, Direct::Auto, 1, ThreadLimit::at_most(3));
        assert_eq!(limited.threads, 3);
    }
}
