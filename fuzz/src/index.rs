//! Indexes of checkpoints: every accepted index is a weight map of files below its directory, and is read correctly.

use std::collections::{BTreeMap, BTreeSet};

use safetensors_torch::{ErrorKind, parse_index};

use crate::{json, model};

/// Runs the target. `bytes`: an index.
pub fn run(bytes: &[u8]) {
    let expected = json::read(bytes).and_then(|tree| {
        let mut maps = tree.object()?.iter().filter(|(field, _)| field == "weight_map");
        let map = model::texts(&maps.next().filter(|_| maps.next().is_none())?.1)?;
        map.values().all(|file| is_below(file)).then_some(map)
    });
    match (parse_index(bytes), expected) {
        (Ok((files, tensors)), Some(expected)) => {
            let wanted: BTreeSet<&String> = expected.values().collect();
            assert!(files.iter().eq(wanted), "{files:?}");
            assert!(tensors.iter().map(|(name, _)| name).is_sorted_by(|a, b| a < b));
            let found: BTreeMap<String, String> =
                tensors.into_iter().map(|(name, file)| (name, files[file as usize].clone())).collect();
            assert_eq!(found, expected);
        }
        (Err(error), None) => {
            let kinds = [ErrorKind::Index, ErrorKind::Duplicate, ErrorKind::ForeignFormat];
            assert!(kinds.contains(&error.kind()) && !error.to_string().is_empty(), "{error}");
        }
        (read, expected) => panic!("the reader says {read:?}, the model {expected:?}"),
    }
}

/// Returns whether a relative path does not leave its directory.
fn is_below(path: &str) -> bool {
    let mut parts = path.split('/');
    let first = parts.next().unwrap_or_default();
    !first.is_empty()
        && ![".", ".."].contains(&first)
        && parts.all(|part| part != "..")
        && !path.contains('\0')
}
