//! Checkpoints opened during a save, and saved by two threads at once: all tensors always come from the same save.

mod common;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::checkpoints::{INDEX, contents, save};
use common::names;
use safetensors_torch::{Backend, Checkpoint, CheckpointOptions, Error, ErrorKind};

/// The longest that each part of a test runs, even on a slow machine.
const LIMIT: Duration = Duration::from_secs(1);

/// Saves six tensors of one byte each, all of them `value`.
fn write(directory: &Path, value: u8, max_shard_size: u64) -> Vec<String> {
    let bytes = [value];
    let tensors = ["a", "b", "c", "d", "e", "f"].map(|name| (name, &bytes[..]));
    save(directory, &tensors, max_shard_size).expect("saved")
}

/// Opens the checkpoint, checks that all tensors have the same value, and returns it.
fn open_value(path: &Path) -> Result<u8, Error> {
    let checkpoint = Checkpoint::open(
        path,
        CheckpointOptions { backend: Backend::Pread, ..CheckpointOptions::default() },
    )?;
    let values: Vec<Vec<u8>> = contents(&checkpoint).into_iter().map(|(_, bytes)| bytes).collect();
    assert!(values.len() == 6 && values.iter().all(|bytes| *bytes == values[0]), "{values:?}");
    Ok(values[0][0])
}

/// Clears the flag when dropped, even by a panic.
struct ClearOnDrop<'s>(&'s AtomicBool);

impl Drop for ClearOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Opens `opened` repeatedly, while checkpoints with these shard sizes are saved in turn into `directory`.
fn open_during_saves(directory: &Path, opened: &Path, sizes: &[u64]) {
    write(directory, 0, sizes[0]);
    let (saving, begin) = (AtomicBool::new(true), Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The reader and the writer stop each other, even after a panic.
            let _clear = ClearOnDrop(&saving);
            for (value, &size) in (1..=250).zip(sizes.iter().cycle()) {
                if !saving.load(Ordering::Acquire) || begin.elapsed() > LIMIT {
                    break;
                }
                write(directory, value, size);
            }
        });
        let _clear = ClearOnDrop(&saving);
        let (mut opens, mut failures) = (0, Vec::new());
        while saving.load(Ordering::Acquire) {
            opens += 1;
            // On a busy machine, the checkpoint may be replaced at each attempt to open it.
            let failed = open_value(opened).err().filter(|error| error.kind() != ErrorKind::FileChanged);
            failures.extend(failed.map(|error| error.to_string()));
        }
        assert!(failures.is_empty(), "{} of {opens}: {:?}", failures.len(), failures[0]);
        assert!(opens > 0);
    });
}

#[test]
fn a_directory_opened_during_a_save_is_complete() {
    // Shards replace one file, one file replaces shards, shards replace shards of the same and of other names.
    for sizes in [&[9, 1][..], &[1], &[1, 2], &[2, 9, 1, 1, 2, 2, 9, 9]] {
        let directory = tempfile::tempdir().expect("a directory");
        open_during_saves(directory.path(), directory.path(), sizes);
    }
}

#[test]
fn an_index_opened_during_a_save_is_complete() {
    for sizes in [&[1][..], &[1, 2]] {
        let directory = tempfile::tempdir().expect("a directory");
        open_during_saves(directory.path(), &directory.path().join(INDEX), sizes);
    }
}

#[test]
fn opening_before_the_first_save_reports_a_missing_checkpoint() {
    let (root, begin) = (tempfile::tempdir().expect("a directory"), Instant::now());
    let (mut round, mut unexpected) = (0, Vec::new());
    while round < 500 && begin.elapsed() < LIMIT {
        let at = &root.path().join(round.to_string());
        let barrier = &Barrier::new(2);
        std::thread::scope(|scope| {
            let saver = scope.spawn(move || {
                barrier.wait();
                write(at, 1, 1)
            });
            barrier.wait();
            while let Err(error) = open_value(at) {
                // The directory is missing or empty.
                let text = error.to_string();
                let missing = error.os_error() == Some(libc::ENOENT) || text.contains("holds no checkpoint");
                unexpected.extend((!missing).then_some(text));
                if saver.is_finished() && open_value(at).is_err() {
                    break;
                }
            }
        });
        open_value(at).expect("saved");
        round += 1;
    }
    assert!(unexpected.is_empty(), "{} in {round} rounds: {:?}", unexpected.len(), unexpected[0]);
}

#[test]
fn concurrent_saves_leave_one_complete_checkpoint() {
    for sizes in [[1, 1], [1, 2], [1, 9], [2, 9]] {
        let (directory, begin) = (tempfile::tempdir().expect("a directory"), Instant::now());
        let (at, barrier) = (directory.path(), Barrier::new(2));
        let mut round = 0;
        while round < 40 && begin.elapsed() < LIMIT {
            let written = std::thread::scope(|scope| {
                let savers = [0, 1].map(|saver| {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        barrier.wait();
                        write(at, saver, sizes[saver as usize])
                    })
                });
                savers.map(|saver| saver.join().expect("no panic"))
            });
            let last = open_value(at).expect("complete");
            // No file of the other save is left.
            assert_eq!(names(at), written[last as usize], "{sizes:?}, round {round}");
            round += 1;
        }
        assert!(round > 0);
    }
}

#[test]
fn opening_waits_for_a_locked_save_only_without_a_checkpoint() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = directory.path();
    write(at, 7, 1);
    let saver = File::create(at.join(".safetensors.lock")).expect("made");
    // SAFETY: a call without pointers on a descriptor that is open.
    let lock = |operation| assert_eq!(unsafe { libc::flock(saver.as_raw_fd(), operation) }, 0);
    lock(libc::LOCK_EX);
    // A checkpoint that exists is opened without waiting for the lock.
    let timed = |path: &Path| {
        let begin = Instant::now();
        (open_value(path), begin.elapsed().as_secs())
    };
    let (opened, seconds) = timed(at);
    assert!(opened.expect("complete") == 7 && seconds < 4);
    fs::rename(at.join(INDEX), at.join("aside")).expect("renamed");
    let (refused, seconds) = timed(at);
    assert!(refused.expect_err("no index").kind() == ErrorKind::Index && (4..60).contains(&seconds));
    lock(libc::LOCK_UN);
    let (refused, seconds) = timed(at);
    assert!(refused.expect_err("no index").kind() == ErrorKind::Index && seconds < 4);
}
