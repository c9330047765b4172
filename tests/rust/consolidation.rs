//! The files of torch.distributed.checkpoint, joined: the bytes are those of the whole tensors, whatever the chunks.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::{directory, names};
use proptest::prelude::*;
use safetensors_torch::{
    Dtype, ErrorKind, Metadata, SaveOptions, ShardedOptions, TensorSpec, consolidate, save_file, save_sharded,
};
use serde_json::json;

/// A tensor of consecutive numbers.
#[derive(Clone, Debug)]
struct Whole {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    bytes: Vec<u8>,
}

/// A box of elements: offsets and sizes.
type Part = (Vec<u64>, Vec<u64>);

impl Whole {
    fn new(name: &str, dtype: Dtype, shape: &[u64]) -> Whole {
        let bytes = (shape.iter().product::<u64>() * dtype.bits()).div_ceil(8);
        let bytes = (0..bytes).map(|n| (n * 7 % 251) as u8).collect();
        Whole { name: name.to_string(), dtype, shape: shape.to_vec(), bytes }
    }

    /// Returns the bytes of a box, row by row.
    fn part(&self, (offsets, sizes): &Part) -> Vec<u8> {
        let width = self.dtype.bits() as usize / 8;
        let Some(last) = sizes.len().checked_sub(1) else { return self.bytes.clone() };
        let mut part = Vec::new();
        for row in 0..sizes[..last].iter().product::<u64>() {
            let (mut rest, mut at, mut stride) = (row, offsets[last], self.shape[last]);
            for dim in (0..last).rev() {
                at += (offsets[dim] + rest % sizes[dim]) * stride;
                rest /= sizes[dim];
                stride *= self.shape[dim];
            }
            part.extend(&self.bytes[at as usize * width..][..sizes[last] as usize * width]);
        }
        part
    }
}

/// Writes the file of process number `rank` with boxes of tensors.
fn save_chunks(directory: &Path, rank: usize, chunks: &[(&Whole, &Part)]) {
    let bytes: Vec<Vec<u8>> = chunks.iter().map(|(whole, part)| whole.part(part)).collect();
    let specs = chunks.iter().map(|(Whole { name, dtype, .. }, (_, sizes))| TensorSpec {
        name,
        dtype: *dtype,
        shape: sizes,
    });
    let specs: Vec<_> = specs.collect();
    let positions: BTreeMap<&str, _> = chunks
        .iter()
        .map(|(whole, (offsets, _))| (whole.name.as_str(), json!({"saved_offsets": offsets})))
        .collect();
    let metadata = Metadata::from([
        ("DCP_SHARDING_INFO".to_string(), json!(positions).to_string()),
        ("DCP_VERSION".to_string(), "1.0".to_string()),
        ("format".to_string(), "pt".to_string()),
    ]);
    let data: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
    save_file(&specs, &data, Some(&metadata), &shard(directory, rank), SaveOptions::default())
        .expect("saved");
}

fn shard(directory: &Path, rank: usize) -> std::path::PathBuf {
    directory.join(format!("shard-{rank:05}-model-00001-of-00001.safetensors"))
}

/// Writes whole tensors, sorted by name, as a checkpoint.
fn save_whole(directory: &Path, wholes: &[Whole], options: ShardedOptions<'_>) -> Vec<String> {
    let mut wholes: Vec<&Whole> = wholes.iter().collect();
    wholes.sort_by_key(|whole| &whole.name);
    let specs =
        wholes.iter().map(|Whole { name, dtype, shape, .. }| TensorSpec { name, dtype: *dtype, shape });
    let data: Vec<&[u8]> = wholes.iter().map(|whole| whole.bytes.as_slice()).collect();
    let metadata = Metadata::from([("format".to_string(), "pt".to_string())]);
    save_sharded(&specs.collect::<Vec<_>>(), &data, Some(&metadata), directory, options).expect("saved")
}

fn options(max_shard_size: u64) -> ShardedOptions<'static> {
    ShardedOptions { max_shard_size, ..ShardedOptions::default() }
}

/// Compares the checkpoint in `consolidated` with that of the whole tensors, byte for byte.
fn assert_same(consolidated: &Path, written: &[String], wholes: &[Whole], max_shard_size: u64) {
    let expected = directory();
    assert_eq!(written, save_whole(expected.path(), wholes, options(max_shard_size)));
    assert_eq!(names(consolidated), names(expected.path()));
    for name in written {
        let (ours, theirs) = (fs::read(consolidated.join(name)), fs::read(expected.path().join(name)));
        assert!(ours.expect("written") == theirs.expect("written"), "{name}");
    }
}

/// Cuts a box in two, again and again, at places that `cuts` chooses.
fn divide(shape: &[u64], cuts: &[(usize, usize, u64)]) -> Vec<Part> {
    let mut boxes = vec![(vec![0; shape.len()], shape.to_vec())];
    for &(which, dim, place) in cuts {
        if shape.is_empty() {
            break;
        }
        let (which, dim) = (which % boxes.len(), dim % shape.len());
        let (mut offsets, mut sizes) = boxes[which].clone();
        let place = place % (sizes[dim] + 1);
        boxes[which].1[dim] = place;
        offsets[dim] += place;
        sizes[dim] -= place;
        boxes.push((offsets, sizes));
    }
    boxes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_chunks_make_the_whole_tensors(
        tensors in prop::collection::vec(
            (
                prop::collection::vec(0u64..9, 0..4),
                prop::sample::select(vec![Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::I64, Dtype::Bool]),
                prop::collection::vec((0usize..100, 0usize..4, 0u64..100), 0..8),
            ),
            1..6,
        ),
        max_shard_size in prop::sample::select(vec![64u64, 1000, u64::MAX]),
    ) {
        let (input, output) = (directory(), directory());
        let named = tensors.iter().enumerate();
        let wholes: Vec<Whole> =
            named.map(|(n, (shape, dtype, _))| Whole::new(&format!("tensor.{n}"), *dtype, shape)).collect();
        let boxes: Vec<Vec<Part>> = tensors.iter().map(|(shape, _, cuts)| divide(shape, cuts)).collect();
        let ranks = boxes.iter().map(Vec::len).max().expect("a tensor");
        for rank in 0..ranks {
            let chunks = wholes.iter().zip(&boxes).filter_map(|(whole, boxes)| Some((whole, boxes.get(rank)?)));
            save_chunks(input.path(), rank + 1, &chunks.collect::<Vec<_>>());
        }
        let written = consolidate(input.path(), output.path(), options(max_shard_size)).expect("consolidated");
        assert_same(output.path(), &written, &wholes, max_shard_size);
    }
}

#[test]
fn large_chunks_of_rows_and_of_columns() {
    let (input, output) = (directory(), directory());
    // Runs of more and of less than 64 KiB, and more bytes than the buffer has.
    let shape = [300, 40_000];
    let wholes = ["rows", "columns"].map(|name| Whole::new(name, Dtype::F32, &shape));
    let rows = [(vec![0, 0], vec![160, 40_000]), (vec![160, 0], vec![140, 40_000])];
    let columns = [(vec![0, 0], vec![300, 30_000]), (vec![0, 30_000], vec![300, 10_000])];
    for rank in 0..2 {
        save_chunks(input.path(), rank + 1, &[(&wholes[0], &rows[rank]), (&wholes[1], &columns[rank])]);
    }
    let written = consolidate(input.path(), output.path(), options(u64::MAX)).expect("consolidated");
    assert_same(output.path(), &written, &wholes, u64::MAX);
}

#[test]
fn files_of_other_names_are_ignored() {
    let directory = directory();
    let whole = Whole::new("a", Dtype::U8, &[4]);
    save_chunks(directory.path(), 1, &[(&whole, &(vec![0], vec![4]))]);
    let written = consolidate(directory.path(), directory.path(), options(100)).expect("consolidated");
    assert_eq!(written, ["model.safetensors"]);
    // Final files beside those of the processes do not count twice.
    let again = consolidate(directory.path(), directory.path(), options(100)).expect("consolidated");
    assert_eq!(again, written);
}

/// Consolidates a directory that must be refused, and checks that an older checkpoint stays as it was.
fn refused(input: &Path, kind: ErrorKind, parts: &[&str]) {
    let output = directory();
    let old = [Whole::new("old", Dtype::U8, &[3])];
    let written = save_whole(output.path(), &old, options(100));
    let error = consolidate(input, output.path(), options(100)).expect_err("refused");
    assert_eq!(error.kind(), kind, "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "no {part:?} in: {error}");
    }
    assert_same(output.path(), &written, &old, 100);
}

#[test]
fn chunks_that_do_not_fit_are_refused() {
    let whole = Whole::new("w", Dtype::F32, &[4, 4]);
    let upper = (vec![0, 0], vec![2, 4]);
    let cases: [(&Part, &[&str]); 2] = [
        // The lower left is missing.
        (&(vec![2, 2], vec![2, 2]), &["tensor \"w\" of shape [4, 4]", "48 of its 64 bytes"]),
        (&(vec![1, 0], vec![3, 4]), &["shard-00002", "shard-00001", "overlap", "older checkpoint"]),
    ];
    for (other, parts) in cases {
        let input = directory();
        save_chunks(input.path(), 1, &[(&whole, &upper)]);
        save_chunks(input.path(), 2, &[(&whole, other)]);
        refused(input.path(), ErrorKind::Offsets, parts);
    }
}

/// Writes the file of a process whose only tensor is "w", with these positions in its metadata.
fn save_with_info(directory: &Path, rank: usize, shape: &[u64], dtype: Dtype, info: Option<&str>) {
    let spec = TensorSpec { name: "w", dtype, shape };
    let bytes = vec![1; (shape.iter().product::<u64>() * dtype.bits() / 8) as usize];
    let metadata = info.map(|info| Metadata::from([("DCP_SHARDING_INFO".to_string(), info.to_string())]));
    let path = shard(directory, rank);
    save_file(&[spec], &[&bytes], metadata.as_ref(), &path, SaveOptions::default()).expect("saved");
}

#[test]
fn files_without_valid_positions_are_refused() {
    let far = json!({"w": {"saved_offsets": [u64::MAX, 0]}}).to_string();
    let cases: [(Option<&str>, ErrorKind, &str); 7] = [
        (None, ErrorKind::HeaderJson, "lacks DCP_SHARDING_INFO; load it as it is"),
        (Some("{"), ErrorKind::HeaderJson, "DCP_SHARDING_INFO is invalid"),
        (Some(r#"{"w": {}}"#), ErrorKind::HeaderJson, "no saved_offsets of \"w\""),
        (
            Some(r#"{"w": {"saved_offsets": [-1, 0]}}"#),
            ErrorKind::HeaderJson,
            "DCP_SHARDING_INFO is invalid: invalid value: integer `-1`",
        ),
        (Some(r#"{"v": {"saved_offsets": [0, 0]}}"#), ErrorKind::Offsets, "does not list it"),
        (Some(r#"{"w": {"saved_offsets": [0]}}"#), ErrorKind::Offsets, "1 offsets for 2 dimensions"),
        (Some(&far), ErrorKind::Offsets, "an offset overflows"),
    ];
    for (info, kind, text) in cases {
        let input = directory();
        save_with_info(input.path(), 1, &[2, 2], Dtype::U8, info);
        refused(input.path(), kind, &["shard-00001", text]);
    }
}

#[test]
fn chunks_of_different_dtypes_are_refused() {
    let input = directory();
    for (rank, dtype) in [(1, Dtype::F32), (2, Dtype::BF16)] {
        let info = json!({"w": {"saved_offsets": [2 * (rank - 1)]}}).to_string();
        save_with_info(input.path(), rank, &[2], dtype, Some(&info));
    }
    refused(input.path(), ErrorKind::Offsets, &["tensor \"w\"", "another dtype"]);
}

#[test]
fn parts_of_bytes_are_refused_unless_they_are_whole_tensors() {
    let input = directory();
    save_with_info(input.path(), 1, &[2, 3], Dtype::F4, Some(r#"{"w": {"saved_offsets": [0, 0]}}"#));
    consolidate(input.path(), directory().path(), options(100)).expect("a whole tensor");
    save_with_info(input.path(), 2, &[2, 3], Dtype::F4, Some(r#"{"w": {"saved_offsets": [0, 3]}}"#));
    refused(input.path(), ErrorKind::Offsets, &["F4 may begin inside a byte"]);
}

#[test]
fn a_directory_without_chunks_is_refused() {
    let input = directory();
    save_whole(input.path(), &[Whole::new("a", Dtype::U8, &[4])], options(100));
    refused(input.path(), ErrorKind::InvalidArgument, &["no file shard-*.safetensors", "sharded"]);
    refused(&input.path().join("absent"), ErrorKind::Io, &["absent"]);
}
