//! A virtqueue as vhost-user hands it over: a split ring in guest memory, its kick, its call.
//!
//! ```text
//!   stopped --first kick--> started --GET_VRING_BASE--> stopped          (vhost-user, "Ring states")
//! ```
//!
//! Invariants: a device touches the ring only once it is started; `next_avail` is what GET_VRING_BASE answers; nothing
//! that a guest writes into its rings makes these functions panic, read past the ring or loop.

mod chain;
mod notify;
mod split;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::memory::GuestMemory;
pub use chain::{Chain, ChainError, MAX_SEGMENTS, Segment};
pub(crate) use notify::Notifier;
pub(crate) use split::SplitRing;
pub use split::{RingAddresses, RingError};

/// Which of a device's queues, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueIndex(pub u16);

impl std::fmt::Display for QueueIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "queue {}", self.0)
    }
}

/// One virtqueue that a device serves.
#[derive(Debug)]
pub struct Vring {
    pub(crate) index: QueueIndex,
    pub(crate) ring: SplitRing,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) kick: Arc<OwnedFd>,
    pub(crate) call: Notifier,
    pub(crate) err: Notifier,
    pub(crate) started: bool,
}

impl Vring {
    pub fn index(&self) -> QueueIndex {
        self.index
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Readable when the guest kicked. It need not be read: nobody asks for its count, and a count that stays makes
    /// sure that whoever serves the ring next looks at it.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Whether the ring may be touched: it has been kicked since the frontend set it up.
    pub fn is_started(&self) -> bool {
        self.started
    }

    /// The first kick has come.
    pub fn start(&mut self) {
        self.started = true;
    }

    /// Whether requests that are not given back when the ring stops are known to whoever serves it next.
    pub fn keeps_inflight(&self) -> bool {
        false
    }

    /// Fetches the next available chain's head, if there is one; read what it leads to with [`Vring::read_chain`].
    /// Each head fetched is to be given to [`Vring::push_used`] once.
    ///
    /// # Errors
    /// The ring is broken beyond this request: leave it alone until it is set up again.
    pub fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        self.ring.next_head(&self.memory)
    }

    /// Whether [`Vring::next_head`] has something to give now.
    pub fn has_available(&self) -> Result<bool, RingError> {
        self.ring.has_available(&self.memory)
    }

    /// Reads the descriptors behind `head` into `chain`.
    ///
    /// # Errors
    /// This request cannot be served; the ring goes on.
    pub fn read_chain(&self, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        chain.read(&self.memory, self.ring.descriptor_table(), self.ring.size(), head)
    }

    /// Gives a chain back to the guest with `len` bytes written to it.
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        self.ring.push_used(&self.memory, head, len)
    }

    /// Interrupts the guest if it wants to know of what was pushed since the last call.
    pub fn signal_used(&mut self) -> Result<(), RingError> {
        if self.ring.should_signal(&self.memory)? {
            self.call.signal();
        }
        Ok(())
    }

    /// Asks for a kick at the next available chain. `true` when one came meanwhile: fetch again instead of waiting.
    pub fn enable_kicks(&mut self) -> Result<bool, RingError> {
        self.ring.enable_kicks(&self.memory)
    }

    /// Spares the guest kicks while the ring is looked at anyway.
    pub fn disable_kicks(&mut self) -> Result<(), RingError> {
        self.ring.disable_kicks(&self.memory)
    }

    /// Tells the frontend that this ring is broken, where it asked to be told (SET_VRING_ERR).
    pub fn signal_broken(&self) {
        self.err.signal();
    }
}
