//! Pages that the guest has put in the balloon and that are not, or not by themselves, given back: they are part of a huge
//! page, or were put in while nothing may be given back.
//!
//! Invariants: a page is here from its inflate request until its deflate request, whether or not it was given back
//! meanwhile; a block without pages is not here, so that an empty balloon costs nothing.

use std::collections::BTreeMap;

use crate::config_space::PAGE;
use crate::pages::Run;

/// A bit a page.
type Bits = Box<[u64]>;

/// Pages by blocks of equal size.
#[derive(Debug)]
pub(crate) struct Held {
    /// Bytes of a block: a power of two, and at least [`Held::SMALLEST_BLOCK`].
    block: u64,
    /// By the address where a block starts.
    blocks: BTreeMap<u64, Bits>,
}

impl Held {
    /// The smallest huge page there is. Blocks of it cost next to nothing where there are no huge pages.
    pub(crate) const SMALLEST_BLOCK: u64 = 2 << 20;

    pub(crate) fn new(block: u64) -> Self {
        Self { block: block.max(Self::SMALLEST_BLOCK), blocks: BTreeMap::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    pub(crate) fn block(&self) -> u64 {
        self.block
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.blocks.values().map(ones).sum::<u64>() * PAGE
    }

    /// Bytes in blocks that are not complete.
    pub(crate) fn incomplete(&self) -> u64 {
        let pages = self.block / PAGE;
        self.blocks.values().map(ones).filter(|count| *count != pages).sum::<u64>() * PAGE
    }

    /// The blocks that `run` is in, each with the pages of it that are the run's.
    fn parts(&self, run: Run) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> + use<> {
        let block = self.block;
        let run = run.touched(PAGE);
        (run.start / block..run.end.div_ceil(block)).map(move |number| {
            let start = number * block;
            let page = |at: u64| (at.clamp(start, start + block) - start) / PAGE;
            (start, page(run.start) as usize..page(run.end) as usize)
        })
    }

    pub(crate) fn insert(&mut self, run: Run) {
        let words = (self.block / PAGE / 64) as usize;
        for (start, pages) in self.parts(run) {
            let bits = self.blocks.entry(start).or_insert_with(|| vec![0; words].into());
            pages.for_each(|page| bits[page / 64] |= 1 << (page % 64));
        }
    }

    pub(crate) fn remove(&mut self, run: Run) {
        if self.is_empty() {
            return;
        }
        for (start, pages) in self.parts(run) {
            let Some(bits) = self.blocks.get_mut(&start) else { continue };
            pages.for_each(|page| bits[page / 64] &= !(1 << (page % 64)));
            if bits.iter().all(|word| *word == 0) {
                self.blocks.remove(&start);
            }
        }
    }

    /// The blocks that `run` is in and of which all pages are here.
    pub(crate) fn complete(&self, run: Run) -> impl Iterator<Item = Run> {
        self.parts(run)
            .map(|(start, _)| start)
            .filter(|start| {
                self.blocks.get(start).is_some_and(|bits| bits.iter().all(|word| *word == u64::MAX))
            })
            .map(|start| Run { start, end: start + self.block })
    }

    /// All that is here, in order.
    pub(crate) fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (start, bits) in &self.blocks {
            let pages = 0..bits.len() * 64;
            for page in pages.filter(|page| bits[page / 64] & 1 << (page % 64) != 0) {
                let at = start + page as u64 * PAGE;
                match runs.last_mut() {
                    Some(last) if last.end == at => last.end += PAGE,
                    _ => runs.push(Run { start: at, end: at + PAGE }),
                }
            }
        }
        runs
    }

    pub(crate) fn clear(&mut self) {
        self.blocks.clear();
    }
}

fn ones(bits: &Bits) -> u64 {
    bits.iter().map(|word| u64::from(word.count_ones())).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const BLOCK: u64 = Held::SMALLEST_BLOCK;

    fn pages(start: u64, count: u64) -> Run {
        Run { start: start * PAGE, end: (start + count) * PAGE }
    }

    #[test]
    fn a_block_is_complete_with_its_last_page_and_not_without_any() {
        let mut held = Held::new(PAGE);
        held.insert(pages(512, 300));
        held.insert(pages(813, 211));
        assert_eq!(held.complete(pages(512, 512)).count(), 0);
        held.insert(pages(812, 1));
        assert_eq!(held.complete(pages(900, 1)).collect::<Vec<_>>(), [Run { start: BLOCK, end: 2 * BLOCK }]);
        held.remove(pages(700, 1));
        assert_eq!(held.complete(pages(512, 512)).count(), 0);
        held.remove(pages(0, 4096));
        assert!(held.is_empty());
    }

    proptest! {
        #[test]
        fn it_has_what_was_put_in_and_not_taken_out(
            steps in prop::collection::vec((any::<bool>(), 0u64..2048, 1u64..700), 0..20),
        ) {
            let (mut held, mut wanted) = (Held::new(BLOCK), BTreeSet::new());
            for (insert, start, count) in steps {
                let run = pages(start, count);
                if insert {
                    held.insert(run);
                    wanted.extend(start..start + count);
                } else {
                    held.remove(run);
                    wanted.retain(|page| !(start..start + count).contains(page));
                }
            }
            prop_assert_eq!(held.len(), wanted.len() as u64 * PAGE);
            let found: BTreeSet<u64> =
                held.runs().into_iter().flat_map(|run| run.start / PAGE..run.end / PAGE).collect();
            prop_assert_eq!(found, wanted);
        }
    }
}
