//! Memory for tensors. Neighbours in a file share a block, because fresh pages are expensive ([`PagePopulator`]).
//!
//! A tensor that outlives its neighbours keeps little memory beside its own: blocks of small tensors are small, and large
//! tensors release their pages in pieces of the size of a huge page.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::{MmapMut, MmapRaw};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::direct_io::{BLOCK_BYTES, block_offset};
use crate::sys::huge_pages::{HUGE_PAGE_BYTES, PagePopulator, discard};

/// The alignment of tensors that direct reads do not fill; torch's allocator has the same.
const ALIGNMENT: usize = 64;

/// The alignment that every dtype has in a mapped file too.
const DTYPE_ALIGNMENT: u64 = 8;

/// Tensors of this size and more release their memory one by one. Smaller ones are too many to count.
const LARGE_BYTES: usize = 64 << 10;

/// The largest block of small tensors, and so the memory that one of them can keep allocated.
const SMALL_BLOCK_BYTES: usize = HUGE_PAGE_BYTES;

/// The largest block that several large tensors share.
const LARGE_BLOCK_BYTES: usize = 64 << 20;

/// Uninitialized memory, freed with its last owner.
#[derive(Debug)]
pub struct Block(Backing);

#[derive(Debug)]
enum Backing {
    /// From the allocator. `start` points to the spare capacity of the vector, which stays empty.
    Heap { start: NonNull<u8>, _lines: Vec<Line> },
    /// Anonymous pages; the block begins at the first huge page boundary.
    Pages { map: MmapRaw, skipped: usize, fresh: PagePopulator, users: PieceUsers },
    /// A large tensor's part of a block of pages.
    Part { block: Arc<Block>, offset: usize, length: usize },
}

/// The unit of allocation.
#[derive(Debug)]
#[repr(align(64))]
struct Line {
    _bytes: [u8; ALIGNMENT],
}

// SAFETY: a block hands out only its address and never accesses the bytes, so no access here can race. It is freed, or its
// pages are discarded, by the thread that drops the last `Arc`, after all other owners.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// Allocates `length` bytes, aligned to [`ALIGNMENT`]. `None` if there is not enough memory.
    fn new(length: usize) -> Option<Block> {
        // A block of small tensors is rarely full, but is worth a huge page.
        if length > HUGE_PAGE_BYTES - LARGE_BYTES {
            let length = length.max(HUGE_PAGE_BYTES);
            // Leaves room to align the start. Untouched pages use no memory.
            let map = MmapRaw::from(MmapMut::map_anon(length.checked_add(HUGE_PAGE_BYTES)?).ok()?);
            let skipped = map.as_ptr().align_offset(HUGE_PAGE_BYTES);
            let fresh = PagePopulator::new(map.as_mut_ptr().wrapping_add(skipped), length);
            return Some(Block(Backing::Pages { map, skipped, fresh, users: PieceUsers::default() }));
        }
        let mut lines = Vec::new();
        lines.try_reserve_exact(length.max(1).div_ceil(ALIGNMENT)).ok()?;
        let start = NonNull::from(lines.spare_capacity_mut()).cast();
        Some(Block(Backing::Heap { start, _lines: lines }))
    }

    fn start(&self) -> *mut u8 {
        match &self.0 {
            Backing::Heap { start, .. } => start.as_ptr(),
            Backing::Pages { map, skipped, .. } => map.as_mut_ptr().wrapping_add(*skipped),
            Backing::Part { block, offset, .. } => block.start().wrapping_add(*offset),
        }
    }

    /// Populates the memory of `bytes`. Returns the end of the populated bytes, which is `bytes.end` or more.
    fn populate(&self, bytes: Range<usize>) -> usize {
        match &self.0 {
            Backing::Heap { .. } => usize::MAX,
            Backing::Pages { fresh, .. } => fresh.populate(bytes),
            Backing::Part { block, offset, .. } => {
                block.populate(bytes.start + offset..bytes.end + offset) - offset
            }
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let Backing::Part { block, offset, length } = &self.0 else { return };
        // The last part leaves everything to the block, which unmaps it.
        if Arc::strong_count(block) == 1 {
            return;
        }
        let Backing::Pages { users, fresh, .. } = &block.0 else { return };
        for pieces in users.remove(*offset, *length) {
            // The last piece of a block may be shorter.
            let bytes = pieces.start..pieces.end.min(fresh.len());
            // SAFETY: nobody reads these bytes again. `PieceUsers` has counted every part with bytes in them, and each was
            // removed by this drop, which runs after the part's last owner.
            unsafe { discard(block.start().wrapping_add(bytes.start), bytes.len()) }
        }
    }
}

/// The number of parts that have bytes in each piece of a block. A piece has the size of a huge page: splitting one takes
/// longer than reading into it.
#[derive(Debug, Default)]
struct PieceUsers(Box<[AtomicU32]>);

impl PieceUsers {
    /// Counts the parts, given as non-empty (offset, length) pairs.
    fn new(parts: impl Iterator<Item = (usize, usize)>) -> PieceUsers {
        let mut users: Vec<AtomicU32> = Vec::new();
        for (offset, length) in parts {
            let pieces = pieces(offset, length);
            if pieces.end > users.len() {
                users.resize_with(pieces.end, AtomicU32::default);
            }
            users[pieces].iter_mut().for_each(|users| *users.get_mut() += 1);
        }
        PieceUsers(users.into())
    }

    /// Removes a part. Returns the bytes of the pieces that have no other part, neighbours merged.
    fn remove(&self, offset: usize, length: usize) -> Vec<Range<usize>> {
        let mut unused: Vec<Range<usize>> = Vec::new();
        for piece in pieces(offset, length) {
            // AcqRel: the last removal happens after all accesses by the other parts' owners.
            if self.0[piece].fetch_sub(1, Ordering::AcqRel) == 1 {
                let bytes = piece * HUGE_PAGE_BYTES..(piece + 1) * HUGE_PAGE_BYTES;
                match unused.last_mut() {
                    Some(last) if last.end == bytes.start => last.end = bytes.end,
                    _ => unused.push(bytes),
                }
            }
        }
        unused
    }
}

/// Returns the pieces that contain bytes of a part.
fn pieces(offset: usize, length: usize) -> Range<usize> {
    offset / HUGE_PAGE_BYTES..(offset + length).div_ceil(HUGE_PAGE_BYTES)
}

/// Returns where a tensor of `size` bytes begins in a block whose first `end` bytes are taken. Blocks of large tensors begin
/// where a block of a device does.
fn place(end: usize, size: usize, offset: Option<&u64>) -> usize {
    match offset {
        Some(&offset) if size >= LARGE_BYTES && offset.is_multiple_of(DTYPE_ALIGNMENT) => {
            let distance = block_offset(offset) + BLOCK_BYTES - end % BLOCK_BYTES;
            end.saturating_add(distance % BLOCK_BYTES)
        }
        _ => end.saturating_add(ALIGNMENT - 1) & !(ALIGNMENT - 1),
    }
}

/// A buffer for each of several tensors.
#[derive(Debug, Default)]
pub struct Buffers {
    blocks: Vec<Arc<Block>>,
    locations: Vec<Location>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Location {
    block: u32,
    offset: usize,
}

impl Buffers {
    /// Allocates a buffer for each of `sizes`, in their order.
    ///
    /// ```
    /// let buffers = safetensors_torch::Buffers::new(&[12, 4096])?;
    /// let (start, owner) = (buffers.start(1), buffers.owner(1));
    /// drop(buffers);
    /// // SAFETY: `owner` keeps the 4096 bytes at `start` allocated.
    /// unsafe { start.write_bytes(0, 4096) };
    /// drop(owner);
    /// # Ok::<(), safetensors_torch::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] with `ENOMEM` if there is not enough memory.
    pub fn new(sizes: &[usize]) -> Result<Buffers> {
        Buffers::for_direct_reads(sizes, &[])
    }

    /// As [`Buffers::new`], for tensors at `offsets` in a file that direct reads fill. A large tensor lies in blocks of memory
    /// as it lies in those of the file, if that suits every dtype. Tensors without an offset are aligned as in `new`.
    pub(crate) fn for_direct_reads(sizes: &[usize], offsets: &[u64]) -> Result<Buffers> {
        let mut buffers = Buffers { blocks: Vec::new(), locations: vec![Location::default(); sizes.len()] };
        let (small, large): (Vec<usize>, Vec<usize>) =
            (0..sizes.len()).partition(|&index| sizes[index] < LARGE_BYTES);
        for (indices, max_bytes) in [(small, SMALL_BLOCK_BYTES), (large, LARGE_BLOCK_BYTES)] {
            let mut rest = &indices[..];
            while !rest.is_empty() {
                rest = &rest[buffers.add_block(sizes, offsets, rest, max_bytes)?..];
            }
        }
        Ok(buffers)
    }

    /// Adds a block of at most `max_bytes` for the first tensors of `indices`, or a larger one for the first alone.
    /// Returns how many of them it holds.
    fn add_block(
        &mut self,
        sizes: &[usize],
        offsets: &[u64],
        indices: &[usize],
        max_bytes: usize,
    ) -> Result<usize> {
        let mut end = 0usize;
        let mut count = 0;
        for &index in indices {
            let start = place(end, sizes[index], offsets.get(index));
            // The tensors of a file are smaller than the file together.
            let next = start.saturating_add(sizes[index]);
            if count > 0 && next > max_bytes {
                break;
            }
            self.locations[index] = Location { block: self.blocks.len() as u32, offset: start };
            end = next;
            count += 1;
        }
        let out_of_memory = || {
            let bytes = end - self.locations[indices[0]].offset;
            let detail = format!("cannot allocate {bytes} bytes for the tensors: not enough memory");
            Error::new(ErrorKind::Io, detail).with_os_error(io::Error::from_raw_os_error(libc::ENOMEM))
        };
        let mut block = Block::new(end).ok_or_else(out_of_memory)?;
        match &mut block.0 {
            Backing::Pages { users, .. } if sizes[indices[0]] >= LARGE_BYTES => {
                let parts =
                    indices[..count].iter().map(|&index| (self.locations[index].offset, sizes[index]));
                *users = PieceUsers::new(parts);
            }
            _ => {
                self.blocks.push(Arc::new(block));
                return Ok(count);
            }
        }
        let block = Arc::new(block);
        for &index in &indices[..count] {
            let offset = self.locations[index].offset;
            let part = Backing::Part { block: Arc::clone(&block), offset, length: sizes[index] };
            self.locations[index] = Location { block: self.blocks.len() as u32, offset: 0 };
            self.blocks.push(Arc::new(Block(part)));
        }
        Ok(count)
    }

    /// Populates memory that is about to be written. Each part is the index of a buffer and a range of its bytes.
    pub(crate) fn populate(&self, parts: impl Iterator<Item = (usize, Range<usize>)>) {
        // Most parts lie in the memory that was populated with the previous one.
        let (mut block, mut populated) = (u32::MAX, 0);
        for (index, part) in parts {
            let location = self.locations[index];
            let bytes = location.offset + part.start..location.offset + part.end;
            if location.block != block || bytes.end > populated {
                block = location.block;
                populated = self.blocks[block as usize].populate(bytes);
            }
        }
    }

    /// Returns the first byte of the buffer at `index`.
    pub fn start(&self, index: usize) -> *mut u8 {
        let Location { block, offset } = self.locations[index];
        self.blocks[block as usize].start().wrapping_add(offset)
    }

    /// Returns the block that keeps the buffer at `index` allocated.
    pub fn owner(&self, index: usize) -> Arc<Block> {
        Arc::clone(&self.blocks[self.locations[index].block as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::huge_pages::is_resident;
    use std::collections::HashSet;

    #[test]
    fn buffers_are_aligned_and_disjoint() {
        let sizes = [
            1,
            0,
            64,
            65,
            LARGE_BYTES,
            HUGE_PAGE_BYTES,
            3 * HUGE_PAGE_BYTES + 1,
            LARGE_BLOCK_BYTES,
            5,
            LARGE_BLOCK_BYTES + 1,
            2,
        ];
        let buffers = Buffers::new(&sizes).expect("buffers");
        assert!(buffers.blocks.len() > 1);
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for (index, &size) in sizes.iter().enumerate() {
            let start = buffers.start(index);
            assert_eq!(start.addr() % ALIGNMENT, 0);
            // SAFETY: the buffer at `index` has `size` bytes, and `buffers` is alive.
            unsafe { std::ptr::write_bytes(start, index as u8, size) };
            ranges.push((start.addr(), start.addr() + size));
        }
        for (index, &size) in sizes.iter().enumerate().filter(|&(_, &size)| size > 0) {
            // SAFETY: as above, and the bytes are initialized.
            let bytes = unsafe { std::slice::from_raw_parts(buffers.start(index), size) };
            // Both ends are enough under Miri, which is slow.
            let end = if cfg!(miri) { size.min(64) } else { size };
            let mut checked = bytes[..end].iter().chain(&bytes[size - end..]);
            assert!(checked.all(|&byte| byte == index as u8));
        }
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    }

    #[test]
    fn memory_for_direct_reads_has_the_blocks_of_the_file() {
        let sizes = [LARGE_BYTES + 8, HUGE_PAGE_BYTES, 100, LARGE_BYTES, LARGE_BLOCK_BYTES + 1, LARGE_BYTES];
        // Neighbours, except the last one, which no dtype may have there.
        let mut offsets = vec![5000 * 8];
        for size in &sizes[..5] {
            offsets.push((offsets.last().expect("one") + *size as u64) & !7);
        }
        offsets[5] += 4;
        let buffers = Buffers::for_direct_reads(&sizes, &offsets).expect("buffers");
        let starts: Vec<usize> = (0..6).map(|index| buffers.start(index).addr()).collect();
        for index in [0, 1, 3, 4] {
            assert_eq!(starts[index] % BLOCK_BYTES, block_offset(offsets[index]), "{index}");
        }
        assert_eq!(starts[1], starts[0] + sizes[0], "neighbours stay neighbours");
        assert!(starts[2].is_multiple_of(ALIGNMENT) && starts[5].is_multiple_of(ALIGNMENT));
    }

    #[test]
    fn a_buffer_outlives_the_others_through_its_owner() {
        let buffers = Buffers::new(&[8, 8]).expect("buffers");
        let (start, owner) = (buffers.start(1), buffers.owner(1));
        drop(buffers);
        assert_eq!(Arc::strong_count(&owner), 1);
        // SAFETY: `owner` keeps the 8 bytes allocated.
        unsafe { start.write(7) };
    }

    #[test]
    fn small_tensors_keep_little_alive() {
        let sizes: Vec<usize> =
            (0..4000).map(|index| if index % 2 == 0 { 5000 } else { LARGE_BYTES }).collect();
        let buffers = Buffers::new(&sizes).expect("buffers");
        let small: HashSet<u32> = (0..4000).step_by(2).map(|index| buffers.locations[index].block).collect();
        assert_eq!(small.len(), (2000 * 5000usize).div_ceil(SMALL_BLOCK_BYTES), "10 MB of small tensors");
        for &block in &small {
            let end = (0..4000).filter(|&index| buffers.locations[index].block == block);
            let end =
                end.map(|index| buffers.locations[index].offset + sizes[index]).max().expect("a tensor");
            assert!(end <= SMALL_BLOCK_BYTES, "a small tensor keeps {end} bytes");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pages")]
    fn a_large_tensor_releases_its_memory() {
        // Odd sizes, so that neighbours share pages. All except the last share a block.
        let sizes = [LARGE_BYTES + 999, 3 * HUGE_PAGE_BYTES + 77, 64 << 10, 1 << 20, LARGE_BLOCK_BYTES];
        let buffers = Buffers::new(&sizes).expect("buffers");
        let mut owners = Vec::new();
        for (index, &size) in sizes.iter().enumerate() {
            buffers.populate(std::iter::once((index, 0..size)));
            // SAFETY: the buffer at `index` has `size` bytes, and `buffers` is alive.
            unsafe { std::ptr::write_bytes(buffers.start(index), index as u8 + 1, size) };
            owners.push(Some(buffers.owner(index)));
        }
        let locations: Vec<*mut u8> = (0..sizes.len()).map(|index| buffers.start(index)).collect();
        let resident_at = |index: usize| {
            let pages = (0..sizes[index]).step_by(4096);
            pages.filter(|&at| is_resident(locations[index].wrapping_add(at))).count() * 4096
        };
        drop(buffers);
        for dead in [1, 0, 3, 4] {
            assert!(resident_at(dead) >= sizes[dead].saturating_sub(HUGE_PAGE_BYTES));
            owners[dead] = None;
            // The pieces at both ends contain bytes of neighbours.
            assert!(resident_at(dead) <= 2 * HUGE_PAGE_BYTES, "{} bytes remain", resident_at(dead));
            for (index, &size) in sizes.iter().enumerate().filter(|&(index, _)| owners[index].is_some()) {
                // SAFETY: the owner keeps the bytes allocated, which were written above.
                let bytes = unsafe { std::slice::from_raw_parts(locations[index], size) };
                assert!(bytes.iter().all(|&byte| byte == index as u8 + 1), "{index} changed with {dead}");
            }
        }
        let kept: usize = (0..sizes.len()).map(resident_at).sum();
        assert!(kept <= HUGE_PAGE_BYTES, "64 KiB keep {kept} bytes");
    }

    #[test]
    fn too_large_a_size_is_an_error() {
        for size in [1 << 60, usize::MAX] {
            let error = Buffers::new(&[size]).expect_err("more than any machine has");
            assert_eq!((error.kind(), error.os_error()), (ErrorKind::Io, Some(libc::ENOMEM)));
        }
    }
}
