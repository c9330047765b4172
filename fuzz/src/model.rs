//! A second implementation of the format: simple and slow, written from its specification, without error messages.

use std::collections::BTreeMap;

use safetensors_torch::Dtype;

use crate::json::{Node, has_repeated_key};

/// The largest value of a size.
const LIMIT: u128 = i64::MAX as u128;

/// The largest size of a header, in bytes.
const MAX_HEADER: u64 = 100_000_000;

/// The contents of a header.
#[derive(Debug, PartialEq)]
pub struct Contents {
    /// In file order.
    pub tensors: Vec<Tensor>,
    pub metadata: Option<BTreeMap<String, String>>,
}

/// A tensor. Comparing the fields in order sorts tensors into file order.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tensor {
    pub begin: u64,
    pub end: u64,
    pub name: String,
    pub code: &'static str,
    pub shape: Vec<u64>,
}

/// Parses the JSON of a header of `length` bytes in a file of `file_length`. Returns `None` if it is not valid.
pub fn contents(header: Option<&Node>, length: u64, file_length: u64) -> Option<Contents> {
    let entries = header?.object()?;
    if length > MAX_HEADER || has_repeated_key(entries.iter().map(|(name, _)| &name[..])) {
        return None;
    }
    let (mut tensors, mut metadata) = (Vec::new(), None);
    for (name, entry) in entries {
        match (&name[..], entry) {
            ("__metadata__", Node::Null) => {}
            ("__metadata__", entry) => metadata = Some(texts(entry)?),
            (_, entry) => tensors.push(tensor(name, entry)?),
        }
    }
    tensors.sort();
    let mut position = 0;
    for tensor in &tensors {
        if tensor.begin != position || bits(tensor)? != u128::from(tensor.end.checked_sub(tensor.begin)?) * 8
        {
            return None;
        }
        position = tensor.end;
    }
    (u128::from(position) + u128::from(length) + 8 == u128::from(file_length))
        .then_some(Contents { tensors, metadata })
}

/// Parses an object of strings without duplicate keys.
pub fn texts(node: &Node) -> Option<BTreeMap<String, String>> {
    let entries = node.object()?;
    if has_repeated_key(entries.iter().map(|(key, _)| &key[..])) {
        return None;
    }
    entries.iter().map(|(key, value)| Some((key.clone(), value.text()?.to_string()))).collect()
}

fn tensor(name: &str, entry: &Node) -> Option<Tensor> {
    let fields = entry.object()?;
    let field = |wanted: &str| {
        let mut found = fields.iter().filter(|(field, _)| field == wanted);
        found.next().filter(|_| found.next().is_none()).map(|(_, value)| value)
    };
    let code = field("dtype")?.text()?;
    let dtype = Dtype::ALL.iter().find(|dtype| dtype.code() == code)?;
    let [begin, end] = field("data_offsets")?.integers()?[..] else { return None };
    Some(Tensor {
        begin,
        end,
        name: name.to_string(),
        code: dtype.code(),
        shape: field("shape")?.integers()?,
    })
}

/// Returns the size of a tensor in bits, or `None` if it overflows.
fn bits(tensor: &Tensor) -> Option<u128> {
    let dtype = Dtype::ALL.iter().find(|dtype| dtype.code() == tensor.code)?;
    let mut elements = 1u128;
    for &dim in &tensor.shape {
        elements *= u128::from(dim);
        if elements > u128::from(u64::MAX) {
            return None;
        }
    }
    let bits = elements * u128::from(dtype.bits());
    (fits_torch(&tensor.shape) && bits <= LIMIT).then_some(bits)
}

/// Returns whether torch can represent this shape: dimensions and strides below 2^63, a dimension of 0 counted as 1.
pub fn fits_torch(shape: &[u64]) -> bool {
    let mut stride = 1u128;
    for &dim in shape.iter().skip(1).rev() {
        stride = stride.saturating_mul(u128::from(dim.max(1)));
    }
    stride <= LIMIT && shape.iter().all(|&dim| u128::from(dim) <= LIMIT)
}
