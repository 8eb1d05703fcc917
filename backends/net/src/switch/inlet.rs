//! Where a guest takes frames in: its receive queue, filled by whoever has a frame for it.
//!
//! ```text
//!   closed --the session starts the queue--> open --its first kick--> serving --the session wants it back--> closed
//!                                                                      `--the ring is broken--> left alone
//! ```
//!
//! The queue's own thread opens and closes, takes kicks, and raises interrupts and says that a ring is broken: a frontend's
//! descriptors are touched by threads of its own port alone, for what is behind them may wait. Frames are put in by
//! threads of other ports, under a lock that is held for one frame, and never beside another inlet's.
//!
//! Invariants: whoever puts in a frame waits for nobody but another one that does; what finds no buffers is dropped and
//! counted; once the queue is closed nobody writes to its buffers.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cleave_runtime::{Caller, Command, Inbox, Vring, Waiter};
use rustix::event::{EventfdFlags, eventfd};

use super::frame::{Frame, Header};
use super::offload::Form;
use crate::config_space::header_len;
use crate::counters::Received;
use crate::queue::stock::Stock;
use crate::queue::{QueueError, Ring, give_up};
use crate::shared::{CurrentFilter, Shared};

#[derive(Debug)]
pub(crate) struct Inlet {
    open: Mutex<Option<Open>>,
    /// Frames that came while nobody took them.
    missed: AtomicU64,
    /// What the queue's thread owes its frontend; it is woken by `wake`.
    call_due: AtomicBool,
    broken_due: AtomicBool,
    wake: OwnedFd,
}

/// A receive queue that runs.
struct Open {
    ring: Ring,
    stock: Stock,
    filter: CurrentFilter,
    shared: Arc<Shared>,
    pair: usize,
    features: u64,
    /// Bytes before each frame.
    header: usize,
    /// It is known that the driver uses this queue: there was a buffer.
    filled: bool,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Open").field("pair", &self.pair).finish_non_exhaustive()
    }
}

/// What became of a frame, or of a part of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Put {
    Delivered,
    Dropped,
}

impl Inlet {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            open: Mutex::new(None),
            missed: AtomicU64::new(0),
            call_due: AtomicBool::new(false),
            broken_due: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frames that came while nobody took them.
    pub(crate) fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    /// A frame came for which no queue is open.
    pub(crate) fn miss(&self) {
        self.missed.fetch_add(1, Ordering::Relaxed);
    }

    /// Puts a frame into the driver's buffers, if there are any and it wants it. `true`: it may have to be interrupted.
    pub(crate) fn deliver(&self, frame: &Frame<'_>) -> bool {
        let mut guard = self.lock();
        let Some(open) = guard.as_mut().filter(|open| open.ring.serves()) else {
            self.miss();
            return false;
        };
        let delivered = open.take(frame);
        delivered.unwrap_or_else(|error| {
            self.breaks(open, &error);
            true
        })
    }

    /// Has the driver interrupted, if it wants to know of what it was given.
    pub(crate) fn call_if_due(&self) {
        let due = match self.lock().as_mut() {
            Some(open) => self.is_due(open),
            None => false,
        };
        if due {
            self.call_due.store(true, Ordering::Release);
            self.wake();
        }
    }

    fn is_due(&self, open: &mut Open) -> bool {
        open.ring.vring.owes_a_call().unwrap_or_else(|error| {
            self.breaks(open, &error.into());
            false
        })
    }

    fn breaks(&self, open: &mut Open, error: &QueueError) {
        if open.ring.leave_alone(error) {
            self.broken_due.store(true, Ordering::Release);
            self.wake();
        }
    }

    fn wake(&self) {
        // A counter that is full is readable all the same.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Serves vrings of the receive queue of `pair`, one after the other, until the device is gone.
    pub(crate) fn serve(&self, pair: u16, waiter: &Waiter, inbox: &Inbox, shared: &Arc<Shared>) {
        while let Some(command) = inbox.next() {
            if let Command::Start(vring) = command {
                let caller = vring.caller();
                waiter.watch_kick(vring.kick_fd());
                *self.lock() = Some(Open::new(pair, vring, shared.clone()));
                self.attend(waiter, inbox, &caller);
                let vring = self.close();
                self.tell(&caller);
                if let Some(vring) = vring {
                    waiter.unwatch_kick(vring.kick_fd());
                    inbox.give_back(vring);
                }
            }
        }
    }

    /// What the thread of the queue waits by.
    pub(crate) fn waiter(&self) -> std::io::Result<Waiter> {
        let waiter = Waiter::new()?;
        waiter.watch_other(self.wake.as_fd(), rustix::event::epoll::EventFlags::IN)?;
        Ok(waiter)
    }

    /// Does what the queue's thread is there for, until the session wants the queue back.
    fn attend(&self, waiter: &Waiter, inbox: &Inbox, caller: &Caller) {
        // One that goes on may have been kicked before.
        self.look(false);
        loop {
            let ready = waiter.wait().unwrap_or_else(|error| give_up("waiting for events failed", &error));
            if ready.kick {
                self.look(true);
            }
            self.tell(caller);
            if ready.wake && matches!(inbox.try_next(), Some(Command::Stop(_))) {
                return;
            }
        }
    }

    /// Looks whether there are buffers now, perhaps after a kick.
    fn look(&self, kicked: bool) {
        if let Some(open) = self.lock().as_mut() {
            if kicked {
                open.ring.vring.start();
            }
            if let Err(error) = open.look() {
                self.breaks(open, &error);
            }
        }
    }

    /// Tells the frontend what is due to it.
    fn tell(&self, caller: &Caller) {
        if self.call_due.swap(false, Ordering::Acquire) {
            caller.call();
        }
        if self.broken_due.swap(false, Ordering::Acquire) {
            caller.signal_broken();
        }
    }

    fn close(&self) -> Option<Vring> {
        let mut open = self.lock().take()?;
        if self.is_due(&mut open) {
            self.call_due.store(true, Ordering::Release);
        }
        open.stock.give_back(&mut open.ring);
        Some(open.ring.vring)
    }
}

impl Open {
    fn new(pair: u16, vring: Vring, shared: Arc<Shared>) -> Self {
        let features = shared.features();
        Self {
            stock: Stock::new(&vring, features),
            ring: Ring::new(vring),
            filter: CurrentFilter::of(&shared),
            shared,
            pair: pair.into(),
            features,
            header: header_len(features).into(),
            filled: false,
        }
    }

    /// Waits for the first buffers by kicks; afterwards nobody waits for any.
    fn look(&mut self) -> Result<(), QueueError> {
        while self.ring.serves() && !self.filled {
            if self.ring.vring.has_available()? {
                self.filled = true;
                self.ring.vring.disable_kicks()?;
                self.shared.receiver_has_buffers(self.pair as u16);
            } else if !self.ring.vring.enable_kicks()? {
                break;
            }
        }
        Ok(())
    }

    fn counters(&self) -> &Received {
        &self.shared.counters[self.pair].received
    }

    /// See [`Inlet::deliver`]. All of the frame is given to the driver at once, and all buffers that are none.
    fn take(&mut self, frame: &Frame<'_>) -> Result<bool, QueueError> {
        let taken = self.fill(frame);
        self.stock.give(&mut self.ring)?;
        taken
    }

    fn fill(&mut self, frame: &Frame<'_>) -> Result<bool, QueueError> {
        let Self { filter, shared, .. } = self;
        let wanted = filter.passes(shared, |start| {
            let known = frame.start();
            start[..known.len()].copy_from_slice(known);
            known.len()
        });
        if !wanted {
            self.counters().unwanted.add_one();
            return Ok(false);
        }
        let nothing = Header::default();
        let put = match Form::of(frame, self.features) {
            None => {
                self.counters().failed.add_one();
                Put::Dropped
            }
            Some(Form::Whole(header)) => self.put(frame, &header, &[], 0..frame.len(), None)?,
            Some(Form::Summed { at, checksum }) => {
                self.put(frame, &nothing, &[], 0..frame.len(), Some((at, checksum)))?
            }
            Some(Form::Segments(mut segments)) => {
                let mut delivered = Put::Dropped;
                // When one finds no room the next ones would find none either.
                while let Some((headers, rest)) = segments.next(frame) {
                    match self.put(frame, &nothing, headers, rest, None)? {
                        Put::Delivered => delivered = Put::Delivered,
                        Put::Dropped => break,
                    }
                }
                delivered
            }
        };
        Ok(put == Put::Delivered)
    }

    /// Gives the guest `start` and these bytes of the frame behind `header`; with a checksum at its place in them, if there is one.
    fn put(
        &mut self,
        frame: &Frame<'_>,
        header: &Header,
        start: &[u8],
        rest: std::ops::Range<usize>,
        checksum: Option<(usize, u16)>,
    ) -> Result<Put, QueueError> {
        let behind = self.header + start.len();
        let len = behind + rest.len();
        self.stock.fetch(&mut self.ring, len)?;
        if self.stock.buffers.len() < len {
            let counters = self.counters();
            let never = self.stock.is_all_there_can_be(&self.ring);
            if never { &counters.too_long } else { &counters.no_room }.add_one();
            return Ok(Put::Dropped);
        }
        let buffers = &self.stock.buffers;
        buffers.write_at(0, &header.bytes()[..self.header]);
        buffers.write_at(self.header, start);
        frame.copy_to(rest, buffers, behind);
        if let Some((at, checksum)) = checksum {
            buffers.write_at(self.header + at, &checksum.to_be_bytes());
        }
        self.stock.use_up(len);
        self.counters().delivered.add_one();
        Ok(Put::Delivered)
    }
}
