//! A transmit queue: frames from the driver to the port (virtio 1.2, 5.1.6.2). The header goes to the port as it is, which
//! checks it as it checks everybody's.
//!
//! Frames that have gone are used some at a time: each time the driver is told, the lines of memory that tell it change
//! hands, which takes about as long as the kernel does with a frame.
//!
//! Invariant: between two turns nothing is fetched and not used but the one frame that waits for room.

use std::io::{self, ErrorKind};
use std::time::Instant;

use cleave_runtime::{Chain, Command, Inbox, Polling, Vring, Waiter};

use super::{BATCH, Next, QueueError, Ring, Server, Work, end_if_gone};
use crate::buffers::GuestBuffers;
use crate::config_space::header_len;
use crate::counters::Sent;
use crate::filter::ETHERNET_HEADER;
use crate::limits::Direction;
use crate::shared::Shared;

/// Most bytes of a frame with its header: one that is to be segmented, with a VLAN tag.
const MAX_LEN: usize = 12 + ETHERNET_HEADER + 4 + 65535;

/// How many frames, or how many bytes of them, are used together. A frame is sent twice if the daemon is killed after it was
/// sent and before it was used.
const TOGETHER: usize = 16;
const TOGETHER_BYTES: usize = 64 << 10;

/// Serves vrings of the transmit queue of `pair`, one after the other, until the device is gone.
pub(crate) fn serve(pair: u16, waiter: &Waiter, inbox: &Inbox, shared: &Shared) {
    let mut polling = Polling::new(shared.poll);
    while let Some(command) = inbox.next() {
        if let Command::Start(vring) = command {
            let mut transmitter = Transmitter::new(pair, &vring, shared);
            let vring = Server { inbox, waiter, polling: &mut polling }.run(vring, &mut transmitter);
            inbox.give_back(vring);
        }
    }
}

/// What the thread of the transmit queue of `pair` waits by.
pub(crate) fn waiter(pair: u16, shared: &Shared) -> io::Result<Waiter> {
    let waiter = Waiter::new()?;
    if let Some((fd, room)) = shared.port.room(pair) {
        waiter.watch_other(fd, room)?;
    }
    Ok(waiter)
}

struct Transmitter<'s> {
    pair: u16,
    shared: &'s Shared,
    /// Bytes before each frame.
    header: usize,
    chain: Chain,
    frame: GuestBuffers,
    /// The chain of `frame`, for which the port has no room yet.
    waiting: Option<u16>,
    /// Chains that are done with, and not used yet; bytes of their frames.
    done: Vec<(u16, u32)>,
    done_bytes: usize,
    counters: &'s Sent,
}

impl<'s> Transmitter<'s> {
    fn new(pair: u16, vring: &Vring, shared: &'s Shared) -> Self {
        Self {
            pair,
            shared,
            header: header_len(shared.features()).into(),
            chain: Chain::default(),
            frame: GuestBuffers::new(vring.memory().clone()),
            waiting: None,
            done: Vec::with_capacity(TOGETHER),
            done_bytes: 0,
            counters: &shared.counters[usize::from(pair)].sent,
        }
    }

    /// Makes the chain of `head` the frame to send.
    fn read(&mut self, ring: &Ring, head: u16) -> Result<(), String> {
        self.frame.clear();
        ring.vring.read_chain(head, &mut self.chain).map_err(|error| error.to_string())?;
        self.frame.push(self.chain.readable()).map_err(|error| error.to_string())?;
        match self.frame.len() {
            len if len < self.header + ETHERNET_HEADER => {
                Err(format!("a frame of {len} bytes, with its header, is too short"))
            }
            len if len > MAX_LEN => Err(format!("a frame of {len} bytes, with its header, is too long")),
            _ => Ok(()),
        }
    }

    /// Sends the frame. `false`: there is no room for it now.
    fn send(&mut self, ring: &mut Ring) -> bool {
        match self.shared.port.send(self.pair, &self.frame) {
            Ok(()) => {
                self.counters.sent.add_one();
                let len = self.frame.len();
                self.shared.checkpoint.passed(Direction::Transmit, &self.frame, self.header, len);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(error) => {
                end_if_gone(&*self.shared.port, &error);
                self.counters.failed.add_one();
                // A device that is down is no fault of the guest's.
                if error.raw_os_error() != Some(libc::EIO) {
                    ring.complain(&format_args!("a frame could not be sent: {error}"));
                }
            }
        }
        true
    }
}

impl Transmitter<'_> {
    /// The chain of `head` is to be used.
    fn finish(&mut self, ring: &mut Ring, head: u16, bytes: usize) -> Result<(), QueueError> {
        self.done.push((head, 0));
        self.done_bytes += bytes;
        let enough = self.done.len() >= TOGETHER || self.done_bytes >= TOGETHER_BYTES;
        if enough { self.give_back(ring) } else { Ok(()) }
    }

    fn give_back(&mut self, ring: &mut Ring) -> Result<(), QueueError> {
        self.done_bytes = 0;
        let given = ring.vring.push_used_together(&self.done);
        self.done.clear();
        Ok(given?)
    }

    fn send_some(&mut self, ring: &mut Ring) -> Result<Next, QueueError> {
        for _ in 0..BATCH {
            if let Some(wait) = self.shared.checkpoint.wait(Direction::Transmit) {
                let has_frame = self.waiting.is_some() || ring.vring.has_available()?;
                return Ok(if has_frame { Next::At(Instant::now() + wait) } else { Next::Driver });
            }
            let head = match self.waiting.take() {
                Some(head) => head,
                None => {
                    let Some(head) = ring.vring.next_head()? else { return Ok(Next::Driver) };
                    if let Err(what) = self.read(ring, head) {
                        self.counters.malformed.add_one();
                        ring.complain(&what);
                        self.finish(ring, head, 0)?;
                        continue;
                    }
                    head
                }
            };
            if !self.send(ring) {
                self.waiting = Some(head);
                return Ok(Next::Port);
            }
            self.finish(ring, head, self.frame.len())?;
        }
        Ok(Next::Again)
    }
}

impl Work for Transmitter<'_> {
    fn turn(&mut self, ring: &mut Ring) -> Result<Next, QueueError> {
        let next = self.send_some(ring);
        let flushed = self.shared.port.flush(self.pair);
        self.give_back(ring)?;
        // Before what the port still has nothing can go.
        if flushed.is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
            next.and(Ok(Next::Port))
        } else {
            next
        }
    }

    fn end(&mut self, ring: &mut Ring) {
        if self.waiting.take().is_some() {
            ring.vring.unfetch(1);
        }
    }
}
