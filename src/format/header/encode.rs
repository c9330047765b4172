//! Encodes a header.

use super::table::{LENGTH_BYTES, MAX_HEADER_BYTES, METADATA_KEY, Metadata};
use super::tensor::TensorInfo;
use crate::error::{Error, ErrorKind, Result};

/// Encodes the bytes before the data: length, JSON, and spaces up to a multiple of `alignment`, a multiple of 8.
pub fn encode<'a>(
    entries: impl Iterator<Item = TensorInfo<'a>>,
    metadata: Option<&Metadata>,
    alignment: u64,
) -> Result<Vec<u8>> {
    let out = encode_unpadded(entries, metadata);
    let padded = (out.len() as u64).next_multiple_of(alignment);
    pad(out, padded)
}

/// As [`encode`], without padding and with a zero length.
pub fn encode_unpadded<'a>(
    entries: impl Iterator<Item = TensorInfo<'a>>,
    metadata: Option<&Metadata>,
) -> Vec<u8> {
    let mut out = vec![0; LENGTH_BYTES as usize];
    out.push(b'{');
    let mut first = true;
    if let Some(metadata) = metadata {
        first = false;
        write_json(&mut out, METADATA_KEY);
        out.push(b':');
        write_json(&mut out, metadata);
    }
    for entry in entries {
        if !std::mem::replace(&mut first, false) {
            out.push(b',');
        }
        write_json(&mut out, entry.name);
        out.extend_from_slice(b":{\"dtype\":\"");
        out.extend_from_slice(entry.dtype.code().as_bytes());
        out.extend_from_slice(b"\",\"shape\":");
        write_json(&mut out, entry.shape);
        out.extend_from_slice(b",\"data_offsets\":");
        write_json(&mut out, &[entry.begin, entry.end]);
        out.push(b'}');
    }
    out.push(b'}');
    out
}

/// Pads the result of [`encode_unpadded`] to `padded` bytes with spaces, and sets the length.
pub fn pad(mut out: Vec<u8>, padded: u64) -> Result<Vec<u8>> {
    let length = padded - LENGTH_BYTES;
    if length > MAX_HEADER_BYTES {
        let detail = format!(
            "the header would take {length} bytes, more than the {MAX_HEADER_BYTES} allowed: use shorter names, less \
             metadata, or several files"
        );
        return Err(Error::new(ErrorKind::HeaderTooLarge, detail));
    }
    out.resize(padded as usize, b' ');
    out[..LENGTH_BYTES as usize].copy_from_slice(&length.to_le_bytes());
    Ok(out)
}

fn write_json<T: serde::Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    // Strings, string maps and integers always serialize, and writing to a Vec does not fail.
    serde_json::to_writer(out, value).expect("strings and integers serialize into a Vec");
}
