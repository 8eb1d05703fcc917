//! Which port an address is at: learned from frames' sources, forgotten when none came for a while (IEEE 802.1D, 7.8 and
//! 7.9).
//!
//! ```text
//!   unknown --a frame from it--> at a port --a frame from it at another--> at that port
//!                                    `--none for the ageing time--> unknown
//! ```
//!
//! Invariants: no port has more addresses than its share, so that none can fill the table for others; one whose share is
//! full learns no more until some of its addresses are old, and frames to what is not known go to everybody.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

/// Addresses at a port with a guest: more than interfaces, for a guest may be a router or a bridge itself.
pub(crate) const GUESTS_SHARE: usize = 256;

/// Addresses at a port with a whole network behind it.
pub(crate) const UPLINKS_SHARE: usize = 4096;

/// Time since the switch started.
pub(crate) type Now = Duration;

/// The table is searched for old addresses no more often than this.
const SWEEP: Duration = Duration::from_secs(1);

/// How long a thread may go on with what it has looked up, in which time only changes count.
const TRUST: Duration = Duration::from_secs(1);

pub(crate) type Address = [u8; 6];

#[derive(Debug)]
struct Entry {
    port: usize,
    /// Milliseconds, as [`Now`].
    seen: AtomicU64,
}

#[derive(Debug, Default)]
struct Entries {
    by_address: HashMap<Address, Entry>,
    /// By port, how many there are.
    counts: Vec<usize>,
    swept: Now,
}

#[derive(Debug)]
pub(crate) struct Table {
    ageing: Duration,
    /// By port.
    shares: Vec<usize>,
    entries: RwLock<Entries>,
    /// Moves on when an address comes to a port, or leaves it.
    version: AtomicU64,
}

/// What one thread has looked up last.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    learned: Option<(Address, u64, Now)>,
    found: Option<(Address, Option<usize>, u64, Now)>,
}

impl Table {
    pub(crate) fn new(shares: Vec<usize>, ageing: Duration) -> Self {
        let entries = Entries { counts: vec![0; shares.len()], ..Entries::default() };
        Self { ageing, shares, entries: RwLock::new(entries), version: AtomicU64::new(0) }
    }

    /// How many addresses are at each port.
    pub(crate) fn counts(&self) -> Vec<usize> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).counts.clone()
    }

    /// A frame from `address` has come in at `port`.
    pub(crate) fn learn(&self, now: Now, address: Address, port: usize, recent: &mut Recent) {
        // A group sends nothing, nor does nobody.
        if address[0] & 1 == 1 || address == [0; 6] {
            return;
        }
        let version = self.version.load(Ordering::Acquire);
        if let Some((known, at, since)) = recent.learned
            && (known, at) == (address, version)
            && now < since + TRUST
        {
            return;
        }
        if !self.see_again(now, &address, port) {
            self.put(now, address, port);
        }
        recent.learned = Some((address, self.version.load(Ordering::Acquire), now));
    }

    fn see_again(&self, now: Now, address: &Address, port: usize) -> bool {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.by_address.get(address).filter(|entry| entry.port == port);
        entry.map(|entry| entry.seen.store(millis(now), Ordering::Relaxed)).is_some()
    }

    fn put(&self, now: Now, address: Address, port: usize) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let entries = &mut *entries;
        if entries.counts[port] >= self.shares[port] {
            self.sweep(now, entries);
        }
        if entries.counts[port] >= self.shares[port] {
            return;
        }
        let entry = Entry { port, seen: AtomicU64::new(millis(now)) };
        if let Some(before) = entries.by_address.insert(address, entry) {
            entries.counts[before.port] -= 1;
        }
        entries.counts[port] += 1;
        self.version.fetch_add(1, Ordering::Release);
    }

    fn sweep(&self, now: Now, entries: &mut Entries) {
        if now < entries.swept + SWEEP {
            return;
        }
        entries.swept = now;
        let counts = &mut entries.counts;
        entries.by_address.retain(|_, entry| {
            let stays = !self.is_old(now, entry);
            if !stays {
                counts[entry.port] -= 1;
            }
            stays
        });
        self.version.fetch_add(1, Ordering::Release);
    }

    fn is_old(&self, now: Now, entry: &Entry) -> bool {
        now.saturating_sub(Duration::from_millis(entry.seen.load(Ordering::Relaxed))) > self.ageing
    }

    /// The port that `address` is at, if that is known.
    pub(crate) fn find(&self, now: Now, address: Address, recent: &mut Recent) -> Option<usize> {
        let version = self.version.load(Ordering::Acquire);
        if let Some((known, port, at, since)) = recent.found
            && (known, at) == (address, version)
            && now < since + TRUST
        {
            return port;
        }
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.by_address.get(&address).filter(|entry| !self.is_old(now, entry));
        let port = entry.map(|entry| entry.port);
        recent.found = Some((address, port, version, now));
        port
    }
}

fn millis(now: Now) -> u64 {
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u16) -> Address {
        let [high, low] = number.to_be_bytes();
        [2, 0, 0, 0, high, low]
    }

    fn seconds(count: u64) -> Now {
        Duration::from_secs(count)
    }

    fn table() -> Table {
        Table::new(vec![4, 4, 100], seconds(300))
    }

    #[test]
    fn an_address_is_where_it_was_last_and_is_forgotten_in_time() {
        let table = table();
        let (mut a, mut b) = (Recent::default(), Recent::default());
        assert_eq!(table.find(seconds(0), address(1), &mut b), None);
        table.learn(seconds(0), address(1), 0, &mut a);
        assert_eq!(table.find(seconds(0), address(1), &mut b), Some(0));
        // It moves, and what was looked up before is not trusted any more.
        table.learn(seconds(0), address(1), 1, &mut b);
        assert_eq!(table.find(seconds(0), address(1), &mut b), Some(1));
        table.learn(seconds(0), address(1), 0, &mut a);
        assert_eq!(table.find(seconds(0), address(1), &mut b), Some(0));
        assert_eq!(table.counts(), [1, 0, 0]);
        // Frames keep it; a thread that trusts its own memory says so once a second.
        for second in 1..400 {
            table.learn(seconds(second), address(1), 0, &mut a);
        }
        assert_eq!(table.find(seconds(699), address(1), &mut b), Some(0));
        assert_eq!(table.find(seconds(701), address(1), &mut b), None);
    }

    #[test]
    fn no_port_can_fill_the_table_for_others() {
        let table = table();
        let mut recent = Recent::default();
        for number in 0..1000 {
            table.learn(seconds(0), address(number), 0, &mut recent);
        }
        assert_eq!(table.counts(), [4, 0, 0]);
        table.learn(seconds(0), address(2000), 1, &mut recent);
        assert_eq!(table.find(seconds(0), address(2000), &mut recent), Some(1));
        // Nor can one whose share is full take what is another's.
        table.learn(seconds(0), address(2000), 0, &mut recent);
        assert_eq!(table.find(seconds(1), address(2000), &mut recent), Some(1));
        // What is old makes room.
        table.learn(seconds(301), address(1001), 0, &mut recent);
        assert_eq!(table.counts(), [1, 0, 0]);
        assert_eq!(table.find(seconds(301), address(1001), &mut recent), Some(0));
    }

    #[test]
    fn neither_groups_nor_nobody_are_learned() {
        let table = table();
        let mut recent = Recent::default();
        table.learn(seconds(0), [0xff; 6], 0, &mut recent);
        table.learn(seconds(0), [0; 6], 0, &mut recent);
        assert_eq!(table.counts(), [0, 0, 0]);
    }
}
