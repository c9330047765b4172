//! Written files: both this library and the reference read back the input, and the reference writes the same bytes. A
//! refusal has a valid reason.

use std::collections::HashMap;
use std::fs;

use arbitrary::Unstructured;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use safetensors_torch::{Layout, SaveOptions, TensorFile, TensorSpec, save_file, save_into};

use crate::directory::HAS_FILES;
use crate::tensors::{Input, Tensor, faults, input};

/// The largest tensor whose data is written; larger ones are only planned.
const MAX_BYTES: u128 = 1 << 16;

/// Runs the target on tensors derived from `bytes`.
pub fn run(bytes: &[u8]) {
    if let Ok(input) = input(&mut Unstructured::new(bytes)) {
        check(&input);
    }
}

fn check(input: &Input) {
    let Input { tensors, metadata, alignment, to_file } = input;
    let specs: Vec<TensorSpec> = tensors.iter().map(Tensor::spec).collect();
    let faults = faults(input);
    let layout = match Layout::plan(&specs, metadata.as_ref(), *alignment) {
        Ok(layout) => layout,
        Err(error) => {
            return assert!(faults.contains(&error.kind()), "{input:?}: {error}, not one of {faults:?}");
        }
    };
    assert!(faults.is_empty(), "{input:?} was accepted in spite of {faults:?}");
    assert_eq!(layout.header().len() as u64 % alignment, 0);
    if tensors.iter().any(|tensor| tensor.bits().is_none_or(|bits| bits / 8 > MAX_BYTES)) {
        return;
    }
    let data: Vec<Vec<u8>> = tensors.iter().map(Tensor::data).collect();
    let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    let mut bytes = vec![0xAA; layout.total_bytes() as usize];
    save_into(&specs, &slices, metadata.as_ref(), &mut bytes, *alignment).expect("planned");
    check_read(input, &data, &bytes);
    check_reference(input, &data, &bytes);
    if *to_file && HAS_FILES {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("f");
        let options = SaveOptions { alignment: *alignment, durable: false };
        save_file(&specs, &slices, metadata.as_ref(), &path, options).expect("written");
        assert!(fs::read(&path).expect("a file") == bytes, "{input:?}: file and memory differ");
        assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 1);
    }
}

fn check_read(input: &Input, data: &[Vec<u8>], bytes: &[u8]) {
    // SAFETY: the bytes outlive the file, and are not written to.
    let file = unsafe { TensorFile::from_memory(bytes.as_ptr(), bytes.len()) }.expect("valid");
    assert_eq!(file.header().metadata(), input.metadata.as_ref());
    assert_eq!(file.header().len(), data.len());
    for (tensor, data) in input.tensors.iter().zip(data) {
        let read = file.tensor(file.require(&tensor.name).expect("there")).expect("there");
        assert_eq!((read.dtype, read.shape), (tensor.dtype, &tensor.shape[..]));
        let range = file.byte_range(&read);
        assert!(bytes[range.start as usize..range.end as usize] == data[..], "{input:?}");
    }
}

fn check_reference(input: &Input, data: &[Vec<u8>], bytes: &[u8]) {
    let read = SafeTensors::deserialize(bytes).expect("valid for the reference");
    assert_eq!(read.len(), data.len());
    let mut views = Vec::new();
    for (tensor, data) in input.tensors.iter().zip(data) {
        let view = read.tensor(&tensor.name).expect("there for the reference");
        let shape: Vec<usize> = tensor.shape.iter().map(|&dim| dim as usize).collect();
        assert_eq!(view.dtype().to_string(), tensor.dtype.code());
        assert_eq!(view.shape(), shape);
        assert!(view.data() == data);
        views.push((&tensor.name[..], TensorView::new(view.dtype(), shape, data).expect("a view")));
    }
    let metadata: Option<HashMap<String, String>> = input.metadata.clone().map(HashMap::from_iter);
    // The reference writes several keys in any order, and invalid JSON for empty metadata without tensors.
    let same = match &metadata {
        None => true,
        Some(metadata) => metadata.len() == 1 || (metadata.is_empty() && !views.is_empty()),
    };
    if same && input.alignment == 8 {
        assert!(safetensors::serialize(views, metadata).expect("valid") == bytes, "{input:?}: other bytes");
    }
}
