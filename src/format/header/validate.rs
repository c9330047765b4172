//! Validates a parsed header: unique names, offsets that cover the data without hole or overlap, sizes that match dtype and
//! shape. Sorts the tensors into file order.

use super::malformed;
use super::table::{Header, METADATA_KEY};
use super::tensor::shape_nbytes;
use crate::error::{ErrorKind, Result};

pub(super) fn validate(header: &mut Header, file_length: u64) -> Result<()> {
    sort_into_file_order(header);
    index_by_name(header)?;
    check_offsets(header, file_length)
}

fn sort_into_file_order(header: &mut Header) {
    let names = &header.names;
    header.tensors.sort_by(|a, b| {
        (a.begin, a.end)
            .cmp(&(b.begin, b.end))
            .then_with(|| names[a.name.range()].cmp(&names[b.name.range()]))
    });
}

fn index_by_name(header: &mut Header) -> Result<()> {
    let mut by_name: Vec<u32> = (0..header.tensors.len() as u32).collect();
    by_name.sort_by(|&a, &b| header.name_at(a).cmp(header.name_at(b)));
    if let Some(pair) = by_name.windows(2).find(|pair| header.name_at(pair[0]) == header.name_at(pair[1])) {
        let name = header.name_at(pair[0]);
        return Err(malformed(ErrorKind::Duplicate, format!("the header has two tensors named {name:?}")));
    }
    header.by_name = by_name;
    if header.find(METADATA_KEY).is_some() {
        return Err(malformed(ErrorKind::ReservedName, format!("no tensor may be named {METADATA_KEY:?}")));
    }
    Ok(())
}

fn check_offsets(header: &Header, file_length: u64) -> Result<()> {
    let mut position = 0;
    let mut previous = None;
    for tensor in header.iter() {
        let (begin, end, name) = (tensor.begin, tensor.end, tensor.name);
        if end < begin {
            let detail = format!("tensor {name:?}: data_offsets [{begin}, {end}] end before they begin");
            return Err(malformed(ErrorKind::Offsets, detail));
        }
        let needed = shape_nbytes(tensor.dtype, tensor.shape)
            .map_err(|(kind, fault)| malformed(kind, format!("tensor {name:?}: {fault}")))?;
        if end - begin != needed {
            let detail = format!(
                "tensor {name:?}: data_offsets [{begin}, {end}] span {} bytes, but {} of shape {:?} takes {needed}",
                end - begin,
                tensor.dtype,
                tensor.shape
            );
            return Err(malformed(ErrorKind::SizeMismatch, detail));
        }
        if begin != position {
            let after =
                previous.map_or("the start of the data".to_string(), |name| format!("tensor {name:?}"));
            let fault = if begin > position { "leave a hole behind" } else { "overlap" };
            let detail = format!(
                "tensor {name:?}: data_offsets [{begin}, {end}] {fault} {after}, which ends at {position}"
            );
            return Err(malformed(ErrorKind::Offsets, detail));
        }
        position = end;
        previous = Some(name);
    }
    let available = file_length - header.data_start;
    if position != available {
        let cause = if position > available {
            "the file was cut short"
        } else {
            "bytes that belong to no tensor follow the last one"
        };
        let last = previous.map_or(String::new(), |name| format!(" (the last is {name:?})"));
        let detail =
            format!("the tensors{last} need {position} bytes of data, but the file has {available}: {cause}");
        return Err(malformed(ErrorKind::DataLength, detail));
    }
    Ok(())
}
