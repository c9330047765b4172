//! Saves to a path that exists: a file, a link, a pipe, a device, a descriptor. Checks permissions too.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::{Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use crate::common::{contents, directory, load, names, pattern, read, save, with_file};
use safetensors_torch::{AtomicFile, Backend, ErrorKind, TensorFile};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("there").mode() & 0o7777
}

fn make_fifo(path: &Path) {
    let name = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
    // SAFETY: `mkfifo` requires a C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
}

#[test]
fn a_new_file_has_the_permissions_of_every_new_file() {
    let directory = directory();
    let (ours, other) = (directory.path().join("ours"), directory.path().join("other"));
    save(&ours, &[1]).expect("saved");
    File::create(&other).expect("made");
    assert_eq!(mode(&ours), mode(&other));
    assert_eq!(names(directory.path()), ["other", "ours"]);
}

#[test]
fn an_existing_file_keeps_its_permissions() {
    let directory = directory();
    let path = directory.path().join("file");
    for bits in [0o600, 0o640, 0o604, 0o755, 0o444, 0o200] {
        fs::write(&path, "old").expect("written");
        fs::set_permissions(&path, Permissions::from_mode(bits)).expect("set");
        save(&path, &pattern(100)).expect("saved");
        assert_eq!(mode(&path), bits);
        fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("set");
        assert_eq!(load(&path), pattern(100));
        assert_eq!(names(directory.path()), ["file"]);
    }
}

#[test]
fn an_existing_file_is_replaced_not_written_to() {
    let directory = directory();
    let path = directory.path().join("file");
    save(&path, &[1; 100]).expect("saved");
    let other_name = directory.path().join("link");
    fs::hard_link(&path, &other_name).expect("linked");
    save(&path, &[2; 50]).expect("saved");
    assert_eq!(load(&path), [2; 50]);
    assert_eq!(load(&other_name), [1; 100]);
}

#[test]
fn symbolic_links_are_replaced_and_their_targets_stay() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("blobs")).expect("made");
    save(&at("blobs/first"), &[1; 9]).expect("saved");
    fs::set_permissions(at("blobs/first"), Permissions::from_mode(0o640)).expect("set");
    let blob = fs::read(at("blobs/first")).expect("there");
    symlink("blobs/first", at("chain")).expect("linked");
    let absolute = at("blobs/first");
    for to in ["blobs/first", absolute.to_str().expect("UTF-8"), "chain", "nothing", "link", "blobs"] {
        symlink(to, at("link")).expect("linked");
        save(&at("link"), &[2; 9]).expect("saved");
        assert!(fs::symlink_metadata(at("link")).expect("there").is_file(), "{to}");
        assert_eq!(load(&at("link")), [2; 9]);
        assert!(fs::read(at("blobs/first")).expect("there") == blob && !at("nothing").exists());
        // Others still cannot read it.
        assert!(!["blobs/first", "chain"].contains(&to) || mode(&at("link")) == 0o640, "{to}");
        fs::remove_file(at("link")).expect("removed");
    }
    assert!(fs::symlink_metadata(at("chain")).expect("there").is_symlink());
    assert_eq!(names(&at("blobs")), ["first"]);
    assert_eq!(names(directory.path()), ["blobs", "chain"]);
}

#[test]
fn a_directory_that_is_renamed_during_a_save_gets_the_file() {
    let root = directory();
    let (at, aside) = (root.path().join("at"), root.path().join("aside"));
    for existing in [false, true] {
        fs::create_dir(&at).expect("made");
        if existing {
            fs::write(at.join("file"), "old").expect("written");
        }
        let mut file = AtomicFile::create(&at.join("file"), 3).expect("begun");
        fs::rename(&at, &aside).expect("renamed");
        fs::create_dir(&at).expect("made");
        file.write([&b"new"[..]]).expect("written");
        file.commit(true).expect("committed");
        assert_eq!(fs::read(aside.join("file")).expect("there"), b"new");
        assert_eq!((names(&at), names(&aside)), (vec![], vec!["file".to_string()]));
        fs::remove_dir(&at).expect("removed");
        fs::remove_dir_all(&aside).expect("removed");
    }
}

#[test]
fn permissions_are_those_at_the_commit() {
    let directory = directory();
    let path = directory.path().join("file");
    let set = |bits| fs::set_permissions(&path, Permissions::from_mode(bits)).expect("set");
    let make = |bits| {
        fs::write(&path, "old").expect("written");
        set(bits);
    };
    let save_while = |change: &dyn Fn()| {
        let mut file = AtomicFile::create(&path, 3).expect("begun");
        file.write([&b"new"[..]]).expect("written");
        change();
        file.commit(false).expect("committed");
        assert_eq!(fs::read(&path).expect("there"), b"new");
        assert_eq!(names(directory.path()), ["file"]);
        mode(&path)
    };
    make(0o644);
    assert_eq!(save_while(&|| set(0o600)), 0o600);
    assert_eq!(save_while(&|| set(0o640)), 0o640);
    assert_eq!(save_while(&|| fs::remove_file(&path).expect("removed")), 0o640);
    fs::remove_file(&path).expect("removed");
    assert_eq!(save_while(&|| make(0o604)), 0o604);
}

/// Returns an access control list in the kernel's format: the rights of the owner, user 12345, group, mask and others.
fn acl(rights: [u16; 5]) -> Vec<u8> {
    let tags = [(0x01u16, u32::MAX), (0x02, 12345), (0x04, u32::MAX), (0x10, u32::MAX), (0x20, u32::MAX)];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for ((tag, id), rights) in tags.into_iter().zip(rights) {
        bytes.extend([tag.to_le_bytes(), rights.to_le_bytes()].concat());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// Sets the access control list of `path`; returns `false` if its filesystem has none.
fn set_acl(path: &Path, name: &std::ffi::CStr, acl: &[u8]) -> bool {
    let path = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
    // SAFETY: `setxattr` requires two C strings, and readable bytes of the given length: those of `acl`.
    let status = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), acl.as_ptr().cast(), acl.len(), 0) };
    if status != 0 {
        println!("skipped: no access control lists here: {}", std::io::Error::last_os_error());
    }
    status == 0
}

fn get_acl(path: &Path) -> Option<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
    let mut bytes = vec![0; 1000];
    // SAFETY: `getxattr` requires two C strings, and a buffer of the given length.
    let length = unsafe {
        libc::getxattr(
            path.as_ptr(),
            c"system.posix_acl_access".as_ptr(),
            bytes.as_mut_ptr().cast(),
            bytes.len(),
        )
    };
    bytes.truncate(usize::try_from(length).ok()?);
    Some(bytes)
}

#[test]
fn an_access_control_list_is_kept() {
    let directory = directory();
    let path = directory.path().join("file");
    fs::write(&path, "old").expect("written");
    // The group has no rights, but the mode shows the mask.
    let list = acl([6, 6, 0, 6, 0]);
    if !set_acl(&path, c"system.posix_acl_access", &list) {
        return;
    }
    assert_eq!(mode(&path), 0o660);
    for _ in 0..2 {
        save(&path, &[1]).expect("saved");
        assert_eq!((mode(&path), get_acl(&path)), (0o660, Some(list.clone())));
    }
    // A list that was set during the save.
    let other = acl([6, 4, 4, 4, 0]);
    let mut file = AtomicFile::create(&path, 1).expect("begun");
    file.write([&b"1"[..]]).expect("written");
    assert!(set_acl(&path, c"system.posix_acl_access", &other));
    file.commit(false).expect("committed");
    assert_eq!((mode(&path), get_acl(&path)), (0o640, Some(other)));
}

#[test]
fn a_default_list_applies_to_new_files_only() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("old"), "old").expect("written");
    fs::set_permissions(at("old"), Permissions::from_mode(0o640)).expect("set");
    if !set_acl(directory.path(), c"system.posix_acl_default", &acl([7, 7, 7, 7, 0])) {
        return;
    }
    File::create(at("theirs")).expect("made");
    for name in ["new", "old"] {
        save(&at(name), &[1]).expect("saved");
    }
    assert!(get_acl(&at("theirs")).is_some());
    assert_eq!((mode(&at("new")), get_acl(&at("new"))), (mode(&at("theirs")), get_acl(&at("theirs"))));
    // User 12345 still cannot read it.
    assert_eq!((mode(&at("old")), get_acl(&at("old"))), (0o640, None));
}

#[test]
fn descriptors_are_written_to() {
    let directory = directory();
    let path = directory.path().join("file");
    let data = pattern(200_000);
    let save_to = |file: &File, name: &dyn Fn(i32) -> String| {
        use std::os::fd::AsRawFd;
        save(Path::new(&name(file.as_raw_fd())), &data)
    };
    let names_of: [&dyn Fn(i32) -> String; 2] =
        [&|fd| format!("/proc/self/fd/{fd}"), &|fd| format!("/dev/fd/{fd}")];
    for name in names_of {
        for is_deleted in [false, true] {
            let mut file = File::options()
                .create(true)
                .truncate(true)
                .read(true)
                .write(true)
                .open(&path)
                .expect("opened");
            file.write_all(b"head").expect("written");
            if is_deleted {
                fs::remove_file(&path).expect("removed");
            }
            save_to(&file, name).expect("saved");
            file.write_all(b"tail").expect("written");
            let mut all = Vec::new();
            file.rewind().and_then(|()| file.read_to_end(&mut all)).expect("read");
            let saved = all.strip_prefix(b"head").and_then(|rest| rest.strip_suffix(b"tail")).expect("both");
            assert_eq!(with_file(saved, contents).expect("valid").tensors[0].3, data);
            assert_eq!(names(directory.path()).len(), usize::from(!is_deleted));
        }
    }
    fs::write(&path, "old").expect("written");
    let read_only = File::open(&path).expect("opened");
    assert_eq!(save_to(&read_only, names_of[0]).expect_err("read only").os_error(), Some(libc::EBADF));
    // An incremental writer writes in any order, so it is refused.
    let descriptor = File::options().write(true).open(&path).expect("opened");
    let name = names_of[0](std::os::fd::AsRawFd::as_raw_fd(&descriptor));
    let error = AtomicFile::create(Path::new(&name), 3).expect_err("refused");
    assert_eq!(error.os_error(), Some(libc::ENODEV));
    assert!(error.to_string().contains("name the file itself"), "{error}");
    let error = save(Path::new("/proc/self/exe"), &data).expect_err("refused");
    assert!(error.to_string().contains("name the file itself"), "{error}");
    assert_eq!(fs::read(&path).expect("there"), b"old");

    save(&path, &data).expect("saved");
    let mapped = TensorFile::open(&path, Backend::Mmap).expect("opened");
    let descriptor = File::options().write(true).open(&path).expect("opened");
    let error = save_to(&descriptor, names_of[0]).expect_err("mapped");
    assert_eq!(error.os_error(), Some(libc::EBUSY));
    assert!(error.to_string().contains("\"pread\""), "{error}");
    assert_eq!(read(&mapped, 0), data);
}

#[test]
fn a_pipe_is_written_to_after_another_file_takes_its_name() {
    let directory = directory();
    let (fifo, other) = (directory.path().join("fifo"), directory.path().join("other"));
    make_fifo(&fifo);
    let data = pattern(10_000_000);
    std::thread::scope(|scope| {
        let saver = scope.spawn(|| save(&fifo, &data));
        let mut reader = File::open(&fifo).expect("opened");
        fs::write(&other, "other").expect("written");
        fs::rename(&other, &fifo).expect("renamed");
        let mut all = Vec::new();
        reader.read_to_end(&mut all).expect("read");
        saver.join().expect("no panic").expect("saved");
        assert_eq!(with_file(&all, contents).expect("valid").tensors[0].3, data);
    });
    assert_eq!(fs::read(&fifo).expect("there"), b"other");
    assert_eq!(names(directory.path()), ["fifo"]);
}

#[test]
fn pipes_and_devices_are_written_to() {
    let directory = directory();
    let fifo = directory.path().join("fifo");
    make_fifo(&fifo);
    let data = pattern(200_000);
    let bytes = std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(&fifo).expect("read"));
        save(&fifo, &data).expect("saved");
        reader.join().expect("no panic")
    });
    assert_eq!(with_file(&bytes, contents).expect("valid").tensors[0].3, data);
    assert_eq!(names(directory.path()), ["fifo"]);
    save(Path::new("/dev/null"), &data).expect("saved");
    let error = save(Path::new("/dev/full"), &data).expect_err("full");
    assert_eq!(error.os_error(), Some(libc::ENOSPC), "{error}");
}

#[test]
fn impossible_targets_are_refused() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("file"), "old").expect("written");
    fs::create_dir(at("directory")).expect("made");
    let before = names(directory.path());
    for (path, errno) in [
        (at("directory"), libc::EISDIR),
        (at("directory/"), libc::EISDIR),
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
    assert_eq!(names(directory.path()), before);
    assert_eq!(fs::read(at("file")).expect("there"), b"old");
}
