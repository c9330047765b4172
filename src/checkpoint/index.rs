//! The index of a checkpoint: a JSON object whose `weight_map` maps tensor names to file names.
//!
//! An index is untrusted input: its file names are checked before a file is opened.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::path::{Component, Path};

use serde::de::{MapAccess, Visitor};

use crate::error::{Error, ErrorKind};
use crate::format::header::{MAX_HEADER_BYTES, detect_foreign};
use crate::format::json::{self, ErrorSlot, IgnoredValue, JsonText, ObjectSeed, fail_with};
use crate::read::source::{open_regular_in, read_exact_at};
use crate::sys::directory::Directory;

const WEIGHT_MAP: &str = "weight_map";

#[derive(Debug, Default)]
pub(super) struct Index {
    /// The files, sorted and unique: paths relative to the directory of the index, which do not lead out of it.
    pub(super) shards: Vec<String>,
    /// The tensors, sorted by name, and the position of each one's file in `shards`.
    pub(super) tensors: Vec<(String, u32)>,
}

impl Index {
    /// Reads and checks the index `name`, but not its files. Returns the open file too. `path` is for errors.
    pub(super) fn read(directory: &Directory, name: &OsStr, path: &Path) -> Result<(Index, File), Error> {
        let (file, length) = open_regular_in(directory, name, path)?;
        let index = Index::read_from(length, path, |json| read_exact_at(&file, path, json, 0))?;
        Ok((index, file))
    }

    /// Reads and checks an index of `length` bytes with `read`, which fills a buffer. `path` is for errors.
    pub(super) fn read_from(
        length: u64,
        path: &Path,
        read: impl FnOnce(&mut [u8]) -> Result<(), Error>,
    ) -> Result<Index, Error> {
        if length > MAX_HEADER_BYTES {
            let detail =
                format!("an index of {length} bytes is too large: at most {MAX_HEADER_BYTES} bytes are read");
            return Err(Error::new(ErrorKind::Index, detail).in_file(path));
        }
        let mut json = vec![0; length as usize];
        read(&mut json)?;
        Index::parse(&json).map_err(|error| error.in_file(path))
    }

    pub(super) fn parse(json: &[u8]) -> Result<Index, Error> {
        let invalid = |what: &dyn fmt::Display| {
            // JSON is an invalid index, not another format.
            let is_json = json.trim_ascii_start().first().is_some_and(|byte| b"{[".contains(byte));
            let other = if is_json { None } else { detect_foreign(json) };
            other.unwrap_or_else(|| invalid_index(what))
        };
        let text = std::str::from_utf8(json).map_err(|error| invalid(&error))?;
        let slot = RefCell::new(None);
        Index::sort(json::parse_object(text, &slot, Root(&slot), |error| invalid(&error))?)
    }

    /// Sorts files and tensors; refuses duplicate names.
    fn sort(Entries { files, mut tensors }: Entries) -> Result<Index, Error> {
        tensors.sort();
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let detail = format!("{WEIGHT_MAP:?} has the tensor {:?} twice", pair[0].0);
            return Err(Error::new(ErrorKind::Duplicate, detail));
        }
        let mut files: Vec<(String, u32)> = files.into_iter().collect();
        files.sort();
        let mut rank = vec![0; files.len()];
        for (position, &(_, file)) in files.iter().enumerate() {
            rank[file as usize] = position as u32;
        }
        for (_, file) in &mut tensors {
            *file = rank[*file as usize];
        }
        Ok(Index { shards: files.into_iter().map(|(name, _)| name).collect(), tensors })
    }
}

/// Returns the bytes of an index, formatted as by Hugging Face's tools. `tensors` are pairs of tensor and file name,
/// `total_bytes` is the size of all tensors.
pub(super) fn encode<'a>(tensors: impl Iterator<Item = (&'a str, &'a str)>, total_bytes: u64) -> Vec<u8> {
    let weight_map: std::collections::BTreeMap<&str, &str> = tensors.collect();
    let index = serde_json::json!({"metadata": {"total_size": total_bytes}, WEIGHT_MAP: weight_map});
    let mut json = serde_json::to_vec_pretty(&index).expect("strings and integers serialize into a Vec");
    json.push(b'\n');
    json
}

fn invalid_index(what: impl fmt::Display) -> Error {
    let detail = format!("the index is not valid: {what}; fetch the checkpoint again, or save it again");
    Error::new(ErrorKind::Index, detail)
}

/// Refuses a file name that leads out of the directory of the index.
fn check_file_name(tensor: &str, file: &str) -> Result<(), Error> {
    let inside = !file.is_empty()
        && !file.contains('\0')
        && Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
    if inside {
        return Ok(());
    }
    let detail = format!(
        "the index puts tensor {tensor:?} into {file:?}, which is not a file in the directory of the index: the index was damaged, or \
         made to read other files; do not trust this checkpoint"
    );
    Err(Error::new(ErrorKind::Index, detail))
}

/// A weight map in the order of the JSON.
#[derive(Default)]
struct Entries {
    /// The files, and the number of each.
    files: HashMap<String, u32>,
    /// The tensors, and the numbers of their files.
    tensors: Vec<(String, u32)>,
}

/// The index: an object with a weight map and other fields.
struct Root<'f>(&'f ErrorSlot);

impl<'de> Visitor<'de> for Root<'_> {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a JSON object with a {WEIGHT_MAP:?}")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = None;
        while let Some(JsonText(field)) = map.next_key()? {
            if field != WEIGHT_MAP {
                map.next_value::<IgnoredValue>()?;
            } else if entries.replace(map.next_value_seed(ObjectSeed(WeightMap(self.0)))?).is_some() {
                let detail = format!("the index has {WEIGHT_MAP:?} twice");
                return Err(fail_with(self.0, Error::new(ErrorKind::Duplicate, detail)));
            }
        }
        entries.ok_or_else(|| fail_with(self.0, invalid_index(format_args!("{WEIGHT_MAP:?} is missing"))))
    }
}

/// `weight_map`: an object with string values.
struct WeightMap<'f>(&'f ErrorSlot);

impl<'de> Visitor<'de> for WeightMap<'_> {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{WEIGHT_MAP:?} to be an object that maps names of tensors to file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Entries::default();
        while let Some(JsonText(tensor)) = map.next_key()? {
            let JsonText(file) = map.next_value().map_err(|error| {
                fail_with(self.0, invalid_index(format_args!("the file of tensor {tensor:?}: {error}")))
            })?;
            check_file_name(&tensor, &file).map_err(|error| fail_with(self.0, error))?;
            let next = entries.files.len() as u32;
            let number = match entries.files.get(&*file) {
                Some(&number) => number,
                None => *entries.files.entry(file.into_owned()).or_insert(next),
            };
            entries.tensors.push((tensor.into_owned(), number));
        }
        Ok(entries)
    }
}

/// Returns the file names of an index, and for each tensor its file. For the fuzz targets.
#[cfg(fuzzing)]
pub fn parse_index(json: &[u8]) -> Result<(Vec<String>, Vec<(String, u32)>), Error> {
    Index::parse(json).map(|index| (index.shards, index.tensors))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(json: &str) -> ErrorKind {
        Index::parse(json.as_bytes()).expect_err("refused").kind()
    }

    #[test]
    fn an_encoded_index_parses() {
        let entries = [("b", "two"), ("a\u{e9}\n", "one"), ("c", "two")];
        let json = encode(entries.into_iter(), 12);
        let index = Index::parse(&json).expect("valid");
        assert_eq!(index.shards, ["one", "two"]);
        assert_eq!(index.tensors, [("a\u{e9}\n".into(), 0), ("b".into(), 1), ("c".into(), 1)]);
        assert_eq!(
            String::from_utf8(encode([("w", "f")].into_iter(), 7)).expect("text"),
            "{\n  \"metadata\": {\n    \"total_size\": 7\n  },\n  \"weight_map\": {\n    \"w\": \"f\"\n  }\n}\n"
        );
    }

    #[test]
    fn other_fields_are_ignored() {
        let index =
            Index::parse(br#"{"metadata": null, "weight_map": {}, "x": [1, {"y": 2.5}]}"#).expect("valid");
        assert!(index.shards.is_empty() && index.tensors.is_empty());
    }

    #[test]
    fn names_outside_the_directory_are_refused() {
        for name in ["../x", "/etc/passwd", "a/../../x", "", ".", "./x", "..", "a/..", "a\\u0000b"] {
            let json = format!(r#"{{"weight_map": {{"t": "{name}"}}}}"#);
            let error = Index::parse(json.as_bytes()).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Index, "{name}");
            assert!(error.to_string().contains("\"t\""), "{error}");
        }
        let inside = Index::parse(br#"{"weight_map": {"t": "a/b..c"}}"#).expect("inside");
        assert_eq!(inside.shards, ["a/b..c"]);
    }

    #[test]
    fn malformed_indexes_are_refused() {
        for json in ["", "[]", "{}", "null", r#"{"weight_map": []}"#, r#"{"weight_map": {"t": 1}}"#] {
            assert_eq!(kind(json), ErrorKind::Index, "{json}");
        }
        assert_eq!(kind(r#"{"weight_map": {}} x"#), ErrorKind::Index);
        assert_eq!(kind(r#"{"weight_map": {}, "weight_map": {}}"#), ErrorKind::Duplicate);
        assert_eq!(kind(r#"{"weight_map": {"t": "a", "t": "b"}}"#), ErrorKind::Duplicate);
        assert_eq!(kind(&format!(r#"{{"x": {}"#, "[".repeat(100_000))), ErrorKind::Index);
        assert_eq!(kind("version https://git-lfs.github.com/spec/v1\noid"), ErrorKind::ForeignFormat);
        assert_eq!(Index::parse(b"{\"\xff\": 1}").expect_err("refused").kind(), ErrorKind::Index);
    }
}
