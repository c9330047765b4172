//! Checks that shards contain what their index lists.

use super::index::Index;
use super::shards::{Shard, TensorLocation, name_at};
use crate::error::{Error, ErrorKind, Result};

/// Returns the locations of the tensors that the index lists, sorted by name; ignores other tensors of the shards.
pub(super) fn listed_locations(index: &Index, shards: &[Shard]) -> Result<Vec<TensorLocation>> {
    let locations = index.tensors.iter().map(|(name, shard)| {
        let found = shards[*shard as usize].file.header().find(name);
        let found = found.ok_or_else(|| misplaced(name, *shard, shards))?;
        Ok(TensorLocation { shard: *shard, index: found as u32 })
    });
    locations.collect()
}

/// Checks that the shards contain the tensors of the index and no others. `locations` are those of all tensors, sorted by
/// name, as the index is.
pub(super) fn check_equal(index: &Index, shards: &[Shard], locations: &[TensorLocation]) -> Result<()> {
    let mut listed = index.tensors.iter().peekable();
    for &location in locations {
        let (name, shard) = (name_at(shards, location), &shards[location.shard as usize].name);
        match listed.peek() {
            Some((wanted, at)) if wanted == name && *at == location.shard => {
                listed.next();
            }
            // Both lists are sorted, so no shard contains a listed name that comes before this one.
            Some((wanted, at)) if wanted.as_str() < name => return Err(misplaced(wanted, *at, shards)),
            Some((wanted, at)) if wanted == name && !contains(&shards[*at as usize], name) => {
                return Err(misplaced(wanted, *at, shards));
            }
            _ => {
                let detail = format!(
                    "shard {shard:?} holds tensor {name:?}, which the index does not list there: index and shards are \
                     not of one checkpoint; save or fetch them again, or set `extra` to \"ignore\" to load only what the \
                     index lists"
                );
                return Err(Error::new(ErrorKind::Index, detail));
            }
        }
    }
    match listed.next() {
        Some((name, at)) => Err(misplaced(name, *at, shards)),
        None => Ok(()),
    }
}

fn contains(shard: &Shard, name: &str) -> bool {
    shard.file.header().find(name).is_some()
}

/// Returns the error for a tensor that is not in the shard that the index names.
fn misplaced(name: &str, shard: u32, shards: &[Shard]) -> Error {
    let found = match shards.iter().find(|one| contains(one, name)) {
        Some(other) => format!("it is in {:?}", other.name),
        None => "no shard has it".to_string(),
    };
    let detail = format!(
        "the index puts tensor {name:?} into shard {:?}, which does not hold it ({found}): index and shards are not of \
         one checkpoint; save or fetch them again",
        shards[shard as usize].name
    );
    Error::new(ErrorKind::Index, detail)
}
