//! Runs the items of a job on several threads, and cuts lengths into chunks of one size.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::error::Result;
use crate::sys::threads::ThreadLimit;

/// Below this size, a second thread costs more than it saves.
pub const MIN_PARALLEL_BYTES: usize = 4 << 20;

/// The bytes of a chunk: large enough to make the overhead negligible, small enough to balance the threads.
pub const CHUNK_BYTES: usize = 8 << 20;

/// Returns how many threads, including the calling one, to use for `bytes` in `items`.
pub fn thread_count(threads: ThreadLimit, bytes: usize, items: usize) -> usize {
    if bytes < MIN_PARALLEL_BYTES {
        return 1;
    }
    threads.max().min(items).max(1)
}

/// Calls `work` with each number below `items`, on `threads` threads including the calling one. Returns the first error of
/// `work`; no items are started after it.
pub fn for_each(items: usize, threads: usize, work: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    for_each_until(None, 0..items, threads, work).map(|_| ())
}

/// Calls `work` with the numbers in `items`, in order, and starts none after `deadline` except the first. Returns the first
/// number that was not started; `work` has returned for all numbers below it.
pub fn for_each_until(
    deadline: Option<Instant>,
    items: Range<usize>,
    threads: usize,
    work: impl Fn(usize) -> Result<()> + Sync,
) -> Result<usize> {
    let next = AtomicUsize::new(items.start);
    let failure = Mutex::new(None);
    let run = || {
        loop {
            let item = next.load(Ordering::Relaxed);
            let late = item > items.start && deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if item >= items.end || late {
                return;
            }
            if next.compare_exchange_weak(item, item + 1, Ordering::Relaxed, Ordering::Relaxed).is_err() {
                continue;
            }
            if let Err(error) = work(item) {
                // Stops the other threads.
                next.store(items.end, Ordering::Relaxed);
                failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        let mut others = Vec::new();
        for _ in 1..threads.min(items.len()) {
            match std::thread::Builder::new().spawn_scoped(scope, run) {
                Ok(thread) => others.push(thread),
                // The calling thread does the work alone if no other can be started.
                Err(_) => break,
            }
        }
        run();
        for thread in others {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    let failure = failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    failure.map_or(Ok(next.into_inner()), Err)
}

/// The concatenation of several lengths, cut into chunks of one size.
#[derive(Debug)]
pub struct Chunks {
    /// The end of each length in the concatenation.
    ends: Vec<usize>,
    /// The bytes of a chunk.
    size: usize,
    /// How many bytes the first chunk is shorter.
    skew: usize,
}

impl Chunks {
    /// Cuts `lengths`, whose sum must not overflow, into chunks of [`CHUNK_BYTES`].
    pub fn new(lengths: impl Iterator<Item = usize>) -> Chunks {
        Chunks::of_size(lengths, CHUNK_BYTES, 0)
    }

    /// As [`Chunks::new`], into chunks of `size` bytes. The first begins at `offset` in its chunk, as the first length does
    /// in a file that is cut at multiples of `size`.
    pub fn of_size(lengths: impl Iterator<Item = usize>, size: usize, offset: u64) -> Chunks {
        let mut end = 0;
        let ends = lengths.map(|length| {
            end += length;
            end
        });
        Chunks { ends: ends.collect(), size, skew: (offset % size as u64) as usize }
    }

    pub fn total_bytes(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    pub fn len(&self) -> usize {
        match self.total_bytes() {
            0 => 0,
            bytes => (bytes + self.skew).div_ceil(self.size),
        }
    }

    /// Returns the number of bytes in the chunks before number `chunk`.
    pub fn bytes_before(&self, chunk: usize) -> usize {
        (chunk * self.size).saturating_sub(self.skew).min(self.total_bytes())
    }

    /// Returns the non-empty parts of lengths in chunk number `chunk`: the index of each length, and a range inside it.
    pub fn parts(&self, chunk: usize) -> impl Iterator<Item = (usize, Range<usize>)> + Clone + '_ {
        let (from, to) = (self.bytes_before(chunk), self.bytes_before(chunk + 1));
        let first = self.ends.partition_point(|&end| end <= from);
        (first..self.ends.len())
            .map(move |index| {
                let start = if index == 0 { 0 } else { self.ends[index - 1] };
                (index, start, from.max(start)..to.min(self.ends[index]))
            })
            .take_while(move |(_, start, _)| *start < to)
            .filter(|(_, _, part)| !part.is_empty())
            .map(|(index, start, part)| (index, part.start - start..part.end - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};

    #[test]
    fn each_item_runs_once() {
        for threads in [1, 2, 5] {
            let seen: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            let done = for_each(seen.len(), threads, |item| {
                seen[item].fetch_add(1, Ordering::Relaxed);
                Ok(())
            });
            assert!(done.is_ok());
            assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn only_one_item_starts_after_the_deadline() {
        for threads in [1, 3] {
            let seen: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            let mut first = 0;
            while first < seen.len() {
                let next = for_each_until(Some(Instant::now()), first..seen.len(), threads, |item| {
                    seen[item].fetch_add(1, Ordering::Relaxed);
                    Ok(())
                });
                assert_eq!(next.expect("no error"), first + 1, "the deadline had passed");
                first += 1;
            }
            assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn an_error_stops_the_other_items() {
        let started = AtomicUsize::new(0);
        let outcome = for_each(1_000_000, 2, |item| {
            started.fetch_add(1, Ordering::Relaxed);
            if item == 10 { Err(Error::new(ErrorKind::Io, "no")) } else { Ok(()) }
        });
        assert_eq!(outcome.expect_err("item 10").kind(), ErrorKind::Io);
        assert!(started.load(Ordering::Relaxed) < 1_000_000);
    }

    #[test]
    fn chunks_partition_the_bytes_and_have_one_size() {
        let lengths = [0, 3, 0, CHUNK_BYTES, 1, 2 * CHUNK_BYTES - 4, 0, 5, 5, 0];
        let chunks = Chunks::new(lengths.into_iter());
        assert_eq!((chunks.total_bytes(), chunks.len()), (lengths.iter().sum(), 4));
        let mut next = [0; 10];
        for chunk in 0..chunks.len() {
            let mut bytes = 0;
            for (index, part) in chunks.parts(chunk) {
                assert_eq!(part.start, next[index]);
                assert!(!part.is_empty());
                next[index] = part.end;
                bytes += part.len();
            }
            assert_eq!(bytes, if chunk == 3 { 10 } else { CHUNK_BYTES });
        }
        assert_eq!(next, lengths);
        assert_eq!(Chunks::new([0, 0].into_iter()).len(), 0);
        assert_eq!(Chunks::new(std::iter::empty()).len(), 0);
    }

    #[test]
    fn small_jobs_run_on_one_thread() {
        for threads in [ThreadLimit::at_most(0), ThreadLimit::at_most(9)] {
            assert_eq!(thread_count(threads, MIN_PARALLEL_BYTES - 1, 100), 1);
            assert_eq!(thread_count(threads, usize::MAX, 1), 1);
            assert_eq!(thread_count(threads, usize::MAX, 0), 1);
        }
        assert_eq!(thread_count(ThreadLimit::at_most(9), MIN_PARALLEL_BYTES, 100), 9);
    }
}
