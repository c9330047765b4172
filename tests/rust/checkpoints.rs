//! Checkpoints of several files: written and read, refused if index and shards disagree, and replaced atomically.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use common::checkpoints::{INDEX, contents, save, save_with};
use common::{directory, names};
use proptest::prelude::*;
use safetensors_torch::{
    Backend, Checkpoint, CheckpointOptions, Dtype, Error, ErrorKind, Extra, SaveOptions, ShardPlan,
    ShardedOptions, ShardedWriter, TensorSpec, save_file, save_sharded,
};

fn save_one(path: &Path, name: &str, data: &[u8]) {
    let shape = [data.len() as u64];
    let spec = TensorSpec { name, dtype: Dtype::U8, shape: &shape };
    save_file(&[spec], &[data], None, path, SaveOptions::default()).expect("saved");
}

fn open(path: &Path) -> Result<Checkpoint, Error> {
    open_with(path, CheckpointOptions::default())
}

fn open_with(path: &Path, options: CheckpointOptions) -> Result<Checkpoint, Error> {
    let mapped = Checkpoint::open(path, CheckpointOptions { backend: Backend::Mmap, ..options });
    let read = Checkpoint::open(path, CheckpointOptions { backend: Backend::Pread, ..options });
    assert_eq!(mapped.is_ok(), read.is_ok());
    mapped
}

fn refused(path: &Path, kind: ErrorKind, parts: &[&str]) {
    let error = open(path).expect_err("refused");
    assert_eq!(error.kind(), kind, "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "no {part:?} in: {error}");
    }
}

#[test]
fn shards_and_index_are_written_and_read() {
    let directory = directory();
    let at = directory.path().join("new/directory");
    let written = save(&at, &[("z", &[1, 2]), ("a", &[3]), ("m", &[])], 2).expect("saved");
    assert_eq!(written, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]);
    assert_eq!(names(&at), written);
    for path in [at.clone(), at.join(INDEX)] {
        let checkpoint = open(&path).expect("valid");
        let expected = [("a".to_string(), vec![3]), ("m".to_string(), vec![]), ("z".to_string(), vec![1, 2])];
        assert_eq!(contents(&checkpoint), expected);
        assert_eq!(checkpoint.len(), 3);
        assert_eq!(checkpoint.path(), at.join(INDEX));
        for shard in checkpoint.shards() {
            assert_eq!(shard.file.header().metadata().expect("written")["format"], "pt");
        }
        let error = checkpoint.require("b").expect_err("absent");
        assert_eq!(error.kind(), ErrorKind::TensorNotFound);
    }
    // Each shard can be opened on its own.
    assert_eq!(open(&at.join(&written[0])).expect("valid").len(), 1);
}

#[test]
fn large_files_are_written_together() {
    let temporary = directory();
    // Enough bytes for several threads, in files of different sizes.
    let data: Vec<Vec<u8>> = (0..9u8).map(|n| vec![n; 700_000 + 100_000 * usize::from(n)]).collect();
    let tensors: Vec<(String, &[u8])> =
        data.iter().enumerate().map(|(n, bytes)| (format!("t{n}"), &bytes[..])).collect();
    let tensors: Vec<(&str, &[u8])> = tensors.iter().map(|(name, bytes)| (&name[..], *bytes)).collect();
    let names = save(temporary.path(), &tensors, 1).expect("saved");
    assert_eq!(names.len(), 10);
    // Opening compares each file with the index.
    let found = contents(&open(temporary.path()).expect("opened"));
    let expected: Vec<(String, Vec<u8>)> =
        tensors.iter().map(|(name, bytes)| (name.to_string(), bytes.to_vec())).collect();
    assert!(found == expected);
}

#[test]
fn a_save_replaces_the_earlier_checkpoint() {
    let directory = directory();
    let at = directory.path();
    let tensors: [(&str, &[u8]); 3] = [("a", &[1]), ("b", &[2]), ("c", &[3])];
    fs::write(at.join("config.json"), "{}").expect("written");
    save_one(&at.join("model2-00001-of-00009.safetensors"), "other", &[9]);
    let others = ["config.json", "model2-00001-of-00009.safetensors"];
    // One file, three, two, three, three with the same names, and one.
    for max in [100, 1, 2, 1, 1, 100] {
        let mut expected = save(at, &tensors, max).expect("saved");
        assert_eq!(contents(&open(at).expect("valid")).len(), 3);
        expected.extend(others.map(String::from));
        expected.sort();
        assert_eq!(names(at), expected);
    }
}

#[test]
fn an_error_leaves_the_directory_as_it_was() {
    let directory = directory();
    let at = directory.path();
    let before = save(at, &[("a", &[1]), ("b", &[2])], 1).expect("saved");
    let bad = save(at, &[("a", &[7]), ("b", &[8]), ("a", &[9])], 1).expect_err("twice");
    assert_eq!(bad.kind(), ErrorKind::Duplicate);
    // A directory has the second file's name, so creating it fails after the first file is complete.
    fs::create_dir(at.join("model-00002-of-00003.safetensors")).expect("made");
    let error = save(at, &[("a", &[7]), ("b", &[8]), ("c", &[9])], 1).expect_err("a directory is in the way");
    assert_eq!(error.os_error(), Some(libc::EISDIR));
    fs::remove_dir(at.join("model-00002-of-00003.safetensors")).expect("removed");
    assert_eq!(names(at), before);
    assert_eq!(contents(&open(at).expect("as before"))[0].1, [1]);

    let missing = at.join("x/y");
    save(&missing, &[("__metadata__", &[7])], 1).expect_err("reserved");
    let options = ShardedOptions { stem: "a/b", ..ShardedOptions::default() };
    let error = save_with(&missing, &[("a", &[7])], options).expect_err("no file name");
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(names(at), before);
}

#[test]
fn an_error_stops_the_threads_that_write_other_files() {
    if std::thread::available_parallelism().is_ok_and(|threads| threads.get() == 1) {
        return; // one thread writes all files
    }
    let directory = directory();
    let at = directory.path();
    // The second file fails at once. Pages of fresh memory show how much of the first is read to be written.
    let blocked = at.join("model-00002-of-00002.safetensors");
    fs::create_dir(&blocked).expect("made");
    let large = vec![0; 512 << 20];
    let error = save(at, &[("a", &large), ("b", &[1])], 1).expect_err("a directory is in the way");
    assert_eq!(error.os_error(), Some(libc::EISDIR));
    // Aligned to any size of pages.
    let last_page = large.as_ptr_range().end.map_addr(|end| (end - 1) & !0xffff);
    let mut is_resident = 9;
    // SAFETY: mincore does not access the page, and writes one byte for it.
    let status = unsafe { libc::mincore(last_page.cast_mut().cast(), 1, &raw mut is_resident) };
    assert_eq!((status, is_resident & 1), (0, 0), "the first file was written to its end");
    fs::remove_dir(blocked).expect("removed");
    assert!(names(at).is_empty());
}

#[test]
fn links_are_replaced_and_their_targets_stay() {
    let directory = directory();
    let (blobs, at) = (directory.path().join("blobs"), directory.path().join("snapshot"));
    let tensors: [(&str, &[u8]); 2] = [("a", &[1]), ("b", &[2])];
    let expected = [("a".to_string(), vec![7]), ("b".to_string(), vec![8])];
    for max in [1, 9] {
        // As in the Hugging Face cache: every file is a symbolic link to a shared blob.
        for name in save(&blobs, &tensors, 1).expect("saved") {
            fs::create_dir_all(&at).expect("made");
            let _ = fs::remove_file(at.join(&name));
            symlink(blobs.join(&name), at.join(&name)).expect("linked");
        }
        // A second name for the first shard.
        symlink("model-00001-of-00002.safetensors", at.join("model.safetensors")).expect("linked");
        let written = save(&at, &[("a", &[7]), ("b", &[8])], max).expect("saved");
        assert_eq!(names(&at), written);
        assert_eq!(contents(&open(&at).expect("valid")), expected);
        assert_eq!(contents(&open(&blobs).expect("as before"))[0].1, [1]);
        fs::remove_dir_all(&at).expect("removed");
    }
}

#[test]
fn a_directory_renamed_during_a_save_gets_the_checkpoint() {
    let root = directory();
    let (at, aside) = (root.path().join("made/at"), root.path().join("aside"));
    let plan = ShardPlan::new([1, 1].into_iter(), "model", 1).expect("valid");
    for is_committed in [true, false] {
        let mut writer = ShardedWriter::new(&at, &plan, ["a", "b"].into_iter()).expect("begun");
        fs::rename(&at, &aside).expect("renamed");
        fs::create_dir(&at).expect("made");
        for shard in 0..2 {
            let spec = TensorSpec { name: ["a", "b"][shard], dtype: Dtype::U8, shape: &[1] };
            let mut bytes = vec![
                0;
                safetensors_torch::Layout::plan(&[spec], None, 8).expect("valid").total_bytes()
                    as usize
            ];
            safetensors_torch::save_into(&[spec], &[&[7]], None, &mut bytes, 8).expect("saved");
            let mut file = writer.create(shard, bytes.len() as u64).expect("begun");
            file.write([&bytes[..]]).expect("written");
            writer.add(file);
        }
        if is_committed {
            writer.commit(true).expect("saved");
            assert_eq!(contents(&open(&aside).expect("whole")).len(), 2);
        } else {
            drop(writer);
        }
        // The new directory of the old name stays empty, and is not removed.
        assert!(names(&at).is_empty());
        fs::remove_dir_all(&aside).expect("removed");
        fs::remove_dir_all(root.path().join("made")).expect("removed");
    }
}

/// Saves `count` tensors, one per file, while a directory blocks the file name `blocked`. Returns the error.
fn save_blocked(at: &Path, stem: &str, count: usize, blocked: &str) -> Error {
    let tensors: Vec<String> = (0..count).map(|i| format!("t{i}")).collect();
    let plan = ShardPlan::new((0..count).map(|_| 1), stem, 1).expect("valid");
    let mut writer = ShardedWriter::new(at, &plan, tensors.iter().map(String::as_str)).expect("begun");
    for shard in 0..plan.count() {
        let mut file = writer.create(shard, 1).expect("begun");
        file.write([&[7u8][..]]).expect("written");
        writer.add(file);
    }
    let (blocked, aside) = (at.join(blocked), at.join("aside"));
    let existed = fs::rename(&blocked, &aside).is_ok();
    fs::create_dir(&blocked).expect("made");
    let error = writer.commit(true).expect_err("a directory is in the way");
    fs::remove_dir(&blocked).expect("removed");
    if existed {
        fs::rename(aside, blocked).expect("put back");
    }
    assert_eq!(error.os_error(), Some(libc::EISDIR), "{error}");
    error
}

#[test]
fn a_failed_commit_restores_the_checkpoint() {
    let directory = directory();
    let at = directory.path();
    let before = save(at, &[("a", &[1]), ("b", &[2])], 1).expect("saved");
    fs::set_permissions(at.join(INDEX), fs::Permissions::from_mode(0o640)).expect("changed");
    let unchanged = || {
        assert_eq!(names(at), before);
        assert_eq!(contents(&open(at).expect("as before")).len(), 2);
        let mode = fs::metadata(at.join(INDEX)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
    };
    // New file names: the files already in place are removed again.
    for blocked in ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"] {
        assert!(!save_blocked(at, "model", 3, blocked).to_string().contains("not complete"));
        unchanged();
    }
    // The same file names: the old index is restored if the first file fails.
    assert!(
        !save_blocked(at, "model", 2, "model-00001-of-00002.safetensors")
            .to_string()
            .contains("not complete")
    );
    unchanged();
    let error = save_blocked(at, "model", 2, "model-00002-of-00002.safetensors").to_string();
    assert!(error.contains("1 of 2 files are in place, and no index"), "{error}");
    refused(at, ErrorKind::Index, &["not their index"]);
    assert_eq!(names(at), before[..2]);
}

#[test]
fn wrong_counts_of_names_or_buffers_are_refused() {
    let directory = directory();
    let spec = TensorSpec { name: "a", dtype: Dtype::U8, shape: &[1] };
    for data in [&[][..], &[&[1u8][..], &[2]]] {
        let error = save_sharded(&[spec], data, None, directory.path(), ShardedOptions::default());
        assert_eq!(error.expect_err("refused").kind(), ErrorKind::InvalidArgument);
    }
    let plan = ShardPlan::new([1, 1].into_iter(), "model", 1).expect("valid");
    for names in [&["a"][..], &["a", "b", "c"]] {
        let error = ShardedWriter::new(directory.path(), &plan, names.iter().copied()).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    assert!(names(directory.path()).is_empty());
}

#[test]
fn directories_created_by_a_failed_save_are_removed() {
    let directory = directory();
    let at = directory.path().join("x/y");
    let long = "n".repeat(300);
    let options = ShardedOptions { stem: &long, ..ShardedOptions::default() };
    let error = save_with(&at, &[("a", &[7])], options).expect_err("too long a name");
    assert_eq!(error.os_error(), Some(libc::ENAMETOOLONG));
    assert!(names(directory.path()).is_empty());
    fs::write(directory.path().join("file"), "").expect("written");
    let error = save(&directory.path().join("file/y"), &[("a", &[7])], 1).expect_err("a file is in the way");
    assert_eq!(error.kind(), ErrorKind::Io);
}

#[test]
fn an_index_that_does_not_match_its_files_is_refused() {
    let directory = directory();
    let at = directory.path();
    save(at, &[("a", &[1]), ("b", &[2])], 1).expect("saved");
    let first = at.join("model-00001-of-00002.safetensors");
    let second = at.join("model-00002-of-00002.safetensors");
    let index = fs::read_to_string(at.join(INDEX)).expect("text");

    // The tensors are in each other's file.
    save_one(&first, "b", &[2]);
    save_one(&second, "a", &[1]);
    refused(at, ErrorKind::Index, &[INDEX, "\"a\"", "model-00001-of-00002", "it is in \"model-00002"]);
    save_one(&second, "b", &[2]);
    refused(at, ErrorKind::Index, &[INDEX, "\"a\"", "no shard has it"]);
    // The first file has a tensor that the index assigns to the second, then one that the index does not list.
    save_one(&first, "a", &[1]);
    save(&at.join("two"), &[("a", &[1]), ("b", &[2])], 9).expect("saved");
    fs::copy(at.join("two/model.safetensors"), &first).expect("copied");
    refused(at, ErrorKind::Index, &[INDEX, "\"b\"", "model-00001-of-00002"]);
    save(&at.join("two"), &[("a", &[1]), ("zz", &[2])], 9).expect("saved");
    fs::copy(at.join("two/model.safetensors"), &first).expect("copied");
    refused(at, ErrorKind::Index, &[INDEX, "\"zz\"", "model-00001-of-00002"]);
    save_one(&first, "a", &[1]);
    open(at).expect("fits again");

    // A missing shard, a truncated one, and one of a foreign format.
    fs::remove_file(&second).expect("removed");
    refused(at, ErrorKind::Io, &["No such file", "model-00002-of-00002", INDEX]);
    fs::write(&second, &fs::read(&first).expect("there")[..20]).expect("written");
    refused(at, ErrorKind::HeaderTruncated, &["model-00002-of-00002"]);
    fs::write(&second, "version https://git-lfs.github.com/spec/v1\n").expect("written");
    refused(at, ErrorKind::ForeignFormat, &["model-00002-of-00002", "git lfs pull"]);
    fs::remove_file(&second).expect("removed");

    // File names must not lead out of the directory, even to an existing file; symbolic links may.
    let outside = at.join("inner");
    fs::create_dir(&outside).expect("made");
    fs::write(outside.join(INDEX), index.replace("model-00001-of", "../model-00001-of")).expect("written");
    refused(&outside, ErrorKind::Index, &["inner", INDEX, "\"a\"", "../model-00001-of-00002.safetensors"]);
    save_one(&at.join("elsewhere"), "b", &[2]);
    symlink("elsewhere", &second).expect("linked");
    assert_eq!(contents(&open(at).expect("valid")).len(), 2);
}

#[test]
fn extra_tensors_are_refused_or_ignored() {
    let directory = directory();
    let at = directory.path();
    save(at, &[("a", &[1]), ("b", &[2]), ("c", &[3]), ("d", &[4])], 2).expect("saved");
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let index = |map: serde_json::Value| {
        fs::write(at.join(INDEX), serde_json::json!({ "weight_map": map }).to_string()).expect("written");
    };
    index(serde_json::json!({"b": first, "c": second}));
    refused(at, ErrorKind::Index, &[first, "\"a\"", "set `extra` to \"ignore\""]);
    let ignore = CheckpointOptions { extra: Extra::Ignore, ..CheckpointOptions::default() };
    let checkpoint = open_with(at, ignore).expect("the rest is left out");
    assert_eq!(contents(&checkpoint), [("b".to_string(), vec![2]), ("c".to_string(), vec![3])]);
    assert_eq!((checkpoint.len(), checkpoint.find("a"), checkpoint.find("d")), (2, None, None));

    // If two files have a tensor, the index decides.
    save_one(&at.join(second), "b", &[9]);
    index(serde_json::json!({"a": first, "b": second}));
    let checkpoint = open_with(at, ignore).expect("each once");
    assert_eq!(contents(&checkpoint), [("a".to_string(), vec![1]), ("b".to_string(), vec![9])]);

    // Every listed tensor must still exist.
    index(serde_json::json!({"a": second, "b": first}));
    let error = open_with(at, ignore).expect_err("it is elsewhere");
    assert!(
        error.kind() == ErrorKind::Index && error.to_string().contains("it is in \"model-00001"),
        "{error}"
    );
    index(serde_json::json!({"gone": first}));
    assert!(open_with(at, ignore).expect_err("nowhere").to_string().contains("no shard has it"));
    assert_eq!("ignore".parse::<Extra>().expect("known"), Extra::Ignore);
    assert!("no".parse::<Extra>().is_err());
}

#[test]
fn variants_in_one_directory() {
    let directory = directory();
    let at = directory.path();
    save(at, &[("a", &[1]), ("b", &[2])], 9).expect("saved");
    save_with(
        at,
        &[("a", &[3]), ("b", &[4])],
        ShardedOptions { stem: "model.fp16", max_shard_size: 1, ..ShardedOptions::default() },
    )
    .expect("saved");
    let fp16 = CheckpointOptions { variant: Some("fp16"), ..CheckpointOptions::default() };
    let (plain, half) = (
        [("a".to_string(), vec![1]), ("b".to_string(), vec![2])],
        [("a".to_string(), vec![3]), ("b".to_string(), vec![4])],
    );
    assert_eq!(contents(&open(at).expect("without a variant")), plain);
    assert_eq!(contents(&open_with(at, fp16).expect("the variant")), half);
    // The other common name of a variant's index.
    let other = at.join("model.safetensors.index.fp16.json");
    fs::rename(at.join("model.fp16.safetensors.index.json"), &other).expect("renamed");
    let checkpoint = open_with(at, fp16).expect("the variant");
    assert_eq!((checkpoint.path(), contents(&checkpoint)), (&*other, half.to_vec()));
    let bf16 = CheckpointOptions { variant: Some("bf16"), ..fp16 };
    let error = open_with(at, bf16).expect_err("absent");
    assert!(error.to_string().contains("variant \"bf16\""), "{error}");
    let error = open_with(&at.join("model.safetensors"), fp16).expect_err("a file");
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    // The index is moved aside while its files are replaced, and restored if none was replaced.
    let error = save_blocked(at, "model.fp16", 2, "model.fp16-00001-of-00002.safetensors");
    assert!(!error.to_string().contains("not complete"), "{error}");
    assert_eq!(contents(&open_with(at, fp16).expect("as before")), half);
    let error = save_blocked(at, "model.fp16", 2, "model.fp16-00002-of-00002.safetensors");
    assert!(error.to_string().contains("1 of 2 files are in place, and no index"), "{error}");
    assert!(!other.exists());
    fs::write(&other, "{}").expect("written");
    // Saving the variant leaves one index.
    let options = ShardedOptions { stem: "model.fp16", max_shard_size: 1, ..ShardedOptions::default() };
    save_with(at, &[("a", &[5]), ("b", &[6])], options).expect("saved");
    assert!(!other.exists());
    assert_eq!(
        contents(&open_with(at, fp16).expect("the variant")),
        [("a".to_string(), vec![5]), ("b".to_string(), vec![6])]
    );
    assert_eq!(contents(&open(at).expect("without a variant")), plain);
}

#[test]
fn missing_checkpoints_are_reported() {
    let directory = directory();
    let at = directory.path();
    refused(at, ErrorKind::Index, &["no checkpoint"]);
    refused(&at.join("gone"), ErrorKind::Io, &["No such file or directory", "gone"]);
    refused(&at.join("gone.json"), ErrorKind::Io, &["No such file or directory", "gone.json"]);
    fs::write(at.join("model-00001-of-00002.safetensors"), "").expect("written");
    refused(at, ErrorKind::Index, &["not their index", INDEX]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn written_checkpoints_are_read_back(
        sizes in prop::collection::vec(0..40usize, 0..12),
        max in 1..60u64,
    ) {
        let directory = directory();
        let tensors: Vec<(String, Vec<u8>)> =
            sizes.iter().enumerate().map(|(i, &size)| (format!("t{i:02}"), vec![i as u8; size])).collect();
        let given: Vec<(&str, &[u8])> =
            tensors.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        save(directory.path(), &given, max).expect("saved");
        let checkpoint = open(directory.path()).expect("valid");
        prop_assert_eq!(contents(&checkpoint), tensors);
        for shard in checkpoint.shards() {
            let sizes: Vec<u64> = shard.file.header().iter().map(|tensor| tensor.nbytes()).collect();
            prop_assert!(sizes.iter().sum::<u64>() <= max || sizes.len() == 1);
        }
    }
}
