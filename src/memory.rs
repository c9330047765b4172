//! Memory for tensors that are read: blocks that neighbours in a file share, on huge pages where they are large.
//!
//! Memory fresh from the kernel is paid for page by page; with pages of 2 MiB a large read takes little more than half
//! the time. Tensors share a block, as most are smaller than such a page; a block is small enough that one which outlives
//! its neighbours keeps little beside itself. Knows nothing of files.

use std::alloc;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{Advice, MmapMut, MmapRaw};

use crate::error::{Error, ErrorKind, Result};
use crate::page_cache::page_bytes;

/// Where a tensor may begin: torch's own memory is aligned so too.
const ALIGNMENT: usize = 64;

/// A huge page of x86-64, and of arm64 with the usual base pages.
const HUGE_PAGE: usize = 2 << 20;

/// The most bytes of a block of several tensors. What has more has a block of its own.
const BLOCK_BYTES: usize = 64 << 20;

/// Uninitialized memory, freed with its last owner.
#[derive(Debug)]
pub struct Block(Backing);

#[derive(Debug)]
enum Backing {
    /// From the allocator.
    Heap { start: NonNull<u8>, layout: alloc::Layout },
    /// Anonymous pages; the block begins at the first whole huge page among them.
    Pages { map: MmapRaw, skipped: usize },
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
        if length >= HUGE_PAGE {
            // Room to begin at a huge page. What is never touched takes no memory.
            let map = MmapMut::map_anon(length.checked_add(HUGE_PAGE).ok_or_else(refused)?);
            let map = MmapRaw::from(map.map_err(|_| refused())?);
            let skipped = map.as_ptr().align_offset(HUGE_PAGE);
            // Only a wish: kernels without huge pages, or told not to use them, give small ones. Miri knows no advice.
            if !cfg!(miri) {
                let _ = map.advise_range(Advice::HugePage, skipped, length);
            }
            return Ok(Block(Backing::Pages { map, skipped }));
        }
        let layout = alloc::Layout::from_size_align(length.max(1), ALIGNMENT).map_err(|_| refused())?;
        // SAFETY: the layout's size is not 0.
        let start = NonNull::new(unsafe { alloc::alloc(layout) }).ok_or_else(refused)?;
        Ok(Block(Backing::Heap { start, layout }))
    }

    fn start(&self) -> *mut u8 {
        match &self.0 {
            Backing::Heap { start, .. } => start.as_ptr(),
            Backing::Pages { map, skipped } => map.as_mut_ptr().wrapping_add(*skipped),
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // Pages unmap themselves.
        if let Backing::Heap { start, layout } = self.0 {
            // SAFETY: `new` allocated `start` with this very layout, and this is the only drop.
            unsafe { alloc::dealloc(start.as_ptr(), layout) }
        }
    }
}

/// Asks for huge pages in `length` bytes of fresh memory from `start` on. The wish stays with the addresses until they
/// are unmapped, so it is not for memory that belongs to somebody else. No byte changes, whatever memory it is.
#[cfg_attr(not(feature = "bridge"), expect(dead_code, reason = "only C++ hands in fresh memory"))]
pub(crate) fn prefer_huge_pages(start: *mut u8, length: usize) {
    let skipped = start.align_offset(HUGE_PAGE);
    let whole = length.saturating_sub(skipped) / HUGE_PAGE * HUGE_PAGE;
    if whole > 0 {
        // SAFETY: this advice changes neither the contents nor the rights of any page, and the kernel refuses it for
        // addresses that are not mapped. Refusal does no harm: the pages are small ones then.
        unsafe { libc::madvise(start.wrapping_add(skipped).cast(), whole, libc::MADV_HUGEPAGE) };
    }
}

/// Whether the page at `address` has memory already, so that writing there takes no page fault.
pub(crate) fn has_page(address: *mut u8) -> bool {
    let page = address.map_addr(|address| address & !(page_bytes() - 1));
    let mut resident = 0u8;
    // SAFETY: the kernel only looks, refuses addresses that are not mapped, and writes one byte for one page.
    let status = unsafe { libc::mincore(page.cast(), 1, &raw mut resident) };
    status == 0 && resident & 1 != 0
}

/// Memory for several tensors: a place for each, in blocks.
#[derive(Debug, Default)]
pub struct Memory {
    blocks: Vec<Arc<Block>>,
    places: Vec<Place>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    block: u32,
    offset: usize,
}

impl Memory {
    /// A place for each of `sizes`, in their order.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] with `ENOMEM` where there is not so much memory.
    pub fn new(sizes: &[usize]) -> Result<Memory> {
        let mut memory = Memory { blocks: Vec::new(), places: Vec::with_capacity(sizes.len()) };
        let mut first = 0;
        while first < sizes.len() {
            let mut length = 0usize;
            let mut next = first;
            let block = memory.blocks.len() as u32;
            while next < sizes.len() && (next == first || length.saturating_add(sizes[next]) <= BLOCK_BYTES) {
                memory.places.push(Place { block, offset: length });
                // A file's tensors are together no larger than the file, so only the last rounding could overflow.
                length = length.saturating_add(sizes[next]).saturating_add(ALIGNMENT - 1) & !(ALIGNMENT - 1);
                next += 1;
            }
            memory.blocks.push(Arc::new(Block::new(length)?));
            first = next;
        }
        Ok(memory)
    }

    /// The first byte of the place at `index`, which the memory has.
    pub fn start(&self, index: usize) -> *mut u8 {
        let Place { block, offset } = self.places[index];
        self.blocks[block as usize].start().wrapping_add(offset)
    }

    /// What keeps the place at `index` alive.
    pub fn owner(&self, index: usize) -> Arc<Block> {
        Arc::clone(&self.blocks[self.places[index].block as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_there_once_it_was_written_to() {
        let memory = Memory::new(&[4 * HUGE_PAGE]).expect("memory");
        let start = memory.start(0);
        assert!(!has_page(start.wrapping_add(123)));
        // SAFETY: the place has these bytes.
        unsafe { std::ptr::write_bytes(start, 1, 200) };
        assert!(has_page(start.wrapping_add(123)));
    }

    #[test]
    fn places_are_aligned_and_apart() {
        let sizes = [1, 0, 64, 65, HUGE_PAGE, 3 * HUGE_PAGE + 1, BLOCK_BYTES, 5, BLOCK_BYTES + 1, 2];
        let memory = Memory::new(&sizes).expect("memory");
        assert!(memory.blocks.len() > 1);
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for (index, &size) in sizes.iter().enumerate() {
            let start = memory.start(index);
            assert_eq!(start.addr() % ALIGNMENT, 0);
            // SAFETY: the place at `index` has `size` bytes, and `memory` is alive.
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
        let memory = Memory::new(&[8, 8]).expect("memory");
        let (start, owner) = (memory.start(1), memory.owner(1));
        drop(memory);
        assert_eq!(Arc::strong_count(&owner), 1);
        // SAFETY: `owner` keeps the place's 8 bytes.
        unsafe { start.write(7) };
    }

    #[test]
    fn small_tensors_do_not_keep_much_alive() {
        let memory = Memory::new(&[1 << 20; 200]).expect("memory");
        assert_eq!(memory.blocks.len(), 4, "200 MiB in blocks of 64 MiB");
        let memory = Memory::new(&[5, BLOCK_BYTES + 1, 2]).expect("memory");
        assert_eq!(memory.blocks.len(), 3, "what is large stands alone");
    }

    #[test]
    fn too_much_is_an_error() {
        for size in [1 << 60, usize::MAX] {
            let error = Memory::new(&[size]).expect_err("no machine has that");
            assert_eq!((error.kind(), error.os_error()), (ErrorKind::Io, Some(libc::ENOMEM)));
        }
    }
}
