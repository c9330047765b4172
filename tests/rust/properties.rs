//! Properties of every file: a load returns the saved tensors, no input makes the reader panic, a slice equals its
//! elements picked one by one, tensors written in parts and in any order produce the same file as a save, and so does
//! an edit of the metadata.

mod common;

use common::{Contents, contents, file_bytes, kind_of, naive_slice, pattern, read_slice, saved, with_file};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use safetensors_torch::{
    AxisRange, DEFAULT_ALIGNMENT, Dtype, EditOptions, IncrementalWriter, METADATA_KEY, Metadata,
    MetadataChanges, SaveOptions, Slice, TensorSpec, edit_metadata,
};

#[derive(Clone, Debug)]
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    data: Vec<u8>,
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop::sample::select(Dtype::ALL)
}

/// Any text, often with characters that JSON must escape.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        vec(any::<char>(), 0..12).prop_map(String::from_iter),
        vec(
            prop::sample::select(&['\0', '"', '\\', '\n', '/', 'a', '\u{7f}', '\u{2028}', '\u{10FFFF}']),
            0..8
        )
        .prop_map(String::from_iter),
    ]
}

fn metadata() -> impl Strategy<Value = Option<Metadata>> {
    prop::option::of(btree_map(text(), text(), 0..5))
}

/// A shape whose elements fill whole bytes.
fn shape(dtype: Dtype) -> impl Strategy<Value = Vec<u64>> {
    let whole_bytes = if dtype.bits() < 8 { 4 } else { 1 };
    vec(0u64..6, 0..4).prop_map(move |mut shape| {
        match shape.last_mut() {
            Some(last) => *last *= whole_bytes,
            None if whole_bytes > 1 => shape.push(whole_bytes),
            None => {}
        }
        shape
    })
}

fn tensors() -> impl Strategy<Value = Vec<Tensor>> {
    let one = dtype().prop_flat_map(|dtype| (Just(dtype), shape(dtype), any::<u8>()));
    btree_map(text().prop_filter("reserved", |name| name != METADATA_KEY), one, 0..12)
        .prop_map(|map| {
            map.into_iter()
                .map(|(name, (dtype, shape, seed))| {
                    let bits = shape.iter().product::<u64>() * dtype.bits();
                    let data = pattern(usize::from(seed) + (bits / 8) as usize)[usize::from(seed)..].to_vec();
                    Tensor { name, dtype, shape, data }
                })
                .collect::<Vec<_>>()
        })
        .prop_shuffle()
}

fn save(tensors: &[Tensor], metadata: Option<&Metadata>, alignment: u64) -> Vec<u8> {
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|tensor| TensorSpec { name: &tensor.name, dtype: tensor.dtype, shape: &tensor.shape })
        .collect();
    let data: Vec<&[u8]> = tensors.iter().map(|tensor| &tensor.data[..]).collect();
    saved(&specs, &data, metadata, alignment).expect("valid tensors")
}

/// Returns a file to damage: two dtypes, metadata, an empty tensor.
fn small_file() -> Vec<u8> {
    let tensor = |name: &str, dtype, shape: &[u64], data: &[u8]| Tensor {
        name: name.to_string(),
        dtype,
        shape: shape.to_vec(),
        data: data.to_vec(),
    };
    let tensors = [
        tensor("weight", Dtype::F32, &[2, 1], &[1, 2, 3, 4, 5, 6, 7, 8]),
        tensor("bias", Dtype::U8, &[3], &[9, 10, 11]),
        tensor("none", Dtype::I64, &[0], &[]),
    ];
    save(&tensors, Some(&[("format".to_string(), "pt".to_string())].into()), DEFAULT_ALIGNMENT)
}

/// Reads all tensors and metadata: damaged bytes may be a valid file, but reads stay in bounds.
fn read_all(bytes: &[u8]) {
    if let Ok(contents) = with_file(bytes, contents) {
        let data: usize = contents.tensors.iter().map(|(.., data)| data.len()).sum();
        assert!(data < bytes.len());
    }
}

/// A shape, a range for each of its dimensions, and an element type.
fn slices() -> impl Strategy<Value = (Dtype, Vec<u64>, Vec<AxisRange>)> {
    let whole = prop::sample::select(&[Dtype::U8, Dtype::F16, Dtype::F32, Dtype::C64]);
    let axis = (1u64..7).prop_flat_map(|dim| {
        (0..=dim, 0..=dim, 1u64..4)
            .prop_map(move |(a, b, step)| (dim, AxisRange { start: a.min(b), stop: a.max(b), step }))
    });
    (whole, vec(axis, 0..5)).prop_map(|(dtype, axes)| {
        let (shape, ranges) = axes.into_iter().unzip();
        (dtype, shape, ranges)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn loading_returns_what_was_saved(
        tensors in tensors(),
        metadata in metadata(),
        alignment in prop::sample::select(&[8u64, 16, 64, 4096]),
    ) {
        let bytes = save(&tensors, metadata.as_ref(), alignment);
        let (read, start) = with_file(&bytes, |file| (contents(file), file.header().data_start())).expect("valid");
        prop_assert_eq!(start % alignment, 0);
        let mut expected = tensors.clone();
        expected.sort_by_key(|tensor| (tensor.dtype.layout_rank(), tensor.name.clone()));
        // Empty tensors are written in the order of dtypes, but read in the order of offsets, then names.
        let mut offset = 0;
        let mut keyed: Vec<(u64, u64, Tensor)> = expected
            .into_iter()
            .map(|tensor| {
                let begin = offset;
                offset += tensor.data.len() as u64;
                (begin, offset, tensor)
            })
            .collect();
        keyed.sort_by(|a, b| (a.0, a.1, &a.2.name).cmp(&(b.0, b.1, &b.2.name)));
        let tensors = keyed.into_iter().map(|(.., t)| (t.name, t.dtype, t.shape, t.data)).collect();
        prop_assert_eq!(read, Contents { tensors, metadata });
    }

    #[test]
    fn the_order_of_the_tensors_does_not_matter(
        (tensors, shuffled) in tensors().prop_flat_map(|t| (Just(t.clone()), Just(t).prop_shuffle())),
    ) {
        prop_assert_eq!(save(&tensors, None, 8), save(&shuffled, None, 8));
    }

    #[test]
    fn random_bytes_are_an_error(bytes in vec(any::<u8>(), 0..400)) {
        read_all(&bytes);
    }

    #[test]
    fn random_headers_are_an_error_or_a_file(json in text(), data in vec(any::<u8>(), 0..16)) {
        read_all(&file_bytes(json, &data));
    }

    #[test]
    fn damaged_files_are_an_error_or_a_file(
        edits in vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..6),
    ) {
        let mut bytes = small_file();
        for (place, value, how) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = place.index(bytes.len());
            match how {
                0 => bytes[at] = value,
                1 => bytes[at] ^= 1 << (value % 8),
                2 => bytes.insert(at, value),
                _ => { bytes.remove(at); }
            }
        }
        read_all(&bytes);
    }

    #[test]
    fn a_file_with_bytes_missing_or_left_over_is_refused(cut in 0usize..500, extra in vec(any::<u8>(), 1..20)) {
        let whole = small_file();
        prop_assert!(kind_of(&whole).is_none());
        prop_assert!(kind_of(&whole[..cut % whole.len()]).is_some());
        prop_assert!(kind_of(&[whole, extra].concat()).is_some());
    }

    #[test]
    fn digits_in_a_header_are_checked(
        shape in [prop_oneof![4 => 0u64..6, 1 => any::<u64>()], prop_oneof![4 => 0u64..6, 1 => any::<u64>()]],
        dtype in dtype(),
        (begin, end) in (prop_oneof![4 => Just(0u64), 1 => any::<u64>()], prop::option::weighted(0.2, any::<u64>())),
        missing in prop_oneof![4 => Just(0usize), 1 => 0usize..3],
    ) {
        let bits = u128::from(shape[0]).checked_mul(u128::from(shape[1])).and_then(|n| n.checked_mul(dtype.bits().into()));
        let needed = bits.filter(|&bits| bits < 10_000).map_or(0, |bits| (bits / 8) as u64);
        let end = end.unwrap_or(needed);
        let data = (needed as usize).saturating_sub(missing);
        let json = format!(
            "{{\"a\":{{\"dtype\":\"{dtype}\",\"shape\":[{},{}],\"data_offsets\":[{begin},{end}]}}}}",
            shape[0], shape[1]
        );
        let valid = begin == 0
            && end == data as u64
            && bits == Some(8 * data as u128)
            && shape.iter().all(|&dim| dim <= i64::MAX as u64);
        prop_assert_eq!(kind_of(&file_bytes(json, &vec![0; data])).is_none(), valid);
    }

    #[test]
    fn slices_equal_elements_picked_one_by_one((dtype, shape, ranges) in slices()) {
        let item = (dtype.bits() / 8) as usize;
        let data = pattern(shape.iter().product::<u64>() as usize * item);
        let expected = naive_slice(&data, item, &shape, &ranges);

        let slice = Slice::plan("a", dtype, &shape, &ranges).expect("within the tensor");
        let lengths: Vec<u64> = ranges.iter().map(AxisRange::len).collect();
        prop_assert_eq!(slice.shape(), &lengths[..]);
        prop_assert_eq!(slice.nbytes(), expected.len() as u64);
        let picked: Vec<u8> = slice.byte_ranges().flat_map(|r| data[r.start as usize..r.end as usize].to_vec()).collect();
        prop_assert_eq!(&picked, &expected);

        let tensor = Tensor { name: "a".to_string(), dtype, shape, data };
        let bytes = save(&[tensor], None, 8);
        prop_assert_eq!(with_file(&bytes, |file| read_slice(file, 0, &ranges)).expect("valid").expect("read"), expected);
    }

    #[test]
    fn slices_of_half_bytes_are_right_or_refused(
        rows in 1u64..5,
        pairs in 1u64..5,
        cuts in (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<prop::sample::Index>()),
    ) {
        let columns = pairs * 2;
        let cut = |a: prop::sample::Index, b: prop::sample::Index, dim: u64| {
            let (a, b) = (a.index(dim as usize + 1) as u64, b.index(dim as usize + 1) as u64);
            AxisRange { start: a.min(b), stop: a.max(b), step: 1 }
        };
        let ranges = [cut(cuts.0, cuts.1, rows), cut(cuts.2, cuts.3, columns)];
        let data = pattern((rows * pairs) as usize);
        let empty = ranges.iter().any(AxisRange::is_empty);
        match Slice::plan("a", Dtype::F4, &[rows, columns], &ranges) {
            Ok(slice) => {
                prop_assert!(empty || (ranges[1].start % 2 == 0 && ranges[1].stop % 2 == 0));
                let halved = [ranges[0], AxisRange { start: ranges[1].start / 2, stop: ranges[1].stop / 2, step: 1 }];
                let expected = if empty { Vec::new() } else { naive_slice(&data, 1, &[rows, pairs], &halved) };
                let picked: Vec<u8> =
                    slice.byte_ranges().flat_map(|r| data[r.start as usize..r.end as usize].to_vec()).collect();
                prop_assert_eq!(picked, expected);
            }
            Err(_) => prop_assert!(!empty && (ranges[1].start % 2 == 1 || ranges[1].stop % 2 == 1)),
        }
    }
}

#[test]
fn truncated_files_and_flipped_bits_do_not_panic() {
    let whole = small_file();
    for length in 0..whole.len() {
        assert!(kind_of(&whole[..length]).is_some(), "cut at {length}");
    }
    for bit in 0..whole.len() * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        read_all(&bytes);
    }
}

/// Splits a file into its header, including padding, and its data.
fn split(bytes: &[u8]) -> (&[u8], &[u8]) {
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    (&bytes[8..8 + length], &bytes[8 + length..])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn parts_in_any_order_produce_the_file_of_a_save(
        tensors in tensors(),
        metadata in metadata(),
        seeds in vec(any::<u64>(), 1..20),
    ) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let specs: Vec<TensorSpec> = tensors
            .iter()
            .map(|tensor| TensorSpec { name: &tensor.name, dtype: tensor.dtype, shape: &tensor.shape })
            .collect();
        let writer = IncrementalWriter::create(&specs, metadata.as_ref(), &path, SaveOptions::default()).expect("begun");
        // Each tensor is written in up to three parts; the seeds define the order of all parts.
        let mut parts = Vec::new();
        for (number, tensor) in tensors.iter().enumerate() {
            let cut = |seed: u64| (seed % (tensor.data.len() as u64 + 1)) as usize;
            let mut cuts = [0, cut(seeds[number % seeds.len()]), cut(seeds[0] / 3), tensor.data.len()];
            cuts.sort_unstable();
            parts.extend(cuts.windows(2).filter(|cut| cut[0] < cut[1]).map(|cut| (number, cut[0], cut[1])));
            if tensor.data.is_empty() {
                parts.push((number, 0, 0));
            }
        }
        parts.sort_by_key(|&(number, start, _)| seeds[(number + start) % seeds.len()]);
        for (done, &(number, start, end)) in parts.iter().enumerate() {
            let tensor = &tensors[number];
            prop_assert!(writer.commit().is_err(), "complete after {done} of {} parts", parts.len());
            writer.write_part(&tensor.name, start as u64, &tensor.data[start..end]).expect("written");
        }
        prop_assert!(writer.missing().expect("this process").is_empty());
        writer.commit().expect("complete");
        prop_assert!(std::fs::read(&path).expect("there") == save(&tensors, metadata.as_ref(), DEFAULT_ALIGNMENT));
    }

    #[test]
    fn an_edit_produces_the_file_of_a_save(
        tensors in tensors(),
        before in metadata(),
        changes in btree_map(text(), prop::option::of(text()), 0..4),
        removed in any::<u64>(),
        alignment in prop::sample::select(&[8u64, 64, 512, 1024]),
        reserve in prop_oneof![Just(0u64), 0u64..300],
        in_place in any::<bool>(),
    ) {
        let mut changes: MetadataChanges = changes;
        let keys = before.iter().flat_map(|metadata| metadata.keys());
        changes.extend(keys.enumerate().filter(|(i, _)| removed >> i & 1 == 1).map(|(_, key)| (key.clone(), None)));
        let mut after = before.clone();
        for (key, value) in &changes {
            match value {
                Some(value) => drop(after.get_or_insert_default().insert(key.clone(), value.clone())),
                None => drop(after.as_mut().map(|metadata| metadata.remove(key))),
            }
        }

        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let old = save(&tensors, before.as_ref(), alignment);
        std::fs::write(&path, &old).expect("written");
        let outcome = edit_metadata(&path, &changes, EditOptions { in_place, reserve, durable: false });
        let new = std::fs::read(&path).expect("there");

        let (old_header, data) = split(&old);
        let compact = save(&tensors, after.as_ref(), DEFAULT_ALIGNMENT);
        let json = split(&compact).0.trim_ascii_end();
        let fits = json.len() as u64 + reserve <= old_header.len() as u64;
        if !fits && in_place {
            prop_assert!(outcome.is_err());
            prop_assert!(new == old);
            return Ok(());
        }
        prop_assert_eq!(outcome.expect("edited"), after.clone());
        let (new_header, new_data) = split(&new);
        prop_assert!(new_data == data);
        prop_assert!(new_header.trim_ascii_end() == json);
        let padding = (new_header.len() - json.len()) as u64;
        prop_assert!(padding >= reserve && new_header[json.len()..].iter().all(|&byte| byte == b' '));
        if fits && (in_place || after == before) {
            prop_assert_eq!(new_header.len(), old_header.len());
        } else if reserve == 0 {
            // The data keep their alignment.
            let alignment = 1 << (8 + old_header.len() as u64).trailing_zeros();
            prop_assert!(new == save(&tensors, after.as_ref(), alignment));
        }
        prop_assert!((8 + new_header.len() as u64).is_multiple_of(alignment));
    }
}
