//! Fresh memory, and what its pages cost.
//!
//! A page costs its first touch. Huge pages cost less than small ones where the machine has its memory at hand, and many
//! times more where a hypervisor takes free memory back: it takes whole huge pages, and each must then come from the
//! host, while small pages come out of remains that the guest kept. Which it is differs between machines, and from one
//! second to the next. So memory is brought in by pieces of the size of a huge page, just before they are written to;
//! each is timed, and the kind of page that took less time lately is used for the next. Knows nothing of tensors.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::sys::page_cache::page_size;

/// A huge page of x86-64, and of arm64 with the usual base pages; the unit in which memory is brought in.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// The kind of page that costs more is tried again after this many times what the try is expected to cost.
const PATIENCE: u64 = 16;

/// The two kinds of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageKind {
    Small,
    Huge,
}

/// What pieces of either kind took lately, in nanoseconds of a processor.
#[derive(Debug)]
struct Costs {
    small: Cost,
    huge: Cost,
    /// How long pieces took since the dearer kind was tried.
    since_trial: AtomicU64,
}

/// What the last two pieces of one kind took: one in each half, 0 if there was none.
#[derive(Debug)]
struct Cost(AtomicU64);

/// Shared by the whole process, because what one load learned holds for the next.
static COSTS: Costs = Costs::new();

impl Cost {
    const fn new() -> Cost {
        Cost(AtomicU64::new(0))
    }

    /// The smaller of the last two: a single piece that was held up by something else says nothing.
    fn lately(&self) -> Option<u64> {
        let both = self.0.load(Ordering::Relaxed);
        let (last, before) = (both & u64::from(u32::MAX), both >> 32);
        if before == 0 { (last != 0).then_some(last) } else { Some(last.min(before)) }
    }

    fn add(&self, nanoseconds: u64) {
        let last = nanoseconds.clamp(1, u64::from(u32::MAX));
        // Of two threads at once one may get lost: no harm.
        let before = self.0.load(Ordering::Relaxed) << 32;
        self.0.store(before | last, Ordering::Relaxed);
    }
}

impl Costs {
    const fn new() -> Costs {
        Costs { small: Cost::new(), huge: Cost::new(), since_trial: AtomicU64::new(0) }
    }

    /// The kind for the next piece. Every piece that is brought in must be reported with [`Costs::add`].
    fn choose(&self) -> PageKind {
        // Small pages first: at their worst they cost as much as huge ones do at theirs.
        let Some(small) = self.small.lately() else { return PageKind::Small };
        let Some(huge) = self.huge.lately() else { return PageKind::Huge };
        let (cheaper, dearer) =
            if huge < small { (PageKind::Huge, PageKind::Small) } else { (PageKind::Small, PageKind::Huge) };
        // A trial is expected to lose the difference, so that all trials together lose a small part of the time.
        let due = PATIENCE * small.abs_diff(huge).max(small.min(huge));
        if self.since_trial.load(Ordering::Relaxed) < due {
            return cheaper;
        }
        self.since_trial.store(0, Ordering::Relaxed);
        dearer
    }

    /// Notes what a piece of that kind took.
    fn add(&self, kind: PageKind, nanoseconds: u64) {
        match kind {
            PageKind::Small => self.small.add(nanoseconds),
            PageKind::Huge => self.huge.add(nanoseconds),
        }
        self.since_trial.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

/// Memory of this process that nobody has written to yet. Only page tables change here, never a byte.
#[derive(Debug)]
pub(crate) struct PagePopulator {
    start: *mut u8,
    length: usize,
    /// What the kernel was told last: a [`PageKind`], or [`NO_ADVICE`].
    advice: AtomicU8,
}

const NO_ADVICE: u8 = u8::MAX;

// SAFETY: an address and a length; all that is done with them leaves every byte as it is.
unsafe impl Send for PagePopulator {}
// SAFETY: as above.
unsafe impl Sync for PagePopulator {}

impl PagePopulator {
    /// For the `length` bytes from `start` on. The kernel's advice stays with these addresses until they are unmapped, so
    /// it is not for memory that belongs to somebody else.
    pub(crate) fn new(start: *mut u8, length: usize) -> PagePopulator {
        PagePopulator { start, length, advice: AtomicU8::new(NO_ADVICE) }
    }

    /// How many bytes there are.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// How far `address` is from the start.
    pub(crate) fn offset(&self, address: *mut u8) -> usize {
        address.addr() - self.start.addr()
    }

    /// Brings in every whole piece that bytes of `part` lie in, before they are written to; pieces that have memory are
    /// left as they are. Returns the end of the last piece: calls for bytes before it have nothing to do.
    pub(crate) fn populate(&self, part: Range<usize>) -> usize {
        // Miri has no pages.
        if part.is_empty() || cfg!(miri) {
            return part.end;
        }
        let first = self.start.align_offset(HUGE_PAGE_BYTES);
        if part.end <= first {
            return first;
        }
        let mut piece = first + part.start.saturating_sub(first) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        while piece < part.end && piece + HUGE_PAGE_BYTES <= self.length {
            // Two threads may meet in a piece that both have a part of: then both bring it in, as two page faults would.
            let start = self.start.wrapping_add(piece);
            if !is_resident(start) {
                self.populate_piece(start);
            }
            piece += HUGE_PAGE_BYTES;
        }
        piece.max(part.end)
    }

    fn populate_piece(&self, piece: *mut u8) {
        let kind = COSTS.choose();
        self.advise(kind);
        let before = processor_time();
        // SAFETY: this call gives pages memory and changes no byte, and the kernel refuses addresses that are not mapped.
        let status = unsafe { libc::madvise(piece.cast(), HUGE_PAGE_BYTES, libc::MADV_POPULATE_WRITE) };
        // Linux before 5.14 refuses: the small pages then come when they are written to.
        if status == 0 {
            COSTS.add(kind, processor_time().saturating_sub(before));
        }
    }

    /// Tells the kernel which kind of pages is wanted from now on. All of the memory is told at once: pieces told apart
    /// would each take a mapping of their own, of which a process has 65,530.
    fn advise(&self, kind: PageKind) {
        if self.advice.swap(kind as u8, Ordering::Relaxed) == kind as u8 {
            return;
        }
        let advice = match kind {
            PageKind::Small => libc::MADV_NOHUGEPAGE,
            PageKind::Huge => libc::MADV_HUGEPAGE,
        };
        let page = page_size();
        let skipped = self.start.align_offset(page);
        let whole = self.length.saturating_sub(skipped) / page * page;
        // SAFETY: this advice changes neither the contents nor the rights of any page, and the kernel refuses it for
        // addresses that are not mapped. Refusal does no harm: the pages are small ones then.
        unsafe { libc::madvise(self.start.wrapping_add(skipped).cast(), whole, advice) };
    }
}

/// Gives back the memory of the whole pages among `length` bytes from `start` on.
///
/// # Safety
///
/// Nobody may read these bytes again: they are zeros from now on, or what they were.
pub(crate) unsafe fn discard(start: *mut u8, length: usize) {
    let page = page_size();
    let skipped = start.align_offset(page);
    let whole = length.saturating_sub(skipped) / page * page;
    if whole > 0 && !cfg!(miri) {
        // SAFETY: the caller vouches for the bytes; refusal (locked memory) leaves them.
        unsafe { libc::madvise(start.wrapping_add(skipped).cast(), whole, libc::MADV_DONTNEED) };
    }
}

/// Whether the page at `address` has memory already, so that writing there takes no page fault.
pub(crate) fn is_resident(address: *mut u8) -> bool {
    let page = address.map_addr(|address| address & !(page_size() - 1));
    let mut resident = 0u8;
    // SAFETY: the kernel only looks, refuses addresses that are not mapped, and writes one byte for one page.
    let status = unsafe { libc::mincore(page.cast(), 1, &raw mut resident) };
    status == 0 && resident & 1 != 0
}

/// How long this thread has had a processor, in nanoseconds: unlike the time of day, it stands still while others have it.
fn processor_time() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one `timespec`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: u64 = 750_000;
    const HUGE: u64 = 250_000;
    /// Of a page, huge or of many small ones, that comes from the host.
    const FROM_HOST: u64 = 4_400_000;

    /// What `pieces` take in all, each of which costs what `cost` says of its number and kind.
    fn simulated(costs: &Costs, pieces: u64, cost: impl Fn(u64, PageKind) -> u64) -> u64 {
        let mut total = 0;
        for piece in 0..pieces {
            let kind = costs.choose();
            let taken = cost(piece, kind);
            costs.add(kind, taken);
            total += taken;
        }
        total
    }

    /// Asserts that `pieces` take hardly longer than those of one kind alone, or of the other.
    fn assert_close_to_the_better(pieces: u64, cost: impl Fn(u64, PageKind) -> u64 + Copy) {
        let alone = |kind| (0..pieces).map(|piece| cost(piece, kind)).sum::<u64>();
        let best = alone(PageKind::Small).min(alone(PageKind::Huge));
        let taken = simulated(&Costs::new(), pieces, cost);
        // One piece of the wrong kind must be tried to know.
        assert!(taken <= best + best / 8 + FROM_HOST, "{taken} ns, where one kind alone takes {best}");
    }

    #[test]
    fn a_machine_with_memory_at_hand_gets_huge_pages() {
        let at_hand = |_, kind| if kind == PageKind::Huge { HUGE } else { SMALL };
        for pieces in [1, 5, 30, 1500] {
            assert_close_to_the_better(pieces, at_hand);
        }
        // Something else holds up every fiftieth piece.
        let disturbed = |piece, kind| if piece % 50 == 49 { FROM_HOST } else { at_hand(piece, kind) };
        assert_close_to_the_better(1500, disturbed);
    }

    #[test]
    fn a_machine_that_gives_free_memory_back_gets_small_pages() {
        let given_back = |_, kind| if kind == PageKind::Huge { FROM_HOST } else { SMALL };
        for pieces in [1, 5, 30, 1500] {
            assert_close_to_the_better(pieces, given_back);
        }
    }

    #[test]
    fn what_changes_is_noticed() {
        // Huge pages are at hand until the host has to give them, and again later.
        let changing = |piece, kind| match (kind, piece / 500) {
            (PageKind::Huge, 1) => FROM_HOST,
            (PageKind::Huge, _) => HUGE,
            (PageKind::Small, _) => SMALL,
        };
        let best = 1000 * HUGE + 500 * SMALL;
        let taken = simulated(&Costs::new(), 1500, changing);
        assert!(taken <= best + best / 8, "{taken} ns, where the best of both takes {best}");
        // Then the small ones come from the host too.
        let used_up =
            |piece, kind| if kind == PageKind::Small && piece > 300 { FROM_HOST + SMALL } else { FROM_HOST };
        assert_close_to_the_better(1500, used_up);
    }

    #[test]
    fn one_load_learns_from_another() {
        let costs = Costs::new();
        let given_back = |_, kind| if kind == PageKind::Huge { FROM_HOST } else { SMALL };
        assert!(simulated(&costs, 2, given_back) >= FROM_HOST);
        assert_eq!(simulated(&costs, 10, given_back), 10 * SMALL);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pages")]
    fn whole_pieces_are_brought_in_and_no_others() {
        let map = memmap2::MmapMut::map_anon(8 * HUGE_PAGE_BYTES).expect("memory");
        let start = map.as_ptr().cast_mut();
        let start = start.wrapping_add(start.align_offset(HUGE_PAGE_BYTES));
        let resident = || -> Vec<usize> {
            (0..7 * HUGE_PAGE_BYTES).step_by(4096).filter(|&at| is_resident(start.wrapping_add(at))).collect()
        };
        let pages = |bytes: Range<usize>| -> Vec<usize> { bytes.step_by(4096).collect() };
        // Neither the first nor the last piece is whole.
        let fresh = PagePopulator::new(start.wrapping_add(5000), 7 * HUGE_PAGE_BYTES - 9000);
        let byte = 2 * HUGE_PAGE_BYTES + 12_345 - 5000;
        let end = fresh.populate(byte..byte + 1);
        if resident().is_empty() {
            return; // Linux before 5.14
        }
        assert_eq!(end, 3 * HUGE_PAGE_BYTES - 5000);
        assert_eq!(resident(), pages(2 * HUGE_PAGE_BYTES..3 * HUGE_PAGE_BYTES));
        fresh.populate(0..7 * HUGE_PAGE_BYTES - 9000);
        assert_eq!(resident(), pages(HUGE_PAGE_BYTES..6 * HUGE_PAGE_BYTES));
        assert!(map.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_page_is_there_once_it_was_written_to() {
        let mut map = memmap2::MmapMut::map_anon(HUGE_PAGE_BYTES).expect("memory");
        let address = map.as_mut_ptr().wrapping_add(123_456);
        assert!(!is_resident(address));
        map[123_000] = 1;
        assert!(is_resident(address));
    }
}
