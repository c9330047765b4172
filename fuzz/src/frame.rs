//! The parts of a file's bytes, and files that are made whole around a header.
//!
//! A fuzzer that changes a header would have to change the length before it and the data behind it too. The targets look
//! at its bytes as they are, then once more with both set right.

use crate::json::Node;

/// The header: the bytes behind the length, as many as that says, or all that there are.
pub fn header_of(file: &[u8]) -> &[u8] {
    match file.split_first_chunk::<8>() {
        Some((length, rest)) => {
            let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
            &rest[..length.min(rest.len())]
        }
        None => file,
    }
}

/// The end of the data that the tensors of a header ask for.
pub fn data_end(header: Option<&Node>) -> u64 {
    let entries = header.and_then(Node::object).unwrap_or_default();
    let ends = entries.iter().filter_map(|(_, entry)| {
        let offsets = match entry {
            Node::Object(fields) => &fields.iter().find(|(field, _)| field == "data_offsets")?.1,
            // The reference takes a list for a tensor.
            Node::List(fields) => fields.get(2)?,
            _ => return None,
        };
        offsets.integers()?.get(1).copied()
    });
    ends.max().unwrap_or(0)
}

/// The length of a file with this header, and data up to `end`; `None` where there can be no such file.
pub fn file_length(header: &[u8], end: u64) -> Option<u64> {
    end.checked_add(8 + header.len() as u64)
}

/// The bytes of a file with this header and the data that it asks for; `None` where that would be more than `limit`.
pub fn whole_file(header: &[u8], end: u64, limit: u64) -> Option<Vec<u8>> {
    let end = usize::try_from(end).ok().filter(|&end| end as u64 <= limit)?;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend((0..end).map(|place| (place as u8).wrapping_mul(37)));
    Some(file)
}
