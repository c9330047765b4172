//! Memory for tensors that are read: small neighbours in a file share a block, and so do large ones, whose memory is given
//! back by pieces of the size of a huge page, each with its last tensor.
//!
//! Memory fresh from the kernel is paid for page by page ([`PagePopulator`]). Blocks make that cheap: many tensors share the
//! pages of one. They are made so that a tensor that outlives its neighbours keeps little beside itself. Knows nothing of
//! files.

use std::alloc;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::{MmapMut, MmapRaw};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::populate::{HUGE_PAGE_BYTES, PagePopulator, discard};

/// Where a tensor may begin: torch's own memory is aligned so too.
const ALIGNMENT: usize = 64;

/// Tensors of so many bytes give memory back when they die. Smaller ones are too many to count.
const LARGE_BYTES: usize = 64 << 10;

/// The most bytes of a block of small tensors: what one of them can keep alive.
const SMALL_BLOCK_BYTES: usize = HUGE_PAGE_BYTES;

/// The most bytes of a block of several large tensors. What has more has a block of its own.
const LARGE_BLOCK_BYTES: usize = 64 << 20;

/// Uninitialized memory, freed with its last owner.
#[derive(Debug)]
pub struct Block(Backing);

#[derive(Debug)]
enum Backing {
    /// From the allocator.
    Heap { start: NonNull<u8>, layout: alloc::Layout },
    /// Anonymous pages; the block begins at the first whole huge page among them.
    Pages { map: MmapRaw, skipped: usize, fresh: PagePopulator, users: PieceUsers },
    /// A large tensor's part of a block of pages.
    Part { block: Arc<Block>, offset: usize, length: usize },
}

// SAFETY: a block owns its memory and gives out nothing but its address; whoever reads or writes there sees to the
// order of accesses.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// `length` bytes at a multiple of [`ALIGNMENT`]. Their contents are not defined.
    fn new(length: usize) -> Result<Block> {
        let refused = || {
            let detail =
                format!("cannot allocate {length} bytes for the tensors: there is not enough memory");
            Error::new(ErrorKind::Io, detail).with_os_error(io::Error::from_raw_os_error(libc::ENOMEM))
        };
        // A block of small tensors is hardly ever quite full; it is worth a huge page.
        if length > HUGE_PAGE_BYTES - LARGE_BYTES {
            let length = length.max(HUGE_PAGE_BYTES);
            // Room to begin at a huge page. What is never touched takes no memory.
            let map = MmapMut::map_anon(length.checked_add(HUGE_PAGE_BYTES).ok_or_else(refused)?);
            let map = MmapRaw::from(map.map_err(|_| refused())?);
            let skipped = map.as_ptr().align_offset(HUGE_PAGE_BYTES);
            let fresh = PagePopulator::new(map.as_mut_ptr().wrapping_add(skipped), length);
            return Ok(Block(Backing::Pages { map, skipped, fresh, users: PieceUsers::default() }));
        }
        let layout = alloc::Layout::from_size_align(length.max(1), ALIGNMENT).map_err(|_| refused())?;
        // SAFETY: the layout's size is not 0.
        let start = NonNull::new(unsafe { alloc::alloc(layout) }).ok_or_else(refused)?;
        Ok(Block(Backing::Heap { start, layout }))
    }

    fn start(&self) -> *mut u8 {
        match &self.0 {
            Backing::Heap { start, .. } => start.as_ptr(),
            Backing::Pages { map, skipped, .. } => map.as_mut_ptr().wrapping_add(*skipped),
            Backing::Part { block, offset, .. } => block.start().wrapping_add(*offset),
        }
    }

    /// Brings in the memory of `part`; returns the end of what was brought in with it, at least that of `part`.
    fn populate(&self, part: Range<usize>) -> usize {
        match &self.0 {
            Backing::Heap { .. } => usize::MAX,
            Backing::Pages { fresh, .. } => fresh.populate(part),
            Backing::Part { block, offset, .. } => {
                block.populate(part.start + offset..part.end + offset) - offset
            }
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        match &self.0 {
            Backing::Heap { start, layout } => {
                // SAFETY: `new` allocated `start` with this very layout, and this is the only drop.
                unsafe { alloc::dealloc(start.as_ptr(), *layout) }
            }
            // They unmap themselves.
            Backing::Pages { .. } => {}
            // The last of its block leaves all of it to that.
            Backing::Part { block, .. } if Arc::strong_count(block) == 1 => {}
            Backing::Part { block, offset, length } => {
                if let Backing::Pages { users, fresh, .. } = &block.0 {
                    for piece in users.remove(*offset, *length) {
                        // The last piece of a block may be cut short.
                        let piece = piece.start..piece.end.min(fresh.len());
                        // SAFETY: every part that has bytes in these pieces is gone (`PieceUsers`), with its last owner.
                        unsafe { discard(block.start().wrapping_add(piece.start), piece.len()) }
                    }
                }
            }
        }
    }
}

/// How many parts have bytes in each piece of a block. Pieces of the size of a huge page: giving back less would split
/// one, which takes longer than reading into it.
#[derive(Debug, Default)]
struct PieceUsers(Box<[AtomicU32]>);

impl PieceUsers {
    /// For parts that begin at these offsets and have these lengths, none of them 0.
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

    /// Takes a part out; returns the bytes of the pieces that have no other, in runs.
    fn remove(&self, offset: usize, length: usize) -> Vec<Range<usize>> {
        let mut unused: Vec<Range<usize>> = Vec::new();
        for piece in pieces(offset, length) {
            // Whoever takes the last part out sees what all others did before.
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

/// The pieces that bytes of a part lie in.
fn pieces(offset: usize, length: usize) -> Range<usize> {
    offset / HUGE_PAGE_BYTES..(offset + length).div_ceil(HUGE_PAGE_BYTES)
}

/// Memory for several tensors: a location for each, in blocks.
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
    /// A location for each of `sizes`, in their order.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] with `ENOMEM` where there is not so much memory.
    pub fn new(sizes: &[usize]) -> Result<Buffers> {
        let mut memory = Buffers { blocks: Vec::new(), locations: vec![Location::default(); sizes.len()] };
        let (small, large): (Vec<usize>, Vec<usize>) =
            (0..sizes.len()).partition(|&index| sizes[index] < LARGE_BYTES);
        for (indices, most) in [(small, SMALL_BLOCK_BYTES), (large, LARGE_BLOCK_BYTES)] {
            let mut rest = &indices[..];
            while !rest.is_empty() {
                rest = &rest[memory.add_block(sizes, rest, most)?..];
            }
        }
        Ok(memory)
    }

    /// Adds a block of no more than `most` bytes for the first of the tensors at `indices`, and their locations; returns how
    /// many of them have a location there, at least one.
    fn add_block(&mut self, sizes: &[usize], indices: &[usize], most: usize) -> Result<usize> {
        let mut length = 0usize;
        let mut count = 0;
        for &index in indices {
            if count > 0 && length.saturating_add(sizes[index]) > most {
                break;
            }
            self.locations[index] = Location { block: self.blocks.len() as u32, offset: length };
            // A file's tensors are together no larger than the file, so only the last rounding could overflow.
            length = length.saturating_add(sizes[index]).saturating_add(ALIGNMENT - 1) & !(ALIGNMENT - 1);
            count += 1;
        }
        let mut block = Block::new(length)?;
        let Backing::Pages { users, .. } = &mut block.0 else {
            self.blocks.push(Arc::new(block));
            return Ok(count);
        };
        if sizes[indices[0]] < LARGE_BYTES {
            self.blocks.push(Arc::new(block));
            return Ok(count);
        }
        *users = PieceUsers::new(
            indices[..count].iter().map(|&index| (self.locations[index].offset, sizes[index])),
        );
        let block = Arc::new(block);
        for &index in &indices[..count] {
            let part = Backing::Part {
                block: Arc::clone(&block),
                offset: self.locations[index].offset,
                length: sizes[index],
            };
            self.locations[index] = Location { block: self.blocks.len() as u32, offset: 0 };
            self.blocks.push(Arc::new(Block(part)));
        }
        Ok(count)
    }

    /// Brings in the memory of parts that are about to be written to: the index of each one's location, and where the part
    /// lies in that.
    pub(crate) fn populate(&self, parts: impl Iterator<Item = (usize, Range<usize>)>) {
        // Most parts lie in what was brought in with the one before.
        let (mut block, mut done) = (u32::MAX, 0);
        for (index, part) in parts {
            let location = self.locations[index];
            if location.block != block || location.offset + part.end > done {
                block = location.block;
                done = self.blocks[block as usize]
                    .populate(location.offset + part.start..location.offset + part.end);
            }
        }
    }

    /// The first byte of the location at `index`, which the memory has.
    pub fn start(&self, index: usize) -> *mut u8 {
        let Location { block, offset } = self.locations[index];
        self.blocks[block as usize].start().wrapping_add(offset)
    }

    /// What keeps the location at `index` alive.
    pub fn owner(&self, index: usize) -> Arc<Block> {
        Arc::clone(&self.blocks[self.locations[index].block as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::populate::is_resident;
    use std::collections::HashSet;

    #[test]
    fn places_are_aligned_and_apart() {
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
        let memory = Buffers::new(&sizes).expect("memory");
        assert!(memory.blocks.len() > 1);
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for (index, &size) in sizes.iter().enumerate() {
            let start = memory.start(index);
            assert_eq!(start.addr() % ALIGNMENT, 0);
            // SAFETY: the location at `index` has `size` bytes, and `memory` is alive.
            unsafe { std::ptr::write_bytes(start, index as u8, size) };
            ranges.push((start.addr(), start.addr() + size));
        }
        for (index, &size) in sizes.iter().enumerate().filter(|&(_, &size)| size > 0) {
            // SAFETY: as above; the bytes were written just now.
            let bytes = unsafe { std::slice::from_raw_parts(memory.start(index), size) };
            // Miri, which is slow, looks at both ends.
            let end = if cfg!(miri) { size.min(64) } else { size };
            let mut looked_at = bytes[..end].iter().chain(&bytes[size - end..]);
            assert!(looked_at.all(|&byte| byte == index as u8));
        }
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    }

    #[test]
    fn a_place_outlives_the_memory_through_its_owner() {
        let memory = Buffers::new(&[8, 8]).expect("memory");
        let (start, owner) = (memory.start(1), memory.owner(1));
        drop(memory);
        assert_eq!(Arc::strong_count(&owner), 1);
        // SAFETY: `owner` keeps the location's 8 bytes.
        unsafe { start.write(7) };
    }

    #[test]
    fn small_tensors_keep_little_alive() {
        let sizes: Vec<usize> =
            (0..4000).map(|index| if index % 2 == 0 { 5000 } else { LARGE_BYTES }).collect();
        let memory = Buffers::new(&sizes).expect("memory");
        let small: HashSet<u32> = (0..4000).step_by(2).map(|index| memory.locations[index].block).collect();
        assert_eq!(small.len(), (2000 * 5000usize).div_ceil(SMALL_BLOCK_BYTES), "10 MB of small ones");
        for &block in &small {
            let end = (0..4000).filter(|&index| memory.locations[index].block == block);
            let end = end.map(|index| memory.locations[index].offset + sizes[index]).max().expect("a tensor");
            assert!(end <= SMALL_BLOCK_BYTES, "a small one keeps {end} bytes");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pages")]
    fn a_large_tensor_gives_its_memory_back() {
        // Of odd sizes, so that neighbours share pages; all in one block, but for the last.
        let sizes = [LARGE_BYTES + 999, 3 * HUGE_PAGE_BYTES + 77, 64 << 10, 1 << 20, LARGE_BLOCK_BYTES];
        let memory = Buffers::new(&sizes).expect("memory");
        let mut owners = Vec::new();
        for (index, &size) in sizes.iter().enumerate() {
            memory.populate(std::iter::once((index, 0..size)));
            // SAFETY: the location at `index` has `size` bytes, and `memory` is alive.
            unsafe { std::ptr::write_bytes(memory.start(index), index as u8 + 1, size) };
            owners.push(Some(memory.owner(index)));
        }
        let locations: Vec<*mut u8> = (0..sizes.len()).map(|index| memory.start(index)).collect();
        let resident_at = |index: usize| {
            let pages = (0..sizes[index]).step_by(4096);
            pages.filter(|&at| is_resident(locations[index].wrapping_add(at))).count() * 4096
        };
        drop(memory);
        for dead in [1, 0, 3, 4] {
            assert!(resident_at(dead) >= sizes[dead].saturating_sub(HUGE_PAGE_BYTES));
            owners[dead] = None;
            // The pieces at both ends have bytes of neighbours.
            assert!(resident_at(dead) <= 2 * HUGE_PAGE_BYTES, "{} bytes are left", resident_at(dead));
            for (index, &size) in sizes.iter().enumerate().filter(|&(index, _)| owners[index].is_some()) {
                // SAFETY: the owner keeps the location's bytes, which were written above.
                let bytes = unsafe { std::slice::from_raw_parts(locations[index], size) };
                assert!(bytes.iter().all(|&byte| byte == index as u8 + 1), "{index} changed with {dead}");
            }
        }
        let kept: usize = (0..sizes.len()).map(resident_at).sum();
        assert!(kept <= HUGE_PAGE_BYTES, "64 KiB keep {kept} bytes");
    }

    #[test]
    fn too_much_is_an_error() {
        for size in [1 << 60, usize::MAX] {
            let error = Buffers::new(&[size]).expect_err("no machine has that");
            assert_eq!((error.kind(), error.os_error()), (ErrorKind::Io, Some(libc::ENOMEM)));
        }
    }
}
