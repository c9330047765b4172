//! Which tensor goes into which shard, and the names of the shards.

use super::index;
use crate::error::{Error, ErrorKind, Result};

/// The default limit for the bytes of tensors in a shard: 5 GB, as in Hugging Face's tools.
pub const DEFAULT_MAX_SHARD_SIZE: u64 = 5_000_000_000;

/// The default beginning of the file names.
pub const DEFAULT_STEM: &str = "model";

pub(super) const SUFFIX: &str = ".safetensors";

pub(super) const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// The division of a checkpoint's tensors into files.
#[derive(Clone, Debug)]
pub struct ShardPlan {
    stem: String,
    /// The shard of each tensor, in the caller's order.
    shard_of: Vec<usize>,
    count: usize,
    total_bytes: u64,
    /// Whether a single file is numbered and has an index too.
    is_numbered: bool,
}

impl ShardPlan {
    /// Divides tensors of `sizes` bytes, in their order. A shard ends before the tensor that would exceed `max_shard_size`;
    /// a larger tensor gets a shard of its own. There is at least one shard. The result is that of Hugging Face's tools.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] for a `max_shard_size` of 0, and for a `stem` that is not a file name or is the name
    /// of a shard.
    ///
    /// # Examples
    ///
    /// ```
    /// let plan = safetensors_torch::ShardPlan::new([4, 4, 4].into_iter(), "model", 8)?;
    /// assert_eq!(plan.shard_of(), [0, 0, 1]);
    /// assert_eq!(plan.file_name(1), "model-00002-of-00002.safetensors");
    /// # Ok::<(), safetensors_torch::Error>(())
    /// ```
    pub fn new(sizes: impl Iterator<Item = u64>, stem: &str, max_shard_size: u64) -> Result<ShardPlan> {
        if max_shard_size == 0 {
            let detail = "max_shard_size is 0: pass the size of a shard in bytes";
            return Err(Error::new(ErrorKind::InvalidArgument, detail));
        }
        check_stem(stem)?;
        // A tensor that is too large closes its own shard at once, before the one that is being filled.
        let (mut closed, mut total_bytes) = (0, 0u64);
        let mut current = Vec::new();
        let (mut current_bytes, mut shard_of) = (0u64, Vec::new());
        let close = |current: &mut Vec<usize>, shard_of: &mut Vec<usize>, closed: &mut usize| {
            for tensor in current.drain(..) {
                shard_of[tensor] = *closed;
            }
            *closed += 1;
        };
        for (tensor, size) in sizes.enumerate() {
            shard_of.push(0);
            total_bytes = total_bytes.saturating_add(size);
            if size > max_shard_size {
                close(&mut vec![tensor], &mut shard_of, &mut closed);
                continue;
            }
            if size > max_shard_size - current_bytes {
                close(&mut current, &mut shard_of, &mut closed);
                current_bytes = 0;
            }
            current.push(tensor);
            current_bytes += size;
        }
        if !current.is_empty() || closed == 0 {
            close(&mut current, &mut shard_of, &mut closed);
        }
        let stem = stem.to_string();
        Ok(ShardPlan { stem, shard_of, count: closed, total_bytes, is_numbered: false })
    }

    /// Puts each tensor of `sizes` bytes into the file of its number in `files`, which are counted from 0. Numbers without a
    /// tensor are left out: the files after them have smaller ones. The files are numbered and have an index even if there
    /// is only one, as those of `torch.distributed.checkpoint`. There must be as many numbers as sizes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] for an invalid `stem` (as [`ShardPlan::new`]).
    pub fn assigned(sizes: impl Iterator<Item = u64>, files: &[usize], stem: &str) -> Result<ShardPlan> {
        check_stem(stem)?;
        let mut numbers = files.to_vec();
        numbers.sort_unstable();
        numbers.dedup();
        let shard_of =
            files.iter().map(|file| numbers.binary_search(file).expect("it is one of them")).collect();
        let total_bytes = sizes.fold(0, u64::saturating_add);
        Ok(ShardPlan {
            stem: stem.to_string(),
            shard_of,
            count: numbers.len(),
            total_bytes,
            is_numbered: true,
        })
    }

    pub(super) fn has_index(&self) -> bool {
        self.count > 1 || self.is_numbered
    }

    /// Returns the number of files.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Returns the size of all tensors in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Returns the file of each tensor, in the caller's order.
    pub fn shard_of(&self) -> &[usize] {
        &self.shard_of
    }

    /// Returns the tensors of each file, in the caller's order.
    pub fn members(&self) -> Vec<Vec<usize>> {
        let mut members = vec![Vec::new(); self.count];
        for (tensor, &shard) in self.shard_of.iter().enumerate() {
            members[shard].push(tensor);
        }
        members
    }

    /// Returns the name of a file: `STEM.safetensors` if it is the only one and not numbered, otherwise
    /// `STEM-00001-of-00003.safetensors`.
    pub fn file_name(&self, shard: usize) -> String {
        if !self.has_index() {
            return format!("{}{SUFFIX}", self.stem);
        }
        format!("{}-{:05}-of-{:05}{SUFFIX}", self.stem, shard + 1, self.count)
    }

    pub(super) fn shard_names(&self) -> Vec<String> {
        (0..self.count).map(|shard| self.file_name(shard)).collect()
    }

    /// Returns the names of the files, the index last if there is one.
    pub fn file_names(&self) -> Vec<String> {
        self.shard_names().into_iter().chain(self.has_index().then(|| self.index_name())).collect()
    }

    /// Returns the bytes of the index, or `None` if there is none. `names` are those of the tensors, in the caller's order.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] unless there are as many names as the plan has tensors.
    pub fn index<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<Option<Vec<u8>>> {
        let tensors: Vec<&str> = names.collect();
        if tensors.len() != self.shard_of.len() {
            let detail =
                format!("a plan for {} tensors, but the names of {}", self.shard_of.len(), tensors.len());
            return Err(Error::new(ErrorKind::InvalidArgument, detail));
        }
        let files = self.shard_names();
        let shards = self.shard_of.iter().map(|&shard| files[shard].as_str());
        Ok(self.has_index().then(|| index::encode(tensors.into_iter().zip(shards), self.total_bytes)))
    }

    pub(super) fn index_name(&self) -> String {
        format!("{}{INDEX_SUFFIX}", self.stem)
    }

    /// Returns whether a name belongs to another checkpoint of the same stem.
    pub fn makes_stale(&self, name: &str) -> bool {
        parse_name(name).is_some_and(|(_, stem)| stem == self.stem) && !self.is_own(name)
    }

    fn is_own(&self, name: &str) -> bool {
        if !self.has_index() {
            return name == self.file_name(0);
        }
        let shard = parse_shard_name(name).and_then(|(_, number, _)| number.checked_sub(1));
        name == self.index_name() || shard.is_some_and(|shard| name == self.file_name(shard))
    }
}

fn check_stem(stem: &str) -> Result<()> {
    if stem.is_empty() || stem.starts_with('.') || stem.contains(['/', '\0']) {
        let detail = format!("stem {stem:?} cannot begin a file name: pass a word such as {DEFAULT_STEM:?}");
        return Err(Error::new(ErrorKind::InvalidArgument, detail));
    }
    if parse_shard_name(&format!("{stem}{SUFFIX}")).is_some() {
        let detail = format!("stem {stem:?} is the name of a shard: pass the part before the numbers");
        return Err(Error::new(ErrorKind::InvalidArgument, detail));
    }
    Ok(())
}

/// What a file name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NameKind {
    /// The only file of a checkpoint.
    File,
    /// One of several files.
    Shard,
    /// The index of several files.
    Index,
}

/// Returns the kind of a checkpoint's file, and its stem, which ends in the variant: `model.fp16`. `None` for other names.
///
/// Knows the variants' names of all versions of diffusers and transformers: `model.fp16.safetensors`,
/// `model.fp16-00001-of-00002.safetensors`, `model-00001-of-00002.fp16.safetensors`,
/// `model.safetensors.index.fp16.json`, `model.safetensors.fp16.index.json`; and that of our saves with the stem
/// `model.fp16`: `model.fp16.safetensors.index.json`.
pub(super) fn parse_name(name: &str) -> Option<(NameKind, String)> {
    if let Some((stem, _, _)) = parse_shard_name(name) {
        return Some((NameKind::Shard, stem));
    }
    if let Some(stem) = name.strip_suffix(SUFFIX) {
        return Some((NameKind::File, stem.to_string()));
    }
    let (stem, rest) = name.strip_suffix(".json")?.split_once(&format!("{SUFFIX}."))?;
    let variant = match rest {
        "index" => None,
        _ => Some(rest.strip_prefix("index.").or_else(|| rest.strip_suffix(".index"))?),
    };
    Some((NameKind::Index, variant.map_or(stem.to_string(), |variant| format!("{stem}.{variant}"))))
}

/// Returns the stem and the numbers of `STEM-00001-of-00003.safetensors`; `None` for other names. A variant after the
/// numbers becomes the end of the stem.
fn parse_shard_name(name: &str) -> Option<(String, usize, usize)> {
    let (rest, end) = name.strip_suffix(SUFFIX)?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let (count, variant) = end.split_once('.').map_or((end, None), |(count, variant)| (count, Some(variant)));
    let parse = |text: &str| {
        let is_number = text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|_| is_number)
    };
    let stem = variant.map_or(stem.to_string(), |variant| format!("{stem}.{variant}"));
    Some((stem, parse(number)?, parse(count)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shards(sizes: &[u64], max: u64) -> Vec<usize> {
        let plan = ShardPlan::new(sizes.iter().copied(), "model", max).expect("valid");
        assert_eq!(plan.total_bytes(), sizes.iter().sum::<u64>());
        let members = plan.members();
        assert_eq!((members.len(), members.concat().len()), (plan.count(), sizes.len()));
        assert!(
            members.iter().enumerate().all(|(shard, of)| of.iter().all(|&i| plan.shard_of()[i] == shard))
        );
        plan.shard_of().to_vec()
    }

    #[test]
    fn shards_are_filled_in_order() {
        assert_eq!(shards(&[4, 4, 4, 1], 8), [0, 0, 1, 1]);
        assert_eq!(shards(&[4, 4, 4, 1], 100), [0; 4]);
        assert_eq!(shards(&[], 1), [] as [usize; 0]);
        assert_eq!(shards(&[0, 0, 0], 1), [0; 3]);
        // A tensor that is too large gets the number before that of the shard that it interrupts.
        assert_eq!(shards(&[3, 9, 3, 3], 8), [1, 0, 1, 2]);
        assert_eq!(shards(&[9, 9], 8), [0, 1]);
        let plan = ShardPlan::new([u64::MAX, u64::MAX].into_iter(), "model", u64::MAX).expect("valid");
        assert_eq!((plan.shard_of(), plan.total_bytes()), (&[0, 1][..], u64::MAX));
    }

    #[test]
    fn names_match_other_tools() {
        let plan = ShardPlan::new([9, 9].into_iter(), "m", 9).expect("valid");
        assert_eq!(
            [plan.file_name(0), plan.file_name(1), plan.index_name()],
            ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json"]
        );
        let one = ShardPlan::new([9].into_iter(), "m", 9).expect("valid");
        assert_eq!(one.file_name(0), "m.safetensors");
    }

    #[test]
    fn files_of_an_earlier_save_are_stale() {
        let two = ShardPlan::new([9, 9].into_iter(), "m", 9).expect("valid");
        let one = ShardPlan::new([9].into_iter(), "m", 9).expect("valid");
        let stale = |plan: &ShardPlan, name: &str| plan.makes_stale(name);
        for (name, by_two, by_one) in [
            ("m.safetensors", true, false),
            ("m.safetensors.index.json", false, true),
            ("m-00001-of-00002.safetensors", false, true),
            ("m-00003-of-00003.safetensors", true, true),
            ("m2-00003-of-00003.safetensors", false, false),
            ("m-1-of-3.safetensors", false, false),
            ("m.bin", false, false),
            ("m.fp16.safetensors", false, false),
        ] {
            assert_eq!((stale(&two, name), stale(&one, name)), (by_two, by_one), "{name}");
        }
    }

    #[test]
    fn variant_names_have_one_stem() {
        use NameKind::{File, Index, Shard};
        let stem = "model.fp16";
        for (name, kind) in [
            ("model.fp16.safetensors", File),
            ("model.fp16-00001-of-00002.safetensors", Shard),
            ("model-00001-of-00002.fp16.safetensors", Shard),
            ("model.safetensors.index.fp16.json", Index),
            ("model.safetensors.fp16.index.json", Index),
            ("model.fp16.safetensors.index.json", Index),
        ] {
            assert_eq!(parse_name(name), Some((kind, stem.to_string())), "{name}");
            // A save with that stem removes all of them except its own.
            let two = ShardPlan::new([9, 9].into_iter(), stem, 9).expect("valid");
            let is_own = ["model.fp16-00001-of-00002.safetensors", "model.fp16.safetensors.index.json"];
            assert_eq!(two.makes_stale(name), !is_own.contains(&name), "{name}");
        }
        assert_eq!(parse_name("model.safetensors.index.json"), Some((Index, "model".to_string())));
        for name in ["model.json", "model.safetensors.json", "model.safetensors.x.json", "model.bin"] {
            assert_eq!(parse_name(name), None, "{name}");
        }
    }

    #[test]
    fn invalid_arguments_are_refused() {
        let shard = "m-00001-of-00002";
        for (stem, max) in [("m", 0), ("", 1), ("../m", 1), (".m", 1), ("a\0", 1), (shard, 1)] {
            let error = ShardPlan::new([1].into_iter(), stem, max).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }
}
