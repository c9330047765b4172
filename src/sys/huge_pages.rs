//! Populates fresh memory, with huge or small pages, whichever cost less.
//!
//! Huge pages are cheaper if the machine has free memory. They are several times more expensive if a hypervisor reclaims
//! free memory: it takes whole huge pages, and each must come back from the host, while small pages come from fragments
//! that the guest kept. This varies between machines and over time. So memory is populated in pieces of the size of a huge
//! page, right before they are written; each piece is timed, and the next one uses the kind of page that was cheaper.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::sys::page_cache::page_size;

/// The size of a huge page on x86-64, and on arm64 with base pages of 4 KiB; the unit of populating.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// The more expensive kind is tried again after this many times the expected cost of the trial.
const TRIAL_INTERVAL: u64 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageKind {
    Small,
    Huge,
}

/// The recent processor time per piece of either kind, in nanoseconds.
#[derive(Debug)]
struct Costs {
    small: Cost,
    huge: Cost,
    /// The time of all pieces since the last trial of the more expensive kind.
    since_trial: AtomicU64,
}

/// The times of the last two pieces of one kind: 32 bits each, 0 for none.
#[derive(Debug)]
struct Cost(AtomicU64);

/// Shared by the process: the next load uses what the last one measured.
static COSTS: Costs = Costs::new();

impl Cost {
    /// Returns the smaller of the last two times, to ignore a single disturbed piece.
    fn recent(&self) -> Option<u64> {
        let both = self.0.load(Ordering::Relaxed);
        let (last, before) = (both & u64::from(u32::MAX), both >> 32);
        if before == 0 { (last != 0).then_some(last) } else { Some(last.min(before)) }
    }

    fn add(&self, nanoseconds: u64) {
        let last = nanoseconds.clamp(1, u64::from(u32::MAX));
        // Two threads at once may lose one measurement, which is harmless.
        let before = self.0.load(Ordering::Relaxed) << 32;
        self.0.store(before | last, Ordering::Relaxed);
    }
}

impl Costs {
    const fn new() -> Costs {
        Costs {
            small: Cost(AtomicU64::new(0)),
            huge: Cost(AtomicU64::new(0)),
            since_trial: AtomicU64::new(0),
        }
    }

    /// Returns the kind for the next piece. Report its time with [`Costs::add`].
    fn choose(&self) -> PageKind {
        // Small pages first: their worst case costs no more than that of huge pages.
        let Some(small) = self.small.recent() else { return PageKind::Small };
        let Some(huge) = self.huge.recent() else { return PageKind::Huge };
        let (cheaper, costlier) =
            if huge < small { (PageKind::Huge, PageKind::Small) } else { (PageKind::Small, PageKind::Huge) };
        // A trial is expected to cost the difference, so all trials together cost a small part of the time.
        let due = TRIAL_INTERVAL * small.abs_diff(huge).max(small.min(huge));
        let since_trial = self.since_trial.load(Ordering::Relaxed);
        // Only one of several threads makes the trial.
        let is_due = since_trial >= due
            && self
                .since_trial
                .compare_exchange(since_trial, 0, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if is_due { costlier } else { cheaper }
    }

    fn add(&self, kind: PageKind, nanoseconds: u64) {
        match kind {
            PageKind::Small => self.small.add(nanoseconds),
            PageKind::Huge => self.huge.add(nanoseconds),
        }
        self.since_trial.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

/// Memory of this process that has not been written yet. Changes page tables, never contents.
#[derive(Debug)]
pub(crate) struct PagePopulator {
    start: *mut u8,
    length: usize,
    /// The last advice to the kernel: a [`PageKind`], or [`NO_ADVICE`].
    advice: AtomicU8,
}

const NO_ADVICE: u8 = u8::MAX;

// SAFETY: the address is only passed to madvise and mincore, which change no byte and check that it is mapped.
unsafe impl Send for PagePopulator {}
// SAFETY: as above.
unsafe impl Sync for PagePopulator {}

impl PagePopulator {
    /// Returns a populator for `length` bytes at `start`. The kernel keeps its advice until they are unmapped, so they must
    /// not belong to an allocator.
    pub(crate) fn new(start: *mut u8, length: usize) -> PagePopulator {
        PagePopulator { start, length, advice: AtomicU8::new(NO_ADVICE) }
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// Returns the offset of `address` from the start.
    pub(crate) fn offset(&self, address: *mut u8) -> usize {
        address.addr() - self.start.addr()
    }

    /// Populates the whole pieces that contain bytes of `part`, except resident ones. Returns the end of the last piece;
    /// calls for bytes before it have no effect.
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
            // Two threads may populate the same piece, which is harmless, like two page faults.
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
        // SAFETY: MADV_POPULATE_WRITE changes no byte, and the kernel refuses addresses that are not mapped.
        let status = unsafe { libc::madvise(piece.cast(), HUGE_PAGE_BYTES, libc::MADV_POPULATE_WRITE) };
        // Linux before 5.14 refuses; the pages then come with the writes.
        let time = processor_time().saturating_sub(before);
        // Another thread may have changed the advice for the memory, and so the kind of these pages.
        if status == 0 && self.advice.load(Ordering::Relaxed) == kind as u8 {
            COSTS.add(kind, time);
        }
    }

    /// Sets the kind of pages for all of the memory. Different advice for single pieces would split the mapping, and a
    /// process may have only 65,530.
    fn advise(&self, kind: PageKind) {
        if self.advice.swap(kind as u8, Ordering::Relaxed) == kind as u8 {
            return;
        }
        let advice = match kind {
            PageKind::Small => libc::MADV_NOHUGEPAGE,
            PageKind::Huge => libc::MADV_HUGEPAGE,
        };
        let (skipped, length) = whole_pages(self.start, self.length);
        // SAFETY: this advice changes no byte and no access right, and the kernel refuses addresses that are not mapped.
        // Without it the pages are small.
        unsafe { libc::madvise(self.start.wrapping_add(skipped).cast(), length, advice) };
    }
}

/// Returns the offset and the length of the whole pages among `length` bytes at `start`.
fn whole_pages(start: *mut u8, length: usize) -> (usize, usize) {
    let page = page_size();
    let skipped = start.align_offset(page);
    (skipped, length.saturating_sub(skipped) / page * page)
}

/// Releases the memory of the whole pages among `length` bytes at `start`.
///
/// # Safety
///
/// Nobody may read these bytes again before writing them: they become zeros, or stay.
pub(crate) unsafe fn discard(start: *mut u8, length: usize) {
    let (skipped, length) = whole_pages(start, length);
    if length > 0 && !cfg!(miri) {
        // SAFETY: the pages lie inside the bytes that nobody reads again by this function's contract, so no bytes of others
        // change. The kernel refuses locked memory, which then stays.
        unsafe { libc::madvise(start.wrapping_add(skipped).cast(), length, libc::MADV_DONTNEED) };
    }
}

/// Returns whether the page at `address` is resident, so that a write takes no page fault.
pub(crate) fn is_resident(address: *mut u8) -> bool {
    let page = address.map_addr(|address| address & !(page_size() - 1));
    let mut resident = 0u8;
    // SAFETY: mincore does not access the page, refuses addresses that are not mapped, and writes one byte for one page.
    let status = unsafe { libc::mincore(page.cast(), 1, &raw mut resident) };
    status == 0 && resident & 1 != 0
}

/// Returns the processor time of this thread in nanoseconds, which does not advance while other threads run.
fn processor_time() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists, and the call writes one `timespec`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: u64 = 750_000;
    const HUGE: u64 = 250_000;
    /// The time of a piece whose memory comes from the host.
    const FROM_HOST: u64 = 4_400_000;

    /// Returns the total time of `pieces`; `cost` returns the time of one by its number and kind.
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

    /// Asserts that `pieces` take hardly longer than with the better of the two kinds alone.
    fn assert_close_to_the_better(pieces: u64, cost: impl Fn(u64, PageKind) -> u64 + Copy) {
        let alone = |kind| (0..pieces).map(|piece| cost(piece, kind)).sum::<u64>();
        let best = alone(PageKind::Small).min(alone(PageKind::Huge));
        let taken = simulated(&Costs::new(), pieces, cost);
        // One piece of the wrong kind must be tried.
        assert!(taken <= best + best / 8 + FROM_HOST, "{taken} ns, where one kind alone takes {best}");
    }

    #[test]
    fn free_memory_gets_huge_pages() {
        let free = |_, kind| if kind == PageKind::Huge { HUGE } else { SMALL };
        for pieces in [1, 5, 30, 1500] {
            assert_close_to_the_better(pieces, free);
        }
        // Something else delays every fiftieth piece.
        let disturbed = |piece, kind| if piece % 50 == 49 { FROM_HOST } else { free(piece, kind) };
        assert_close_to_the_better(1500, disturbed);
    }

    #[test]
    fn reclaimed_memory_gets_small_pages() {
        let reclaimed = |_, kind| if kind == PageKind::Huge { FROM_HOST } else { SMALL };
        for pieces in [1, 5, 30, 1500] {
            assert_close_to_the_better(pieces, reclaimed);
        }
    }

    #[test]
    fn a_change_of_costs_is_noticed() {
        // Huge pages are free, then come from the host, then are free again.
        let changing = |piece, kind| match (kind, piece / 500) {
            (PageKind::Huge, 1) => FROM_HOST,
            (PageKind::Huge, _) => HUGE,
            (PageKind::Small, _) => SMALL,
        };
        let best = 1000 * HUGE + 500 * SMALL;
        let taken = simulated(&Costs::new(), 1500, changing);
        assert!(taken <= best + best / 8, "{taken} ns, where the best of both takes {best}");
        // Then small pages come from the host too.
        let used_up =
            |piece, kind| if kind == PageKind::Small && piece > 300 { FROM_HOST + SMALL } else { FROM_HOST };
        assert_close_to_the_better(1500, used_up);
    }

    #[test]
    fn a_load_uses_the_measurements_of_the_previous_one() {
        let costs = Costs::new();
        let reclaimed = |_, kind| if kind == PageKind::Huge { FROM_HOST } else { SMALL };
        assert!(simulated(&costs, 2, reclaimed) >= FROM_HOST);
        assert_eq!(simulated(&costs, 10, reclaimed), 10 * SMALL);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pages")]
    fn only_whole_pieces_are_populated() {
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
    fn a_page_is_resident_after_a_write() {
        let mut map = memmap2::MmapMut::map_anon(HUGE_PAGE_BYTES).expect("memory");
        let address = map.as_mut_ptr().wrapping_add(123_456);
        assert!(!is_resident(address));
        map[123_000] = 1;
        assert!(is_resident(address));
    }
}
