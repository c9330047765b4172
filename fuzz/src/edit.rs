//! Edits of the metadata: the tensors do not change, and the metadata has exactly the changes. An error does not change
//! the file.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors_torch::{
    Backend, EditOptions, ErrorKind, METADATA_KEY, Metadata, MetadataChanges, TensorFile, edit_metadata,
};

use crate::directory::{assert_alone, replace, with_path};
use crate::model::{self, Contents};
use crate::{frame, json};

/// The largest size of generated data after a header.
const MAX_DATA: u64 = 1 << 12;

/// Keys and values of changes, in addition to those of the file.
const TEXTS: [&str; 6] = ["", "k", "format", "\"\0\\", METADATA_KEY, "\u{10ffff}\u{1}"];

/// The bit of the options that rebuilds the file around its header.
const FRAMED: u8 = 4;

/// Runs the target. `bytes`: the number of changes, options (two bytes), two bytes per change, then the file.
pub fn run(bytes: &[u8]) {
    let [count, mode, reserve, rest @ ..] = bytes else { return };
    let (script, file) = rest.split_at(rest.len().min(usize::from(count % 5) * 2));
    let json = frame::header_of(file);
    let made = if mode & FRAMED == 0 {
        None
    } else {
        frame::whole_file(json, frame::data_end(json::read(json).as_ref()), MAX_DATA)
    };
    let file = made.unwrap_or_else(|| file.to_vec());
    let before = contents(&file);
    let options = EditOptions {
        in_place: mode & 1 == 1,
        // More than a header can have, or up to a page.
        reserve: match reserve {
            253.. => [100_000_000, u64::MAX - 7, u64::MAX][usize::from(reserve - 253)],
            _ => u64::from(*reserve) * 16,
        },
        durable: false,
    };
    let changes = changes(script, before.as_ref());
    with_path("f.safetensors", |path, _| check(path, &file, before.as_ref(), &changes, options));
}

/// Returns the contents of a file, read by the model.
fn contents(file: &[u8]) -> Option<Contents> {
    let json = frame::header_of(file);
    let is_complete = file.len() >= 8 && file[..8] == (json.len() as u64).to_le_bytes();
    let tree = json::read(json);
    model::contents(tree.as_ref().filter(|_| is_complete), json.len() as u64, file.len() as u64)
}

/// Returns the changes of a script: each a key, which may be one of the file's, and a value or none.
fn changes(script: &[u8], before: Option<&Contents>) -> MetadataChanges {
    let known = before.and_then(|contents| contents.metadata.as_ref());
    let known: Vec<&String> = known.into_iter().flat_map(Metadata::keys).collect();
    let change = |pair: &[u8]| {
        let (key, value) = (usize::from(pair[0]), usize::from(pair[1]));
        let key = match known.get(key / TEXTS.len()) {
            Some(known) if key >= 128 => (*known).clone(),
            _ => TEXTS[key % TEXTS.len()].to_string(),
        };
        let value = TEXTS.get(value % (TEXTS.len() + 2)).map(|text| text.repeat(1 + value / 16));
        (key, value)
    };
    script.chunks_exact(2).map(change).collect()
}

fn check(
    path: &Path,
    file: &[u8],
    before: Option<&Contents>,
    changes: &MetadataChanges,
    options: EditOptions,
) {
    replace(path, file);
    let inode = fs::metadata(path).expect("a file").ino();
    let edited = edit_metadata(path, changes, options);
    let after = fs::read(path).expect("the file is still there");
    assert_alone(path);
    let is_same_file = fs::metadata(path).expect("a file").ino() == inode;
    match (edited, before) {
        (Err(error), None) => {
            let refused = TensorFile::open(path, Backend::Pread).expect_err("the edit refused it");
            assert_eq!(error.kind(), refused.kind());
            assert!(is_same_file && after == file);
        }
        (Err(error), Some(_)) => {
            let allowed = match error.kind() {
                ErrorKind::InvalidArgument => options.in_place,
                ErrorKind::HeaderTooLarge => options.reserve >= 100_000_000,
                _ => false,
            };
            assert!(allowed, "{options:?}: {error}");
            assert!(is_same_file && after == file);
        }
        (Ok(_), None) => panic!("an edit of an invalid file: {options:?}"),
        (Ok(metadata), Some(before)) => {
            assert_eq!(metadata, expected(before.metadata.as_ref(), changes));
            let read = contents(&after).expect("still a file");
            assert_eq!(read.metadata, metadata);
            assert_eq!(read.tensors, before.tensors);
            assert!(SafeTensors::deserialize(&after).is_ok(), "the reference refuses what was edited");
            let (old, new) = (frame::header_of(file), frame::header_of(&after));
            assert!(after[8 + new.len()..] == file[8 + old.len()..], "the tensors' bytes changed");
            assert_eq!(is_same_file, options.in_place || after == file);
            if after != file {
                let used = new.trim_ascii_end().len() as u64;
                assert!(used + options.reserve <= new.len() as u64, "{options:?}: {used} of {}", new.len());
            }
            assert!(is_same_file || (8 + new.len()).is_multiple_of(8));
        }
    }
}

/// Applies the changes to metadata, one after the other.
fn expected(before: Option<&Metadata>, changes: &MetadataChanges) -> Option<Metadata> {
    let sets_any = changes.values().any(Option::is_some);
    if before.is_none() && !sets_any {
        return None;
    }
    let mut entries: Vec<(&String, &String)> = before
        .into_iter()
        .flatten()
        .filter(|(key, _)| !changes.contains_key(*key))
        .chain(changes.iter().filter_map(|(key, value)| Some((key, value.as_ref()?))))
        .collect();
    entries.sort();
    Some(entries.into_iter().map(|(key, value)| (key.clone(), value.clone())).collect())
}
