//! Edits of metadata: by a rewrite and in place, what readers see, and the file after an error.

mod common;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Contents, assert_error, contents, directory, file_bytes, pattern, read};
use safetensors_torch::{
    Backend, Dtype, EditOptions, ErrorKind, Metadata, MetadataChanges, MetadataEdit, SaveOptions, TensorFile,
    TensorSpec, edit_metadata, save_file,
};
use tempfile::TempDir;

const IN_PLACE: EditOptions = EditOptions { in_place: true, reserve: 0, durable: false };
const REWRITE: EditOptions = EditOptions { in_place: false, reserve: 0, durable: false };

fn changes(pairs: &[(&str, Option<&str>)]) -> MetadataChanges {
    pairs.iter().map(|(key, value)| (key.to_string(), value.map(str::to_string))).collect()
}

fn entries(pairs: &[(&str, &str)]) -> Option<Metadata> {
    Some(pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect())
}

/// Saves a file with two tensors, metadata, and data at a multiple of `alignment`.
fn make(directory: &TempDir, alignment: u64) -> PathBuf {
    let path = directory.path().join("file");
    let first = TensorSpec { name: "first", dtype: Dtype::F32, shape: &[1000] };
    let second = TensorSpec { name: "second", dtype: Dtype::U8, shape: &[3] };
    let options = SaveOptions { alignment, durable: false };
    let metadata = entries(&[("format", "pt")]);
    save_file(&[first, second], &[&pattern(4000), &[7, 8, 9]], metadata.as_ref(), &path, options)
        .expect("saved");
    path
}

fn open(path: &Path) -> Contents {
    contents(&TensorFile::open(path, Backend::Pread).expect("valid"))
}

fn data_start(path: &Path) -> u64 {
    TensorFile::open(path, Backend::Pread).expect("valid").header().data_start()
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).expect("there").ino()
}

#[test]
fn an_edit_in_place_writes_only_the_header() {
    let directory = directory();
    let path = make(&directory, 4096);
    let (before, tensors) = (inode(&path), open(&path).tensors);
    for durable in [false, true] {
        let options = EditOptions { durable, ..IN_PLACE };
        let changed =
            changes(&[("format", None), ("epoch", Some("3")), ("na\0me", Some("\"\n")), ("absent", None)]);
        let metadata = edit_metadata(&path, &changed, options).expect("edited");
        assert_eq!(metadata, entries(&[("epoch", "3"), ("na\0me", "\"\n")]));
        assert_eq!(open(&path), Contents { tensors: open(&path).tensors, metadata });
        assert_eq!((inode(&path), data_start(&path)), (before, 4096));
        edit_metadata(&path, &changes(&[("format", Some("pt"))]), options).expect("edited");
    }
    assert!(open(&path).tensors == tensors);
}

#[test]
fn an_edit_rewrites_the_file_and_reserves_room() {
    let directory = directory();
    let path = make(&directory, 8);
    fs::set_permissions(&path, Permissions::from_mode(0o640)).expect("set");
    let (before, start, tensors) = (inode(&path), data_start(&path), open(&path).tensors);
    let long = "x".repeat(200);
    let large = changes(&[("long", Some(&long))]);
    assert_error(
        edit_metadata(&path, &large, IN_PLACE),
        ErrorKind::InvalidArgument,
        &path,
        "leave in_place out, or make room first",
    );
    assert_eq!(inode(&path), before);

    let options = EditOptions { reserve: 500, ..REWRITE };
    let metadata = edit_metadata(&path, &large, options).expect("edited");
    assert_eq!(metadata, entries(&[("format", "pt"), ("long", &long)]));
    assert!(open(&path) == Contents { tensors, metadata });
    assert_ne!(inode(&path), before);
    assert!(data_start(&path) >= start + 700);
    assert_eq!(fs::metadata(&path).expect("there").mode() & 0o7777, 0o640);

    // There is room now for the next edit, and for the same reserve again.
    let before = inode(&path);
    edit_metadata(&path, &changes(&[("more", Some("y"))]), IN_PLACE).expect("edited");
    let options = EditOptions { reserve: 400, ..IN_PLACE };
    edit_metadata(&path, &changes(&[]), options).expect("room enough");
    let options = EditOptions { reserve: 5000, ..IN_PLACE };
    assert_error(
        edit_metadata(&path, &changes(&[]), options),
        ErrorKind::InvalidArgument,
        &path,
        "reserve is 5000",
    );
    assert_eq!(inode(&path), before);
    assert_eq!(fs::read_dir(directory.path()).expect("there").count(), 1);
}

#[test]
fn an_edit_that_changes_nothing_writes_nothing() {
    let directory = directory();
    // Not what this library would write, so that a rewrite would change it.
    let path = directory.path().join("file");
    let bytes = file_bytes("  {\"__metadata__\" : {\"a\":\"b\"} }   ", &[]);
    fs::write(&path, &bytes).expect("written");
    let before = inode(&path);
    for options in [REWRITE, IN_PLACE] {
        let metadata =
            edit_metadata(&path, &changes(&[("a", Some("b")), ("c", None)]), options).expect("edited");
        assert_eq!(metadata, entries(&[("a", "b")]));
    }
    assert_eq!((fs::read(&path).expect("there"), inode(&path)), (bytes, before));
    edit_metadata(&path, &changes(&[]), EditOptions { reserve: 100, ..REWRITE }).expect("edited");
    assert_ne!(inode(&path), before);
    assert_eq!(open(&path).metadata, entries(&[("a", "b")]));
}

#[test]
fn metadata_appears_with_its_first_entry_and_stays_empty() {
    let directory = directory();
    let path = directory.path().join("file");
    save_file(&[], &[], None, &path, SaveOptions::default()).expect("saved");
    let edit =
        |pairs: &[(&str, Option<&str>)]| edit_metadata(&path, &changes(pairs), REWRITE).expect("edited");
    assert_eq!(edit(&[("absent", None)]), None);
    assert_eq!(edit(&[("k", Some("v"))]), entries(&[("k", "v")]));
    assert_eq!(edit(&[("k", None)]), entries(&[]));
    assert_eq!(open(&path).metadata, entries(&[]));
}

#[test]
fn mapped_tensors_do_not_change() {
    let directory = directory();
    let path = make(&directory, 4096);
    for options in [IN_PLACE, REWRITE] {
        let mapped = TensorFile::open(&path, Backend::Mmap).expect("opened");
        let before = contents(&mapped);
        edit_metadata(&path, &changes(&[("k", Some(&"v".repeat(2000)))]), options).expect("edited");
        assert!(contents(&mapped) == before);
        assert!(open(&path).tensors == before.tensors);
        edit_metadata(&path, &changes(&[("k", None)]), options).expect("edited");
    }
}

#[test]
fn links_are_replaced_or_refused() {
    let directory = directory();
    let path = make(&directory, 4096);
    let (soft, hard) = (directory.path().join("soft"), directory.path().join("hard"));
    let whole = fs::read(&path).expect("there");
    // A symbolic link is replaced; the file it leads to stays.
    symlink("file", &soft).expect("linked");
    edit_metadata(&soft, &changes(&[("k", Some("1"))]), REWRITE).expect("edited");
    assert!(fs::symlink_metadata(&soft).expect("there").is_file());
    assert_eq!(open(&soft).metadata, entries(&[("format", "pt"), ("k", "1")]));
    assert!(open(&soft).tensors == open(&path).tensors);
    assert!(fs::read(&path).expect("there") == whole);
    fs::remove_file(&soft).expect("removed");
    symlink("file", &soft).expect("linked");
    assert_error(
        edit_metadata(&soft, &changes(&[("k", Some("1"))]), IN_PLACE),
        ErrorKind::InvalidArgument,
        &soft,
        "a symbolic link cannot be edited in place",
    );
    // Nothing changes, so nothing is written.
    edit_metadata(&soft, &changes(&[("absent", None)]), REWRITE).expect("nothing to do");
    assert!(fs::symlink_metadata(&soft).expect("there").is_symlink());
    assert!(fs::read(&path).expect("there") == whole);
    fs::remove_file(&soft).expect("removed");
    edit_metadata(&path, &changes(&[("k", Some("2"))]), IN_PLACE).expect("edited");

    // The other name of the file keeps its metadata.
    fs::hard_link(&path, &hard).expect("linked");
    assert_error(
        edit_metadata(&path, &changes(&[("k", Some("3"))]), IN_PLACE),
        ErrorKind::InvalidArgument,
        &path,
        "2 names (hard links)",
    );
    assert_eq!(open(&path).metadata, entries(&[("format", "pt"), ("k", "2")]));
    edit_metadata(&path, &changes(&[("k", Some("3"))]), REWRITE).expect("edited");
    assert_eq!(open(&path).metadata, entries(&[("format", "pt"), ("k", "3")]));
    assert_eq!(open(&hard).metadata, entries(&[("format", "pt"), ("k", "2")]));
}

#[test]
fn a_read_only_file_is_rewritten_and_not_edited_in_place() {
    let directory = directory();
    let path = make(&directory, 4096);
    fs::set_permissions(&path, Permissions::from_mode(0o444)).expect("set");
    if File::options().write(true).open(&path).is_ok() {
        // Root may write to every file; Python's tests run this as another user.
        return;
    }
    let before = inode(&path);
    assert_error(
        edit_metadata(&path, &changes(&[("k", Some("v"))]), IN_PLACE),
        ErrorKind::Io,
        &path,
        "ermission",
    );
    edit_metadata(&path, &changes(&[("k", Some("v"))]), REWRITE).expect("edited");
    assert_ne!(inode(&path), before);
    assert_eq!(fs::metadata(&path).expect("there").mode() & 0o7777, 0o444);
}

#[test]
fn invalid_files_are_refused_and_stay() {
    let directory = directory();
    let path = make(&directory, 4096);
    let whole = fs::read(&path).expect("there");
    for (bytes, kind) in [
        (&whole[..whole.len() - 1], ErrorKind::DataLength),
        (&whole[..100], ErrorKind::HeaderTruncated),
        (b"PK\x03\x04 a zip", ErrorKind::ForeignFormat),
    ] {
        fs::write(&path, bytes).expect("written");
        for options in [IN_PLACE, REWRITE] {
            let outcome = edit_metadata(&path, &changes(&[("k", Some("v"))]), options);
            assert_error(outcome, kind, &path, "");
            assert_eq!(fs::read(&path).expect("there"), bytes);
        }
    }
    let absent = directory.path().join("absent");
    assert_error(edit_metadata(&absent, &changes(&[]), REWRITE), ErrorKind::Io, &absent, "No such file");
    assert_error(
        edit_metadata(directory.path(), &changes(&[]), REWRITE),
        ErrorKind::Io,
        directory.path(),
        "directory",
    );
    fs::write(&path, &whole).expect("written");
    for reserve in [100_000_001, u64::MAX] {
        let options = EditOptions { reserve, ..REWRITE };
        assert_error(
            edit_metadata(&path, &changes(&[]), options),
            ErrorKind::HeaderTooLarge,
            &path,
            "header",
        );
    }
    assert!(fs::read(&path).expect("there") == whole);
}

/// As other writers may save: misaligned data, unknown fields, another order.
#[test]
fn foreign_files_keep_their_tensors() {
    let directory = directory();
    let path = directory.path().join("file");
    let json = r#"{"b":{"data_offsets":[2,6],"dtype":"F32","shape":[1],"note":[1,{}]},"\u0061":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
    fs::write(&path, file_bytes(json, &[1, 2, 3, 4, 5, 6])).expect("written");
    assert_ne!(data_start(&path) % 8, 0);
    let tensors = open(&path).tensors;
    edit_metadata(&path, &changes(&[("k", Some("v"))]), REWRITE).expect("edited");
    assert_eq!(open(&path), Contents { tensors: tensors.clone(), metadata: entries(&[("k", "v")]) });
    assert_eq!(open(&path).tensors[0].0, "a");
    edit_metadata(&path, &changes(&[("k", Some(&"v".repeat(100)))]), REWRITE).expect("edited");
    assert_eq!(data_start(&path) % 8, 0);
    assert_eq!(open(&path).tensors, tensors);
}

#[test]
fn a_large_file_is_edited_in_steps_and_can_be_dropped() {
    let directory = directory();
    let path = directory.path().join("file");
    let data = pattern(70 << 20);
    let spec = TensorSpec { name: "large", dtype: Dtype::U8, shape: &[70 << 20] };
    save_file(&[spec], &[&data], None, &path, SaveOptions::default()).expect("saved");
    let changed = changes(&[("k", Some("v"))]);
    let begin = || MetadataEdit::begin(&path, &changed, REWRITE).expect("begun");

    let mut edit = begin();
    assert!(!edit.advance(Some(Instant::now())).expect("a step"));
    assert!(edit.done_bytes() > 0 && edit.done_bytes() < edit.total_bytes());
    drop(edit);
    assert_eq!(open(&path).metadata, None);
    assert_eq!(fs::read_dir(directory.path()).expect("there").count(), 1);

    let mut edit = begin();
    let mut steps = 1;
    while !edit.advance(Some(Instant::now())).expect("a step") {
        steps += 1;
    }
    assert!(steps >= 3, "{steps}");
    assert_eq!(edit.done_bytes(), edit.total_bytes());
    assert!(edit.advance(None).expect("all is done"));
    let file = TensorFile::open(&path, Backend::Pread).expect("valid");
    assert_eq!(file.header().metadata(), edit.metadata());
    assert!(read(&file, 0) == data);
}

#[test]
fn a_directory_that_is_renamed_during_an_edit_gets_it() {
    let root = directory();
    let (at, aside) = (root.path().join("at"), root.path().join("aside"));
    for options in [IN_PLACE, REWRITE] {
        fs::create_dir(&at).expect("made");
        let spec = TensorSpec { name: "saved", dtype: Dtype::U8, shape: &[3] };
        let save = || {
            let options = SaveOptions { alignment: 4096, durable: false };
            save_file(&[spec], &[&[1, 2, 3]], None, &at.join("file"), options).expect("saved");
        };
        save();
        let edited = at.join("file");
        let mut edit = MetadataEdit::begin(&edited, &changes(&[("k", Some("v"))]), options).expect("begun");
        fs::rename(&at, &aside).expect("renamed");
        fs::create_dir(&at).expect("made");
        save();
        assert!(edit.advance(None).expect("edited"));
        assert_eq!(open(&aside.join("file")).metadata, entries(&[("k", "v")]));
        assert_eq!(open(&at.join("file")).metadata, None);
        fs::remove_dir_all(&at).expect("removed");
        fs::remove_dir_all(&aside).expect("removed");
    }
}

#[test]
fn a_file_that_changes_during_an_edit_stays() {
    let directory = directory();
    let path = make(&directory, 8);
    let changed = changes(&[("k", Some("a longer value than there is room for"))]);
    let mut edit = MetadataEdit::begin(&path, &changed, REWRITE).expect("begun");
    let file = File::options().write(true).open(&path).expect("opened");
    file.set_len(fs::metadata(&path).expect("there").len() - 100).expect("cut short");
    assert_error(edit.advance(None), ErrorKind::FileChanged, &path, "became shorter");
    drop(edit);
    assert_eq!(fs::read_dir(directory.path()).expect("there").count(), 1);
}

#[test]
fn concurrent_changes_stay() {
    let directory = directory();
    let path = directory.path().join("file");
    let (soft, copy) = (directory.path().join("soft"), directory.path().join("copy"));
    symlink("file", &soft).expect("linked");
    let save = || {
        let spec = TensorSpec { name: "saved", dtype: Dtype::U8, shape: &[3] };
        save_file(&[spec], &[&[1, 2, 3]], None, &path, SaveOptions::default()).expect("saved");
    };
    let edit_in_place = || {
        edit_metadata(&path, &changes(&[("other", Some("x"))]), IN_PLACE).expect("edited");
    };
    let write = || {
        fs::copy(&path, &copy).expect("copied");
        fs::write(&path, fs::read(&copy).expect("there")).expect("written");
        fs::remove_file(&copy).expect("removed");
    };
    let remove = || fs::remove_file(&path).expect("removed");
    let doings: [(&str, &dyn Fn()); 4] =
        [("save", &save), ("edit", &edit_in_place), ("write", &write), ("remove", &remove)];
    for (what, do_it) in doings {
        for options in [IN_PLACE, REWRITE, EditOptions { durable: true, ..REWRITE }] {
            make(&directory, 4096);
            // Filesystems record times in steps of some milliseconds.
            std::thread::sleep(Duration::from_millis(20));
            // A rewrite replaces the link, and still checks the file it leads to.
            let edited = if options.in_place { &path } else { &soft };
            let mut edit =
                MetadataEdit::begin(edited, &changes(&[("k", Some("v"))]), options).expect("begun");
            do_it();
            let theirs = fs::read(&path).ok();
            assert_error(edit.advance(None), ErrorKind::FileChanged, edited, "run the edit again");
            drop(edit);
            assert!(fs::read(&path).ok() == theirs, "{what} was undone by {options:?}");
            assert_eq!(
                fs::read_dir(directory.path()).expect("there").count(),
                1 + usize::from(path.exists())
            );
        }
    }
    // A link that is changed during the edit stays.
    make(&directory, 4096);
    let mut edit = MetadataEdit::begin(&soft, &changes(&[("k", Some("v"))]), REWRITE).expect("begun");
    fs::remove_file(&soft).expect("removed");
    symlink(&path, &soft).expect("linked");
    assert_error(edit.advance(None), ErrorKind::FileChanged, &soft, "run the edit again");
    drop(edit);
    assert_eq!(fs::read_link(&soft).expect("a link"), path);
    // Changes of names and permissions do not refuse the edit.
    make(&directory, 4096);
    let mut edit = MetadataEdit::begin(&path, &changes(&[("k", Some("v"))]), REWRITE).expect("begun");
    fs::hard_link(&path, &copy).expect("linked");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("set");
    open(&path);
    assert!(edit.advance(None).expect("edited"));
    assert_eq!(open(&path).metadata, entries(&[("format", "pt"), ("k", "v")]));
    assert_eq!(open(&copy).metadata, entries(&[("format", "pt")]));
}
