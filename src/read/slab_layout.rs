//! Which bytes go into which slab: tensors in file order, small ones together.

use std::ops::Range;

use crate::format::slice::Slice;

/// The alignment of a part in its slab, and of the lengths that a tensor is cut into. It is a multiple of the size of
/// every element.
pub const SLAB_PART_ALIGNMENT: usize = 16;

/// Bytes of one tensor in a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlabPart {
    /// The number of the request.
    pub request: usize,
    /// The offset of the bytes in the tensor or slice.
    pub offset: usize,
    /// The offset of the bytes in the slab.
    pub slab_offset: usize,
    /// The number of bytes, never 0.
    pub length: usize,
}

/// A tensor to be read, or a slice of one.
#[derive(Debug)]
pub(super) struct Request {
    /// The tensor's index in file order.
    pub(super) index: usize,
    /// The range of the tensor in the file.
    pub(super) range: Range<u64>,
    /// The bytes of the tensor or slice.
    pub(super) bytes: usize,
    pub(super) slice: Option<Slice>,
}

/// Returns the smallest range of the file that contains all of `requests`.
pub(super) fn extent(requests: &[Request]) -> Range<u64> {
    let start = requests.iter().map(|request| request.range.start).min().unwrap_or(0);
    let end = requests.iter().map(|request| request.range.end).max();
    start..end.unwrap_or(start)
}

/// The position up to which requests were assigned to slabs, in file order.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    order: Vec<usize>,
    /// An index into `order`.
    next: usize,
    /// The bytes of that request that were assigned.
    offset: usize,
}

impl Cursor {
    pub(super) fn new(requests: &[Request]) -> Cursor {
        let mut order: Vec<usize> =
            (0..requests.len()).filter(|&request| requests[request].bytes > 0).collect();
        order.sort_by_key(|&request| requests[request].range.start);
        Cursor { order, next: 0, offset: 0 }
    }

    pub(super) fn is_done(&self) -> bool {
        self.next == self.order.len()
    }

    pub(super) fn next(&mut self, requests: &[Request], slab_bytes: usize) -> Vec<SlabPart> {
        let mut parts = Vec::new();
        let mut start = 0;
        while let Some(&request) = self.order.get(self.next) {
            let room = slab_bytes.saturating_sub(start);
            let left = requests[request].bytes - self.offset;
            let length = if left <= room { left } else { room / SLAB_PART_ALIGNMENT * SLAB_PART_ALIGNMENT };
            if length == 0 {
                break;
            }
            parts.push(SlabPart { request, offset: self.offset, slab_offset: start, length });
            start = (start + length).next_multiple_of(SLAB_PART_ALIGNMENT);
            if length == left {
                (self.next, self.offset) = (self.next + 1, 0);
            } else {
                self.offset += length;
            }
        }
        parts
    }
}
