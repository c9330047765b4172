//! Checkpoints whose files a program reads by its own means.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use safetensors_torch::{
    ByteSource, Checkpoint, CheckpointOptions, Destination, Dtype, Error, ErrorKind, Extra, Filesystem,
    Result, ShardedOptions, TensorSpec, save_sharded,
};

/// The objects of a bucket.
type Objects = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;
type BeforeOpen = Box<dyn Fn(&str, &Objects) + Sync>;

/// A bucket. Its objects may be replaced while they are read.
struct Bucket {
    objects: Objects,
    has_listing: bool,
    /// Called before each object is opened.
    before_open: BeforeOpen,
    opened: Mutex<Vec<String>>,
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bucket")
    }
}

#[derive(Debug)]
struct Object(Objects, String);

fn os_error(number: i32) -> Error {
    Error::new(ErrorKind::Io, format!("answer {number}"))
        .with_os_error(std::io::Error::from_raw_os_error(number))
}

impl Object {
    fn bytes(&self) -> Result<Vec<u8>> {
        self.0.lock().expect("not poisoned").get(&self.1).cloned().ok_or_else(|| os_error(libc::ENOENT))
    }
}

impl ByteSource for Object {
    fn length(&self) -> Result<u64> {
        Ok(self.bytes()?.len() as u64)
    }

    fn identity(&self) -> Result<Option<String>> {
        // As an ETag, a digest of the bytes.
        Ok(Some(format!(
            "{:?}",
            self.bytes()
                .map(|bytes| bytes.iter().fold(7u64, |sum, &byte| sum * 31 % 1_000_003 + u64::from(byte)))
                .ok()
        )))
    }

    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<()> {
        let bytes = self.bytes()?;
        let changed = || Error::new(ErrorKind::FileChanged, "the object was replaced");
        let end = offset as usize + destination.remaining();
        destination.write(bytes.get(offset as usize..end).ok_or_else(changed)?);
        Ok(())
    }
}

impl Filesystem for Bucket {
    fn open(&self, path: &Path) -> Result<Box<dyn ByteSource>> {
        let path = path.to_str().expect("text").to_owned();
        (self.before_open)(&path, &self.objects);
        self.opened.lock().expect("not poisoned").push(path.clone());
        Ok(Box::new(Object(Arc::clone(&self.objects), path)))
    }

    fn list(&self, directory: &Path) -> Result<Option<Vec<String>>> {
        if !self.has_listing {
            return Ok(None);
        }
        let prefix = format!("{}/", directory.to_str().expect("text").trim_end_matches('/'));
        let objects = self.objects.lock().expect("not poisoned");
        Ok(Some(objects.keys().filter_map(|path| path.strip_prefix(&prefix)).map(str::to_owned).collect()))
    }
}

/// Returns a bucket with a checkpoint of `count` tensors in `s3://b/llm/`, each in its own file if there are several.
fn bucket(count: u8) -> Bucket {
    let bucket = Bucket {
        objects: Objects::default(),
        has_listing: true,
        before_open: Box::new(|_, _| {}),
        opened: Mutex::default(),
    };
    add(&bucket.objects, "s3://b/llm/", count, count);
    bucket
}

/// Adds a checkpoint with tensors `t0`, `t1`, ... of 5 bytes `value`, and one called `extra` in front of the last.
fn add(objects: &Objects, prefix: &str, count: u8, value: u8) {
    let directory = tempfile::tempdir().expect("a directory");
    let names: Vec<String> = (0..count).map(|number| format!("t{number}")).collect();
    let specs: Vec<_> = names.iter().map(|name| TensorSpec { name, dtype: Dtype::U8, shape: &[5] }).collect();
    let bytes = [value; 5];
    let data = vec![&bytes[..]; count.into()];
    let options = ShardedOptions { max_shard_size: 5, ..ShardedOptions::default() };
    save_sharded(&specs, &data, None, directory.path(), options).expect("saved");
    for entry in std::fs::read_dir(directory.path()).expect("listed") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_str().expect("text");
        let bytes = std::fs::read(&path).expect("read");
        objects.lock().expect("not poisoned").insert(format!("{prefix}{name}"), bytes);
    }
}

fn open(bucket: &Bucket, path: &str) -> Result<Checkpoint> {
    Checkpoint::open_in(bucket, path.as_ref(), CheckpointOptions::default())
}

const INDEX: &str = "s3://b/llm/model.safetensors.index.json";

#[test]
fn files_indexes_and_directories_are_opened() {
    let bucket = bucket(3);
    for path in [INDEX, "s3://b/llm", "s3://b/llm/"] {
        let checkpoint = open(&bucket, path).expect("opened");
        assert_eq!(checkpoint.path(), Path::new(INDEX));
        assert_eq!(checkpoint.len(), 3);
        let names: Vec<&str> = checkpoint.shards().iter().map(|shard| &shard.name[..]).collect();
        assert_eq!(names, [1, 2, 3].map(|number| format!("model-0000{number}-of-00003.safetensors")));
        let at = checkpoint.require("t1").expect("there");
        let buffers =
            checkpoint.shards()[at.shard as usize].file.load_tensors(&[at.index as usize]).expect("read");
        // SAFETY: the load has written the tensor's 5 bytes there.
        assert_eq!(unsafe { std::slice::from_raw_parts(buffers.start(0), 5) }, [3; 5]);
    }
    let shard = open(&bucket, "s3://b/llm/model-00002-of-00003.safetensors").expect("a file");
    assert_eq!((shard.len(), &shard.shards()[0].name[..]), (1, "model-00002-of-00003.safetensors"));
    let variant = CheckpointOptions { variant: Some("fp16"), ..CheckpointOptions::default() };
    let file = "s3://b/llm/model-00002-of-00003.safetensors".as_ref();
    let error = Checkpoint::open_in(&bucket, file, variant).expect_err("a file");
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
}

#[test]
fn a_directory_without_a_listing_has_default_names() {
    let bucket = Bucket { has_listing: false, ..bucket(1) };
    assert_eq!(open(&bucket, "s3://b/llm").expect("found").path(), Path::new("s3://b/llm/model.safetensors"));
    add(&bucket.objects, "s3://b/many/", 2, 9);
    assert_eq!(open(&bucket, "s3://b/many/").expect("found").len(), 2);
    let objects = std::mem::take(&mut *bucket.objects.lock().expect("not poisoned"));
    let renamed = objects.into_iter().map(|(path, bytes)| (path.replace("model.s", "model.fp16.s"), bytes));
    *bucket.objects.lock().expect("not poisoned") = renamed.collect();
    let options = CheckpointOptions { variant: Some("fp16"), ..CheckpointOptions::default() };
    for directory in ["s3://b/llm", "s3://b/many"] {
        Checkpoint::open_in(&bucket, directory.as_ref(), options).expect("the variant");
        let error = open(&bucket, directory).expect_err("no checkpoint without a variant");
        assert_eq!(error.os_error(), Some(libc::ENOENT));
        assert!(
            error.to_string().starts_with(directory) && error.to_string().contains("cannot be listed"),
            "{error}"
        );
    }
}

#[test]
fn missing_files_are_named() {
    let bucket = bucket(2);
    let error = open(&bucket, "s3://b/none").expect_err("missing");
    assert_eq!(error.os_error(), Some(libc::ENOENT));
    assert!(error.to_string().starts_with("s3://b/none: "), "{error}");
    let error = open(&bucket, "s3://b/none/").expect_err("missing");
    assert_eq!(error.kind(), ErrorKind::Index);
    bucket.objects.lock().expect("not poisoned").remove("s3://b/llm/model-00002-of-00002.safetensors");
    let error = open(&bucket, INDEX).expect_err("a shard is missing").to_string();
    assert!(error.starts_with("s3://b/llm/model-00002-of-00002.safetensors: "), "{error}");
    assert!(error.contains(&format!("the index {INDEX} lists this shard")), "{error}");
    bucket.objects.lock().expect("not poisoned").remove(INDEX);
    let error = open(&bucket, "s3://b/llm").expect_err("shards alone");
    assert_eq!(error.kind(), ErrorKind::Index, "{error}");
    assert!(error.to_string().contains("but not their index"), "{error}");
}

#[test]
fn an_index_must_fit_its_files() {
    let bucket = bucket(2);
    let index = r#"{"weight_map": {"t0": "model-00001-of-00002.safetensors"}}"#;
    bucket.objects.lock().expect("not poisoned").insert(INDEX.into(), index.into());
    assert_eq!(open(&bucket, INDEX).expect("one file").len(), 1);
    let index = r#"{"weight_map": {"t0": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}}"#;
    bucket.objects.lock().expect("not poisoned").insert(INDEX.into(), index.into());
    for extra in [Extra::Error, Extra::Ignore] {
        let options = CheckpointOptions { extra, ..CheckpointOptions::default() };
        let error = Checkpoint::open_in(&bucket, INDEX.as_ref(), options).expect_err("no x");
        assert_eq!(error.kind(), ErrorKind::Index);
        assert!(error.to_string().starts_with(INDEX), "{error}");
    }
    for outside in ["../other/model.safetensors", "/etc/passwd", "a//../../b"] {
        let index = format!(r#"{{"weight_map": {{"t0": "{outside}"}}}}"#);
        bucket.objects.lock().expect("not poisoned").insert(INDEX.into(), index.into());
        bucket.opened.lock().expect("not poisoned").clear();
        assert_eq!(open(&bucket, INDEX).expect_err("outside").kind(), ErrorKind::Index);
        assert_eq!(*bucket.opened.lock().expect("not poisoned"), [INDEX]);
    }
}

#[test]
fn a_checkpoint_that_is_replaced_meanwhile_is_opened_again() {
    let old = bucket(2);
    // Between the index and the shards, all objects are replaced, once.
    let replaced = Mutex::new(false);
    let bucket = Bucket {
        before_open: Box::new(move |path, objects| {
            if path.contains("-of-") && !std::mem::replace(&mut *replaced.lock().expect("not poisoned"), true)
            {
                objects.lock().expect("not poisoned").clear();
                add(objects, "s3://b/llm/", 3, 50);
            }
        }),
        ..old
    };
    assert_eq!(open(&bucket, "s3://b/llm").expect("the new one").len(), 3);
    let count = Mutex::new(3);
    let bucket = Bucket {
        before_open: Box::new(move |path, objects| {
            if path.contains("-00001-of-") {
                let mut count = count.lock().expect("not poisoned");
                *count += 1;
                objects.lock().expect("not poisoned").clear();
                add(objects, "s3://b/llm/", *count, 50);
            }
        }),
        ..bucket
    };
    assert_eq!(open(&bucket, "s3://b/llm").expect_err("again and again").kind(), ErrorKind::FileChanged);
}
