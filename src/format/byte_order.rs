//! Refuses multi-byte elements on big-endian machines: files are little-endian, and nothing here swaps bytes.

use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;

/// Checks that this machine can read and write the elements of `tensors`. The error names the first that it cannot.
pub fn check<'a>(tensors: impl IntoIterator<Item = (&'a str, Dtype)>) -> Result<()> {
    if !is_big_endian() {
        return Ok(());
    }
    let mut tensors = tensors.into_iter();
    let Some((name, dtype)) = tensors.find(|(_, dtype)| dtype.bits() > 8) else {
        return Ok(());
    };
    let detail = format!(
        "tensor {name:?}: elements of {dtype} are little-endian in the file, and this machine is big-endian; use a \
         little-endian machine, or the PyPI package safetensors, which swaps bytes"
    );
    Err(Error::new(ErrorKind::UnsupportedDtype, detail))
}

#[cfg(not(test))]
fn is_big_endian() -> bool {
    cfg!(target_endian = "big")
}

#[cfg(test)]
use tests::is_big_endian;

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::format::layout::{DEFAULT_ALIGNMENT, Layout, TensorSpec};
    use crate::read::file::TensorFile;

    thread_local! {
        static IS_BIG_ENDIAN: Cell<bool> = const { Cell::new(false) };
    }

    pub(super) fn is_big_endian() -> bool {
        cfg!(target_endian = "big") || IS_BIG_ENDIAN.get()
    }

    /// Returns a file with one tensor that contains the element 1.
    fn file_of(code: &str, bytes: usize) -> Vec<u8> {
        let mut json =
            format!(r#"{{"x":{{"dtype":"{code}","shape":[1],"data_offsets":[0,{bytes}]}}}}"#).into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.append(&mut json);
        file.push(1);
        file.resize(file.len() + bytes - 1, 0);
        file
    }

    fn open(file: &[u8]) -> Result<usize> {
        // SAFETY: the borrow of `file` outlives the `TensorFile` and excludes writes.
        unsafe { TensorFile::from_memory(file.as_ptr(), file.len()) }.map(|file| file.header().len())
    }

    fn plan(dtype: Dtype) -> Result<u64> {
        let spec = TensorSpec { name: "x", dtype, shape: &[2] };
        Layout::plan(&[spec], None, DEFAULT_ALIGNMENT).map(|layout| layout.total_bytes())
    }

    #[test]
    fn a_big_endian_machine_reads_and_writes_only_single_bytes() {
        IS_BIG_ENDIAN.set(true);
        for &dtype in Dtype::ALL.iter().filter(|dtype| dtype.bits() >= 8) {
            let results = [open(&file_of(dtype.code(), dtype.bits() as usize / 8)).err(), plan(dtype).err()];
            for error in results {
                let error = error.map(|error| (error.kind(), error.to_string()));
                assert_eq!(error.is_some(), dtype.bits() > 8, "{dtype}: {error:?}");
                if let Some((kind, text)) = error {
                    assert_eq!(kind, ErrorKind::UnsupportedDtype);
                    assert!(text.starts_with(&format!("tensor \"x\": elements of {dtype} ")), "{text}");
                }
            }
        }
        IS_BIG_ENDIAN.set(false);
    }
}
