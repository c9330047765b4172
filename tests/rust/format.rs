//! The header: valid and invalid input with its kind of error, and the bytes written.

mod common;

use std::time::Duration;

use common::{contents, file_bytes, kind_of, saved, with_file};
use safetensors_torch::{Dtype, ErrorKind, Header, Layout, MAX_HEADER_BYTES, Metadata, TensorSpec};

fn metadata(pairs: &[(&str, &str)]) -> Metadata {
    pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

/// Returns the kind of error of a file with `data` bytes of data, whose one tensor `a` has these fields.
fn tensor(fields: &str, data: usize) -> Option<ErrorKind> {
    kind_of(&file_bytes(format!("{{\"a\":{{{fields}}}}}"), &vec![0; data]))
}

#[test]
fn a_valid_header_is_read() {
    let json = r#"  {"__metadata__":{"k":"v"},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]},
        "a":{"data_offsets":[0,4],"extra":[{"deep":null}],"shape":[],"dtype":"I32"}}  "#;
    let bytes = file_bytes(json, &[1, 0, 0, 0, 2, 2, 2, 2, 3, 3, 3, 3]);
    let read = with_file(&bytes, contents).expect("valid");
    assert_eq!(read.metadata, Some(metadata(&[("k", "v")])));
    assert_eq!(
        read.tensors,
        [
            ("a".to_string(), Dtype::I32, vec![], vec![1, 0, 0, 0]),
            ("b".to_string(), Dtype::F32, vec![2], vec![2, 2, 2, 2, 3, 3, 3, 3]),
        ]
    );
}

#[test]
fn files_without_tensors_are_valid() {
    assert_eq!(kind_of(&file_bytes("{}", &[])), None);
    assert_eq!(
        with_file(&file_bytes(r#"{"__metadata__":null}"#, &[]), contents).expect("valid").metadata,
        None
    );
    let empty = with_file(&file_bytes(r#"{"__metadata__":{}}"#, &[]), contents).expect("valid").metadata;
    assert_eq!(empty, Some(Metadata::new()));
}

#[test]
fn damaged_length_fields_are_refused() {
    for length in 0..8 {
        assert_eq!(kind_of(&vec![0; length]), Some(ErrorKind::FileTooSmall), "{length}");
    }
    assert_eq!(kind_of(&u64::MAX.to_le_bytes()), Some(ErrorKind::HeaderTooLarge));
    assert_eq!(kind_of(&(MAX_HEADER_BYTES + 1).to_le_bytes()), Some(ErrorKind::HeaderTooLarge));
    assert_eq!(kind_of(&MAX_HEADER_BYTES.to_le_bytes()), Some(ErrorKind::HeaderTruncated));
    assert_eq!(kind_of(&1u64.to_le_bytes()), Some(ErrorKind::HeaderTruncated));
    assert_eq!(kind_of(&file_bytes([b'{', 0xFF, b'}'], &[])), Some(ErrorKind::HeaderUtf8));
    // A made-up length is refused too, and does not overflow.
    assert_eq!(Header::parse(b"{}", 3).map_err(|error| error.kind()).err(), Some(ErrorKind::HeaderTruncated));
}

#[test]
fn foreign_formats_are_named() {
    for (bytes, word) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"[..], "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"PK\x03\x04\0\0\0\0\0\0\0\0", "zip"),
        (b"\x80\x02}q\0(X\x01\0\0\0", "pickle"),
        (b"{\"error\":\"not found\"}", "JSON"),
        (b"GGUF", "GGUF"),
    ] {
        let error = with_file(bytes, |_| ()).expect_err("foreign");
        assert_eq!(error.kind(), ErrorKind::ForeignFormat, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn headers_that_are_not_objects_of_tensors_are_refused() {
    for json in [
        "",
        " ",
        "[]",
        "null",
        "7",
        "\"a\"",
        "{",
        "{}x",
        "{} {}",
        "{\"a\":1}",
        "{\"a\":null}",
        "{\"a\":[]}",
        "{\"a\":{}}",
        "{\"__metadata__\":{\"a\":1}}",
        "{\"__metadata__\":{\"a\":null}}",
        "{\"__metadata__\":[]}",
        "{\"__metadata__\":\"a\"}",
        "{\"a\\ud800\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}",
        "{'a':1}",
        "{\"a\":}",
    ] {
        assert_eq!(kind_of(&file_bytes(json, &[])), Some(ErrorKind::HeaderJson), "{json}");
    }
    for fields in [
        r#""shape":[1],"data_offsets":[0,1]"#,
        r#""dtype":"U8","data_offsets":[0,1]"#,
        r#""dtype":"U8","shape":[1]"#,
        r#""dtype":8,"shape":[1],"data_offsets":[0,1]"#,
        r#""dtype":null,"shape":[1],"data_offsets":[0,1]"#,
        r#""dtype":"U8","shape":[1.0],"data_offsets":[0,1]"#,
        r#""dtype":"U8","shape":[-1],"data_offsets":[0,1]"#,
        r#""dtype":"U8","shape":["1"],"data_offsets":[0,1]"#,
        r#""dtype":"U8","shape":1,"data_offsets":[0,1]"#,
        r#""dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]"#,
        r#""dtype":"U8","shape":[1],"data_offsets":[0]"#,
        r#""dtype":"U8","shape":[1],"data_offsets":[0,1,1]"#,
        r#""dtype":"U8","shape":[1],"data_offsets":[0,1.5]"#,
        r#""dtype":"U8","shape":[1],"data_offsets":{"begin":0,"end":1}"#,
    ] {
        assert_eq!(tensor(fields, 1), Some(ErrorKind::HeaderJson), "{fields}");
    }
}

#[test]
fn deep_nesting_does_not_overflow_the_stack() {
    let deep = 200_000;
    for json in [
        "[".repeat(deep),
        "{\"a\":".repeat(deep),
        format!("{{\"a\":{{\"x\":{}{}}}}}", "[".repeat(deep), "]".repeat(deep)),
    ] {
        assert_eq!(kind_of(&file_bytes(json, &[])), Some(ErrorKind::HeaderJson));
    }
}

#[test]
fn duplicates_are_refused() {
    let field = r#""dtype":"U8","shape":[0],"data_offsets":[0,0]"#;
    for json in [
        format!("{{\"a\":{{{field}}},\"a\":{{{field}}}}}"),
        format!("{{\"a\":{{{field}}},\"b\":{{{field}}},\"\\u0061\":{{{field}}}}}"),
        format!("{{\"a\":{{{field},\"dtype\":\"U8\"}}}}"),
        format!("{{\"a\":{{{field},\"shape\":[0]}}}}"),
        format!("{{\"a\":{{{field},\"data_offsets\":[0,0]}}}}"),
        r#"{"__metadata__":{"k":"1","k":"1"}}"#.to_string(),
        r#"{"__metadata__":{},"__metadata__":{}}"#.to_string(),
        r#"{"__metadata__":null,"__metadata__":null}"#.to_string(),
    ] {
        assert_eq!(kind_of(&file_bytes(&json, &[])), Some(ErrorKind::Duplicate), "{json}");
    }
}

#[test]
fn dtypes_sizes_and_overflow() {
    assert_eq!(tensor(r#""dtype":"F33","shape":[1],"data_offsets":[0,1]"#, 1), Some(ErrorKind::UnknownDtype));
    assert_eq!(tensor(r#""dtype":"f32","shape":[1],"data_offsets":[0,4]"#, 4), Some(ErrorKind::UnknownDtype));
    let overflow = |shape: &str| tensor(&format!(r#""dtype":"F32","shape":{shape},"data_offsets":[0,0]"#), 0);
    for shape in [
        "[9223372036854775808]",
        "[18446744073709551615]",
        "[4294967296,4294967296]",
        "[2305843009213693952]",
        "[0,9223372036854775808]",
        "[0,4294967296,4294967296]",
    ] {
        assert_eq!(overflow(shape), Some(ErrorKind::ShapeOverflow), "{shape}");
    }
    assert_eq!(overflow("[0,9223372036854775807]"), None);
    for fields in [
        r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#,
        r#""dtype":"F32","shape":[],"data_offsets":[0,0]"#,
        r#""dtype":"F4","shape":[3],"data_offsets":[0,2]"#,
        r#""dtype":"F6_E2M3","shape":[2],"data_offsets":[0,2]"#,
    ] {
        assert_eq!(tensor(fields, 4), Some(ErrorKind::SizeMismatch), "{fields}");
    }
    assert_eq!(tensor(r#""dtype":"F4","shape":[3,2],"data_offsets":[0,3]"#, 3), None);
    assert_eq!(tensor(r#""dtype":"F6_E3M2","shape":[4],"data_offsets":[0,3]"#, 3), None);
}

#[test]
fn offsets_cover_the_data_exactly() {
    let two = |a: &str, b: &str, data: usize| {
        let json = format!(
            "{{\"a\":{{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":{a}}},\
             \"b\":{{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":{b}}}}}"
        );
        kind_of(&file_bytes(json, &vec![0; data]))
    };
    assert_eq!(two("[2,4]", "[0,2]", 4), None);
    assert_eq!(two("[0,2]", "[3,5]", 5), Some(ErrorKind::Offsets), "a hole");
    assert_eq!(two("[1,3]", "[3,5]", 5), Some(ErrorKind::Offsets), "a hole at the start");
    assert_eq!(two("[0,2]", "[1,3]", 3), Some(ErrorKind::Offsets), "an overlap");
    assert_eq!(two("[0,2]", "[0,2]", 2), Some(ErrorKind::Offsets), "the same bytes twice");
    assert_eq!(two("[2,0]", "[0,2]", 2), Some(ErrorKind::Offsets), "reversed");
    assert_eq!(two("[0,2]", "[18446744073709551615,1]", 4), Some(ErrorKind::Offsets), "reversed");
    assert_eq!(two("[0,2]", "[2,4]", 3), Some(ErrorKind::DataLength), "cut short");
    assert_eq!(two("[0,2]", "[2,4]", 5), Some(ErrorKind::DataLength), "left over");
    assert_eq!(kind_of(&file_bytes("{}", &[0])), Some(ErrorKind::DataLength));
}

#[test]
fn file_order_is_by_offset_then_name() {
    let empty = |name: &str, at: u64| {
        format!("{name:?}:{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[{at},{at}]}}")
    };
    let json = format!(
        "{{{},{},{},\"m\":{{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}},{}}}",
        empty("z", 0),
        empty("y", 4),
        empty("b", 0),
        empty("a", 4)
    );
    let names = |file: &safetensors_torch::TensorFile| {
        let header = file.header();
        let in_order: Vec<String> = header.iter().map(|tensor| tensor.name.to_string()).collect();
        let sorted: Vec<String> =
            header.sorted_by_name().iter().map(|&i| in_order[i as usize].clone()).collect();
        for (index, name) in in_order.iter().enumerate() {
            assert_eq!(header.find(name), Some(index));
        }
        assert_eq!(header.find("c"), None);
        assert_eq!(header.require("c").expect_err("absent").to_string(), "File does not contain tensor c");
        (in_order.concat(), sorted.concat())
    };
    let bytes = file_bytes(json, &[0; 4]);
    assert_eq!(with_file(&bytes, names).expect("valid"), ("bzmay".to_string(), "abmyz".to_string()));
}

#[test]
fn escapes_and_unusual_names() {
    let json = r#"{"\u0000\n\"\\\/\ud83d\ude00é":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},
                   "":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
    let bytes = file_bytes(json, &[]);
    let read = with_file(&bytes, contents).expect("valid");
    assert_eq!(read.tensors[0].0, "");
    assert_eq!(read.tensors[1].0, "\0\n\"\\/\u{1F600}é");
}

#[test]
fn written_bytes() {
    let specs = [
        TensorSpec { name: "b", dtype: Dtype::U8, shape: &[3] },
        TensorSpec { name: "a\"\n\u{1}é", dtype: Dtype::U8, shape: &[] },
        TensorSpec { name: "z", dtype: Dtype::I64, shape: &[1, 0] },
        TensorSpec { name: "y", dtype: Dtype::F16, shape: &[1] },
    ];
    let data: [&[u8]; 4] = [&[1, 2, 3], &[4], &[], &[5, 6]];
    let bytes = saved(&specs, &data, Some(&metadata(&[("y", "2"), ("x", "1")])), 8).expect("saved");
    let json = concat!(
        r#"{"__metadata__":{"x":"1","y":"2"},"z":{"dtype":"I64","shape":[1,0],"data_offsets":[0,0]},"#,
        r#""y":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"#,
        r#""a\"\n\u0001é":{"dtype":"U8","shape":[],"data_offsets":[2,3]},"#,
        r#""b":{"dtype":"U8","shape":[3],"data_offsets":[3,6]}}"#,
    );
    let padded = json.to_string() + &" ".repeat(json.len().next_multiple_of(8) - json.len());
    assert_eq!(bytes, file_bytes(padded, &[5, 6, 4, 1, 2, 3]));
}

#[test]
fn written_files_without_tensors() {
    let empty = |metadata: Option<&Metadata>| saved(&[], &[], metadata, 8).expect("saved");
    assert_eq!(empty(None), file_bytes("{}      ", &[]));
    assert_eq!(empty(Some(&Metadata::new())), file_bytes("{\"__metadata__\":{}}     ", &[]));
}

#[test]
fn written_order_is_by_dtype_then_name() {
    let names: Vec<String> =
        Dtype::ALL.iter().rev().flat_map(|d| [format!("{d}.b"), format!("{d}.a")]).collect();
    let specs: Vec<TensorSpec> = names
        .iter()
        .map(|name| {
            let code = name.split('.').next().expect("a code");
            TensorSpec { name, dtype: Dtype::from_code(code).expect("known"), shape: &[0] }
        })
        .collect();
    let layout = Layout::plan(&specs, None, 8).expect("fits");
    let order: Vec<&str> = layout.order().iter().map(|place| specs[place.index].name).collect();
    let expected: Vec<String> =
        "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 \
                                 F8_E5M2 I8 U8 F6_E3M2 F6_E2M3 F4 BOOL"
            .split(' ')
            .flat_map(|code| [format!("{code}.a"), format!("{code}.b")])
            .collect();
    assert_eq!(order, expected);
}

#[test]
fn alignment_of_the_data() {
    let spec = [TensorSpec { name: "a", dtype: Dtype::F32, shape: &[1] }];
    for alignment in [8, 16, 64, 4096, 1 << 20] {
        let bytes = saved(&spec, &[&[1, 2, 3, 4]], None, alignment).expect("saved");
        let start = with_file(&bytes, |file| file.header().data_start()).expect("valid");
        assert_eq!(start % alignment, 0);
        assert_eq!(start, 60u64.next_multiple_of(alignment), "no more padding than needed");
        assert_eq!(bytes.len() as u64, start + 4);
    }
    for alignment in [0, 1, 4, 12, 24, 1 << 21] {
        let error = Layout::plan(&spec, None, alignment).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{alignment}");
    }
}

#[test]
fn unwritable_files_are_refused() {
    let refused =
        |specs: &[TensorSpec<'_>], data: &[&[u8]]| saved(specs, data, None, 8).expect_err("refused").kind();
    let spec = |name, dtype, shape| TensorSpec { name, dtype, shape };
    assert_eq!(refused(&[spec("__metadata__", Dtype::U8, &[0])], &[&[]]), ErrorKind::ReservedName);
    assert_eq!(
        refused(&[spec("a", Dtype::U8, &[0]), spec("a", Dtype::F32, &[0])], &[&[], &[]]),
        ErrorKind::Duplicate
    );
    assert_eq!(refused(&[spec("a", Dtype::F32, &[u64::MAX])], &[&[]]), ErrorKind::ShapeOverflow);
    const HALF: u64 = 1 << 62;
    assert_eq!(
        refused(&[spec("a", Dtype::U8, &[HALF]), spec("b", Dtype::U8, &[HALF])], &[&[], &[]]),
        ErrorKind::ShapeOverflow
    );
    assert_eq!(refused(&[spec("a", Dtype::F4, &[3])], &[&[0, 0]]), ErrorKind::SizeMismatch);
    assert_eq!(refused(&[spec("a", Dtype::F32, &[1])], &[&[0; 3]]), ErrorKind::BufferSize);
    assert_eq!(refused(&[spec("a", Dtype::F32, &[1])], &[]), ErrorKind::BufferSize);
    let long = "n".repeat(MAX_HEADER_BYTES as usize);
    assert_eq!(refused(&[spec(&long, Dtype::U8, &[0])], &[&[]]), ErrorKind::HeaderTooLarge);

    let mut buffer = [0; 15];
    let error = safetensors_torch::save_into(&[], &[], None, &mut buffer, 8).expect_err("one byte short");
    assert_eq!((error.kind(), buffer), (ErrorKind::BufferSize, [0; 15]));
}

/// Returns the processor time of this thread, which does not depend on other programs.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes only to `time`.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Returns the shortest time of a few parses of a header of `count` tensors.
fn parse_time(count: usize) -> Duration {
    let entries: Vec<String> = (0..count)
        .map(|i| {
            format!(
                "\"model.layers.{i}.weight\":{{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[{},{}]}}",
                8 * i,
                8 * i + 8
            )
        })
        .collect();
    let json = format!("{{{}}}", entries.join(","));
    let length = (8 + json.len() + 8 * count) as u64;
    (0..5)
        .map(|_| {
            let start = thread_time();
            let header = Header::parse(json.as_bytes(), length).expect("valid");
            assert_eq!(header.len(), count);
            thread_time() - start
        })
        .min()
        .expect("five")
}

#[test]
fn time_is_about_linear_in_the_number_of_tensors() {
    let (few, many) = (parse_time(10_000), parse_time(100_000));
    // Ten times the tensors exceed the caches; a quadratic parser would take a hundred times as long.
    assert!(many < few * 60, "10,000 tensors: {few:?}; 100,000: {many:?}");
}
