//! Headers: the reader accepts the same as the model, with the same contents, which can be written again.

use safetensors_torch::{Error, ErrorKind, Header, Layout, METADATA_KEY, TensorFile, TensorSpec};

use crate::{frame, json, model};

/// Runs the target. `bytes`: a file.
pub fn run(bytes: &[u8]) {
    // SAFETY: the bytes are borrowed, so they neither change nor move until the file is dropped here.
    let file = unsafe { TensorFile::from_memory(bytes.as_ptr(), bytes.len()) };
    let json = frame::header_of(bytes);
    let tree = json::read(json);
    // If the file is shorter than the length says, the bytes after the length are not a header.
    let is_complete = bytes.len() >= 8 && bytes[..8] == (json.len() as u64).to_le_bytes();
    let expected =
        model::contents(tree.as_ref().filter(|_| is_complete), json.len() as u64, bytes.len() as u64);
    check_outcome(file.as_ref().map(TensorFile::header), expected.as_ref());
    if let Ok(file) = &file {
        check_data(file, bytes);
    }

    let Some(length) = frame::file_length(json, frame::data_end(tree.as_ref())) else { return };
    let expected = model::contents(tree.as_ref(), json.len() as u64, length);
    check_outcome(Header::parse(json, length).as_ref(), expected.as_ref());
}

fn check_outcome(header: Result<&Header, &Error>, expected: Option<&model::Contents>) {
    match (header, expected) {
        (Ok(header), Some(expected)) => {
            assert_eq!(&contents(header), expected);
            check_names(header);
            check_written_again(header);
        }
        (Err(error), None) => check_error(error),
        (header, expected) => panic!("the reader says {header:?}, the model {expected:?}"),
    }
}

/// Returns the contents of the header in the types of the model.
pub fn contents(header: &Header) -> model::Contents {
    let tensors = header.iter().map(|tensor| model::Tensor {
        begin: tensor.begin,
        end: tensor.end,
        name: tensor.name.to_string(),
        code: tensor.dtype.code(),
        shape: tensor.shape.to_vec(),
    });
    model::Contents { tensors: tensors.collect(), metadata: header.metadata().cloned() }
}

fn check_names(header: &Header) {
    let sorted = header.sorted_by_name();
    let name = |&index: &u32| header.get(index as usize).expect("within the count").name;
    assert_eq!(sorted.len(), header.len());
    assert!(sorted.iter().map(name).is_sorted_by(|a, b| a < b));
    for (index, tensor) in header.iter().enumerate() {
        assert_eq!(header.find(tensor.name), Some(index));
        assert_ne!(tensor.name, METADATA_KEY);
    }
    assert!(header.get(header.len()).is_none());
}

/// Checks that a header with the same tensors can be written and read again.
fn check_written_again(header: &Header) {
    let specs: Vec<TensorSpec> =
        header.iter().map(|t| TensorSpec { name: t.name, dtype: t.dtype, shape: t.shape }).collect();
    let layout = Layout::plan(&specs, header.metadata(), 8).expect("what can be read can be written");
    let again =
        Header::parse(&layout.header()[8..], layout.total_bytes()).expect("what was written can be read");
    assert_eq!((again.len(), again.metadata()), (header.len(), header.metadata()));
    for tensor in header.iter() {
        let copy = again.get(again.find(tensor.name).expect("written")).expect("there");
        assert_eq!((copy.dtype, copy.shape, copy.nbytes()), (tensor.dtype, tensor.shape, tensor.nbytes()));
    }
}

/// Checks that an error is of a documented kind, and has a message.
fn check_error(error: &Error) {
    let kinds = ErrorKind::FileTooSmall as i32..=ErrorKind::DataLength as i32;
    assert!(kinds.contains(&error.code()) || error.kind() == ErrorKind::ReservedName, "{:?}", error.kind());
    assert!(!error.to_string().is_empty());
}

/// Checks that every tensor has the bytes at its data offsets.
fn check_data(file: &TensorFile, bytes: &[u8]) {
    for (index, tensor) in file.header().iter().enumerate() {
        let range = file.byte_range(&tensor);
        let mut data = vec![0; tensor.nbytes() as usize];
        let request = (index, data.as_mut_ptr(), data.len());
        // SAFETY: the buffer has that length, and nothing else refers to it.
        unsafe { file.read_tensors(&[request]) }.expect("the bytes are there");
        assert_eq!(data, bytes[range.start as usize..range.end as usize]);
    }
}
