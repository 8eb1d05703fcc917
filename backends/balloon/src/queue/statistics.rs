//! The statistics queue (virtio 1.2, 5.5.6.3): its one buffer goes back to the driver as a question, and comes as the answer.
//!
//! ```text
//!   held ──it is time, or somebody asks──> with the driver ──a buffer comes──> held
//! ```

use std::time::Instant;

use cleave_runtime::{Chain, RingError};

use super::{Ring, Work, gather};
use crate::shared::Shared;
use crate::stats::{MOST, Statistics};

pub(crate) struct Answers<'s> {
    shared: &'s Shared,
    chain: Chain,
    /// The buffer, and when it came.
    held: Option<(u16, Instant)>,
    /// Somebody has asked, and the buffer was with the driver.
    asked: bool,
}

impl<'s> Answers<'s> {
    pub(crate) fn new(shared: &'s Shared) -> Self {
        Self { shared, chain: Chain::default(), held: None, asked: false }
    }

    fn read(&mut self, ring: &mut Ring, head: u16) {
        if let Err(error) = ring.vring.read_chain(head, &mut self.chain) {
            return ring.complain(&error);
        }
        let mut bytes = [0; MOST];
        match gather(ring.vring.memory(), self.chain.readable(), &mut bytes) {
            Some(bytes) => self.shared.set_statistics(Statistics::read(bytes)),
            None => ring.complain(&"statistics are outside of memory"),
        }
    }
}

impl Work for Answers<'_> {
    fn turn(&mut self, ring: &mut Ring) -> Result<bool, RingError> {
        if let Some(head) = ring.vring.next_head()? {
            // A driver that has more than one gets the others back.
            if let Some((other, _)) = self.held.take() {
                ring.vring.push_used(other, 0)?;
            }
            self.read(ring, head);
            self.held = Some((head, Instant::now()));
        }
        self.asked |= self.shared.take_asked();
        let is_due = self.asked || self.wakes_at().is_some_and(|at| at <= Instant::now());
        if is_due && let Some((head, _)) = self.held.take() {
            self.asked = false;
            ring.vring.push_used(head, 0)?;
        }
        Ok(false)
    }

    /// Nobody is woken for a guest that does not answer.
    fn wakes_at(&self) -> Option<Instant> {
        let (_, came) = self.held?;
        self.shared.interval().and_then(|interval| came.checked_add(interval))
    }

    fn end(&mut self, ring: &mut Ring) {
        if self.held.take().is_some() {
            ring.vring.unfetch(1);
        }
    }
}
