//! Saving files: what is there afterwards, on success, on error, and when the process is killed.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::{self, contents, pattern, read};
use safetensors_torch::{
    AtomicFile, Backend, Dtype, ErrorKind, Result, SaveOptions, TensorFile, TensorSpec, save_file,
};
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder for the test")
}

fn save(path: &Path, data: &[u8]) -> Result<()> {
    let shape = [data.len() as u64];
    let spec = TensorSpec { name: "a", dtype: Dtype::U8, shape: &shape };
    save_file(&[spec], &[data], None, path, SaveOptions::default())
}

fn load(path: &Path) -> Vec<u8> {
    read(&TensorFile::open(path, Backend::Pread).expect("valid"), 0)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("there").mode() & 0o7777
}

fn make_fifo(path: &Path) {
    let name = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
    // SAFETY: a string that ends in NUL.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
}

#[test]
fn a_new_file_has_the_permissions_of_every_new_file() {
    let folder = folder();
    let (ours, other) = (folder.path().join("ours"), folder.path().join("other"));
    save(&ours, &[1]).expect("saved");
    File::create(&other).expect("made");
    assert_eq!(mode(&ours), mode(&other));
    assert_eq!(names(folder.path()), ["other", "ours"]);
}

#[test]
fn an_existing_file_keeps_its_permissions() {
    let folder = folder();
    let path = folder.path().join("file");
    for bits in [0o600, 0o640, 0o604, 0o755, 0o444, 0o200] {
        fs::write(&path, "old").expect("written");
        fs::set_permissions(&path, Permissions::from_mode(bits)).expect("set");
        save(&path, &pattern(100)).expect("saved");
        assert_eq!(mode(&path), bits);
        fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("set");
        assert_eq!(load(&path), pattern(100));
        assert_eq!(names(folder.path()), ["file"]);
    }
}

#[test]
fn an_existing_file_is_replaced_not_written_to() {
    let folder = folder();
    let path = folder.path().join("file");
    save(&path, &[1; 100]).expect("saved");
    let other_name = folder.path().join("link");
    fs::hard_link(&path, &other_name).expect("linked");
    save(&path, &[2; 50]).expect("saved");
    assert_eq!(load(&path), [2; 50]);
    assert_eq!(load(&other_name), [1; 100]);
}

#[test]
fn symbolic_links_are_followed() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("deep")).expect("made");
    symlink("deep/first", at("relative")).expect("linked");
    symlink(at("relative"), at("chain")).expect("linked");
    // Dangling at first, then not.
    for data in [[1; 9], [2; 9]] {
        save(&at("chain"), &data).expect("saved");
        assert_eq!(load(&at("deep/first")), data);
        assert!(fs::symlink_metadata(at("chain")).expect("there").is_symlink());
        assert!(fs::symlink_metadata(at("relative")).expect("there").is_symlink());
    }
    assert_eq!(names(&at("deep")), ["first"]);
    assert_eq!(names(folder.path()), ["chain", "deep", "relative"]);

    symlink("loop", at("loop")).expect("linked");
    let error = save(&at("loop"), &[1]).expect_err("endless");
    assert_eq!((error.kind(), error.os_error()), (ErrorKind::Io, Some(libc::ELOOP)));
}

#[test]
fn what_cannot_be_saved_to() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("file"), "old").expect("written");
    fs::create_dir(at("folder")).expect("made");
    let before = names(folder.path());
    for (path, errno) in [
        (at("folder"), libc::EISDIR),
        (at("folder/"), libc::EISDIR),
        (at("new/"), libc::EISDIR),
        (at("absent/file"), libc::ENOENT),
        (at("file/below"), libc::ENOTDIR),
        (at(&"n".repeat(300)), libc::ENAMETOOLONG),
        (Path::new("").to_path_buf(), libc::ENOENT),
    ] {
        let error = save(&path, &[1]).expect_err("refused");
        assert_eq!((error.kind(), error.os_error()), (ErrorKind::Io, Some(errno)), "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
    assert_eq!(save(Path::new("a\0b"), &[1]).expect_err("refused").kind(), ErrorKind::InvalidArgument);
    assert_eq!(names(folder.path()), before);
    assert_eq!(fs::read(at("file")).expect("there"), b"old");
}

#[test]
fn a_check_that_fails_leaves_the_target_alone() {
    let folder = folder();
    let path = folder.path().join("file");
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
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
fn a_save_that_is_given_up_leaves_nothing() {
    let folder = folder();
    let path = folder.path().join("file");
    for existing in [false, true] {
        if existing {
            fs::write(&path, "old").expect("written");
        }
        let mut file = AtomicFile::create(&path, 100).expect("begun");
        file.write([&[1; 50][..]]).expect("written");
        drop(file);
        assert_eq!(path.exists(), existing);
        assert_eq!(names(folder.path()).len(), usize::from(existing));
    }
    assert_eq!(fs::read(&path).expect("there"), b"old");
}

#[test]
fn a_commit_that_fails_leaves_nothing() {
    let folder = folder();
    let path = folder.path().join("file");
    let mut file = AtomicFile::create(&path, 3).expect("begun");
    file.write([&[1; 3][..]]).expect("written");
    fs::create_dir(&path).expect("made");
    let error = file.commit(false).expect_err("a folder is in the way");
    assert_eq!(error.os_error(), Some(libc::EISDIR), "{error}");
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
fn no_space_is_found_before_the_first_byte() {
    let folder = folder();
    let path = folder.path().join("file");
    fs::write(&path, "old").expect("written");
    let error = AtomicFile::create(&path, i64::MAX as u64).expect_err("no disk is that large");
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(matches!(error.os_error(), Some(libc::ENOSPC | libc::EFBIG)), "{error}");
    assert_eq!(fs::read(&path).expect("there"), b"old");
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
fn syncing_changes_nothing_else() {
    let folder = folder();
    let path = folder.path().join("file");
    let spec = TensorSpec { name: "a", dtype: Dtype::U8, shape: &[2] };
    let options = SaveOptions { sync: true, ..SaveOptions::default() };
    for data in [[1, 2], [3, 4]] {
        save_file(&[spec], &[&data], None, &path, options).expect("saved");
        assert_eq!(load(&path), data);
    }
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
fn the_longest_name_is_no_trouble() {
    let folder = folder();
    let name = "n".repeat(255);
    for data in [[1; 3], [2; 3]] {
        save(&folder.path().join(&name), &data).expect("saved");
        assert_eq!(load(&folder.path().join(&name)), data);
    }
    assert_eq!(names(folder.path()), [name]);
}

#[test]
fn pipes_and_devices_are_written_to() {
    let folder = folder();
    let fifo = folder.path().join("fifo");
    make_fifo(&fifo);
    let data = pattern(200_000);
    let bytes = std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(&fifo).expect("read"));
        save(&fifo, &data).expect("saved");
        reader.join().expect("no panic")
    });
    assert_eq!(common::with_file(&bytes, contents).expect("valid").tensors[0].3, data);
    assert_eq!(names(folder.path()), ["fifo"]);
    save(Path::new("/dev/null"), &data).expect("saved");
    let error = save(Path::new("/dev/full"), &data).expect_err("full");
    assert_eq!(error.os_error(), Some(libc::ENOSPC), "{error}");
}

#[test]
fn readers_see_one_save_or_another_never_half() {
    let folder = folder();
    let path = folder.path().join("file");
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
    assert_eq!(names(folder.path()), ["file"]);
}

const KILLED_FOLDER: &str = "SAFETENSORS_TORCH_TEST_FOLDER";

/// The child of the test below: saves new files until it is killed.
#[test]
#[ignore = "runs for ever; started by a_killed_process_leaves_whole_files_only"]
fn save_until_killed() {
    let folder = std::env::var_os(KILLED_FOLDER).expect("started by its parent");
    let data = pattern(8 << 20);
    for number in 0.. {
        save(&Path::new(&folder).join(format!("{number}.safetensors")), &data).expect("saved");
        if number > 0 {
            let _ = fs::remove_file(Path::new(&folder).join(format!("{}.safetensors", number - 1)));
        }
    }
}

#[test]
fn a_killed_process_leaves_whole_files_only() {
    let unnamed = |folder: &Path| {
        let flags = libc::O_TMPFILE;
        OpenOptions::new().write(true).custom_flags(flags).open(folder).is_ok()
    };
    for round in 0..12 {
        let folder = folder();
        if !unnamed(folder.path()) {
            // Documented: without unnamed files a killed process leaves its temporary file.
            return;
        }
        let mut child = Command::new(std::env::current_exe().expect("a file"))
            .args(["--exact", "saving::save_until_killed", "--ignored"])
            .env(KILLED_FOLDER, folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("started");
        let begun = std::time::Instant::now();
        while names(folder.path()).is_empty() && begun.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(round * 3));
        child.kill().expect("killed");
        child.wait().expect("ended");
        let left = names(folder.path());
        assert!(!left.is_empty(), "the child saved nothing in a minute");
        for name in left {
            assert!(name.ends_with(".safetensors") && !name.starts_with('.'), "stray file {name}");
            TensorFile::open(&folder.path().join(&name), Backend::Pread).expect("a whole file");
        }
    }
}
