//! Which tensor goes into which shard, and what the shards are called.

use crate::error::{Error, ErrorKind, Result};

/// The most bytes of tensors in a shard, where nothing else is asked for: 5 GB, as Hugging Face's tools have it.
pub const DEFAULT_MAX_SHARD_SIZE: u64 = 5_000_000_000;

/// What the names of a checkpoint's files begin with, where nothing else is asked for.
pub const DEFAULT_STEM: &str = "model";

/// How the names of files end.
pub(super) const SUFFIX: &str = ".safetensors";

/// How the names of indexes end.
pub(super) const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// The division of a checkpoint's tensors into files.
#[derive(Clone, Debug)]
pub struct ShardPlan {
    stem: String,
    /// The shard of each tensor, in the order in which they were given.
    shard_of: Vec<usize>,
    count: usize,
    total_bytes: u64,
}

impl ShardPlan {
    /// Divides tensors of `sizes` bytes each, in their order: a shard ends before the tensor with which it would pass
    /// `max_shard_size`, and a tensor that is larger than that has a shard of its own. There is at least one shard.
    ///
    /// The same tensors in the same order make the same shards as with Hugging Face's tools.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] for a `max_shard_size` of 0, and for a `stem` that is no file name, or is that of
    /// a shard.
    pub fn new(sizes: impl Iterator<Item = u64>, stem: &str, max_shard_size: u64) -> Result<ShardPlan> {
        if max_shard_size == 0 {
            let detail = "a shard of at most 0 bytes can hold nothing: give the size of a shard in bytes";
            return Err(Error::new(ErrorKind::InvalidArgument, detail));
        }
        if stem.is_empty() || stem.starts_with('.') || stem.contains(['/', '\0']) {
            let detail = format!(
                "{stem:?} cannot be what the names of files begin with: give a word such as {DEFAULT_STEM:?}"
            );
            return Err(Error::new(ErrorKind::InvalidArgument, detail));
        }
        if parse_shard_name(&format!("{stem}{SUFFIX}")).is_some() {
            let detail = format!(
                "{stem:?} is what a shard of another checkpoint is called: give what stands before the numbers"
            );
            return Err(Error::new(ErrorKind::InvalidArgument, detail));
        }
        // Tensors that are too large come at the place where they stand, before the shard that is being filled.
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
        Ok(ShardPlan { stem: stem.to_string(), shard_of, count: closed, total_bytes })
    }

    /// The number of files.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// The file that each tensor goes into, in the order in which they were given.
    pub fn shard_of(&self) -> &[usize] {
        &self.shard_of
    }

    /// The tensors of each file, in the order in which they were given.
    pub fn members(&self) -> Vec<Vec<usize>> {
        let mut members = vec![Vec::new(); self.count];
        for (tensor, &shard) in self.shard_of.iter().enumerate() {
            members[shard].push(tensor);
        }
        members
    }

    /// The name of a file: `STEM.safetensors` where it is the only one, else `STEM-00001-of-00003.safetensors`.
    pub fn file_name(&self, shard: usize) -> String {
        if self.count == 1 {
            return format!("{}{SUFFIX}", self.stem);
        }
        format!("{}-{:05}-of-{:05}{SUFFIX}", self.stem, shard + 1, self.count)
    }

    /// The name of the index.
    pub(super) fn index_name(&self) -> String {
        format!("{}{INDEX_SUFFIX}", self.stem)
    }

    /// Whether a file of this name belongs to a checkpoint of the same stem, and is not among this one's.
    pub(super) fn makes_stale(&self, name: &str) -> bool {
        parse_name(name).is_some_and(|(_, stem)| stem == self.stem) && !self.is_own(name)
    }

    fn is_own(&self, name: &str) -> bool {
        if self.count == 1 {
            return name == self.file_name(0);
        }
        let shard = parse_shard_name(name).and_then(|(_, number, _)| number.checked_sub(1));
        name == self.index_name() || shard.is_some_and(|shard| name == self.file_name(shard))
    }
}

/// What a name in the directory of a checkpoint stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NameKind {
    /// The only file of a checkpoint.
    File,
    /// One of several files.
    Shard,
    /// The list of several files.
    Index,
}

/// What a file of a checkpoint is, and its stem, of which a variant is the end: `model.fp16`. `None` for other names.
///
/// The names of variants are those of diffusers and transformers, old and new: `model.fp16.safetensors`,
/// `model.fp16-00001-of-00002.safetensors`, `model-00001-of-00002.fp16.safetensors`,
/// `model.safetensors.index.fp16.json`, `model.safetensors.fp16.index.json`; and the one that follows from a stem
/// `model.fp16`, `model.fp16.safetensors.index.json`.
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

/// The stem and the numbers of `STEM-00001-of-00003.safetensors`; `None` for other names. With a variant behind the
/// numbers, that is the end of the stem.
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
        // A tensor that is too large has a file of its own, before the one that it interrupts.
        assert_eq!(shards(&[3, 9, 3, 3], 8), [1, 0, 1, 2]);
        assert_eq!(shards(&[9, 9], 8), [0, 1]);
        let plan = ShardPlan::new([u64::MAX, u64::MAX].into_iter(), "model", u64::MAX).expect("valid");
        assert_eq!((plan.shard_of(), plan.total_bytes()), (&[0, 1][..], u64::MAX));
    }

    #[test]
    fn names_are_those_of_other_tools() {
        let plan = ShardPlan::new([9, 9].into_iter(), "m", 9).expect("valid");
        assert_eq!(
            [plan.file_name(0), plan.file_name(1), plan.index_name()],
            ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json"]
        );
        let one = ShardPlan::new([9].into_iter(), "m", 9).expect("valid");
        assert_eq!(one.file_name(0), "m.safetensors");
    }

    #[test]
    fn what_an_earlier_save_left_is_stale() {
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
    fn names_of_variants_are_those_of_one_stem() {
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
            // A save of that stem leaves none of them behind that is not its own.
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
    fn what_cannot_be_is_refused() {
        let shard = "m-00001-of-00002";
        for (stem, max) in [("m", 0), ("", 1), ("../m", 1), (".m", 1), ("a\0", 1), (shard, 1)] {
            let error = ShardPlan::new([1].into_iter(), stem, max).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }
}
