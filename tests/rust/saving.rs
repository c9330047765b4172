//! Saves: the files after success, after an error, and after a kill.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::{directory, load, names, pattern, save};
use safetensors_torch::{
    AtomicFile, Backend, Dtype, ErrorKind, SaveOptions, TensorFile, TensorSpec, save_file,
};

#[test]
fn a_failed_check_leaves_the_target_as_it_was() {
    let directory = directory();
    let path = directory.path().join("file");
    fs::write(&path, "old").expect("written");
    let spec = TensorSpec { name: "a", dtype: Dtype::F32, shape: &[1] };
    let error =
        save_file(&[spec], &[&[1]], None, &path, SaveOptions::default()).expect_err("three bytes short");
    assert_eq!(error.kind(), ErrorKind::BufferSize);
    let options = SaveOptions { alignment: 7, ..SaveOptions::default() };
    let error = save_file(&[], &[], None, &path, options).expect_err("no power of two");
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
    assert_eq!(fs::read(&path).expect("there"), b"old");
    assert_eq!(names(directory.path()), ["file"]);
}

#[test]
fn a_dropped_save_leaves_nothing() {
    let directory = directory();
    let path = directory.path().join("file");
    for existing in [false, true] {
        if existing {
            fs::write(&path, "old").expect("written");
        }
        let mut file = AtomicFile::create(&path, 100).expect("begun");
        file.write([&[1; 50][..]]).expect("written");
        drop(file);
        assert_eq!(path.exists(), existing);
        assert_eq!(names(directory.path()).len(), usize::from(existing));
    }
    assert_eq!(fs::read(&path).expect("there"), b"old");
}

#[test]
fn a_failed_commit_leaves_nothing() {
    let directory = directory();
    let path = directory.path().join("file");
    let mut file = AtomicFile::create(&path, 3).expect("begun");
    file.write([&[1; 3][..]]).expect("written");
    fs::create_dir(&path).expect("made");
    let error = file.commit(false).expect_err("a directory is in the way");
    assert_eq!(error.os_error(), Some(libc::EISDIR), "{error}");
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    assert_eq!(names(directory.path()), ["file"]);
}

#[test]
fn a_full_disk_is_an_error_before_the_first_byte() {
    let directory = directory();
    let path = directory.path().join("file");
    fs::write(&path, "old").expect("written");
    let error = AtomicFile::create(&path, i64::MAX as u64).expect_err("no disk is that large");
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(matches!(error.os_error(), Some(libc::ENOSPC | libc::EFBIG)), "{error}");
    assert_eq!(fs::read(&path).expect("there"), b"old");
    assert_eq!(names(directory.path()), ["file"]);
}

#[test]
fn durable_saves_the_same_bytes() {
    let directory = directory();
    let path = directory.path().join("file");
    let spec = TensorSpec { name: "a", dtype: Dtype::U8, shape: &[2] };
    let options = SaveOptions { durable: true, ..SaveOptions::default() };
    for data in [[1, 2], [3, 4]] {
        save_file(&[spec], &[&data], None, &path, options).expect("saved");
        assert_eq!(load(&path), data);
    }
    assert_eq!(names(directory.path()), ["file"]);
}

#[test]
fn the_longest_name_can_be_saved() {
    let directory = directory();
    let name = "n".repeat(255);
    for data in [[1; 3], [2; 3]] {
        save(&directory.path().join(&name), &data).expect("saved");
        assert_eq!(load(&directory.path().join(&name)), data);
    }
    assert_eq!(names(directory.path()), [name]);
}

#[test]
fn readers_see_one_save_or_another_never_a_part() {
    let directory = directory();
    let path = directory.path().join("file");
    save(&path, &[0; 70_000]).expect("saved");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let savers: Vec<_> = (1..=3u8)
            .map(|value| {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..40 {
                        save(path, &vec![value; 70_000 + usize::from(value)]).expect("saved");
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let data = load(&path);
                assert_eq!(data.len(), 70_000 + usize::from(data[0]));
                assert!(data.iter().all(|&byte| byte == data[0]), "a torn file");
            }
        });
        for saver in savers {
            saver.join().expect("no panic");
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(names(directory.path()), ["file"]);
}

const KILLED_DIRECTORY: &str = "SAFETENSORS_TORCH_TEST_DIRECTORY";

/// The child of the test below: saves new files until it is killed.
#[test]
#[ignore = "runs forever; started by a_killed_process_leaves_only_whole_files"]
fn save_until_killed() {
    let directory = std::env::var_os(KILLED_DIRECTORY).expect("started by its parent");
    let data = pattern(8 << 20);
    for number in 0.. {
        save(&Path::new(&directory).join(format!("{number}.safetensors")), &data).expect("saved");
        if number > 0 {
            let _ = fs::remove_file(Path::new(&directory).join(format!("{}.safetensors", number - 1)));
        }
    }
}

#[test]
fn a_killed_process_leaves_only_whole_files() {
    let unnamed = |directory: &Path| {
        let flags = libc::O_TMPFILE;
        OpenOptions::new().write(true).custom_flags(flags).open(directory).is_ok()
    };
    for round in 0..12 {
        let directory = directory();
        if !unnamed(directory.path()) {
            // Documented: without unnamed files a killed process leaves its temporary file.
            return;
        }
        let mut child = Command::new(std::env::current_exe().expect("a file"))
            .args(["--exact", "saving::save_until_killed", "--ignored"])
            .env(KILLED_DIRECTORY, directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("started");
        let begun = std::time::Instant::now();
        while names(directory.path()).is_empty() && begun.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(round * 3));
        child.kill().expect("killed");
        child.wait().expect("ended");
        let left = names(directory.path());
        assert!(!left.is_empty(), "the child saved nothing in a minute");
        for name in left {
            assert!(name.ends_with(".safetensors") && !name.starts_with('.'), "stray file {name}");
            TensorFile::open(&directory.path().join(&name), Backend::Pread).expect("a whole file");
        }
    }
}
