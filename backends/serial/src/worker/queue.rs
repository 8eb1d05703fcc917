//! A queue, and the chain of it that is being served.

use cleave_runtime::{Chain, Complaints, QueueIndex, RingError, Vring};
use tracing::warn;

use crate::iovecs::Iovecs;
use crate::kept::Kept;

/// Of whose buffers a chain is to consist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    FromGuest,
    ToGuest,
}

/// A chain that has been fetched.
#[derive(Debug)]
pub(super) struct Current {
    head: u16,
    /// What is left of it.
    pub(super) iovecs: Iovecs,
    /// Bytes that have gone, or come.
    pub(super) done: u32,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) vring: Vring,
    pub(super) current: Option<Current>,
    /// What a predecessor has done of a chain that comes again.
    resumed: Option<(u16, u32)>,
    chain: Chain,
    complaints: Complaints,
    broken: bool,
}

impl Queue {
    pub(super) fn new(vring: Vring, kept: &Kept) -> Self {
        // Where nobody remembers what is in flight, the chain is fetched again from the ring, by this process.
        let again =
            |head| if vring.remembers_in_flight() { vring.comes_again(head) } else { !vring.is_fresh() };
        let resumed = kept.record(vring.index()).filter(|(head, _)| again(*head));
        if resumed.is_none() {
            kept.clear_record(vring.index());
        }
        Self {
            vring,
            current: None,
            resumed,
            chain: Chain::default(),
            complaints: Complaints::default(),
            broken: false,
        }
    }

    pub(super) fn index(&self) -> QueueIndex {
        self.vring.index()
    }

    pub(super) fn can_run(&self) -> bool {
        self.vring.is_started() && !self.broken
    }

    /// Gives the vring back. A chain that is not done comes again, and its record says from where.
    pub(super) fn end(mut self) -> Vring {
        if self.current.is_some() {
            self.vring.unfetch(1);
        }
        self.vring
    }

    pub(super) fn complain(&mut self, what: &dyn std::fmt::Display) {
        self.complaints.add(self.index(), what);
    }

    /// Has a chain be current, if there is one. `false`: there is none, and a kick will tell of one.
    pub(super) fn fetch(&mut self, direction: Direction, kept: &Kept) -> Result<bool, RingError> {
        while self.current.is_none() {
            let Some(head) = self.vring.next_head()? else {
                if self.vring.enable_kicks()? {
                    continue;
                }
                return Ok(false);
            };
            match self.read(head, direction) {
                Ok(iovecs) => self.take(head, iovecs, direction, kept)?,
                Err(what) => {
                    self.complain(&what);
                    self.vring.push_used(head, 0)?;
                }
            }
        }
        Ok(true)
    }

    fn read(&mut self, head: u16, direction: Direction) -> Result<Iovecs, String> {
        self.vring.read_chain(head, &mut self.chain).map_err(|error| error.to_string())?;
        let (wanted, others) = match direction {
            Direction::FromGuest => (self.chain.readable(), self.chain.writable()),
            Direction::ToGuest => (self.chain.writable(), self.chain.readable()),
        };
        if !others.is_empty() {
            return Err("a chain has buffers of the other direction".to_owned());
        }
        Iovecs::new(self.vring.memory().clone(), wanted).map_err(|error| error.to_string())
    }

    fn take(
        &mut self,
        head: u16,
        mut iovecs: Iovecs,
        direction: Direction,
        kept: &Kept,
    ) -> Result<(), RingError> {
        let resumed = self.resumed.take_if(|(resumed, _)| *resumed == head);
        let done = resumed.map_or(0, |(_, done)| (done as usize).min(iovecs.len()) as u32);
        iovecs.advance(done as usize);
        // What has come is given to the guest as it is; of what is to go, the rest goes.
        let is_over = iovecs.len() == 0 || direction == Direction::ToGuest && done != 0;
        kept.set_record(self.index(), head, done);
        self.current = Some(Current { head, iovecs, done });
        if is_over {
            self.finish(if direction == Direction::ToGuest { done } else { 0 }, kept)
        } else {
            Ok(())
        }
    }

    /// Gives the current chain back to the guest, with `written` bytes in it.
    pub(super) fn finish(&mut self, written: u32, kept: &Kept) -> Result<(), RingError> {
        if let Some(Current { head, .. }) = self.current.take() {
            self.vring.push_used(head, written)?;
            kept.clear_record(self.vring.index());
        }
        Ok(())
    }

    /// Interrupts the guest if it wants it, and leaves a queue alone that is broken.
    pub(super) fn settle<T: Default>(&mut self, result: Result<T, RingError>) -> T {
        result.and_then(|value| self.vring.signal_used().map(|()| value)).unwrap_or_else(|error| {
            warn!("{} is left alone until it is set up again: {error}", self.index());
            self.broken = true;
            self.vring.signal_broken();
            T::default()
        })
    }
}
