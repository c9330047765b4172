//! Files that are written: what cannot be is refused for a reason that there is; what can be is read back as it was, here
//! and by the reference, and has the bytes that the reference writes.

use std::collections::HashMap;
use std::fs;

use arbitrary::{Result, Unstructured};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use safetensors_torch::{
    Dtype, ErrorKind, Layout, METADATA_KEY, Metadata, SaveOptions, TensorFile, TensorSpec, save_file,
    save_into,
};

use crate::model::fits_torch;

/// The most bytes of a tensor whose bytes are written, not just its header.
const MAX_BYTES: u128 = 1 << 16;

#[derive(Debug)]
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    seed: u8,
}

#[derive(Debug)]
struct Input {
    tensors: Vec<Tensor>,
    metadata: Option<Metadata>,
    alignment: u64,
    /// Through a file too, which takes longer.
    to_file: bool,
}

/// `bytes` are anything: tensors are made from them.
pub fn run(bytes: &[u8]) {
    if let Ok(input) = input(&mut Unstructured::new(bytes)) {
        check(&input);
    }
}

fn input(u: &mut Unstructured<'_>) -> Result<Input> {
    let alignment = match u.int_in_range(0..=15)? {
        0 => u.arbitrary()?,
        1 => 1 << u.int_in_range(0..=22)?,
        _ => 8,
    };
    let to_file = u.ratio(1, 32)?;
    let metadata = match u.int_in_range(0..=3)? {
        0 | 1 => None,
        2 => Some(Metadata::from_iter([(text(u)?, text(u)?)])),
        _ => {
            let entries = (0..u.int_in_range(0..=4)?).map(|_| Ok((text(u)?, text(u)?)));
            Some(entries.collect::<Result<Metadata>>()?)
        }
    };
    let tensors = (0..u.int_in_range(0..=8)?).map(|_| tensor(u)).collect::<Result<Vec<_>>>()?;
    Ok(Input { tensors, metadata, alignment, to_file })
}

/// Any text, often one that JSON must escape, or that is close to others.
fn text(u: &mut Unstructured<'_>) -> Result<String> {
    match u.int_in_range(0..=7)? {
        0 => Ok(METADATA_KEY.to_string()),
        1..=3 => (0..u.int_in_range(0..=3)?).map(|_| Ok(char::from(u.int_in_range(b'a'..=b'c')?))).collect(),
        _ => (0..u.int_in_range(0..=6)?).map(|_| u.arbitrary::<char>()).collect(),
    }
}

fn tensor(u: &mut Unstructured<'_>) -> Result<Tensor> {
    let dtype = *u.choose(Dtype::ALL)?;
    let dim = |u: &mut Unstructured<'_>| match u.int_in_range(0..=63)? {
        63 => Ok(u.arbitrary::<u64>()? >> u.int_in_range(0..=63)?),
        small => Ok(small % 9),
    };
    let shape = (0..u.int_in_range(0..=4)?).map(|_| dim(u)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor { name: text(u)?, dtype, shape, seed: u.arbitrary()? })
}

impl Tensor {
    fn spec(&self) -> TensorSpec<'_> {
        TensorSpec { name: &self.name, dtype: self.dtype, shape: &self.shape }
    }

    /// Its bits; `None` for more than there are numbers.
    fn bits(&self) -> Option<u128> {
        let mut elements = 1u128;
        for &dim in &self.shape {
            elements = Some(elements * u128::from(dim)).filter(|&n| n <= u128::from(u64::MAX))?;
        }
        Some(elements * u128::from(self.dtype.bits())).filter(|&bits| bits <= i64::MAX as u128)
    }

    fn data(&self) -> Vec<u8> {
        let bytes = self.bits().expect("checked") / 8;
        (0..bytes as usize).map(|place| (place as u8).wrapping_mul(37).wrapping_add(self.seed)).collect()
    }
}

/// Every reason for which the tensors cannot be written.
fn faults(input: &Input) -> Vec<ErrorKind> {
    let mut faults = Vec::new();
    if !input.alignment.is_power_of_two() || input.alignment < 8 || input.alignment > 1 << 20 {
        faults.push(ErrorKind::InvalidArgument);
    }
    let mut total = 0;
    for (place, tensor) in input.tensors.iter().enumerate() {
        if tensor.name == METADATA_KEY {
            faults.push(ErrorKind::ReservedName);
        }
        if input.tensors[..place].iter().any(|other| other.name == tensor.name) {
            faults.push(ErrorKind::Duplicate);
        }
        match tensor.bits().filter(|_| fits_torch(&tensor.shape)) {
            None => faults.push(ErrorKind::ShapeOverflow),
            Some(bits) if bits % 8 != 0 => faults.push(ErrorKind::SizeMismatch),
            Some(bits) => total += bits / 8,
        }
    }
    if total > i64::MAX as u128 {
        faults.push(ErrorKind::ShapeOverflow);
    }
    faults
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
    if *to_file {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("f");
        let options = SaveOptions { alignment: *alignment, sync: false };
        save_file(&specs, &slices, metadata.as_ref(), &path, options).expect("written");
        assert!(fs::read(&path).expect("a file") == bytes, "{input:?}: file and memory differ");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
    }
}

fn check_read(input: &Input, data: &[Vec<u8>], bytes: &[u8]) {
    // SAFETY: the bytes outlive the file, and nobody writes to them.
    let file = unsafe { TensorFile::from_memory(bytes.as_ptr(), bytes.len()) }.expect("valid");
    assert_eq!(file.header().metadata(), input.metadata.as_ref());
    assert_eq!(file.header().len(), data.len());
    for (tensor, data) in input.tensors.iter().zip(data) {
        let read = file.tensor(file.require(&tensor.name).expect("there")).expect("there");
        assert_eq!((read.dtype, read.shape), (tensor.dtype, &tensor.shape[..]));
        let place = file.byte_range(&read);
        assert!(bytes[place.start as usize..place.end as usize] == data[..], "{input:?}");
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
    // The reference has several keys in any order, and no valid JSON for metadata that is empty like the file.
    let same = match &metadata {
        None => true,
        Some(metadata) => metadata.len() == 1 || (metadata.is_empty() && !views.is_empty()),
    };
    if same && input.alignment == 8 {
        assert!(safetensors::serialize(views, metadata).expect("valid") == bytes, "{input:?}: other bytes");
    }
}
