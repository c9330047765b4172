//! What a path means: a file, an index, or the one of them that a folder holds.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::plan::{DEFAULT_STEM, INDEX_SUFFIX, SUFFIX, stem_of_shard};
use super::{Attempt, Failure};
use crate::error::{Error, ErrorKind};

/// How a checkpoint is to be opened.
#[derive(Debug, PartialEq)]
pub(super) enum Location {
    /// All tensors are in this file.
    File(PathBuf),
    /// This index lists the files.
    Index(PathBuf),
}

pub(super) fn locate(path: &Path) -> Attempt<Location> {
    // What is not there, or cannot be looked at, is for opening to say.
    if fs::metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
        return look_through(path);
    }
    let is_index = path.as_os_str().as_bytes().ends_with(b".json");
    Ok(if is_index { Location::Index(path.to_path_buf()) } else { Location::File(path.to_path_buf()) })
}

/// The checkpoint in `folder`.
fn look_through(folder: &Path) -> Attempt<Location> {
    let read = |source| Failure::Final(Error::io("read the folder", folder, source));
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(read)? {
        // A name that is not UTF-8 is none that such tools give.
        names.extend(entry.map_err(read)?.file_name().into_string().ok());
    }
    choose(folder, names)
}

/// The checkpoint among the `names` that `folder` had a moment ago.
fn choose(folder: &Path, names: Vec<String>) -> Attempt<Location> {
    let (mut files, mut indexes, mut sharded) = (Vec::new(), Vec::new(), Vec::new());
    for name in names.into_iter().filter(|name| !name.starts_with('.')) {
        if let Some(stem) = stem_of_shard(&name) {
            sharded.push(stem.to_string());
            continue;
        }
        let (stem, found) = match (name.strip_suffix(INDEX_SUFFIX), name.strip_suffix(SUFFIX)) {
            (Some(stem), _) => (stem, &mut indexes),
            (_, Some(stem)) => (stem, &mut files),
            _ => continue,
        };
        let at = folder.join(&name);
        match fs::metadata(&at) {
            Ok(metadata) if metadata.is_file() => found.push(stem.to_string()),
            // Gone since it was listed: what has taken its place may not be in this list.
            Err(error) if error.kind() == io::ErrorKind::NotFound && is_gone(&at) => {
                return Err(Failure::Changed);
            }
            // A link to nowhere, as an interrupted download may leave it, or no file.
            _ => {}
        }
    }
    // A file counts before the index of the same name: while one replaces the other, both are there.
    indexes.retain(|stem| !files.contains(stem));
    sharded.retain(|stem| !files.contains(stem) && !indexes.contains(stem));
    let file = |stem: &str| Location::File(folder.join(format!("{stem}{SUFFIX}")));
    let index = |stem: &str| Location::Index(folder.join(format!("{stem}{INDEX_SUFFIX}")));
    let is_default = |stem: &String| stem == DEFAULT_STEM;
    let fail = |detail: String| Err(Failure::Missing(Error::new(ErrorKind::Index, detail).in_file(folder)));
    match (&files[..], &indexes[..], &sharded[..]) {
        _ if files.iter().any(is_default) => Ok(file(DEFAULT_STEM)),
        _ if indexes.iter().any(is_default) => Ok(index(DEFAULT_STEM)),
        ([stem], [], []) => Ok(file(stem)),
        ([], [stem], []) => Ok(index(stem)),
        ([], [], []) => {
            fail(format!("the folder holds no checkpoint: neither a *{SUFFIX} file nor a *{INDEX_SUFFIX}"))
        }
        (_, _, []) => {
            fail(format!("the folder holds several checkpoints: open one of {}", listed(&files, &indexes)))
        }
        // The index goes first and comes last, so these are what an interrupted save leaves. What else there is may be
        // of another model.
        (_, _, [stem, ..]) => {
            let mut detail = format!(
                "the folder holds shards of {stem:?}, but not their index {stem}{INDEX_SUFFIX}: a save or a download was \
                 interrupted; save or fetch the checkpoint again, or load the shards one by one"
            );
            if !files.is_empty() || !indexes.is_empty() {
                detail +=
                    &format!(". To open another one of this folder, name it: {}", listed(&files, &indexes));
            }
            fail(detail)
        }
    }
}

/// Whether there is no entry at `path`, not even a link.
fn is_gone(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The names of files and indexes with these stems, sorted.
fn listed(files: &[String], indexes: &[String]) -> String {
    let files = files.iter().map(|stem| format!("{stem}{SUFFIX}"));
    let mut names: Vec<String> =
        files.chain(indexes.iter().map(|stem| format!("{stem}{INDEX_SUFFIX}"))).collect();
    names.sort();
    names.join(", ")
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
            Err(Failure::Missing(error)) => {
                assert_eq!(error.kind(), ErrorKind::Index);
                assert!(error.to_string().starts_with(&folder.path().display().to_string()), "{error}");
                Err(error.to_string())
            }
            Err(failure) => panic!("{failure:?}"),
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
        // Both are there while one replaces the other.
        assert_eq!(found(&["x.safetensors", "x.safetensors.index.json"]).as_deref(), Ok("x.safetensors"));
        assert_eq!(found(&["x.safetensors", "x-00001-of-00002.safetensors"]).as_deref(), Ok("x.safetensors"));
        let hidden = ".safetensors-1-0.tmp";
        assert_eq!(found(&["x.safetensors", hidden, ".y.safetensors"]).as_deref(), Ok("x.safetensors"));
    }

    #[test]
    fn or_an_error_says_what_is_there() {
        let error = found(&["a.safetensors", "b.safetensors.index.json"]).expect_err("two");
        assert!(error.ends_with("open one of a.safetensors, b.safetensors.index.json"), "{error}");
        assert!(found(&["config.json"]).expect_err("none").contains("no checkpoint"));
        let error = found(&["model-00001-of-00002.safetensors"]).expect_err("no index");
        assert!(error.contains("shards of \"model\", but not their index"), "{error}");
        // Not the other model that happens to be there.
        let error =
            found(&["model-00001-of-00002.safetensors", "adapter.safetensors"]).expect_err("no index");
        assert!(
            error.contains("not their index") && error.ends_with("name it: adapter.safetensors"),
            "{error}"
        );
    }

    #[test]
    fn a_name_that_is_gone_has_the_folder_listed_again() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("adapter.safetensors"), "").expect("written");
        for gone in ["model.safetensors", "model.safetensors.index.json"] {
            // Files took its place, which this list does not have: what it does have is of another model.
            let names = ["adapter.safetensors", gone].map(String::from).to_vec();
            let failure = choose(folder.path(), names).expect_err("gone");
            assert!(matches!(failure, Failure::Changed), "{failure:?}");
        }
    }

    #[test]
    fn links_to_nowhere_are_passed_over() {
        let folder = tempfile::tempdir().expect("a folder");
        let index = folder.path().join("model.safetensors.index.json");
        fs::write(&index, "").expect("written");
        std::os::unix::fs::symlink("gone", folder.path().join("model.safetensors")).expect("linked");
        assert_eq!(locate(folder.path()).expect("an index"), Location::Index(index));
    }

    #[test]
    fn other_paths_are_taken_by_their_names() {
        assert_eq!(locate(Path::new("no/x.json")).expect("a path"), Location::Index("no/x.json".into()));
        assert_eq!(locate(Path::new("no/x")).expect("a path"), Location::File("no/x".into()));
    }
}
