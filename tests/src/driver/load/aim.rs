//! Which block comes next, and whether it is read or written.

use super::{DriverError, Extent, Ledger, Load, Result};

/// The blocks of one queue: every `stride`-th of the disk from `first` on, `count` of them.
#[derive(Debug, Clone)]
pub struct Aim {
    first: u64,
    stride: u64,
    pub(super) count: u64,
    next: u64,
    /// Blocks that a pass has not come to.
    left: Option<u64>,
    random: bool,
    write_percent: u8,
    state: u64,
}

/// How each of `queues` queues aims. The queues of a verified load have blocks of their own.
pub(super) fn of_queues(load: &Load, sectors: u64, queues: usize) -> Result<Vec<Aim>> {
    let blocks = sectors * 512 / u64::from(load.block_size);
    let apart = load.verify || load.extent == Extent::Pass;
    let stride = if apart { queues as u64 } else { 1 };
    let count = blocks / stride;
    // With all of its blocks in flight a verified queue would have nothing to pick.
    if count <= if load.verify { 2 * u64::from(load.depth) } else { 0 } {
        return Err(DriverError::Daemon(format!(
            "a disk of {} bytes is too small for {} requests of {} bytes on {queues} queues",
            sectors * 512,
            load.depth,
            load.block_size
        )));
    }
    Ok((0..queues as u64)
        .map(|index| Aim {
            first: if apart { index } else { 0 },
            stride,
            count,
            // Sequential streams of several queues are far apart.
            next: if apart { 0 } else { index * count / queues as u64 },
            left: (load.extent == Extent::Pass).then_some(count),
            random: load.random,
            write_percent: load.write_percent,
            state: 0x9e37_79b9_7f4a_7c15 ^ (index + 1) << 17,
        })
        .collect())
}

impl Aim {
    /// The next block, counted within this queue's, and whether to write it. `None`: the pass is over, or nothing can
    /// be picked before something completes.
    pub(super) fn pick(&mut self, ledger: Option<&Ledger>) -> Option<(u64, bool)> {
        let at = if self.left.is_some() || !self.random { self.in_order() } else { self.any() }?;
        let is_busy = |at: u64| ledger.is_some_and(|ledger| ledger.is_busy(at));
        // At most half of them are busy.
        let free = (0..self.count).map(|step| (at + step) % self.count).find(|at| !is_busy(*at))?;
        let write = self.random() % 100 < u64::from(self.write_percent);
        Some((free, write))
    }

    /// The disk's first sector of this queue's block `at`.
    pub(super) fn sector(&self, at: u64, block_size: u32) -> u64 {
        (at * self.stride + self.first) * u64::from(block_size / 512)
    }

    fn in_order(&mut self) -> Option<u64> {
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(1)?;
        }
        let at = self.next;
        self.next = (at + 1) % self.count;
        Some(at)
    }

    fn any(&mut self) -> Option<u64> {
        Some(self.random() % self.count)
    }

    fn random(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state >> 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_of_a_verified_load_share_no_block() {
        let load = Load { verify: true, depth: 4, ..Load::default() };
        let aims = of_queues(&load, 8 * 100, 3).unwrap();
        let sectors =
            aims.iter().flat_map(|aim| (0..aim.count).map(|at| aim.sector(at, 4096))).collect::<Vec<_>>();
        let mut once = sectors.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!((once.len(), once.last()), (99, Some(&(98 * 8))));
        assert_eq!(once.len(), sectors.len());
    }

    #[test]
    fn a_pass_comes_to_each_block_once() {
        let load = Load { extent: Extent::Pass, ..Load::default() };
        let mut aim = of_queues(&load, 8 * 10, 1).unwrap().remove(0);
        let picked: Vec<u64> = std::iter::from_fn(|| aim.pick(None)).map(|(at, _)| at).collect();
        assert_eq!(picked, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn so_many_of_a_hundred_are_writes() {
        let load = Load { write_percent: 30, ..Load::default() };
        let mut aim = of_queues(&load, 8 * 1000, 1).unwrap().remove(0);
        let writes = (0..10_000).filter(|_| aim.pick(None).unwrap().1).count();
        assert!((2700..3300).contains(&writes), "{writes}");
    }

    #[test]
    fn a_disk_that_is_too_small_is_refused() {
        let load = Load { verify: true, depth: 32, ..Load::default() };
        assert!(of_queues(&load, 8 * 64, 1).is_err());
        assert!(of_queues(&load, 8 * 65, 1).is_ok());
    }
}
