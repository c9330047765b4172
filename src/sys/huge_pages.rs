//! Populates fresh memory, with huge or small pages, whichever cost less.
//!
//! Huge pages are cheaper if the machine has free memory. They are several times more expensive if a hypervisor reclaims
//! free memory: it takes whole huge pages, and each must come back from the host, while small pages come from fragments
//! that the guest kept. This varies between machines and over time. So memory is populated in pieces of the size of a huge
//! page, right before they are written; each piece is timed, and the next one uses the kind of page that was cheaper. Now and
//! then one thread tries the other kind with a single piece.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use memmap2::{MmapMut, MmapRaw};

use crate::sys::mutex::Mutex;
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
    /// Whether a thread is trying the other kind.
    is_trying: AtomicBool,
}

/// The kind of page for a piece.
#[derive(Clone, Copy, Debug)]
struct Choice {
    kind: PageKind,
    /// The kind of the pieces that other threads populate at this time; another one if this piece is a trial.
    of_others: PageKind,
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
            is_trying: AtomicBool::new(false),
        }
    }

    /// Returns the kind that was cheaper recently.
    fn cheaper(&self) -> PageKind {
        match (self.small.recent(), self.huge.recent()) {
            (Some(small), Some(huge)) if huge < small => PageKind::Huge,
            // Small pages first: their worst case costs no more than that of huge pages.
            _ => PageKind::Small,
        }
    }

    /// Returns the kind for the next piece. Report its time with [`Costs::add`].
    fn choose(&self) -> Choice {
        let (small, huge) = (self.small.recent(), self.huge.recent());
        let cheaper = self.cheaper();
        let costlier = if cheaper == PageKind::Small { PageKind::Huge } else { PageKind::Small };
        let is_due = match (small, huge) {
            (None, _) => false,
            (_, None) => true,
            // A trial is expected to cost the difference, so all trials together cost a small part of the time.
            (Some(small), Some(huge)) => {
                let due = TRIAL_INTERVAL * small.abs_diff(huge).max(small.min(huge));
                self.since_trial.load(Ordering::Relaxed) >= due
            }
        };
        let is_trial = is_due && !self.is_trying.swap(true, Ordering::Relaxed);
        Choice { kind: if is_trial { costlier } else { cheaper }, of_others: cheaper }
    }

    /// Adds the time of a piece, `None` if it is not known which kind it got.
    fn add(&self, choice: Choice, nanoseconds: Option<u64>) {
        if let Some(nanoseconds) = nanoseconds {
            match choice.kind {
                PageKind::Small => self.small.add(nanoseconds),
                PageKind::Huge => self.huge.add(nanoseconds),
            }
            self.since_trial.fetch_add(nanoseconds, Ordering::Relaxed);
        }
        if choice.kind != choice.of_others {
            self.since_trial.store(0, Ordering::Relaxed);
            self.is_trying.store(false, Ordering::Relaxed);
        }
    }
}

/// Memory of this process that has not been written yet. Changes page tables, never contents.
#[derive(Debug)]
pub(crate) struct PagePopulator {
    start: *mut u8,
    length: usize,
    advice: Mutex<Advice>,
}

/// The advice to the kernel for all of the memory.
#[derive(Debug, Default)]
struct Advice {
    kind: Option<PageKind>,
    changes: u32,
}

// SAFETY: the address is only passed to madvise and mincore, which change no byte and check that it is mapped.
unsafe impl Send for PagePopulator {}
// SAFETY: as above.
unsafe impl Sync for PagePopulator {}

impl PagePopulator {
    /// Returns a populator for `length` bytes at `start`. The kernel keeps its advice until they are unmapped, so they must
    /// not belong to an allocator.
    pub(crate) fn new(start: *mut u8, length: usize) -> PagePopulator {
        PagePopulator { start, length, advice: Mutex::default() }
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
        let choice = COSTS.choose();
        COSTS.add(choice, self.populate_with(choice, piece));
    }

    /// Populates a piece. Returns the time, or `None` if it is not known which kind of pages it got.
    fn populate_with(&self, choice: Choice, piece: *mut u8) -> Option<u64> {
        let changes = self.advise_all(choice.of_others);
        let is_trial = choice.kind != choice.of_others;
        if is_trial {
            advise(piece, HUGE_PAGE_BYTES, choice.kind);
        }
        let before = processor_time();
        // SAFETY: MADV_POPULATE_WRITE changes no byte, and the kernel refuses addresses that are not mapped.
        let status = unsafe { libc::madvise(piece.cast(), HUGE_PAGE_BYTES, libc::MADV_POPULATE_WRITE) };
        let time = processor_time().saturating_sub(before);
        if is_trial {
            // Different advice splits the mapping, and a process may have only 65,530.
            advise(piece, HUGE_PAGE_BYTES, choice.of_others);
        }
        // Linux before 5.14 refuses; the pages then come with the writes. Another thread may have changed the advice.
        (status == 0 && self.advice.lock().changes == changes).then_some(time)
    }

    /// Sets the kind of pages for all of the memory. Returns how often it has changed.
    fn advise_all(&self, kind: PageKind) -> u32 {
        let mut advice = self.advice.lock();
        if advice.kind != Some(kind) {
            let (skipped, length) = whole_pages(self.start, self.length);
            advise(self.start.wrapping_add(skipped), length, kind);
            *advice = Advice { kind: Some(kind), changes: advice.changes + 1 };
        }
        advice.changes
    }
}

/// Returns whether huge pages were tried and cost more than small ones, so that fresh memory has small pages.
pub(crate) fn are_expensive() -> bool {
    COSTS.huge.recent().is_some() && COSTS.cheaper() == PageKind::Small
}

/// Memory of the size of a huge page, aligned to it; one huge page if the machine has one. Never populated by itself.
#[derive(Debug)]
pub(crate) struct HugePage {
    map: MmapRaw,
    skipped: usize,
}

impl HugePage {
    /// Returns `None` if there is not enough memory.
    pub(crate) fn new() -> Option<HugePage> {
        // Leaves room to align the start. Untouched pages use no memory.
        let map = MmapRaw::from(MmapMut::map_anon(2 * HUGE_PAGE_BYTES).ok()?);
        let page = HugePage { skipped: map.as_ptr().align_offset(HUGE_PAGE_BYTES), map };
        advise(page.start(), HUGE_PAGE_BYTES, PageKind::Huge);
        Some(page)
    }

    /// Returns the address of the first byte. [`HUGE_PAGE_BYTES`] bytes are valid there, as long as the page lives.
    pub(crate) fn start(&self) -> *mut u8 {
        self.map.as_mut_ptr().wrapping_add(self.skipped)
    }
}

/// Sets the kind of pages for whole pages from `start` on.
fn advise(start: *mut u8, length: usize, kind: PageKind) {
    let advice = match kind {
        PageKind::Small => libc::MADV_NOHUGEPAGE,
        PageKind::Huge => libc::MADV_HUGEPAGE,
    };
    // SAFETY: this advice changes no byte and no access right, and the kernel refuses addresses that are not mapped. Without
    // it the pages are small.
    unsafe { libc::madvise(start.cast(), length, advice) };
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
            let choice = costs.choose();
            let taken = cost(piece, choice.kind);
            costs.add(choice, Some(taken));
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
    fn only_one_thread_tries_the_other_kind() {
        let costs = Costs::new();
        let measured = costs.choose();
        costs.add(measured, Some(SMALL));
        let trial = costs.choose();
        assert_eq!((trial.kind, trial.of_others), (PageKind::Huge, PageKind::Small));
        for _ in 0..16 {
            let other = costs.choose();
            assert_eq!((other.kind, other.of_others), (PageKind::Small, PageKind::Small));
            costs.add(other, Some(SMALL));
        }
        // It is not known which kind of page the trial got.
        costs.add(trial, None);
        let trial = costs.choose();
        assert_eq!(trial.kind, PageKind::Huge);
        costs.add(trial, Some(HUGE));
        let next = costs.choose();
        assert_eq!((next.kind, next.of_others), (PageKind::Huge, PageKind::Huge));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pages")]
    fn trials_do_not_split_the_mapping() {
        let map = memmap2::MmapMut::map_anon(64 * HUGE_PAGE_BYTES).expect("memory");
        let memory = map.as_ptr().addr()..map.as_ptr().addr() + map.len();
        let fresh = PagePopulator::new(map.as_ptr().cast_mut(), map.len());
        let first = map.as_ptr().cast_mut().wrapping_add(map.as_ptr().align_offset(HUGE_PAGE_BYTES));
        for number in 0..63 {
            let kind = if number % 2 == 0 { PageKind::Huge } else { PageKind::Small };
            let choice = Choice { kind, of_others: PageKind::Huge };
            let time = fresh.populate_with(choice, first.wrapping_add(number * HUGE_PAGE_BYTES));
            // Linux before 5.14 does not populate.
            assert_eq!(time.is_some(), is_resident(first));
        }
        let maps = std::fs::read_to_string("/proc/self/maps").expect("the mappings of this process");
        let starts = maps.lines().map(|line| line.split('-').next().expect("an address"));
        let starts = starts.map(|start| usize::from_str_radix(start, 16).expect("an address"));
        let inside = starts.filter(|start| memory.contains(start) && *start > memory.start).count();
        assert_eq!(inside, 0, "{maps}");
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
