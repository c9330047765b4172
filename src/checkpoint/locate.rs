//! Finds the file or the index that a path means; chooses one in a directory.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::plan::{DEFAULT_STEM, INDEX_SUFFIX, NameKind, SUFFIX, parse_name};
use crate::error::{Error, ErrorKind};

/// The file to open first.
#[derive(Debug, PartialEq)]
pub(super) enum CheckpointPath {
    /// The file that contains all tensors.
    File(PathBuf),
    /// The index that lists the files.
    Index(PathBuf),
}

/// Why one attempt to open a checkpoint failed.
#[derive(Debug)]
pub(super) enum OpenFailure {
    /// Another attempt would fail too.
    Final(Error),
    /// A file was removed or replaced between two steps: try again.
    Changed,
    /// There is no checkpoint, unless a save is about to create one.
    Missing(Error),
}

/// Returns the file that `path` means.
pub(super) fn locate(path: &Path, variant: Option<&str>) -> Result<CheckpointPath, OpenFailure> {
    // If `path` is missing or cannot be inspected, opening it reports the error.
    match (fs::metadata(path), variant) {
        (Ok(metadata), _) if metadata.is_dir() => return locate_in(path, variant),
        (Ok(_), Some(variant)) => {
            return Err(OpenFailure::Final(variant_of_file(variant).in_file(path)));
        }
        _ => {}
    }
    let is_index = path.as_os_str().as_bytes().ends_with(b".json");
    Ok(if is_index {
        CheckpointPath::Index(path.to_path_buf())
    } else {
        CheckpointPath::File(path.to_path_buf())
    })
}

/// Returns the error for a variant of a path that is a file.
pub(super) fn variant_of_file(variant: &str) -> Error {
    let detail = format!(
        "variant {variant:?} chooses a checkpoint in a directory, and this is a file: pass the directory, or no variant"
    );
    Error::new(ErrorKind::InvalidArgument, detail)
}

fn locate_in(directory: &Path, variant: Option<&str>) -> Result<CheckpointPath, OpenFailure> {
    let read = |source| OpenFailure::Final(Error::io("read the directory", directory, source));
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(read)? {
        // No checkpoint has a name that is not UTF-8.
        names.extend(entry.map_err(read)?.file_name().into_string().ok());
    }
    choose(directory, list_candidates(directory, names)?, variant)
}

/// A name that belongs to a checkpoint.
pub(super) struct Candidate {
    kind: NameKind,
    stem: String,
    name: String,
}

impl Candidate {
    /// Returns `None` if no file of a checkpoint has such a name.
    pub(super) fn of_name(name: String) -> Option<Candidate> {
        let (kind, stem) = parse_name(&name).filter(|_| !name.starts_with('.'))?;
        Some(Candidate { kind, stem, name })
    }
}

/// Chooses the checkpoint among the candidates of a directory.
pub(super) fn choose(
    directory: &Path,
    mut candidates: Vec<Candidate>,
    variant: Option<&str>,
) -> Result<CheckpointPath, OpenFailure> {
    candidates.sort_by(|a, b| a.name.cmp(&b.name));
    let has = |kind, stem: &str| candidates.iter().any(|one| one.kind == kind && one.stem == stem);
    let has_checkpoint = |stem: &str| has(NameKind::File, stem) || has(NameKind::Index, stem);
    let is_variant = |stem: &str| stem.match_indices('.').any(|(dot, _)| has_checkpoint(&stem[..dot]));
    let mut present: Vec<&Candidate> = candidates.iter().collect();
    present.retain(|one| match one.kind {
        NameKind::File => true,
        // While a file replaces an index of the same stem, both exist.
        NameKind::Index => !has(NameKind::File, &one.stem),
        NameKind::Shard => !has_checkpoint(&one.stem),
    });
    let mut wanted = present.clone();
    wanted.retain(|one| match variant {
        Some(variant) => stem_without(&one.stem, variant).is_some(),
        // Without a variant, variants of a checkpoint that exists without one do not count.
        None => !is_variant(&one.stem),
    });
    let is_default = |one: &&Candidate| {
        let stem = variant.map_or(Some(&one.stem[..]), |variant| stem_without(&one.stem, variant));
        one.kind != NameKind::Shard && stem == Some(DEFAULT_STEM)
    };
    if wanted.iter().any(is_default) {
        wanted.retain(is_default);
    }
    match wanted[..] {
        [one] if one.kind == NameKind::File => Ok(CheckpointPath::File(directory.join(&one.name))),
        [one] if one.kind == NameKind::Index => Ok(CheckpointPath::Index(directory.join(&one.name))),
        _ => {
            let error = Error::new(ErrorKind::Index, describe_failure(&wanted, &present, variant));
            Err(OpenFailure::Missing(error.in_file(directory)))
        }
    }
}

/// Returns those of `names`, an earlier listing of `directory`, that belong to a checkpoint.
fn list_candidates(directory: &Path, names: Vec<String>) -> Result<Vec<Candidate>, OpenFailure> {
    let mut candidates = Vec::new();
    for candidate in names.into_iter().filter_map(Candidate::of_name) {
        let path = directory.join(&candidate.name);
        match fs::metadata(&path) {
            _ if candidate.kind == NameKind::Shard => candidates.push(candidate),
            Ok(metadata) if metadata.is_file() => candidates.push(candidate),
            // Removed since the listing, which may lack the files that replaced it.
            Err(error) if error.kind() == io::ErrorKind::NotFound && is_absent(&path) => {
                return Err(OpenFailure::Changed);
            }
            // A dangling link, which an interrupted download may leave, or not a file.
            _ => {}
        }
    }
    Ok(candidates)
}

/// Explains why `wanted`, chosen from the `present` files of a directory, is not one checkpoint.
fn describe_failure(wanted: &[&Candidate], present: &[&Candidate], variant: Option<&str>) -> String {
    // A save removes the index first and creates it last, so an interrupted one leaves shards. Other files of the
    // directory may be of another model.
    if let Some(shard) = wanted.iter().find(|one| one.kind == NameKind::Shard) {
        let stem = &shard.stem;
        let mut detail = format!(
            "the directory holds shards of {stem:?}, but not their index {stem}{INDEX_SUFFIX}: a save or a download was \
             interrupted; save or fetch the checkpoint again, or load the shards one by one"
        );
        let others = list_names(present);
        if !others.is_empty() {
            detail += &format!(". To open another checkpoint of this directory, pass its path: {others}");
        }
        return detail;
    }
    if !wanted.is_empty() {
        return format!(
            "the directory holds several checkpoints: open one by its path, or choose a variant; it holds {}",
            list_names(wanted)
        );
    }
    match variant {
        Some(variant) if present.iter().any(|one| one.kind != NameKind::Shard) => format!(
            "the directory holds no checkpoint of variant {variant:?}, such as {DEFAULT_STEM}.{variant}{SUFFIX}; it \
             holds {}",
            list_names(present)
        ),
        _ => format!(
            "the directory holds no checkpoint: neither a *{SUFFIX} file nor a *{INDEX_SUFFIX}; pass the \
                      directory or the file of one"
        ),
    }
}

fn stem_without<'a>(stem: &'a str, variant: &str) -> Option<&'a str> {
    stem.strip_suffix(variant)?.strip_suffix('.')
}

/// Returns whether there is no entry at `path`, not even a dangling link.
fn is_absent(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Lists the names of files and indexes, each with its possible variant.
fn list_names(candidates: &[&Candidate]) -> String {
    let complete = candidates.iter().filter(|one| one.kind != NameKind::Shard);
    let described = complete.map(|one| match one.stem.rsplit_once('.') {
        Some((_, variant)) => format!("{} (variant {variant:?})", one.name),
        None => one.name.clone(),
    });
    described.collect::<Vec<String>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> Result<String, String> {
        found_variant(names, None)
    }

    fn found_variant(names: &[&str], variant: Option<&str>) -> Result<String, String> {
        let directory = tempfile::tempdir().expect("a directory");
        for name in names {
            fs::write(directory.path().join(name), "").expect("written");
        }
        match locate(directory.path(), variant) {
            Ok(CheckpointPath::File(path) | CheckpointPath::Index(path)) => {
                Ok(path.file_name().expect("a name").to_string_lossy().into_owned())
            }
            Err(OpenFailure::Missing(error)) => {
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
        // Both exist while one replaces the other.
        assert_eq!(found(&["x.safetensors", "x.safetensors.index.json"]).as_deref(), Ok("x.safetensors"));
        assert_eq!(found(&["x.safetensors", "x-00001-of-00002.safetensors"]).as_deref(), Ok("x.safetensors"));
        let hidden = ".safetensors-1-0.tmp";
        assert_eq!(found(&["x.safetensors", hidden, ".y.safetensors"]).as_deref(), Ok("x.safetensors"));
    }

    #[test]
    fn or_an_error_lists_the_files() {
        let error = found(&["a.safetensors", "b.safetensors.index.json"]).expect_err("two");
        assert!(error.ends_with("it holds a.safetensors, b.safetensors.index.json"), "{error}");
        assert!(found(&["config.json"]).expect_err("none").contains("no checkpoint"));
        let error = found(&["model-00001-of-00002.safetensors"]).expect_err("no index");
        assert!(error.contains("shards of \"model\", but not their index"), "{error}");
        // Not the other model in the directory.
        let error =
            found(&["model-00001-of-00002.safetensors", "adapter.safetensors"]).expect_err("no index");
        assert!(
            error.contains("not their index") && error.ends_with("pass its path: adapter.safetensors"),
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
            // It is the only checkpoint.
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
        // The default name comes first among variants too.
        let two = ["adapter.fp16.safetensors", "model.fp16.safetensors"];
        assert_eq!(found_variant(&two, Some("fp16")).as_deref(), Ok("model.fp16.safetensors"));
        assert_eq!(
            found_variant(&["model.non_ema.fp16.safetensors"], Some("non_ema.fp16")).as_deref(),
            Ok("model.non_ema.fp16.safetensors")
        );
    }

    #[test]
    fn or_an_error_lists_the_variants() {
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
        let Err(OpenFailure::Final(error)) = locate(file.path(), Some("fp16")) else { panic!("a file") };
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }

    #[test]
    fn a_name_that_was_removed_means_list_again() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("adapter.safetensors"), "").expect("written");
        for gone in ["model.safetensors", "model.safetensors.index.json"] {
            // The listing lacks the files that replaced it; what it has is of another model.
            let names = ["adapter.safetensors", gone].map(String::from).to_vec();
            let Err(failure) = list_candidates(directory.path(), names) else { panic!("gone") };
            assert!(matches!(failure, OpenFailure::Changed), "{failure:?}");
        }
    }

    #[test]
    fn dangling_links_are_ignored() {
        let directory = tempfile::tempdir().expect("a directory");
        let index = directory.path().join("model.safetensors.index.json");
        fs::write(&index, "").expect("written");
        std::os::unix::fs::symlink("gone", directory.path().join("model.safetensors")).expect("linked");
        assert_eq!(locate(directory.path(), None).expect("an index"), CheckpointPath::Index(index));
    }

    #[test]
    fn other_paths_are_classified_by_name() {
        assert_eq!(
            locate(Path::new("no/x.json"), None).expect("a path"),
            CheckpointPath::Index("no/x.json".into())
        );
        assert_eq!(
            locate(Path::new("no/x"), Some("fp16")).expect("a path"),
            CheckpointPath::File("no/x".into())
        );
    }
}
