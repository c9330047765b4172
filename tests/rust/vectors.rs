//! Checks that each malformed file of the shared test vectors is refused with the status of the list.

use std::fs;
use std::path::Path;

use safetensors_torch::{Backend, Error, TensorFile};

/// Returns the name of the error's kind in the C header.
fn status_name(error: &Error) -> String {
    let mut name = String::from("SFT_ERROR");
    for character in format!("{:?}", error.kind()).chars() {
        if character.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(character.to_ascii_uppercase());
    }
    name
}

#[test]
fn malformed_files_are_refused_with_the_listed_status() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    let list = fs::read_to_string(directory.join("malformed.tsv")).expect("the list");
    let mut count = 0;
    for line in list.lines() {
        let (name, status) = line.split_once('\t').expect("name and status");
        let path = directory.join("malformed").join(format!("{name}.safetensors"));
        for backend in [Backend::Mmap, Backend::Pread] {
            let error = TensorFile::open(&path, backend).expect_err(name);
            assert_eq!(status_name(&error), status, "{name}: {error}");
            assert!(error.to_string().starts_with(&format!("{}: ", path.display())), "{error}");
        }
        count += 1;
    }
    assert!(count >= 150, "{count}");
    assert_eq!(fs::read_dir(directory.join("malformed")).expect("the directory").count(), count);
}
