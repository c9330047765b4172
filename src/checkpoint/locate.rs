//! What a path means: a file, an index, or the one of them that a directory holds.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::plan::{DEFAULT_STEM, INDEX_SUFFIX, NameKind, SUFFIX, parse_name};
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

pub(super) fn locate(path: &Path, variant: Option<&str>) -> Attempt<Location> {
    // What is not there, or cannot be looked at, is for opening to say.
    match (fs::metadata(path), variant) {
        (Ok(metadata), _) if metadata.is_dir() => return look_through(path, variant),
        (Ok(_), Some(variant)) => {
            let detail = format!(
                "variant {variant:?} chooses among the checkpoints of a directory, and this is a file: give the directory, \
                 or no variant"
            );
            return Err(Failure::Final(Error::new(ErrorKind::InvalidArgument, detail).in_file(path)));
        }
        _ => {}
    }
    let is_index = path.as_os_str().as_bytes().ends_with(b".json");
    Ok(if is_index { Location::Index(path.to_path_buf()) } else { Location::File(path.to_path_buf()) })
}

/// The checkpoint in `directory`.
fn look_through(directory: &Path, variant: Option<&str>) -> Attempt<Location> {
    let read = |source| Failure::Final(Error::io("read the directory", directory, source));
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(read)? {
        // A name that is not UTF-8 is none that such tools give.
        names.extend(entry.map_err(read)?.file_name().into_string().ok());
    }
    choose(directory, names, variant)
}

/// A name in a directory that may be a checkpoint's: of its file, its index, or one of its shards.
struct Candidate {
    kind: NameKind,
    stem: String,
    name: String,
}

/// The checkpoint among the `names` that `directory` had a moment ago.
fn choose(directory: &Path, names: Vec<String>, variant: Option<&str>) -> Attempt<Location> {
    let mut all = Vec::new();
    for name in names.into_iter().filter(|name| !name.starts_with('.')) {
        let Some((kind, stem)) = parse_name(&name) else { continue };
        let at = directory.join(&name);
        match fs::metadata(&at) {
            _ if kind == NameKind::Shard => all.push(Candidate { kind, stem, name }),
            Ok(metadata) if metadata.is_file() => all.push(Candidate { kind, stem, name }),
            // Gone since it was listed: what has taken its place may not be in this list.
            Err(error) if error.kind() == io::ErrorKind::NotFound && is_gone(&at) => {
                return Err(Failure::Changed);
            }
            // A link to nowhere, as an interrupted download may leave it, or no file.
            _ => {}
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    // A file counts before the index of the same name: while one replaces the other, both are there.
    let has = |kind, stem: &str| all.iter().any(|one| one.kind == kind && one.stem == stem);
    let is_whole = |stem: &str| has(NameKind::File, stem) || has(NameKind::Index, stem);
    let counts = |one: &&Candidate| match one.kind {
        NameKind::File => true,
        NameKind::Index => !has(NameKind::File, &one.stem),
        NameKind::Shard => !is_whole(&one.stem),
    };
    // Without a variant, the variants of what is there without one do not count.
    let is_variant = |stem: &str| stem.match_indices('.').any(|(dot, _)| is_whole(&stem[..dot]));
    let is_wanted = |one: &&Candidate| match variant {
        Some(variant) => stem_without(&one.stem, variant).is_some(),
        None => !is_variant(&one.stem),
    };
    let is_default = |one: &&Candidate| {
        let stem = variant.map_or(Some(&one.stem[..]), |variant| stem_without(&one.stem, variant));
        one.kind != NameKind::Shard && stem == Some(DEFAULT_STEM)
    };
    let present: Vec<&Candidate> = all.iter().filter(counts).collect();
    let wanted: Vec<&Candidate> = present.iter().copied().filter(is_wanted).collect();
    let defaults: Vec<&Candidate> = wanted.iter().copied().filter(is_default).collect();
    let found = if defaults.is_empty() { &wanted } else { &defaults };
    let shard = found.iter().find(|one| one.kind == NameKind::Shard);
    let fail =
        |detail: String| Err(Failure::Missing(Error::new(ErrorKind::Index, detail).in_file(directory)));
    match (&found[..], shard) {
        ([one], None) if one.kind == NameKind::File => Ok(Location::File(directory.join(&one.name))),
        ([one], None) => Ok(Location::Index(directory.join(&one.name))),
        // The index goes first and comes last, so these are what an interrupted save leaves. What else there is may be
        // of another model.
        (_, Some(shard)) => {
            let stem = &shard.stem;
            let mut detail = format!(
                "the directory holds shards of {stem:?}, but not their index {stem}{INDEX_SUFFIX}: a save or a download was \
                 interrupted; save or fetch the checkpoint again, or load the shards one by one"
            );
            let others = listed(&present);
            if !others.is_empty() {
                detail += &format!(". To open another one of this directory, name it: {others}");
            }
            fail(detail)
        }
        ([], None) => match variant {
            Some(variant) if present.iter().any(|one| one.kind != NameKind::Shard) => fail(format!(
                "the directory holds no checkpoint of variant {variant:?}, such as {DEFAULT_STEM}.{variant}{SUFFIX}; it \
                 holds {}",
                listed(&present)
            )),
            _ => fail(format!(
                "the directory holds no checkpoint: neither a *{SUFFIX} file nor a *{INDEX_SUFFIX}"
            )),
        },
        (several, None) => fail(format!(
            "the directory holds several checkpoints: open one by its path, or choose a variant; it holds {}",
            listed(several)
        )),
    }
}

/// What is before `.variant` in `stem`.
fn stem_without<'a>(stem: &'a str, variant: &str) -> Option<&'a str> {
    stem.strip_suffix(variant)?.strip_suffix('.')
}

/// Whether there is no entry at `path`, not even a link.
fn is_gone(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The names of files and indexes, each with its variant if it may be one.
fn listed(candidates: &[&Candidate]) -> String {
    let whole = candidates.iter().filter(|one| one.kind != NameKind::Shard);
    let shown = whole.map(|one| match one.stem.rsplit_once('.') {
        Some((_, variant)) => format!("{} (variant {variant:?})", one.name),
        None => one.name.clone(),
    });
    shown.collect::<Vec<String>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> std::result::Result<String, String> {
        found_variant(names, None)
    }

    fn found_variant(names: &[&str], variant: Option<&str>) -> std::result::Result<String, String> {
        let directory = tempfile::tempdir().expect("a directory");
        for name in names {
            fs::write(directory.path().join(name), "").expect("written");
        }
        match locate(directory.path(), variant) {
            Ok(Location::File(path) | Location::Index(path)) => {
                Ok(path.file_name().expect("a name").to_string_lossy().into_owned())
            }
            Err(Failure::Missing(error)) => {
                assert_eq!(error.kind(), ErrorKind::Index);
                assert!(error.to_string().starts_with(&directory.path().display().to_string()), "{error}");
                Err(error.to_string())
            }
            Err(failure) => panic!("{failure:?}"),
        }
    }

    #[test]
    fn a_directory_has_one_checkpoint() {
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
        assert!(error.ends_with("it holds a.safetensors, b.safetensors.index.json"), "{error}");
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
    fn a_variant_is_found_under_every_name() {
        let shard = "model.fp16-00001-of-00002.safetensors";
        let old_shard = "diffusion_pytorch_model-00001-of-00002.fp16.safetensors";
        for names in [
            &["model.fp16.safetensors"][..],
            &["model.safetensors.index.fp16.json", shard],
            &["model.fp16.safetensors.index.json", shard],
            &["diffusion_pytorch_model.safetensors.index.fp16.json", old_shard],
            &["diffusion_pytorch_model.safetensors.fp16.index.json", old_shard],
            &["diffusion_pytorch_model.fp16.safetensors"],
        ] {
            assert_eq!(found_variant(names, Some("fp16")).as_deref(), Ok(names[0]));
            // It is the only checkpoint, so that nothing has to be chosen.
            assert_eq!(found(names).as_deref(), Ok(names[0]));
            // Beside one without a variant, whole or in shards.
            let plain_shard = "model-00001-of-00002.safetensors";
            for plain in [&["model.safetensors"][..], &["model.safetensors.index.json", plain_shard]] {
                let (both, plain) = ([plain, names].concat(), plain[0]);
                assert_eq!(found_variant(&both, Some("fp16")).as_deref(), Ok(names[0]));
                assert_eq!(found(&both).as_deref(), Ok(plain), "{both:?}");
            }
        }
        let names = ["x.safetensors", "x.fp16.safetensors", "x.bf16-00001-of-00002.safetensors"];
        assert_eq!(found(&names).as_deref(), Ok("x.safetensors"));
        // The default name counts first among variants too.
        let two = ["adapter.fp16.safetensors", "model.fp16.safetensors"];
        assert_eq!(found_variant(&two, Some("fp16")).as_deref(), Ok("model.fp16.safetensors"));
        assert_eq!(
            found_variant(&["model.non_ema.fp16.safetensors"], Some("non_ema.fp16")).as_deref(),
            Ok("model.non_ema.fp16.safetensors")
        );
    }

    #[test]
    fn or_an_error_says_which_variants_are_there() {
        let names = ["model.safetensors", "model.fp16.safetensors", "model.safetensors.index.bf16.json"];
        let error = found_variant(&names, Some("fp8")).expect_err("none");
        let held = "it holds model.fp16.safetensors (variant \"fp16\"), model.safetensors, \
                    model.safetensors.index.bf16.json (variant \"bf16\")";
        assert!(error.contains("no checkpoint of variant \"fp8\"") && error.ends_with(held), "{error}");
        let error = found(&["x.fp16.safetensors", "x.bf16.safetensors"]).expect_err("two");
        let held = "it holds x.bf16.safetensors (variant \"bf16\"), x.fp16.safetensors (variant \"fp16\")";
        assert!(error.contains("choose a variant") && error.ends_with(held), "{error}");
        assert!(
            found_variant(&["config.json"], Some("fp16"))
                .expect_err("none")
                .contains("no checkpoint: neither")
        );
        let error =
            found_variant(&["model.fp16-00001-of-00002.safetensors"], Some("fp16")).expect_err("no index");
        assert!(error.contains("shards of \"model.fp16\", but not their index"), "{error}");
        // A part of a word is not a variant.
        assert!(found_variant(&["modelfp16.safetensors"], Some("fp16")).is_err());
        assert!(found_variant(&["model.fp16.safetensors"], Some("")).is_err());
        let file = tempfile::NamedTempFile::new().expect("a file");
        let Err(Failure::Final(error)) = locate(file.path(), Some("fp16")) else { panic!("a file") };
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }

    #[test]
    fn a_name_that_is_gone_has_the_directory_listed_again() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("adapter.safetensors"), "").expect("written");
        for gone in ["model.safetensors", "model.safetensors.index.json"] {
            // Files took its place, which this list does not have: what it does have is of another model.
            let names = ["adapter.safetensors", gone].map(String::from).to_vec();
            let failure = choose(directory.path(), names, None).expect_err("gone");
            assert!(matches!(failure, Failure::Changed), "{failure:?}");
        }
    }

    #[test]
    fn links_to_nowhere_are_passed_over() {
        let directory = tempfile::tempdir().expect("a directory");
        let index = directory.path().join("model.safetensors.index.json");
        fs::write(&index, "").expect("written");
        std::os::unix::fs::symlink("gone", directory.path().join("model.safetensors")).expect("linked");
        assert_eq!(locate(directory.path(), None).expect("an index"), Location::Index(index));
    }

    #[test]
    fn other_paths_are_taken_by_their_names() {
        assert_eq!(
            locate(Path::new("no/x.json"), None).expect("a path"),
            Location::Index("no/x.json".into())
        );
        assert_eq!(locate(Path::new("no/x"), Some("fp16")).expect("a path"), Location::File("no/x".into()));
    }
}
