//! Helpers of several test programs: handmade files, and the bytes of tensors.

// Each test program uses some of them.
#![allow(dead_code)]

pub mod checkpoints;

use std::fs;
use std::path::Path;

use safetensors_torch::{
    AxisRange, Backend, Dtype, Error, ErrorKind, Layout, Metadata, SaveOptions, TensorFile, TensorSpec,
    save_file, save_into,
};
use tempfile::TempDir;

/// Returns the bytes of a file with this header, verbatim, and this data.
pub fn file_bytes(json: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let json = json.as_ref();
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json);
    bytes.extend_from_slice(data);
    bytes
}

/// Opens a file in memory, and returns the result of `inspect`.
pub fn with_file<T>(bytes: &[u8], inspect: impl FnOnce(&TensorFile) -> T) -> Result<T, Error> {
    // SAFETY: the bytes outlive the file, which is dropped here, and are not written to.
    let file = unsafe { TensorFile::from_memory(bytes.as_ptr(), bytes.len()) }?;
    Ok(inspect(&file))
}

/// Returns the kind of error of opening a file in memory, or `None` if it is valid.
pub fn kind_of(bytes: &[u8]) -> Option<ErrorKind> {
    with_file(bytes, |_| ()).err().map(|error| error.kind())
}

/// The tensors of a file, in file order, and its metadata.
#[derive(Debug, PartialEq)]
pub struct Contents {
    pub tensors: Vec<(String, safetensors_torch::Dtype, Vec<u64>, Vec<u8>)>,
    pub metadata: Option<Metadata>,
}

/// Reads a whole file.
pub fn contents(file: &TensorFile) -> Contents {
    let tensors = (0..file.header().len())
        .map(|index| {
            let tensor = file.tensor(index).expect("within the count");
            (tensor.name.to_string(), tensor.dtype, tensor.shape.to_vec(), read(file, index))
        })
        .collect();
    Contents { tensors, metadata: file.header().metadata().cloned() }
}

/// Reads one tensor.
pub fn read(file: &TensorFile, index: usize) -> Vec<u8> {
    let mut bytes = vec![0xAA; file.tensor(index).expect("there").nbytes() as usize];
    let request = (index, bytes.as_mut_ptr(), bytes.len());
    // SAFETY: the buffer has that length, and nothing else refers to it.
    unsafe { file.read_tensors(&[request]) }.expect("read");
    bytes
}

/// Reads one slice.
pub fn read_slice(file: &TensorFile, index: usize, ranges: &[AxisRange]) -> Result<Vec<u8>, Error> {
    let slice = file.slice(index, ranges)?;
    let mut bytes = vec![0xAA; slice.nbytes() as usize];
    // SAFETY: the buffer has that length, and nothing else refers to it.
    unsafe { file.read_slice(index, &slice, bytes.as_mut_ptr(), bytes.len()) }?;
    Ok(bytes)
}

/// Returns the elements of a slice, picked one by one: the result that `read_slice` must have.
pub fn naive_slice(data: &[u8], item: usize, shape: &[u64], ranges: &[AxisRange]) -> Vec<u8> {
    let mut offsets = vec![0usize];
    for (range, &dim) in ranges.iter().zip(shape) {
        let steps: Vec<usize> =
            (range.start..range.stop).step_by(range.step as usize).map(|i| i as usize).collect();
        offsets = offsets
            .iter()
            .flat_map(|&offset| steps.iter().map(move |&step| offset * dim as usize + step))
            .collect();
    }
    offsets.iter().flat_map(|&offset| data[offset * item..(offset + 1) * item].iter().copied()).collect()
}

/// Returns the bytes of a file with these tensors.
pub fn saved(
    tensors: &[TensorSpec<'_>],
    data: &[&[u8]],
    metadata: Option<&Metadata>,
    alignment: u64,
) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0xAA; Layout::plan(tensors, metadata, alignment)?.total_bytes() as usize];
    save_into(tensors, data, metadata, &mut bytes, alignment)?;
    Ok(bytes)
}

/// Returns bytes that mostly differ from their neighbours, so that a shift by one is detected.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect()
}

/// Checks that an error is of this kind, and that its message contains the path and `part`.
pub fn assert_error<T: std::fmt::Debug>(outcome: Result<T, Error>, kind: ErrorKind, path: &Path, part: &str) {
    let error = outcome.expect_err(part);
    assert_eq!(error.kind(), kind, "{error}");
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()) && text.contains(part), "{text}");
}

/// Returns the names in a directory, sorted.
pub fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

/// Creates a directory for the test.
pub fn directory() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

/// Saves a tensor `a` of these bytes.
pub fn save(path: &Path, data: &[u8]) -> Result<(), Error> {
    let shape = [data.len() as u64];
    let spec = TensorSpec { name: "a", dtype: Dtype::U8, shape: &shape };
    save_file(&[spec], &[data], None, path, SaveOptions::default())
}

/// Loads the first tensor.
pub fn load(path: &Path) -> Vec<u8> {
    read(&TensorFile::open(path, Backend::Pread).expect("valid"), 0)
}
