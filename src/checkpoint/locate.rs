//! What a path means: a file, an index, or the one of them that a folder holds.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::plan::{DEFAULT_STEM, INDEX_SUFFIX, SUFFIX, is_shard_name};
use crate::error::{Error, ErrorKind, Result};

/// How a checkpoint is to be opened.
#[derive(Debug, PartialEq)]
pub(super) enum Location {
    /// All tensors are in this file.
    File(PathBuf),
    /// This index lists the files.
    Index(PathBuf),
}

pub(super) fn locate(path: &Path) -> Result<Location> {
    // What is not there, or cannot be looked at, is for opening to say.
    if fs::metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
        return look_through(path);
    }
    let is_index = path.as_os_str().as_bytes().ends_with(b".json");
    Ok(if is_index { Location::Index(path.to_path_buf()) } else { Location::File(path.to_path_buf()) })
}

/// The checkpoint in `folder`.
fn look_through(folder: &Path) -> Result<Location> {
    let read = |source| Error::io("read the folder", folder, source);
    let (mut files, mut indexes, mut has_shards) = (Vec::new(), Vec::new(), false);
    for entry in fs::read_dir(folder).map_err(read)? {
        // A name that is not UTF-8 is none that such tools give.
        let Ok(name) = entry.map_err(read)?.file_name().into_string() else { continue };
        if name.starts_with('.') {
            continue;
        }
        if name.ends_with(INDEX_SUFFIX) {
            indexes.push(name);
        } else if is_shard_name(&name) {
            has_shards = true;
        } else if name.ends_with(SUFFIX) {
            files.push(name);
        }
    }
    let (file, index) = (format!("{DEFAULT_STEM}{SUFFIX}"), format!("{DEFAULT_STEM}{INDEX_SUFFIX}"));
    if files.contains(&file) {
        return Ok(Location::File(folder.join(file)));
    }
    if indexes.contains(&index) {
        return Ok(Location::Index(folder.join(index)));
    }
    match (&files[..], &indexes[..]) {
        ([file], []) => Ok(Location::File(folder.join(file))),
        ([], [index]) => Ok(Location::Index(folder.join(index))),
        ([], []) => {
            let detail = if has_shards {
                "the folder holds shards, but no index (*.safetensors.index.json): a save or a download was interrupted; \
                 save or fetch the checkpoint again, or load the shards one by one"
            } else {
                "the folder holds no checkpoint: neither a *.safetensors file nor a *.safetensors.index.json"
            };
            Err(Error::new(ErrorKind::Index, detail).in_file(folder))
        }
        _ => {
            let mut names = [files, indexes].concat();
            names.sort();
            let detail = format!("the folder holds several checkpoints: open one of {}", names.join(", "));
            Err(Error::new(ErrorKind::Index, detail).in_file(folder))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> std::result::Result<String, String> {
        let folder = tempfile::tempdir().expect("a folder");
        for name in names {
            fs::write(folder.path().join(name), "").expect("written");
        }
        match locate(folder.path()) {
            Ok(Location::File(path) | Location::Index(path)) => {
                Ok(path.file_name().expect("a name").to_string_lossy().into_owned())
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Index);
                assert!(error.to_string().starts_with(&folder.path().display().to_string()), "{error}");
                Err(error.to_string())
            }
        }
    }

    #[test]
    fn a_folder_has_one_checkpoint() {
        let shard = "model-00001-of-00002.safetensors";
        assert_eq!(found(&["model.safetensors", "other.safetensors"]).as_deref(), Ok("model.safetensors"));
        assert_eq!(found(&["x.safetensors", "config.json"]).as_deref(), Ok("x.safetensors"));
        let index = "model.safetensors.index.json";
        assert_eq!(found(&[index, shard, "other.safetensors"]).as_deref(), Ok(index));
        assert_eq!(found(&[index, "model.safetensors"]).as_deref(), Ok("model.safetensors"));
        assert_eq!(
            found(&["u.safetensors.index.json", "u-1.txt"]).as_deref(),
            Ok("u.safetensors.index.json")
        );
        let hidden = ".safetensors-1-0.tmp";
        assert_eq!(found(&["x.safetensors", hidden, ".y.safetensors"]).as_deref(), Ok("x.safetensors"));
    }

    #[test]
    fn or_an_error_says_what_is_there() {
        let error = found(&["a.safetensors", "b.safetensors.index.json"]).expect_err("two");
        assert!(error.ends_with("open one of a.safetensors, b.safetensors.index.json"), "{error}");
        assert!(found(&["config.json"]).expect_err("none").contains("no checkpoint"));
        let error = found(&["model-00001-of-00002.safetensors"]).expect_err("no index");
        assert!(error.contains("shards, but no index"), "{error}");
    }

    #[test]
    fn other_paths_are_taken_by_their_names() {
        assert_eq!(locate(Path::new("no/x.json")).expect("a path"), Location::Index("no/x.json".into()));
        assert_eq!(locate(Path::new("no/x")).expect("a path"), Location::File("no/x".into()));
    }
}
