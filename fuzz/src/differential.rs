//! Compares the reader with the reference, the crate `safetensors`: both accept the same headers, with the same
//! contents, except for the differences that docs/differences.md lists.

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use safetensors::tensor::Metadata;
use safetensors_torch::{Error, ErrorKind, Header, METADATA_KEY, TensorFile};

use crate::json::{self, Node, has_repeated_key};
use crate::{frame, model};

/// Runs the target. `bytes`: a file.
pub fn run(bytes: &[u8]) {
    let json = frame::header_of(bytes);
    let tree = json::read(json);
    // SAFETY: the bytes are borrowed, so they neither change nor move until the file is dropped here.
    let file = unsafe { TensorFile::from_memory(bytes.as_ptr(), bytes.len()) };
    let theirs = SafeTensors::read_metadata(bytes).map(|(_, metadata)| metadata).ok();
    compare(file.as_ref().map(TensorFile::header), theirs.as_ref(), tree.as_ref());

    let end = frame::data_end(tree.as_ref());
    let Some(length) = frame::file_length(json, end) else { return };
    let ours = Header::parse(json, length);
    let theirs = std::str::from_utf8(json).ok().and_then(|text| serde_json::from_str::<Metadata>(text).ok());
    let theirs = theirs.filter(|metadata| metadata.data_len() as u64 == end);
    compare(ours.as_ref(), theirs.as_ref(), tree.as_ref());
}

fn compare(ours: Result<&Header, &Error>, theirs: Option<&Metadata>, tree: Option<&Node>) {
    let differences = tree.map_or(Vec::new(), differences);
    match (ours, theirs) {
        (Ok(ours), Some(theirs)) => {
            assert!(differences.is_empty(), "both accept what should be refused here: {differences:?}");
            compare_contents(ours, theirs);
        }
        (Err(error), Some(_)) => assert!(
            differences.iter().any(|(kind, _)| *kind == error.kind()),
            "the reference accepts what is refused here, for none of {differences:?}: {error}"
        ),
        (Ok(ours), None) => panic!("the reference refuses what is accepted here: {ours:?}"),
        (Err(_), None) => {}
    }
}

fn compare_contents(ours: &Header, theirs: &Metadata) {
    let metadata = |entries: &std::collections::HashMap<String, String>| {
        entries.iter().map(|(key, value)| (key.clone(), value.clone())).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(ours.metadata().cloned(), theirs.metadata().as_ref().map(metadata));
    assert_eq!(ours.len(), theirs.tensors().len());
    for tensor in ours.iter() {
        let other = theirs.info(tensor.name).expect("the reference has each tensor");
        let shape: Vec<u64> = other.shape.iter().map(|&dim| dim as u64).collect();
        assert_eq!((tensor.dtype.code(), tensor.shape), (&other.dtype.to_string()[..], &shape[..]));
        assert_eq!((tensor.begin, tensor.end), (other.data_offsets.0 as u64, other.data_offsets.1 as u64));
    }
}

/// Returns the kinds of error of everything in a header that the reference may accept and we refuse.
fn differences(header: &Node) -> Vec<(ErrorKind, &'static str)> {
    let entries = header.object().unwrap_or_default();
    let names = || entries.iter().filter(|(name, _)| name != METADATA_KEY).map(|(name, _)| &name[..]);
    let mut found = Vec::new();
    if has_repeated_key(names()) {
        found.push((ErrorKind::Duplicate, "a duplicate name"));
    }
    for (name, entry) in entries {
        if name == METADATA_KEY {
            if has_repeated_key(entry.object().unwrap_or_default().iter().map(|(key, _)| &key[..])) {
                found.push((ErrorKind::Duplicate, "a duplicate metadata key"));
            }
            continue;
        }
        let fields = match entry {
            Node::Object(fields) => fields,
            Node::List(_) => {
                found.push((ErrorKind::HeaderJson, "a tensor given as an array"));
                continue;
            }
            _ => continue,
        };
        let field = |wanted: &str| fields.iter().find(|(field, _)| field == wanted).map(|(_, value)| value);
        if let Some([(_, Node::Null)]) = field("dtype").and_then(Node::object) {
            found.push((ErrorKind::HeaderJson, "a dtype given as an object, with null as its value"));
        }
        let shape = field("shape").and_then(Node::integers).unwrap_or_default();
        if shape.contains(&0) && !model::fits_torch(&shape) {
            found.push((ErrorKind::ShapeOverflow, "a tensor without elements whose shape overflows"));
        }
    }
    found
}
