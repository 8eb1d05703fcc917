//! Work on all pages of guest memory, by several threads: taking them from the host, or making huge ones of them.
//!
//! Nearly all of it is the kernel clearing pages, so the host's CPUs share it, and a machine starts that much sooner. The
//! caller is one of the threads; between its pieces it tells how far they all are and hears whether to go on.

use std::ops::{ControlFlow, Range};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder, available_parallelism, scope};

use super::MappedRegion;
use super::mapping::{self, HUGE_PAGE};

/// Threads that do it unless somebody says how many: more find the memory's bandwidth used up.
const USUAL_THREADS: usize = 8;

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes taken.
    pub done: u64,
    /// Bytes there are to take.
    pub total: u64,
}

/// Hears how far it is; a break ends it.
pub type Watch<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// How pages are taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Taking {
    /// Bytes of the file's pages.
    pub page_size: u64,
    /// Whether to make transparent huge pages.
    pub collapse: bool,
    pub threads: Option<usize>,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Taken {
    /// Bytes that were to be in transparent huge pages and are not.
    pub small: u64,
    pub stopped: bool,
}

/// Takes every page of `regions`.
pub(super) fn take(regions: &[MappedRegion], taking: Taking, watch: Watch<'_>) -> std::io::Result<Taken> {
    let ranges = regions.iter().map(|region| region.host_address..region.host_address + region.size);
    let pieces = Pieces { ranges: ranges.collect(), size: taking.page_size.max(HUGE_PAGE) };
    let small = AtomicU64::new(0);
    let gives_huge = AtomicBool::new(taking.collapse);
    let work = |piece: Range<u64>| {
        let len = piece.end - piece.start;
        if taking.collapse {
            let done = gives_huge.load(Ordering::Relaxed)
                && len == HUGE_PAGE
                && collapse_piece(piece.start, &gives_huge);
            if !done {
                small.fetch_add(len, Ordering::Relaxed);
            }
        }
        mapping::populate(piece.start, len)
    };
    let result = each(&pieces, threads(taking.threads, &pieces), &work, watch)?;
    Ok(Taken { small: small.into_inner(), stopped: result.is_break() })
}

/// Makes whole huge pages of what lies in `range`, an offset into `region`, as far as the host can.
pub(super) fn collapse(region: &MappedRegion, range: Range<u64>) {
    let start = range.start - range.start % HUGE_PAGE;
    let end = range.end.next_multiple_of(HUGE_PAGE).min(region.size - region.size % HUGE_PAGE);
    if start >= end {
        return;
    }
    let all = region.host_address + start..region.host_address + end;
    let pieces = Pieces { ranges: vec![all], size: HUGE_PAGE };
    let gives_huge = AtomicBool::new(true);
    let work = |piece: Range<u64>| -> Result<(), ()> {
        collapse_piece(piece.start, &gives_huge);
        // What one page cannot have, the next will not get either.
        gives_huge.load(Ordering::Relaxed).then_some(()).ok_or(())
    };
    let _ = each(&pieces, threads(None, &pieces), &work, &mut |_| ControlFlow::Continue(()));
}

/// Makes one huge page, unless the host has none. A page that is only busy says nothing about others.
fn collapse_piece(address: u64, gives_huge: &AtomicBool) -> bool {
    match mapping::collapse_page(address) {
        Ok(()) => true,
        Err(error) => {
            if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) {
                tracing::debug!("guest memory stays in small pages: {error}");
                gives_huge.store(false, Ordering::Relaxed);
            }
            false
        }
    }
}

fn threads(asked: Option<usize>, pieces: &Pieces) -> usize {
    let usual = || available_parallelism().map_or(1, usize::from).min(USUAL_THREADS);
    asked.unwrap_or_else(usual).clamp(1, usize::try_from(pieces.count()).unwrap_or(usize::MAX).max(1))
}

/// Address ranges, in pieces of one size; the last one of a range may be smaller.
struct Pieces {
    ranges: Vec<Range<u64>>,
    size: u64,
}

impl Pieces {
    fn count(&self) -> u64 {
        self.ranges.iter().map(|range| (range.end - range.start).div_ceil(self.size)).sum()
    }

    fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    fn get(&self, mut index: u64) -> Option<Range<u64>> {
        for range in &self.ranges {
            let count = (range.end - range.start).div_ceil(self.size);
            if index < count {
                let start = range.start + index * self.size;
                return Some(start..range.end.min(start + self.size));
            }
            index -= count;
        }
        None
    }
}

/// Has `work` done on every piece. The first error ends it, and so does a break of `watch`'s.
fn each<E: Send>(
    pieces: &Pieces,
    threads: usize,
    work: &(dyn Fn(Range<u64>) -> Result<(), E> + Sync),
    watch: Watch<'_>,
) -> Result<ControlFlow<()>, E> {
    let next = AtomicU64::new(0);
    let done = AtomicU64::new(0);
    let end = AtomicBool::new(false);
    let failure = Mutex::new(None);
    // One piece; false when there is no more to do.
    let step = || {
        if end.load(Ordering::Relaxed) {
            return false;
        }
        let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) else { return false };
        let len = piece.end - piece.start;
        if let Err(error) = work(piece) {
            end.store(true, Ordering::Relaxed);
            failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(error);
            return false;
        }
        done.fetch_add(len, Ordering::Relaxed);
        true
    };
    let mut flow = ControlFlow::Continue(());
    scope(|scope| {
        for _ in 1..threads {
            // A host that gives no thread leaves the work to the others.
            let _ = Builder::new().name("prefault".to_owned()).spawn_scoped(scope, || while step() {});
        }
        while step() {
            let progress = Progress { done: done.load(Ordering::Relaxed), total: pieces.bytes() };
            flow = watch(progress);
            if flow.is_break() {
                end.store(true, Ordering::Relaxed);
            }
        }
    });
    match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(flow),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON: ControlFlow<()> = ControlFlow::Continue(());

    fn pieces() -> Pieces {
        Pieces { ranges: vec![0..10, 100..100, 200..205], size: 4 }
    }

    #[test]
    fn pieces_cover_every_range_once() {
        let all: Vec<_> = (0..).map_while(|index| pieces().get(index)).collect();
        assert_eq!(all, [0..4, 4..8, 8..10, 200..204, 204..205]);
        assert_eq!((pieces().count(), pieces().bytes()), (5, 15));
    }

    #[test]
    fn every_piece_is_worked_on_once_whatever_the_threads() {
        for threads in [1, 2, 7] {
            let seen = Mutex::new(Vec::new());
            let work = |piece: Range<u64>| -> Result<(), ()> {
                seen.lock().unwrap().push(piece.start);
                Ok(())
            };
            assert_eq!(each(&pieces(), threads, &work, &mut |_| ON), Ok(ON));
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            assert_eq!(seen, [0, 4, 8, 200, 204]);
        }
    }

    #[test]
    fn one_thread_tells_after_every_piece_and_ends_when_told() {
        let mut heard = Vec::new();
        let mut watch = |progress: Progress| {
            heard.push(progress.done);
            if progress.done == 8 { ControlFlow::Break(()) } else { ON }
        };
        let result = each(&pieces(), 1, &|_| Ok::<(), ()>(()), &mut watch);
        assert_eq!((result, heard), (Ok(ControlFlow::Break(())), vec![4, 8]));
    }

    #[test]
    fn the_first_error_ends_it() {
        let count = AtomicU64::new(0);
        let work = |piece: Range<u64>| {
            count.fetch_add(1, Ordering::Relaxed);
            if piece.start == 4 { Err("no memory") } else { Ok(()) }
        };
        assert_eq!(each(&pieces(), 1, &work, &mut |_| ON), Err("no memory"));
        assert_eq!(count.into_inner(), 2);
    }

    #[test]
    fn threads_are_as_many_as_there_is_work_for() {
        assert_eq!(threads(Some(64), &pieces()), 5);
        assert_eq!(threads(Some(2), &pieces()), 2);
        assert!((1..=USUAL_THREADS).contains(&threads(None, &pieces())));
        assert_eq!(threads(None, &Pieces { ranges: Vec::new(), size: 4 }), 1);
    }
}
