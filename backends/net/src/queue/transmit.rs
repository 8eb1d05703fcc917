//! A transmit queue: frames from the driver to the port (virtio 1.2, 5.1.6.2). The header goes to the port as it is, which
//! checks it as it checks everybody's.

use std::io::{self, ErrorKind};

use cleave_runtime::{Chain, Command, Inbox, Polling, Vring};

use super::{BATCH, Next, QueueError, Ring, Server, Waiter, Work, end_if_gone};
use crate::buffers::GuestBuffers;
use crate::config_space::header_len;
use crate::counters::Sent;
use crate::filter::ETHERNET_HEADER;
use crate::shared::Shared;

/// Most bytes of a frame with its header: one that is to be segmented, with a VLAN tag.
const MAX_LEN: usize = 12 + ETHERNET_HEADER + 4 + 65535;

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
    let (fd, room) = shared.port.room(pair);
    waiter.watch_port(fd, room)?;
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
            Ok(()) => self.counters.sent.add_one(),
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

impl Work for Transmitter<'_> {
    fn turn(&mut self, ring: &mut Ring) -> Result<Next, QueueError> {
        for _ in 0..BATCH {
            if self.shared.port.flush(self.pair).is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
                return Ok(Next::Port);
            }
            let head = match self.waiting.take() {
                Some(head) => head,
                None => {
                    let Some(head) = ring.vring.next_head()? else { return Ok(Next::Driver) };
                    if let Err(what) = self.read(ring, head) {
                        self.counters.malformed.add_one();
                        ring.complain(&what);
                        ring.vring.push_used(head, 0)?;
                        continue;
                    }
                    head
                }
            };
            if !self.send(ring) {
                self.waiting = Some(head);
                return Ok(Next::Port);
            }
            ring.vring.push_used(head, 0)?;
        }
        Ok(Next::Again)
    }

    fn end(&mut self, ring: &mut Ring) {
        if self.waiting.take().is_some() {
            ring.vring.unfetch(1);
        }
    }
}
