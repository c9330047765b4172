//! Checks that `include/safetensors_torch.h` agrees with its implementation in Rust: functions, prototypes, numbers,
//! struct layouts, version. The header is read as text, and compiled with `cc`.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors_torch::capi::*;
use safetensors_torch::{Dtype, ErrorKind};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the header without comments, preprocessor lines and the `extern "C"` around it.
fn declarations() -> String {
    let text = header_text();
    let mut code = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once("/*") {
        code.push_str(before);
        rest = after.split_once("*/").expect("a comment ends").1;
    }
    code.push_str(rest);
    let code: String =
        code.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect();
    let (before, inside) = code.split_once("extern \"C\" {").expect("C++ needs it");
    let inside = inside.trim_end().strip_suffix('}').expect("extern \"C\" ends");
    format!("{before}{inside}")
}

fn header_text() -> String {
    std::fs::read_to_string(root().join("include/safetensors_torch.h")).expect("the header is there")
}

/// Returns the code with one space between words and none around punctuation, so that formatting is not compared.
fn normalized(code: &str) -> String {
    let mut out = String::new();
    for c in code.chars() {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        if c.is_whitespace() {
            if !out.ends_with(' ') {
                out.push(' ');
            }
            continue;
        }
        if !word(c) {
            out.truncate(out.trim_end().len());
        } else if out.ends_with(' ') && !out.trim_end().ends_with(word) {
            out.pop();
        }
        out.push(c);
    }
    out.trim().to_string()
}

/// Returns the prototypes by function name: the statements of `declarations` outside braces.
fn prototypes_in_header() -> BTreeMap<String, String> {
    let mut depth = 0;
    let flat: String = declarations()
        .chars()
        .filter(|&c| {
            depth += i32::from(c == '{');
            let keep = depth == 0;
            depth -= i32::from(c == '}');
            keep
        })
        .collect();
    flat.split(';')
        .filter(|statement| statement.contains('(') && !statement.contains("typedef"))
        .map(|statement| {
            let name = statement.split('(').next().expect("split gives one").trim();
            let name = name.rsplit([' ', '*', '\n']).next().expect("split gives one");
            (name.to_string(), normalized(statement))
        })
        .collect()
}

fn capi_sources() -> String {
    let directory = root().join("src/capi");
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .expect("src/capi")
        .map(|entry| entry.expect("readable").path())
        .collect();
    files.sort();
    files.iter().map(|path| std::fs::read_to_string(path).expect("a source")).collect()
}

/// Returns the C spelling of a Rust type of the ABI.
fn c_type(rust: &str) -> String {
    let rust = rust.trim();
    if let Some(inner) = rust.strip_prefix("*mut ") {
        return format!("{}*", c_type(inner));
    }
    if let Some(inner) = rust.strip_prefix("*const ") {
        assert!(!inner.starts_with('*'), "a const pointer to a pointer is written otherwise in C: {rust}");
        return format!("const {}*", c_type(inner));
    }
    match rust {
        "c_char" => "char",
        "c_void" | "()" => "void",
        "usize" => "size_t",
        "u64" => "uint64_t",
        "u32" => "uint32_t",
        "i32" => "int32_t",
        named => {
            assert!(named.starts_with("sft_"), "no C type for {named}");
            named
        }
    }
    .to_string()
}

/// Returns the C prototypes that the exported Rust functions require, by name.
fn prototypes_in_rust() -> BTreeMap<String, String> {
    let sources = capi_sources();
    let mut prototypes = BTreeMap::new();
    for after in sources.split("#[unsafe(no_mangle)]").skip(1) {
        let (_, function) = after.split_once("extern \"C\" fn ").expect("only functions are exported");
        let (name, function) = function.split_once('(').expect("arguments");
        let (arguments, function) = function.split_once(')').expect("arguments end");
        let result = function.split_once('{').expect("a body").0.trim().strip_prefix("->").unwrap_or("()");
        let arguments: Vec<String> = arguments
            .split(',')
            .filter(|argument| !argument.trim().is_empty())
            .map(|argument| {
                let (name, rust) = argument.split_once(':').expect("name: type");
                format!("{} {}", c_type(rust), name.trim())
            })
            .collect();
        let arguments = if arguments.is_empty() { "void".to_string() } else { arguments.join(",") };
        let prototype = format!("{} {name}({arguments})", c_type(result));
        prototypes.insert(name.to_string(), normalized(&prototype));
    }
    prototypes
}

#[test]
fn prototypes_agree() {
    let (header, rust) = (prototypes_in_header(), prototypes_in_rust());
    assert!(rust.len() > 20, "the parser lost functions: {rust:?}");
    let names = |map: &BTreeMap<String, String>| map.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&header), names(&rust));
    for (name, prototype) in &header {
        assert_eq!(prototype, &rust[name]);
    }
}

#[test]
fn the_library_exports_what_is_declared() {
    let tests = std::env::current_exe().expect("this test is a file");
    let library = tests.parent().expect("in a directory").join("libsafetensors_torch.so");
    let output = Command::new("nm")
        .args(["--dynamic", "--defined-only", "--format=just-symbols"])
        .arg(&library)
        .output()
        .expect("nm comes with the C compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let symbols = String::from_utf8(output.stdout).expect("names are text");
    let exported: BTreeSet<String> =
        symbols.lines().filter(|name| name.starts_with("sft_")).map(String::from).collect();
    assert_eq!(exported, prototypes_in_header().into_keys().collect::<BTreeSet<_>>());
}

/// Doxygen does not report missing ones.
#[test]
fn constants_are_documented() {
    let text = header_text();
    let constants: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("    SFT_") && line.contains(" = "))
        .inspect(|line| assert!(line.contains("/**< "), "without documentation: {}", line.trim()))
        .collect();
    assert_eq!(constants.len(), STATUSES.len() + Dtype::ALL.len() + 2 + 3 + 2 + 3 + 3 + 3);
}

/// Compiles and runs a C program that prints lines `name value`, and returns the values.
fn run_c(body: &str) -> BTreeMap<String, i64> {
    let directory = tempfile::tempdir().expect("a directory");
    let source = directory.path().join("ask.c");
    let program = directory.path().join("ask");
    let text = format!(
        "#include <safetensors_torch.h>\n#include <stdio.h>\n\
         #define SAY(name, value) printf(\"%s %lld\\n\", name, (long long)(value))\n\
         int main(void) {{\n{body}\nreturn 0;\n}}\n"
    );
    std::fs::write(&source, text).expect("written");
    let compiled = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(root().join("include"))
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .output()
        .expect("cc is a C compiler");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let printed = Command::new(&program).output().expect("runs");
    assert!(printed.status.success());
    String::from_utf8(printed.stdout)
        .expect("text")
        .lines()
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').expect("name value");
            (name.to_string(), value.parse().expect("a number"))
        })
        .collect()
}

#[test]
fn numbers_agree() {
    let code = declarations();
    let constants: BTreeSet<&str> = code
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("SFT_"))
        .collect();
    let body: String = constants.iter().map(|name| format!("SAY(\"{name}\", {name});\n")).collect();

    let mut expected: BTreeMap<String, i64> = BTreeMap::new();
    expected.insert("SFT_BACKEND_MMAP".into(), SFT_BACKEND_MMAP.into());
    expected.insert("SFT_BACKEND_PREAD".into(), SFT_BACKEND_PREAD.into());
    expected.insert("SFT_PREFAULT_NONE".into(), SFT_PREFAULT_NONE.into());
    expected.insert("SFT_PREFAULT_BACKGROUND".into(), SFT_PREFAULT_BACKGROUND.into());
    expected.insert("SFT_PREFAULT_WAIT".into(), SFT_PREFAULT_WAIT.into());
    expected.insert("SFT_EXTRA_ERROR".into(), SFT_EXTRA_ERROR.into());
    expected.insert("SFT_EXTRA_IGNORE".into(), SFT_EXTRA_IGNORE.into());
    expected.insert("SFT_PREFETCH_PENDING".into(), SFT_PREFETCH_PENDING.into());
    expected.insert("SFT_PREFETCH_LANDED".into(), SFT_PREFETCH_LANDED.into());
    expected.insert("SFT_PREFETCH_END".into(), SFT_PREFETCH_END.into());
    expected.insert("SFT_DIRECT_AUTO".into(), SFT_DIRECT_AUTO.into());
    expected.insert("SFT_DIRECT_NEVER".into(), SFT_DIRECT_NEVER.into());
    expected.insert("SFT_DIRECT_ALWAYS".into(), SFT_DIRECT_ALWAYS.into());
    expected.insert("SFT_LOAD_TARGET_MAPPING".into(), SFT_LOAD_TARGET_MAPPING.into());
    expected.insert("SFT_LOAD_TARGET_MEMORY".into(), SFT_LOAD_TARGET_MEMORY.into());
    expected.insert("SFT_LOAD_TARGET_DEVICE".into(), SFT_LOAD_TARGET_DEVICE.into());
    expected.insert("SFT_HISTOGRAM_BINS".into(), SFT_HISTOGRAM_BINS as i64);
    for (number, name, _) in STATUSES {
        expected.insert(name.to_str().expect("ASCII").into(), i64::from(*number));
    }
    for &dtype in Dtype::ALL {
        expected.insert(format!("SFT_DTYPE_{}", dtype.code()), dtype as i64);
    }
    assert_eq!(run_c(&body), expected);
    assert_eq!(STATUSES.len(), 1 + ErrorKind::ALL.len());
}

/// Collects size, alignment and offsets of structs, by the names that the C program uses too. The pattern names every
/// field, so that a missing one is a compile error.
macro_rules! layouts {
    ($( $name:ident { $( $field:ident ),* } )*) => {{
        let mut map: BTreeMap<String, i64> = BTreeMap::new();
        let mut body = String::new();
        $(
            let _ = |value: $name| { let $name { $( $field: _ ),* } = value; };
            let name = stringify!($name);
            map.insert(format!("sizeof {name}"), size_of::<$name>() as i64);
            map.insert(format!("alignof {name}"), align_of::<$name>() as i64);
            body.push_str(&format!("SAY(\"sizeof {name}\", sizeof({name}));\n"));
            body.push_str(&format!("SAY(\"alignof {name}\", _Alignof({name}));\n"));
            $(
                let field = stringify!($field);
                map.insert(format!("{name}.{field}"), offset_of!($name, $field) as i64);
                body.push_str(&format!("SAY(\"{name}.{field}\", offsetof({name}, {field}));\n"));
                map.insert(format!("sizeof {name}.{field}"), size_of_field(|value: &$name| &value.$field));
                body.push_str(&format!("SAY(\"sizeof {name}.{field}\", sizeof((({name}*)0)->{field}));\n"));
            )*
        )*
        (map, body)
    }};
}

fn size_of_field<S, F>(_: fn(&S) -> &F) -> i64 {
    size_of::<F>() as i64
}

#[test]
fn layouts_agree() {
    let (expected, body) = layouts! {
        sft_str { data, length }
        sft_open_options { struct_size, backend, prefault }
        sft_checkpoint_options { struct_size, backend, prefault, variant, extra, reserved }
        sft_save_options { struct_size, alignment, durable, reserved }
        sft_sharded_options { struct_size, stem, max_shard_size, alignment, durable, reserved }
        sft_edit_options { struct_size, reserve, in_place, durable }
        sft_metadata_change { key, value }
        sft_tensor_info { struct_size, name, rank, shape, nbytes, begin, end, dtype, reserved }
        sft_load_plan { struct_size, filesystem, reason, cached_bytes, request_bytes, readers, direct }
        sft_source { struct_size, context, get_length, get_identity, read, free, get_max_requests }
        sft_filesystem { struct_size, context, open, list }
        sft_buffer { data, nbytes }
        sft_range { start, stop, step }
        sft_read_request { index, buffer, nbytes }
        sft_slice_request { index, ranges, rank, buffer, nbytes, strides }
        sft_prefetch_request { file, index, ranges, rank, buffer, nbytes }
        sft_statistics {
            struct_size, count, zeros, nans, infinities, minimum, maximum, mean, squared_deviations
        }
        sft_histogram { struct_size, first, width, bin_count, counts }
        sft_statistics_request { index, first, count, statistics, histogram }
    };
    assert_eq!(run_c(&body), expected);

    // Every struct and field of the header is listed above.
    let mut in_header = BTreeSet::new();
    for after in declarations().split("typedef struct ").skip(1) {
        let Some((name, after)) = after.split_once('{').filter(|(name, _)| !name.contains(';')) else {
            continue;
        };
        for field in after.split_once('}').expect("a struct ends").0.split(';') {
            let field = field.split('[').next().expect("split gives one");
            if let Some(field) = field.trim().rsplit([' ', '*']).next().filter(|field| !field.is_empty()) {
                in_header.insert(format!("{}.{field}", name.trim()));
            }
        }
    }
    let in_rust: BTreeSet<String> =
        expected.into_keys().filter(|name| name.contains('.') && !name.contains(' ')).collect();
    assert_eq!(in_header, in_rust);
}

#[test]
fn aliases_and_initializers_agree() {
    let said = run_c(
        "SAY(\"status\", sizeof(sft_status)); SAY(\"status signed\", (sft_status)-1 < 0);\n\
         SAY(\"dtype\", sizeof(sft_dtype)); SAY(\"dtype signed\", (sft_dtype)-1 < 1);\n\
         SAY(\"backend\", sizeof(sft_backend)); SAY(\"backend signed\", (sft_backend)-1 < 1);\n\
         SAY(\"prefault\", sizeof(sft_prefault)); SAY(\"prefault signed\", (sft_prefault)-1 < 1);\n\
         sft_open_options open = SFT_OPEN_OPTIONS_INIT; sft_save_options save = SFT_SAVE_OPTIONS_INIT;\n\
         sft_tensor_info info = SFT_TENSOR_INFO_INIT; sft_sharded_options sharded = SFT_SHARDED_OPTIONS_INIT;\n\
         sft_edit_options edit = SFT_EDIT_OPTIONS_INIT; SAY(\"edit\", edit.struct_size);\n\
         SAY(\"edit in place\", edit.in_place);\n\
         SAY(\"sharded\", sharded.struct_size); SAY(\"sharded alignment\", sharded.alignment);\n\
         SAY(\"open\", open.struct_size); SAY(\"save\", save.struct_size); SAY(\"info\", info.struct_size);\n\
         SAY(\"alignment\", save.alignment); SAY(\"mmap\", open.backend);\n\
         SAY(\"none\", open.prefault);\n\
         sft_statistics statistics = SFT_STATISTICS_INIT; SAY(\"statistics\", statistics.struct_size);\n\
         sft_histogram histogram = SFT_HISTOGRAM_INIT; SAY(\"histogram\", histogram.struct_size);\n\
         SAY(\"no values\", statistics.count + histogram.bin_count);\n\
         sft_checkpoint_options checkpoint = SFT_CHECKPOINT_OPTIONS_INIT;\n\
         SAY(\"checkpoint\", checkpoint.struct_size); SAY(\"no variant\", checkpoint.variant == NULL);\n\
         SAY(\"extra\", sizeof(sft_extra)); SAY(\"extra signed\", (sft_extra)-1 < 1);\n\
         SAY(\"state\", sizeof(sft_prefetch_state)); SAY(\"state signed\", (sft_prefetch_state)-1 < 1);",
    );
    let expected = [
        ("status", size_of::<sft_status>()),
        ("status signed", 1),
        ("dtype", size_of::<sft_dtype>()),
        ("dtype signed", 0),
        ("backend", size_of::<sft_backend>()),
        ("backend signed", 0),
        ("prefault", size_of::<sft_prefault>()),
        ("prefault signed", 0),
        ("open", size_of::<sft_open_options>()),
        ("checkpoint", size_of::<sft_checkpoint_options>()),
        ("no variant", 1),
        ("extra", size_of::<sft_extra>()),
        ("extra signed", 0),
        ("state", size_of::<sft_prefetch_state>()),
        ("state signed", 0),
        ("save", size_of::<sft_save_options>()),
        ("info", size_of::<sft_tensor_info>()),
        ("edit", size_of::<sft_edit_options>()),
        ("edit in place", 0),
        ("sharded", size_of::<sft_sharded_options>()),
        ("sharded alignment", safetensors_torch::DEFAULT_ALIGNMENT as usize),
        ("alignment", safetensors_torch::DEFAULT_ALIGNMENT as usize),
        ("mmap", SFT_BACKEND_MMAP as usize),
        ("none", SFT_PREFAULT_NONE as usize),
        ("statistics", size_of::<sft_statistics>()),
        ("histogram", size_of::<sft_histogram>()),
        ("no values", 0),
    ];
    for (name, value) in expected {
        assert_eq!(said[name], value as i64, "{name}");
    }
}

#[test]
fn versions_agree() {
    let defined = format!("#define SFT_VERSION_STRING \"{}\"", env!("CARGO_PKG_VERSION"));
    let number = env!("CARGO_PKG_VERSION")
        .split('.')
        .fold(0, |number, part| 100 * number + part.parse::<u32>().expect("a version has numbers"));
    for line in [defined, format!("#define SFT_VERSION_NUMBER {number}")] {
        assert!(header_text().lines().any(|other| other == line), "the header lacks: {line}");
    }
    // SAFETY: a constant that ends in NUL.
    let linked = unsafe { std::ffi::CStr::from_ptr(sft_get_version()) };
    assert_eq!(linked.to_str(), Ok(env!("CARGO_PKG_VERSION")));
}
