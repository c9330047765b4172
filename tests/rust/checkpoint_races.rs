//! Checkpoints that are opened while they are saved, and saved by two at once: each time all tensors are of one save.

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

/// No part of a test goes on for longer, however slow the machine.
const LIMIT: Duration = Duration::from_secs(1);

/// Saves six tensors of one byte each, all of them `value`.
fn write(at: &Path, value: u8, max_shard_size: u64) -> Vec<String> {
    let bytes = [value];
    let tensors = ["a", "b", "c", "d", "e", "f"].map(|name| (name, &bytes[..]));
    save(at, &tensors, max_shard_size).expect("saved")
}

/// Opens the checkpoint, and gives what all of its tensors are.
fn whole(path: &Path) -> Result<u8, Error> {
    let checkpoint = Checkpoint::open(
        path,
        CheckpointOptions { backend: Backend::Pread, ..CheckpointOptions::default() },
    )?;
    let values: Vec<Vec<u8>> = contents(&checkpoint).into_iter().map(|(_, bytes)| bytes).collect();
    assert!(values.len() == 6 && values.iter().all(|bytes| *bytes == values[0]), "{values:?}");
    Ok(values[0][0])
}

/// Says that it is over when it is dropped, be it by a panic.
struct End<'s>(&'s AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Opens `opened` over and over, while checkpoints of these sizes of a file are saved in turn into `at`.
fn opens_during_saves(at: &Path, opened: &Path, sizes: &[u64]) {
    write(at, 0, sizes[0]);
    let (saving, begin) = (AtomicBool::new(true), Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // However this ends, the reader ends too; and so does this when the reader has.
            let _end = End(&saving);
            for (value, &size) in (1..=250).zip(sizes.iter().cycle()) {
                if !saving.load(Ordering::Acquire) || begin.elapsed() > LIMIT {
                    break;
                }
                write(at, value, size);
            }
        });
        let _end = End(&saving);
        let (mut opens, mut failures) = (0, Vec::new());
        while saving.load(Ordering::Acquire) {
            opens += 1;
            // On a machine that is busy it may be replaced each time it is looked at.
            let failed = whole(opened).err().filter(|error| error.kind() != ErrorKind::FileChanged);
            failures.extend(failed.map(|error| error.to_string()));
        }
        assert!(failures.is_empty(), "{} of {opens}: {:?}", failures.len(), failures[0]);
        assert!(opens > 0);
    });
}

#[test]
fn who_opens_during_a_save_has_one_whole() {
    // Files over one file, one file over files, files over files of the same names, and of others.
    for sizes in [&[9, 1][..], &[1], &[1, 2], &[2, 9, 1, 1, 2, 2, 9, 9]] {
        let directory = tempfile::tempdir().expect("a directory");
        opens_during_saves(directory.path(), directory.path(), sizes);
    }
}

#[test]
fn so_has_who_opens_the_index() {
    for sizes in [&[1][..], &[1, 2]] {
        let directory = tempfile::tempdir().expect("a directory");
        opens_during_saves(directory.path(), &directory.path().join(INDEX), sizes);
    }
}

#[test]
fn who_opens_before_the_first_save_is_told_that_there_is_nothing() {
    let (root, begin) = (tempfile::tempdir().expect("a directory"), Instant::now());
    let (mut round, mut told) = (0, Vec::new());
    while round < 500 && begin.elapsed() < LIMIT {
        let at = &root.path().join(round.to_string());
        let barrier = &Barrier::new(2);
        std::thread::scope(|scope| {
            let saver = scope.spawn(move || {
                barrier.wait();
                write(at, 1, 1)
            });
            barrier.wait();
            while let Err(error) = whole(at) {
                // No directory, or an empty one.
                let text = error.to_string();
                let nothing = error.os_error() == Some(libc::ENOENT) || text.contains("holds no checkpoint");
                told.extend((!nothing).then_some(text));
                if saver.is_finished() && whole(at).is_err() {
                    break;
                }
            }
        });
        whole(at).expect("saved");
        round += 1;
    }
    assert!(told.is_empty(), "{} in {round} rounds: {:?}", told.len(), told[0]);
}

#[test]
fn of_two_saves_at_once_one_stays_whole() {
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
            let last = whole(at).expect("whole");
            // And nothing of the other one.
            assert_eq!(names(at), written[last as usize], "{sizes:?}, round {round}");
            round += 1;
        }
        assert!(round > 0);
    }
}

#[test]
fn nobody_waits_for_ever_to_open() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = directory.path();
    write(at, 7, 1);
    let saver = File::create(at.join(".safetensors.lock")).expect("made");
    // SAFETY: a call without pointers on a descriptor that is open.
    let lock = |operation| assert_eq!(unsafe { libc::flock(saver.as_raw_fd(), operation) }, 0);
    lock(libc::LOCK_EX);
    // As long as there is a checkpoint, nobody waits at all.
    let timed = |path: &Path| {
        let begin = Instant::now();
        (whole(path), begin.elapsed().as_secs())
    };
    let (opened, seconds) = timed(at);
    assert!(opened.expect("whole") == 7 && seconds < 4);
    fs::rename(at.join(INDEX), at.join("aside")).expect("renamed");
    let (refused, seconds) = timed(at);
    assert!(refused.expect_err("no index").kind() == ErrorKind::Index && (4..60).contains(&seconds));
    lock(libc::LOCK_UN);
    let (refused, seconds) = timed(at);
    assert!(refused.expect_err("no index").kind() == ErrorKind::Index && seconds < 4);
}
