//! A receive queue: frames from the port into the driver's buffers (virtio 1.2, 5.1.6.3 and 5.1.6.4).
//!
//! Chains are fetched ahead, and a frame is read straight into them: one read, over as many as it may need. With mergeable
//! buffers the frame uses as many as it fills, all at once; otherwise one. What does not fit goes to a spill area of this
//! thread's own: with mergeable buffers the frame is held there until the driver has made more of them available.
//!
//! Frames that come at once are given to the driver some at a time, as those that are sent are taken back.
//!
//! Invariants: between two turns no buffer is filled and not used; chains are used in the order in which they were fetched, so that unused ones can be given back; a frame that
//! is not wanted leaves the buffers it was read into to the next one; one frame at most is held.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::time::Instant;

use cleave_runtime::{Chain, Command, Inbox, Polling, Vring};
use rustix::event::epoll::EventFlags;

use super::{BATCH, Next, QueueError, Ring, Server, Waiter, Work, end_if_gone};
use crate::buffers::{GuestBuffers, MAX_BUFFERS};
use crate::config_space::{HEADER_LEN, feature, header_len};
use crate::counters::Received;
use crate::filter::{ETHERNET_HEADER, Filter, LOOK_AT};
use crate::limits::Direction;
use crate::shared::Shared;

/// The largest frame, with a VLAN tag: one that is to be segmented.
const MAX_FRAME: usize = 65535 + ETHERNET_HEADER + 4;

/// Room for such a one, with its header.
const SPILL: usize = 68 << 10;

/// After a frame larger than the MTU, room for the largest is offered for so many frames.
const LARGE_AGAIN: u32 = 64;

/// How many buffers, or how many bytes in them, are used together: more where a frame takes more.
const TOGETHER: usize = 16;
const TOGETHER_BYTES: usize = 64 << 10;

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

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
    waiter.watch_port(shared.port.fd(pair), EventFlags::IN)?;
    waiter.watch_port(shared.nudge_fd(pair), EventFlags::IN)?;
    Ok(waiter)
}

/// A chain that waits for a frame.
#[derive(Debug, Clone, Copy)]
struct Fetched {
    head: u16,
    /// Of [`Receiver::buffers`].
    entries: usize,
    /// Bytes.
    len: usize,
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
    /// The driver knows nothing of checksums: none of the header's flags is for it.
    no_flags: bool,
    /// Bytes of the largest frame with its header, and of those that are not to be segmented: buffers for these are offered
    /// to the port while others are rare.
    largest: usize,
    usual: usize,
    filter: Filter,
    filter_version: u64,
    chain: Chain,
    fetched: VecDeque<Fetched>,
    /// By head: it is fetched.
    is_fetched: Vec<bool>,
    /// A chain that is no buffer, fetched last: it is given back when those before it are used.
    unusable: Option<u16>,
    /// Of all that are fetched.
    buffers: GuestBuffers,
    /// Buffers of whole frames that are filled, and not used yet; bytes in them.
    used: Vec<(u16, u32)>,
    used_bytes: usize,
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
        let (filter_version, filter) = shared.filter();
        Self {
            pair,
            shared,
            header,
            mergeable: features & feature::MRG_RXBUF != 0,
            no_flags: features & feature::GUEST_CSUM == 0,
            largest: if gso { usual.max(header + MAX_FRAME) } else { usual },
            usual,
            filter,
            filter_version,
            chain: Chain::default(),
            fetched: VecDeque::new(),
            is_fetched: vec![false; vring.size().into()],
            unusable: None,
            buffers: GuestBuffers::new(vring.memory().clone()),
            used: Vec::with_capacity(TOGETHER),
            used_bytes: 0,
            spill,
            held: None,
            large: 0,
            port_ready: true,
            filled: false,
            counters: &shared.counters[usize::from(pair)].received,
        }
    }

    /// Fetches chains until they have room for `wanted` bytes; fewer, if there are not as many.
    fn fetch(&mut self, ring: &mut Ring, wanted: usize) -> Result<(), QueueError> {
        // Bounded, however fast the driver makes available what is no buffer.
        for _ in 0..=ring.vring.size() {
            if let Some(head) = self.unusable.filter(|_| self.fetched.is_empty()) {
                self.unusable = None;
                self.is_fetched[usize::from(head)] = false;
                self.used.push((head, 0));
            }
            let enough = self.buffers.len() >= wanted || !self.mergeable && !self.fetched.is_empty();
            if enough || self.is_full() {
                return Ok(());
            }
            let Some(head) = ring.vring.next_head()? else { return Ok(()) };
            if std::mem::replace(&mut self.is_fetched[usize::from(head)], true) {
                ring.vring.unfetch(1);
                return Err(QueueError::HeadTwice(head));
            }
            match self.add(ring, head) {
                Ok(fetched) => self.fetched.push_back(fetched),
                Err(what) => {
                    ring.complain(&what);
                    self.unusable = Some(head);
                }
            }
        }
        Ok(())
    }

    /// No more chains can be fetched before some are used.
    fn is_full(&self) -> bool {
        self.unusable.is_some() || self.buffers.entries() > MAX_BUFFERS / 2
    }

    fn add(&mut self, ring: &Ring, head: u16) -> Result<Fetched, String> {
        ring.vring.read_chain(head, &mut self.chain).map_err(|error| error.to_string())?;
        if !self.chain.readable().is_empty() {
            return Err("a buffer for frames has parts that the device may only read".to_owned());
        }
        let before = self.buffers.len();
        let entries = self.buffers.push(self.chain.writable()).map_err(|error| error.to_string())?;
        let len = self.buffers.len() - before;
        if len < self.header {
            self.buffers.drop_last(entries);
            return Err(format!("a buffer of {len} bytes has no room for a header"));
        }
        Ok(Fetched { head, entries, len })
    }

    /// Takes the next frame. `None`: there is none.
    fn read(&mut self, ring: &mut Ring) -> Result<Option<()>, QueueError> {
        match self.shared.port.receive(self.pair, &mut self.buffers, self.spill) {
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
        let in_buffers = self.buffers.len();
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
        self.fetch(ring, held.len)?;
        if self.buffers.len() >= held.len {
            self.held = None;
            self.buffers.write_at(held.in_buffers, &self.spill[..held.len - held.in_buffers]);
            self.deliver(ring, held.len)?;
        } else if self.is_full() || self.fetched.len() == usize::from(ring.vring.size()) {
            // There will never be enough.
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
        let (mut left, mut entries, mut count) = (len, 0, 0);
        while let Some(fetched) = self.fetched.pop_front_if(|_| left != 0) {
            let part = left.min(fetched.len);
            left -= part;
            entries += fetched.entries;
            self.is_fetched[usize::from(fetched.head)] = false;
            // A frame has 68 KiB at most.
            self.used.push((fetched.head, part as u32));
            count += 1;
        }
        self.finish_header(count);
        self.shared.checkpoint.passed(Direction::Receive, &self.buffers, self.header, len);
        self.buffers.consume(entries);
        self.counters.delivered.add_one();
        self.used_bytes += len;
        let enough = self.used.len() >= TOGETHER || self.used_bytes >= TOGETHER_BYTES;
        if enough { self.give(ring) } else { Ok(()) }
    }

    /// The driver gets the frames that are in `used`.
    fn give(&mut self, ring: &mut Ring) -> Result<(), QueueError> {
        self.used_bytes = 0;
        let given = ring.vring.push_used_together(&self.used);
        self.used.clear();
        Ok(given?)
    }

    /// Completes the header of the frame that is in the first `count` buffers: the port has left what it does not know.
    fn finish_header(&self, count: u16) {
        if self.header == usize::from(HEADER_LEN) {
            self.buffers.write_at(NUM_BUFFERS, &count.to_le_bytes());
        }
        if self.no_flags {
            self.buffers.write_at(0, &[0]);
        }
    }

    fn is_wanted(&mut self, len: usize) -> bool {
        if let Some((version, filter)) = self.shared.newer_filter(self.filter_version) {
            (self.filter_version, self.filter) = (version, filter);
        }
        if self.filter.promisc {
            return true;
        }
        let mut start = [0; LOOK_AT];
        let look_at = LOOK_AT.min(len - self.header);
        let looked_at = self.buffers.read_at(self.header, &mut start[..look_at]);
        self.filter.passes(&start[..looked_at])
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
            self.fetch(ring, wanted)?;
            if self.fetched.is_empty() {
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
        self.give(ring)?;
        next
    }

    fn port_is_ready(&mut self) {
        self.port_ready = true;
    }

    fn end(&mut self, ring: &mut Ring) {
        // Unusable ones and these are all that a queue of at most 32768 entries has.
        ring.vring.unfetch((self.fetched.len() + usize::from(self.unusable.is_some())) as u16);
    }
}
