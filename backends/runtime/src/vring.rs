//! A virtqueue as vhost-user hands it over: a split ring in guest memory, its kick, its call.
//!
//! ```text
//!   stopped --first kick--> started --GET_VRING_BASE--> stopped          (vhost-user, "Ring states")
//! ```
//!
//! Invariants: a device touches the ring only once it is started; `next_avail` is what GET_VRING_BASE answers; nothing
//! that a guest writes into its rings makes these functions panic, read past the ring or loop; where the frontend keeps
//! the requests in flight, each head is marked there from its fetching until the guest has it back.

mod caller;
mod chain;
mod inflight;
mod log;
mod notify;
mod part;
mod split;
mod together;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::memory::GuestMemory;
pub use caller::Caller;
pub use chain::{Chain, ChainError, MAX_SEGMENTS, Segment};
pub(crate) use inflight::{Found, InflightArea, InflightQueue};
pub use inflight::{InflightError, Kept};
pub(crate) use log::RingLog;
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
    pub(crate) continues: bool,
    pub(crate) inflight: Option<InflightQueue>,
    /// Heads that a predecessor left in flight and that are to be served again, before any other.
    pub(crate) resubmit: VecDeque<u16>,
    /// While the frontend wants to know what is written.
    pub(crate) log: Option<Box<RingLog>>,
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

    /// Where the ring's parts are in guest-physical memory, and how many bytes each has.
    pub fn parts(&self) -> [(GuestAddress, u64); 3] {
        self.ring.parts()
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

    /// Whether the driver has used this ring before, with this daemon or a predecessor of it, and goes on with it; if not,
    /// it has just set the device up.
    pub fn continues(&self) -> bool {
        self.continues
    }

    /// The first kick has come.
    pub fn start(&mut self) {
        self.started = true;
    }

    /// Whether heads that are fetched and not pushed are known to whoever serves the ring next. Then it may be given
    /// back with some unfinished; otherwise they would be lost.
    pub fn remembers_in_flight(&self) -> bool {
        self.inflight.is_some()
    }

    /// Fetches the next chain's head, if there is one: first those left in flight, then what is available. Read what it
    /// leads to with [`Vring::read_chain`]. Each head fetched is to be given to [`Vring::push_used`] once.
    ///
    /// # Errors
    /// The ring is broken beyond this request: leave it alone until it is set up again.
    pub fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        if let Some(head) = self.resubmit.pop_front() {
            return Ok(Some(head));
        }
        let head = self.ring.next_head()?;
        if let (Some(head), Some(inflight)) = (head, &mut self.inflight) {
            inflight.fetched(head)?;
        }
        Ok(head)
    }

    /// Whether [`Vring::next_head`] has something to give now.
    pub fn has_available(&mut self) -> Result<bool, RingError> {
        Ok(!self.resubmit.is_empty() || self.ring.has_available()?)
    }

    /// Whether `head` was left in flight, and [`Vring::next_head`] is still to give it again.
    pub fn comes_again(&self, head: u16) -> bool {
        self.resubmit.contains(&head)
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
        if let Some(log) = &mut self.log {
            log.chain_written(&self.memory, &self.ring, head);
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.before_used(head)?;
        }
        let element = self.ring.put_used(head, len);
        self.ring.publish_used();
        if let Some(inflight) = &mut self.inflight {
            inflight.after_used(head, self.ring.next_used())?;
        }
        if let Some(log) = &self.log {
            log.used_ring_written(element, SplitRing::ELEMENT_LEN);
            log.used_ring_written(0, SplitRing::HEADER_LEN);
        }
        Ok(())
    }

    /// Interrupts the guest if it wants to know of what was pushed since the last call.
    pub fn signal_used(&mut self) -> Result<(), RingError> {
        if let Some(log) = self.log.as_ref().filter(|_| self.ring.has_unsignalled()) {
            log.signal();
        }
        if self.ring.should_signal() {
            self.call.signal();
        }
        Ok(())
    }

    /// Asks for a kick at the next available chain. `true` when one came meanwhile: fetch again instead of waiting.
    pub fn enable_kicks(&mut self) -> Result<bool, RingError> {
        let more = self.ring.enable_kicks()?;
        self.log_wish();
        Ok(more || !self.resubmit.is_empty())
    }

    /// Spares the guest kicks while the ring is looked at anyway.
    pub fn disable_kicks(&mut self) -> Result<(), RingError> {
        self.ring.disable_kicks();
        self.log_wish();
        Ok(())
    }

    /// Whether kicks are wanted is written in the used ring, before and behind its elements.
    fn log_wish(&self) {
        if let Some(log) = &self.log {
            log.used_ring_written(0, SplitRing::HEADER_LEN);
            log.used_ring_written(self.ring.avail_event_offset(), 2);
        }
    }

    /// Tells the frontend that this ring is broken, where it asked to be told (SET_VRING_ERR).
    pub fn signal_broken(&self) {
        self.err.signal();
    }
}
