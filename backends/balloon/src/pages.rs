//! Runs of pages: what a driver names page by page is given back in as few pieces as it makes.

use crate::config_space::PAGE;

/// A range of guest-physical addresses, in bytes. It is not empty and does not wrap around.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Run {
    /// `None` where there would be nothing in it, or its end is no address.
    pub(crate) fn new(start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        (len != 0).then_some(Self { start, end })
    }

    pub(crate) fn len(self) -> u64 {
        self.end - self.start
    }

    /// The whole units of `size` bytes, a power of two, that lie in it.
    pub(crate) fn whole(self, size: u64) -> Option<Self> {
        let start = self.start.checked_next_multiple_of(size)?;
        let end = self.end & !(size - 1);
        (start < end).then_some(Self { start, end })
    }

    /// The units of `size` bytes that have any byte of it.
    pub(crate) fn touched(self, size: u64) -> Self {
        Self { start: self.start & !(size - 1), end: self.end.checked_next_multiple_of(size).unwrap_or(!0) }
    }

    pub(crate) fn intersection(self, other: Self) -> Option<Self> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Self { start, end })
    }

    /// What is left of it without those of `others`, which are in the order of their starts.
    pub(crate) fn without(self, others: &[Self]) -> Vec<Self> {
        let mut left = Vec::new();
        let mut from = self.start;
        for other in others.iter().filter_map(|other| self.intersection(*other)) {
            if from < other.start {
                left.push(Self { start: from, end: other.start });
            }
            from = from.max(other.end);
        }
        if from < self.end {
            left.push(Self { start: from, end: self.end });
        }
        left
    }
}

/// The runs that these page numbers make up; each page counts once. Leaves the numbers in order.
pub(crate) fn runs(pfns: &mut [u32]) -> impl Iterator<Item = Run> {
    pfns.sort_unstable();
    pfns.chunk_by(|a, b| b - a <= 1).map(|chunk| {
        let (first, last) = (u64::from(chunk[0]), u64::from(chunk[chunk.len() - 1]));
        Run { start: first * PAGE, end: (last + 1) * PAGE }
    })
}

/// Most runs that are kept: more are forgotten, which costs only what they would have been good for.
const MOST_RUNS: usize = 1 << 16;

/// Runs in order, of which no two touch.
#[derive(Debug, Default)]
pub(crate) struct RunSet(Vec<Run>);

impl RunSet {
    pub(crate) fn insert(&mut self, run: Run) {
        let first = self.0.partition_point(|other| other.end < run.start);
        let behind = self.0.partition_point(|other| other.start <= run.end);
        let joined = self.0[first..behind]
            .iter()
            .fold(run, |all, other| Run { start: all.start.min(other.start), end: all.end.max(other.end) });
        if first < behind || self.0.len() < MOST_RUNS {
            self.0.splice(first..behind, [joined]);
        }
    }

    pub(crate) fn runs(&self) -> &[Run] {
        &self.0
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.0.iter().map(|run| run.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn run(start: u64, end: u64) -> Run {
        Run { start, end }
    }

    #[test]
    fn neighbours_in_any_order_are_one_run() {
        let mut pfns = [7, 5, 6, 6, 9, 1, u32::MAX];
        let page = |pfn: u64| pfn * PAGE;
        let wanted = [
            run(page(1), page(2)),
            run(page(5), page(8)),
            run(page(9), page(10)),
            run(page(u32::MAX.into()), page(1 << 32)),
        ];
        assert_eq!(runs(&mut pfns).collect::<Vec<_>>(), wanted);
        assert_eq!(runs(&mut []).count(), 0);
    }

    #[test]
    fn whole_units_only_are_in_it_and_all_touched_ones_around() {
        let huge = 2 << 20;
        assert_eq!(run(4096, 3 * huge - 1).whole(huge), Some(run(huge, 2 * huge)));
        assert_eq!(run(4096, huge).whole(huge), None);
        assert_eq!(run(u64::MAX - 4096, u64::MAX).whole(huge), None);
        assert_eq!(run(5000, 5001).touched(4096), run(4096, 8192));
    }

    proptest! {
        #[test]
        fn what_is_taken_out_is_out_and_nothing_else(
            start in 0u64..40, len in 1u64..40, others in prop::collection::vec((0u64..40, 1u64..8), 0..6),
        ) {
            let mut others: Vec<Run> = others.into_iter().map(|(start, len)| run(start, start + len)).collect();
            others.sort_unstable();
            let whole = run(start, start + len);
            let left: BTreeSet<u64> = whole.without(&others).into_iter().flat_map(|run| run.start..run.end).collect();
            let taken = |at: &u64| others.iter().any(|other| (other.start..other.end).contains(at));
            let wanted: BTreeSet<u64> = (whole.start..whole.end).filter(|at| !taken(at)).collect();
            prop_assert_eq!(left, wanted);
        }

        #[test]
        fn a_set_has_what_was_put_in_and_no_two_runs_that_touch(
            put in prop::collection::vec((0u64..100, 1u64..10), 0..30),
        ) {
            let (mut set, mut wanted) = (RunSet::default(), BTreeSet::new());
            for (start, len) in put {
                set.insert(run(start, start + len));
                wanted.extend(start..start + len);
            }
            prop_assert_eq!(set.runs().iter().flat_map(|run| run.start..run.end).collect::<BTreeSet<_>>(), wanted);
            prop_assert!(set.runs().windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
