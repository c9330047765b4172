//! Which bytes go into which slab: tensors in the order of their requests, small ones together.

use std::collections::VecDeque;

use crate::read::prefetch_plan::{Budget, Request};

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

/// The position up to which requests were assigned to slabs. Requests without bytes are left out.
#[derive(Debug)]
pub(super) struct Cursor {
    is_started: Vec<bool>,
    /// The first request in order that may not be started. Those before it are started.
    next: usize,
    /// Requests that the caller waits for.
    urgent: VecDeque<usize>,
    /// The started requests with bytes that were not assigned, and how many were. The last one is continued.
    open: Vec<(usize, usize)>,
    /// The number of requests with bytes that were not assigned.
    left: usize,
}

impl Cursor {
    pub(super) fn new(requests: &[Request]) -> Cursor {
        let is_started: Vec<bool> = requests.iter().map(|request| request.bytes == 0).collect();
        let left = is_started.iter().filter(|is_started| !**is_started).count();
        Cursor { is_started, next: 0, urgent: VecDeque::new(), open: Vec::new(), left }
    }

    pub(super) fn is_done(&self) -> bool {
        self.left == 0
    }

    /// Makes a request go first, unless it is started.
    pub(super) fn prioritize(&mut self, request: usize) {
        if !self.is_started[request] && !self.urgent.contains(&request) {
            self.urgent.push_back(request);
        }
    }

    /// Starts the next request if that is necessary and the budget allows it. Returns whether there are bytes to assign.
    pub(super) fn prepare(&mut self, requests: &[Request], budget: &mut Budget) -> bool {
        if let Some(request) = self.urgent.pop_front() {
            self.start(request, requests, budget);
        }
        if self.open.is_empty() {
            while self.is_started.get(self.next) == Some(&true) {
                self.next += 1;
            }
            if requests.get(self.next).is_some_and(|next| budget.allows(next.cost)) {
                self.start(self.next, requests, budget);
            }
        }
        !self.open.is_empty()
    }

    fn start(&mut self, request: usize, requests: &[Request], budget: &mut Budget) {
        if !std::mem::replace(&mut self.is_started[request], true) {
            budget.start(1, requests[request].cost);
            self.open.push((request, 0));
        }
    }

    /// Assigns bytes to a slab.
    pub(super) fn next(
        &mut self,
        requests: &[Request],
        budget: &mut Budget,
        slab_bytes: usize,
    ) -> Vec<SlabPart> {
        let mut parts = Vec::new();
        let mut start = 0;
        while self.prepare(requests, budget) {
            let Some((request, offset)) = self.open.last_mut() else { break };
            let room = slab_bytes.saturating_sub(start);
            let left = requests[*request].bytes - *offset;
            let length = if left <= room { left } else { room / SLAB_PART_ALIGNMENT * SLAB_PART_ALIGNMENT };
            if length == 0 {
                break;
            }
            parts.push(SlabPart { request: *request, offset: *offset, slab_offset: start, length });
            start = (start + length).next_multiple_of(SLAB_PART_ALIGNMENT);
            *offset += length;
            if length == left {
                self.open.pop();
                self.left -= 1;
            }
        }
        parts
    }
}
