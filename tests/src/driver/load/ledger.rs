//! What each block of a verified load holds: a stamp in each sector, and a book of which is due.
//!
//! ```text
//! sector: magic, run, sector number, sequence, then 60 words that follow from those
//! ```
//!
//! Invariants: a block has at most one request in flight, so that a read finds exactly the last completed write; a
//! sequence number is used once in a run.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::super::{DriverError, Result};
use super::aim::Aim;

const SECTOR: usize = 512;
const MAGIC: u64 = 0x6576_6165_6c63_2d31;
const BUSY: u64 = 1 << 63;

/// A number that no earlier run has had.
pub(super) fn new_run() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    now ^ COUNT.fetch_add(1, Ordering::Relaxed) << 56 ^ u64::from(std::process::id()) << 32
}

/// What one sector says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    run: u64,
    sector: u64,
    sequence: u64,
}

impl Stamp {
    fn words(self) -> impl Iterator<Item = u64> {
        let mut state = self.run ^ self.sector.rotate_left(24) ^ self.sequence.rotate_left(48);
        let rest = std::iter::repeat_with(move || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            state ^ state >> 29
        });
        [MAGIC, self.run, self.sector, self.sequence].into_iter().chain(rest).take(SECTOR / 8)
    }

    fn fill(self, bytes: &mut [u8]) {
        for (place, word) in bytes.chunks_exact_mut(8).zip(self.words()) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }

    fn is_in(self, bytes: &[u8]) -> bool {
        bytes.chunks_exact(8).zip(self.words()).all(|(place, word)| place == word.to_le_bytes())
    }

    /// What a sector claims to be, if it is stamped at all.
    fn claimed(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| {
            bytes[8 * at..8 * at + 8].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
        };
        (word(0) == MAGIC).then(|| Self { run: word(1), sector: word(2), sequence: word(3) })
    }
}

/// The blocks of one queue: by block, the sequence number of its last write, 0 if this run has not written it.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    run: u64,
    block_size: u32,
    blocks: Vec<u64>,
    sequence: u64,
}

impl Ledger {
    pub(super) fn new(run: u64, block_size: u32, aim: &Aim) -> Self {
        Self { run, block_size, blocks: vec![0; aim.count as usize], sequence: 0 }
    }

    pub(super) fn fits(&self, block_size: u32, aim: &Aim) -> bool {
        self.block_size == block_size && self.blocks.len() as u64 == aim.count
    }

    pub(super) fn is_busy(&self, block: u64) -> bool {
        self.blocks[block as usize] & BUSY != 0
    }

    /// Blocks that this run has written.
    pub fn written(&self) -> u64 {
        self.blocks.iter().filter(|entry| **entry & !BUSY != 0).count() as u64
    }

    pub(super) fn begin_read(&mut self, block: u64) {
        self.blocks[block as usize] |= BUSY;
    }

    /// The content of the next write to `block`, at `sector` of the disk, goes to `bytes`.
    pub(super) fn begin_write(&mut self, block: u64, sector: u64, bytes: &mut [u8]) {
        self.sequence += 1;
        self.blocks[block as usize] = self.sequence | BUSY;
        for (at, place) in bytes.chunks_exact_mut(SECTOR).enumerate() {
            Stamp { run: self.run, sector: sector + at as u64, sequence: self.sequence }.fill(place);
        }
    }

    pub(super) fn end(&mut self, block: u64) {
        self.blocks[block as usize] &= !BUSY;
    }

    /// Whether `bytes`, read from `block`, are what is due; `false`: not known, and nothing in them says otherwise.
    pub(super) fn check(&self, block: u64, sector: u64, bytes: &[u8]) -> Result<bool> {
        let sequence = self.blocks[block as usize] & !BUSY;
        for (at, found) in bytes.chunks_exact(SECTOR).enumerate() {
            let sector = sector + at as u64;
            let claimed = Stamp::claimed(found);
            let due = match claimed {
                _ if sequence != 0 => Stamp { run: self.run, sector, sequence },
                // An earlier run's, or none.
                Some(claimed) if claimed.run != self.run => Stamp { sector, ..claimed },
                Some(_) => return Err(damaged(sector, "this run has not written it, yet it says so")),
                None => continue,
            };
            if !due.is_in(found) {
                let what = match claimed {
                    None => format!("write {sequence} is due, and there is no stamp"),
                    Some(claimed) if claimed == due => format!("the content of write {sequence} is damaged"),
                    Some(claimed) => format!(
                        "write {} of run {:x} to sector {} is there instead of {sequence} of {:x}",
                        claimed.sequence, claimed.run, claimed.sector, self.run
                    ),
                };
                return Err(damaged(sector, &what));
            }
        }
        Ok(sequence != 0)
    }
}

fn damaged(sector: u64, what: &str) -> DriverError {
    DriverError::Damaged { sector, what: what.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger { run: 7, block_size: 4096, blocks: vec![0; 4], sequence: 0 }
    }

    #[test]
    fn the_last_write_is_right_and_nothing_else_is() {
        let mut ledger = ledger();
        let (mut first, mut second) = (vec![0; 4096], vec![0; 4096]);
        ledger.begin_write(1, 8, &mut first);
        ledger.begin_write(1, 8, &mut second);
        ledger.end(1);
        assert!(ledger.check(1, 8, &second).unwrap());
        assert!(ledger.check(1, 8, &first).unwrap_err().to_string().contains("write 1"), "lost");
        let torn = [&second[..1024], &first[1024..]].concat();
        assert!(ledger.check(1, 8, &torn).unwrap_err().to_string().contains("sector 10"), "torn");
        assert!(ledger.check(1, 16, &second).is_err(), "elsewhere");
        second[4095] ^= 1;
        assert!(ledger.check(1, 8, &second).unwrap_err().to_string().contains("damaged"));
    }

    #[test]
    fn blocks_nobody_wrote_are_unknown_unless_they_lie() {
        let mut ledger = ledger();
        assert!(!ledger.check(0, 0, &[0; 4096]).unwrap());
        let mut other = Ledger { run: 6, ..ledger.clone() };
        let mut bytes = vec![0; 4096];
        other.begin_write(0, 0, &mut bytes);
        assert!(!ledger.check(0, 0, &bytes).unwrap(), "an earlier run's");
        assert!(ledger.check(0, 8, &bytes).is_err(), "an earlier run's, of another place");
        ledger.begin_write(1, 8, &mut bytes);
        assert!(ledger.check(0, 8, &bytes).is_err(), "this run's, in a block it has not written");
    }
}
