//! Reads a header from the bytes of a file.

use super::table::{Header, LENGTH_BYTES, MAX_HEADER_BYTES};
use super::{foreign, parse, validate};
use crate::error::{Error, ErrorKind, Result};

impl Header {
    /// Reads the length that the first 8 bytes give, and checks it against the whole file's length in bytes.
    ///
    /// `start` is the beginning of the file: at least 8 bytes, or the whole file if it is shorter. The more of it
    /// there is (up to 512 bytes), the better an error can say what else the file may be.
    pub fn length(start: &[u8], file_length: u64) -> Result<u64> {
        let Some((length, rest)) = start.split_first_chunk::<8>() else {
            return Err(foreign::detect_foreign(start).unwrap_or_else(|| {
                Error::new(
                    ErrorKind::FileTooSmall,
                    format!(
                        "a safetensors file begins with 8 bytes of header length, but this has {file_length} byte(s) \
                         in all; it was probably cut short: fetch or save it again"
                    ),
                )
            }));
        };
        let length = u64::from_le_bytes(*length);
        // Behind a length that means anything comes JSON; a short header of ours may begin like another format.
        let json_follows = rest.first().is_some_and(|byte| b" \t\r\n{".contains(byte));
        if !(length <= MAX_HEADER_BYTES && json_follows)
            && let Some(error) = foreign::detect_foreign(start)
        {
            return Err(error);
        }
        check_length(length, file_length)?;
        Ok(length)
    }

    /// Parses and validates the JSON of a header, given the whole file's length in bytes.
    pub fn parse(json: &[u8], file_length: u64) -> Result<Header> {
        check_length(json.len() as u64, file_length)?;
        let mut header = parse::parse(json)?;
        header.data_start = LENGTH_BYTES + json.len() as u64;
        validate::validate(&mut header, file_length)?;
        Ok(header)
    }
}

/// Checks that a header of `length` bytes is allowed, and that a file of `file_length` bytes has room for it.
fn check_length(length: u64, file_length: u64) -> Result<()> {
    let available = file_length.saturating_sub(LENGTH_BYTES);
    if length > MAX_HEADER_BYTES {
        return Err(Error::new(
            ErrorKind::HeaderTooLarge,
            format!(
                "the first 8 bytes give a header length of {length} bytes, more than the {MAX_HEADER_BYTES} \
                 allowed: this is no safetensors file, or a damaged one"
            ),
        ));
    }
    if length > available {
        return Err(Error::new(
            ErrorKind::HeaderTruncated,
            format!(
                "the header should have {length} bytes, but only {available} follow its length: the file was cut short, \
                 or is no safetensors file"
            ),
        ));
    }
    Ok(())
}
