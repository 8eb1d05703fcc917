//! A receive queue: frames from the port into the driver's buffers (virtio 1.2, 5.1.6.3 and 5.1.6.4).
//!
//! Chains are fetched ahead, and a frame is read straight into them: one read, over as many as it may need. With mergeable
//! buffers the frame uses as many as it fills, all at once; otherwise one. What does not fit goes to a spill area of this
//! thread's own: with mergeable buffers the frame is held there until the driver has made more of them available.
//!
//! Frames that come at once are given to the driver some at a time, as those that are sent are taken back.
//!
//! Invariants: between two turns no buffer is filled and not used; a frame that is not wanted leaves the buffers it was read
//! into to the next one; one frame at most is held.

use std::io::{self, ErrorKind};
use std::time::Instant;

use cleave_runtime::{Command, Inbox, Polling, Vring, Waiter};
use rustix::event::epoll::EventFlags;

use super::stock::Stock;
use super::{BATCH, Next, QueueError, Ring, Server, Work, end_if_gone};
use crate::config_space::{feature, header_len};
use crate::counters::Received;
use crate::filter::ETHERNET_HEADER;
use crate::limits::Direction;
use crate::shared::{CurrentFilter, Shared};

/// The largest frame, with a VLAN tag: one that is to be segmented.
const MAX_FRAME: usize = 65535 + ETHERNET_HEADER + 4;

/// Room for such a one, with its header.
const SPILL: usize = 68 << 10;

/// After a frame larger than the MTU, room for the largest is offered for so many frames.
const LARGE_AGAIN: u32 = 64;

/// Serves vrings of the receive queue of `pair`, one after the other, until the device is gone.
pub(crate) fn serve(pair: u16, waiter: &Waiter, inbox: &Inbox, shared: &Shared) {
    let mut polling = Polling::new(shared.poll);
    let mut spill = vec![0; SPILL].into_boxed_slice();
    while let Some(command) = inbox.next() {
        if let Command::Start(vring) = command {
            let mut receiver = Receiver::new(pair, &vring, shared, &mut spill);
            let vring = Server { inbox, waiter, polling: &mut polling }.run(vring, &mut receiver);
            inbox.give_back(vring);
        }
    }
}

/// What the thread of the receive queue of `pair` waits by.
pub(crate) fn waiter(pair: u16, shared: &Shared) -> io::Result<Waiter> {
    let waiter = Waiter::new()?;
    if let Some(fd) = shared.port.fd(pair) {
        waiter.watch_other(fd, EventFlags::IN)?;
    }
    waiter.watch_other(shared.nudge_fd(pair), EventFlags::IN)?;
    Ok(waiter)
}

/// A frame whose end is in the spill area.
#[derive(Debug, Clone, Copy)]
struct Held {
    len: usize,
    in_buffers: usize,
}

struct Receiver<'s> {
    pair: u16,
    shared: &'s Shared,
    /// Bytes before each frame.
    header: usize,
    mergeable: bool,
    /// Bytes of the largest frame with its header, and of those that are not to be segmented: buffers for these are offered
    /// to the port while others are rare.
    largest: usize,
    usual: usize,
    filter: CurrentFilter,
    stock: Stock,
    spill: &'s mut [u8],
    held: Option<Held>,
    /// Frames for which room for the largest is offered.
    large: u32,
    port_ready: bool,
    /// It is known that the driver uses this queue: there was a buffer.
    filled: bool,
    counters: &'s Received,
}

impl<'s> Receiver<'s> {
    fn new(pair: u16, vring: &Vring, shared: &'s Shared, spill: &'s mut [u8]) -> Self {
        let features = shared.features();
        let header = usize::from(header_len(features));
        let gso = features & feature::GUEST_GSO != 0;
        let usual = header + usize::from(shared.port.mtu()) + ETHERNET_HEADER + 4;
        Self {
            pair,
            shared,
            header,
            mergeable: features & feature::MRG_RXBUF != 0,
            largest: if gso { usual.max(header + MAX_FRAME) } else { usual },
            usual,
            filter: CurrentFilter::of(shared),
            stock: Stock::new(vring, features),
            spill,
            held: None,
            large: 0,
            port_ready: true,
            filled: false,
            counters: &shared.counters[usize::from(pair)].received,
        }
    }

    /// Takes the next frame. `None`: there is none.
    fn read(&mut self, ring: &mut Ring) -> Result<Option<()>, QueueError> {
        match self.shared.port.receive(self.pair, &mut self.stock.buffers, self.spill) {
            Ok(len) => self.take(ring, len).map(Some),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(Some(())),
            Err(error) => {
                end_if_gone(&*self.shared.port, &error);
                self.counters.failed.add_one();
                ring.complain(&format_args!("a frame could not be received: {error}"));
                Ok(Some(()))
            }
        }
    }

    /// A frame of `len` bytes with its header has been read.
    fn take(&mut self, ring: &mut Ring, len: usize) -> Result<(), QueueError> {
        self.large = if len > self.usual { LARGE_AGAIN } else { self.large.saturating_sub(1) };
        let in_buffers = self.stock.buffers.len();
        if len < self.header + ETHERNET_HEADER {
            self.counters.failed.add_one();
        } else if len <= in_buffers {
            return self.deliver(ring, len);
        } else if self.mergeable {
            self.held = Some(Held { len, in_buffers });
        } else {
            self.counters.too_long.add_one();
        }
        Ok(())
    }

    /// Goes on with a frame that is held. `false`: the driver has not enough buffers for it yet.
    fn go_on(&mut self, ring: &mut Ring, held: Held) -> Result<bool, QueueError> {
        self.stock.fetch(ring, held.len)?;
        if self.stock.buffers.len() >= held.len {
            self.held = None;
            self.stock.buffers.write_at(held.in_buffers, &self.spill[..held.len - held.in_buffers]);
            self.deliver(ring, held.len)?;
        } else if self.stock.is_all_there_can_be(ring) {
            self.held = None;
            self.counters.too_long.add_one();
        }
        Ok(self.held.is_none())
    }

    /// Gives the guest the frame of `len` bytes in the first buffers, if it wants it.
    fn deliver(&mut self, ring: &mut Ring, len: usize) -> Result<(), QueueError> {
        if !self.is_wanted(len) {
            self.counters.unwanted.add_one();
            return Ok(());
        }
        self.shared.checkpoint.passed(Direction::Receive, &self.stock.buffers, self.header, len);
        self.counters.delivered.add_one();
        self.stock.use_up(len);
        if self.stock.is_due() { self.stock.give(ring) } else { Ok(()) }
    }

    fn is_wanted(&mut self, len: usize) -> bool {
        let (header, buffers) = (self.header, &self.stock.buffers);
        self.filter.passes(self.shared, |start| {
            let look_at = start.len().min(len - header);
            buffers.read_at(header, &mut start[..look_at])
        })
    }
}

impl Receiver<'_> {
    fn receive_some(&mut self, ring: &mut Ring) -> Result<Next, QueueError> {
        for _ in 0..BATCH {
            if let Some(held) = self.held {
                if !self.go_on(ring, held)? {
                    return Ok(Next::Driver);
                }
                continue;
            }
            if !self.port_ready {
                return Ok(Next::Port);
            }
            let wanted = if self.large > 0 { self.largest } else { self.usual };
            self.stock.fetch(ring, wanted)?;
            if self.stock.is_empty() {
                return Ok(Next::Driver);
            }
            if !std::mem::replace(&mut self.filled, true) {
                self.shared.receiver_has_buffers(self.pair);
            }
            if let Some(wait) = self.shared.checkpoint.wait(Direction::Receive) {
                return Ok(Next::At(Instant::now() + wait));
            }
            if self.read(ring)?.is_none() {
                self.port_ready = false;
            }
        }
        Ok(Next::Again)
    }
}

impl Work for Receiver<'_> {
    fn turn(&mut self, ring: &mut Ring) -> Result<Next, QueueError> {
        let next = self.receive_some(ring);
        self.stock.give(ring)?;
        next
    }

    fn port_is_ready(&mut self) {
        self.port_ready = true;
    }

    fn end(&mut self, ring: &mut Ring) {
        self.stock.give_back(ring);
    }
}
