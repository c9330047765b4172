//! Copies runs of bytes from one layout to another.

use std::cmp::Reverse;

use crate::format::runs::{Loop, Runs};

/// The iterations of the second innermost loop that are copied together. So many lines of the destination stay in the
/// processor's first cache, even if they are a multiple of its size apart.
const BLOCK: u64 = 8;

/// Copies `runs` from the first of their two layouts, at `source`, to the second, at `destination`.
///
/// # Safety
///
/// Every run must be valid for reads in the source and for writes in the destination. No run of the destination may overlap
/// another one or the source.
pub(super) unsafe fn copy_runs(runs: &Runs<2>, source: *const u8, destination: *mut u8) {
    let mut loops = runs.loops.clone();
    // The innermost loop writes neighbours, the one around it reads neighbours.
    loops.sort_by_key(|around| Reverse(around.strides[1]));
    if let Some((_, outer)) = loops.split_last_mut()
        && let Some((nearest, _)) = outer.iter().enumerate().min_by_key(|(_, around)| around.strides[0])
    {
        outer[nearest..].rotate_left(1);
    }
    let length = runs.length as usize;
    // SAFETY: this function has the same contract; `N` is 0 or the length of a run.
    unsafe {
        match length {
            1 => copy_loops::<1>(&loops, length, source, destination),
            2 => copy_loops::<2>(&loops, length, source, destination),
            4 => copy_loops::<4>(&loops, length, source, destination),
            8 => copy_loops::<8>(&loops, length, source, destination),
            16 => copy_loops::<16>(&loops, length, source, destination),
            _ => copy_loops::<0>(&loops, length, source, destination),
        }
    }
}

/// Copies runs of `length`; `N` is 0 or the same number, which makes a copy of few bytes a single instruction.
///
/// # Safety
///
/// As for [`copy_runs`].
unsafe fn copy_loops<const N: usize>(
    loops: &[Loop<2>],
    length: usize,
    source: *const u8,
    destination: *mut u8,
) {
    match loops {
        [] => {
            let length = if N == 0 { length } else { N };
            // SAFETY: this function's contract covers the run on either side.
            unsafe { std::ptr::copy_nonoverlapping(source, destination, length) };
        }
        [across, along] => {
            for start in (0..across.count).step_by(BLOCK as usize) {
                let block = Loop { count: BLOCK.min(across.count - start), ..*across };
                let (source, destination) = at(across, start, source, destination);
                for index in 0..along.count {
                    let (source, destination) = at(along, index, source, destination);
                    // SAFETY: this function's contract, which covers the runs of each iteration.
                    unsafe { copy_loops::<N>(&[block], length, source, destination) };
                }
            }
        }
        [outer, inner @ ..] => {
            for index in 0..outer.count {
                let (source, destination) = at(outer, index, source, destination);
                // SAFETY: as above.
                unsafe { copy_loops::<N>(inner, length, source, destination) };
            }
        }
    }
}

/// Returns the addresses of iteration number `index` of a loop.
fn at(around: &Loop<2>, index: u64, source: *const u8, destination: *mut u8) -> (*const u8, *mut u8) {
    let [from, to] = around.strides.map(|stride| (index * stride) as usize);
    (source.wrapping_add(from), destination.wrapping_add(to))
}
