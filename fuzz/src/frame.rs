//! Splits files into parts, and builds valid files around a header.
//!
//! A fuzzer that mutates a header rarely adapts the length before it and the data after it. The targets therefore run
//! on its bytes twice: as they are, and with both corrected.

use crate::json::Node;

/// Returns the header: as many bytes as the length says, or fewer if the file ends before.
pub fn header_of(file: &[u8]) -> &[u8] {
    match file.split_first_chunk::<8>() {
        Some((length, rest)) => {
            let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
            &rest[..length.min(rest.len())]
        }
        None => file,
    }
}

/// Returns the largest data offset of the tensors of a header.
pub fn data_end(header: Option<&Node>) -> u64 {
    let entries = header.and_then(Node::object).unwrap_or_default();
    let ends = entries.iter().filter_map(|(_, entry)| {
        let offsets = match entry {
            Node::Object(fields) => &fields.iter().find(|(field, _)| field == "data_offsets")?.1,
            // The reference accepts an array as a tensor.
            Node::List(fields) => fields.get(2)?,
            _ => return None,
        };
        offsets.integers()?.get(1).copied()
    });
    ends.max().unwrap_or(0)
}

/// Returns the length of a file with this header, and data up to `end`, or `None` if it overflows.
pub fn file_length(header: &[u8], end: u64) -> Option<u64> {
    end.checked_add(8 + header.len() as u64)
}

/// Returns the bytes of a file with this header and its data, or `None` if they exceed `limit`.
pub fn whole_file(header: &[u8], end: u64, limit: u64) -> Option<Vec<u8>> {
    let end = usize::try_from(end).ok().filter(|&end| end as u64 <= limit)?;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend((0..end).map(|place| (place as u8).wrapping_mul(37)));
    Some(file)
}
