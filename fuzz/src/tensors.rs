//! Tensors and metadata to write, derived from a fuzzer's bytes, and every reason to refuse them.

use arbitrary::{Result, Unstructured};
use safetensors_torch::{Dtype, ErrorKind, METADATA_KEY, Metadata, TensorSpec};

use crate::model::fits_torch;

#[derive(Debug)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    seed: u8,
}

#[derive(Debug)]
pub struct Input {
    pub tensors: Vec<Tensor>,
    pub metadata: Option<Metadata>,
    pub alignment: u64,
    /// Returns true once in 32 times, for slow cases.
    pub to_file: bool,
}

/// Up to eight tensors, optional metadata, and an alignment. Each may be invalid.
pub fn input(u: &mut Unstructured<'_>) -> Result<Input> {
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

/// Any text, often one that JSON must escape or that resembles others.
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
    pub fn spec(&self) -> TensorSpec<'_> {
        TensorSpec { name: &self.name, dtype: self.dtype, shape: &self.shape }
    }

    /// Returns the size in bits, or `None` if it overflows.
    pub fn bits(&self) -> Option<u128> {
        let mut elements = 1u128;
        for &dim in &self.shape {
            elements = Some(elements * u128::from(dim)).filter(|&n| n <= u128::from(u64::MAX))?;
        }
        Some(elements * u128::from(self.dtype.bits())).filter(|&bits| bits <= i64::MAX as u128)
    }

    /// Returns the bytes of the tensor, whose bits must fill whole bytes.
    pub fn data(&self) -> Vec<u8> {
        let bytes = self.bits().expect("checked") / 8;
        (0..bytes as usize).map(|index| (index as u8).wrapping_mul(37).wrapping_add(self.seed)).collect()
    }
}

/// Returns every reason to refuse the tensors.
pub fn faults(input: &Input) -> Vec<ErrorKind> {
    let mut faults = Vec::new();
    if !input.alignment.is_power_of_two() || input.alignment < 8 || input.alignment > 1 << 20 {
        faults.push(ErrorKind::InvalidArgument);
    }
    let mut total = 0;
    for (index, tensor) in input.tensors.iter().enumerate() {
        if tensor.name == METADATA_KEY {
            faults.push(ErrorKind::ReservedName);
        }
        if input.tensors[..index].iter().any(|other| other.name == tensor.name) {
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
