//! Copies memory to memory, on several threads where it pays.

use crate::error::Result;
use crate::parallel::{self, Chunks};

/// One run of bytes, and where it goes.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    /// The first byte.
    pub source: *const u8,
    /// Where it goes.
    pub destination: *mut u8,
    /// How many bytes.
    pub length: usize,
}

// SAFETY: a plain instruction; `copy` requires of its caller that sources and destinations are valid on any thread.
unsafe impl Send for Copy {}
// SAFETY: as above.
unsafe impl Sync for Copy {}

/// Carries out `copies`.
///
/// # Safety
///
/// Every source must be valid for reads and every destination for writes of its length until the call returns, nobody
/// else may write to any of them, and no destination may overlap another or a source.
pub unsafe fn copy(copies: &[Copy]) -> Result<()> {
    let chunks = Chunks::new(copies.iter().map(|copy| copy.length));
    parallel::pull(chunks.len(), parallel::threads_for(chunks.bytes(), chunks.len()), |chunk| {
        for (index, part) in chunks.parts(chunk) {
            let Copy { source, destination, .. } = copies[index];
            // SAFETY: the part lies in the copy's length, for which the caller vouches; no other chunk has this part.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    source.add(part.start),
                    destination.add(part.start),
                    part.len(),
                );
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_arrives() {
        let source: Vec<u8> = (0..20 << 20).map(|n: u32| (n % 251) as u8).collect();
        let mut target = vec![0; source.len()];
        let mut copies = Vec::new();
        let (mut at, mut length) = (0, 1);
        while at < source.len() {
            let bytes = length.min(source.len() - at);
            let destination = target.as_mut_ptr().wrapping_add(at);
            copies.push(Copy { source: source[at..].as_ptr(), destination, length: bytes });
            (at, length) = (at + bytes, length * 3 % 5_000_011);
        }
        // SAFETY: the parts of `target` are apart from each other and from `source`.
        unsafe { copy(&copies) }.expect("memory");
        assert!(target == source);
    }
}
