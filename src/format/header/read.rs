//! Reads a header from the bytes of a file.

use super::table::{Header, LENGTH_BYTES, MAX_HEADER_BYTES};
use super::{foreign, malformed, parse, validate};
use crate::error::{Error, ErrorKind, Result};

impl Header {
    /// Reads the header length from the first 8 bytes, and checks it against the length of the file.
    ///
    /// `start` contains the first bytes of the file: at least 8, or the whole file if it is shorter. With up to 512 bytes
    /// an error can name the actual format of the file.
    pub fn length(start: &[u8], file_length: u64) -> Result<u64> {
        let Some((length, rest)) = start.split_first_chunk::<8>() else {
            return Err(foreign::detect_foreign(start).unwrap_or_else(|| {
                let detail = format!(
                    "a safetensors file begins with 8 bytes of header length, but this has {file_length} byte(s) in all; \
                     it was probably cut short: fetch or save it again"
                );
                Error::new(ErrorKind::FileTooSmall, detail)
            }));
        };
        let length = u64::from_le_bytes(*length);
        // JSON follows a real length; the length of a short header may look like the signature of another format.
        let json_follows = rest.first().is_some_and(|byte| b" \t\r\n{".contains(byte));
        if !(length <= MAX_HEADER_BYTES && json_follows)
            && let Some(error) = foreign::detect_foreign(start)
        {
            return Err(error);
        }
        check_length(length, file_length)?;
        Ok(length)
    }

    /// Parses and validates the JSON of a header of a file of `file_length` bytes.
    pub fn parse(json: &[u8], file_length: u64) -> Result<Header> {
        check_length(json.len() as u64, file_length)?;
        let mut header = parse::parse(json)?;
        header.data_start = LENGTH_BYTES + json.len() as u64;
        validate::validate(&mut header, file_length)?;
        Ok(header)
    }
}

/// Checks that a header of `length` bytes is allowed and fits into a file of `file_length` bytes.
fn check_length(length: u64, file_length: u64) -> Result<()> {
    let available = file_length.saturating_sub(LENGTH_BYTES);
    if length > MAX_HEADER_BYTES {
        let detail = format!(
            "the first 8 bytes say that the header has {length} bytes, more than the {MAX_HEADER_BYTES} \
                 allowed: the file is damaged, or not a safetensors file"
        );
        return Err(malformed(ErrorKind::HeaderTooLarge, detail));
    }
    if length > available {
        let detail = format!(
            "the header should have {length} bytes, but only {available} follow its length: the file was cut short, \
                 or is not a safetensors file"
        );
        return Err(malformed(ErrorKind::HeaderTruncated, detail));
    }
    Ok(())
}
