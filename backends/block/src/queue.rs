//! One queue's thread: takes requests off the ring, puts them on the disk's, and back.
//!
//! ```text
//!   idle --Start--> waiting for the first kick --kick--> serving --Stop--> draining --in flight = 0--> idle
//!                                                  `--the ring is broken--> broken --Stop--> draining
//! ```
//!
//! Invariants: the thread waits in one place, [`Engine::wait`], for the disk, the kick and the session at once; a head is
//! in flight at most once; guest memory stays mapped while anything is in flight, for the vring holds it until drained.
#![expect(unsafe_code, reason = "the disk moves data to and from guest memory itself")]

use std::io;
use std::sync::atomic::Ordering;

use cleave_common::exit::ExitCode;
use cleave_runtime::{Chain, Command, GuestMemory, Inbox, RingError, Segment, Vring};
use cleave_storage::{Engine, Event, Transfer, WatchId};
use tracing::{debug, error, warn};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::disk::Disk;
use crate::request::{ID_LEN, Request, Status, Work};

/// Most complaints about one guest's requests, from one start of the queue to its stop.
const MAX_COMPLAINTS: u32 = 8;

/// Serves vrings, one after the other, until the device is gone.
pub(crate) fn serve(mut engine: Engine, inbox: &Inbox, disk: &Disk) {
    let wake = engine.watch(inbox.wake_fd());
    while let Some(command) = inbox.next() {
        if let Command::Start(vring) = command {
            let vring = Queue::new(vring, &mut engine, disk).run(inbox, wake);
            inbox.give_back(vring);
        }
    }
}

/// Most requests fetched before they are handed to the disk and its completions looked at. An idle disk gets its first
/// request alone and at once; the batches double while it gets busy. So it works on the first ones while the next are
/// prepared, and the guest on the first completions.
const MAX_BATCH: usize = 4;

/// What is needed to answer a request once the disk has done its part.
#[derive(Debug, Clone, Copy, Default)]
struct Pending {
    status: GuestAddress,
    /// Bytes written for the guest if all goes well, without the status.
    written: u32,
}

struct Queue<'e> {
    vring: Vring,
    engine: &'e mut Engine,
    disk: &'e Disk,
    kick: WatchId,
    /// By head.
    pending: Vec<Pending>,
    /// The request being read.
    chain: Chain,
    buffers: Vec<libc::iovec>,
    broken: bool,
    complaints: u32,
}

impl<'e> Queue<'e> {
    fn new(vring: Vring, engine: &'e mut Engine, disk: &'e Disk) -> Self {
        let kick = engine.watch(vring.kick_fd());
        let pending = vec![Pending::default(); usize::from(vring.size())];
        let (chain, buffers) = (Chain::default(), Vec::new());
        Self { vring, engine, disk, kick, pending, chain, buffers, broken: false, complaints: 0 }
    }

    fn run(mut self, inbox: &Inbox, wake: WatchId) -> Vring {
        let mut stopping = false;
        loop {
            let more = !stopping && self.fetch();
            if stopping && self.engine.in_flight() == 0 {
                break;
            }
            let waited = if more { self.engine.poll() } else { self.engine.wait() };
            if let Err(error) = waited {
                give_up(&error);
            }
            while let Some(event) = self.engine.next_event() {
                match event {
                    Event::Done { tag, result } => self.complete(tag, result),
                    Event::Readable(id) if id == self.kick => self.vring.start(),
                    Event::Readable(id) if id == wake => {
                        stopping |= matches!(inbox.try_next(), Some(Command::Stop));
                    }
                    Event::WatchLost(id) if id == self.kick => {
                        warn!(
                            "{}: the kick descriptor failed; no request is fetched any more",
                            self.vring.index()
                        );
                    }
                    Event::Readable(_) | Event::WatchLost(_) => {}
                }
            }
            let signalled = self.vring.signal_used();
            self.check(signalled);
        }
        self.engine.unwatch(self.kick);
        self.vring
    }

    /// Takes what the guest has made available. `true`: there is more, for the next turn.
    fn fetch(&mut self) -> bool {
        if self.broken || !self.vring.is_started() || !self.engine.has_room() {
            return false;
        }
        let fetched = self.fetch_some();
        self.check(fetched).unwrap_or(false)
    }

    /// Bounded, so that a guest that never stops does not keep the thread from its commands.
    fn fetch_some(&mut self) -> Result<bool, RingError> {
        self.vring.disable_kicks()?;
        for _ in 0..self.engine.in_flight().clamp(1, MAX_BATCH) {
            match self.vring.next_head()? {
                Some(head) => self.begin(head)?,
                None => break,
            }
        }
        // Kicks are asked for only when there is nothing left to see.
        let more = self.vring.has_available()? || self.vring.enable_kicks()?;
        self.vring.signal_used()?;
        Ok(more)
    }

    fn begin(&mut self, head: u16) -> Result<(), RingError> {
        if self.engine.is_busy(head) {
            self.complain(&format_args!("descriptor {head} is made available again while it is in use"));
            return Ok(());
        }
        if let Err(error) = self.vring.read_chain(head, &mut self.chain) {
            self.complain(&error);
            return self.vring.push_used(head, 0);
        }
        let request = match Request::parse(&self.chain, self.vring.memory(), &self.disk.limits) {
            Ok(request) => request,
            Err(error) => {
                self.complain(&error);
                return self.vring.push_used(head, 0);
            }
        };
        let status = match request.work {
            Ok(work) => match self.start(head, &request, work) {
                Some(status) => status,
                None => return Ok(()),
            },
            Err(status) => status,
        };
        self.finish(head, Pending { status: request.status, written: 0 }, status)
    }

    /// Hands the work to the disk, or does it at once: then its status is the answer.
    fn start(&mut self, head: u16, request: &Request, work: Work) -> Option<Status> {
        let written = if matches!(work, Work::Read { .. }) { request.data_len } else { 0 };
        let transfer = match work {
            Work::Read { offset } => Transfer::read(offset),
            Work::Write { offset } => Transfer::write(offset, self.disk.durable.load(Ordering::Relaxed)),
            Work::Flush => {
                self.pending[usize::from(head)] = Pending { status: request.status, written: 0 };
                self.engine.flush(head);
                return None;
            }
            Work::GetId => return Some(self.write_id()),
        };
        let data = Request::data(&self.chain, work);
        if let Err(error) = host_buffers(self.vring.memory(), data, &mut self.buffers) {
            self.complain(&error);
            return Some(Status::IoErr);
        }
        self.pending[usize::from(head)] = Pending { status: request.status, written };
        // SAFETY: the buffers are guest memory, mapped as long as `self.vring` holds it; `run` gives the vring back only
        // when nothing is in flight.
        unsafe { self.engine.transfer(head, transfer, self.buffers.drain(..)) };
        None
    }

    fn write_id(&self) -> Status {
        let mut id = [0; ID_LEN];
        id[..self.disk.serial.len()].copy_from_slice(self.disk.serial.as_bytes());
        let mut rest = &id[..];
        for segment in Request::data(&self.chain, Work::GetId) {
            let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
            if self.vring.memory().map().write_slice(now, segment.addr).is_err() {
                return Status::IoErr;
            }
            rest = later;
        }
        Status::Ok
    }

    fn complete(&mut self, head: u16, result: io::Result<()>) {
        let pending = self.pending[usize::from(head)];
        let status = match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.complain(&format_args!("the disk failed: {error}"));
                Status::IoErr
            }
        };
        let finished = self.finish(head, pending, status);
        self.check(finished);
    }

    fn finish(&mut self, head: u16, pending: Pending, status: Status) -> Result<(), RingError> {
        self.vring.memory().map().write_obj(status as u8, pending.status)?;
        let written = if status == Status::Ok { pending.written } else { 0 };
        self.vring.push_used(head, written + 1)
    }

    /// A broken ring is left alone until it is set up again; what is in flight still completes.
    fn check<T>(&mut self, outcome: Result<T, RingError>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(error) => {
                if !std::mem::replace(&mut self.broken, true) {
                    warn!("{} is broken until it is set up again: {error}", self.vring.index());
                    self.vring.signal_broken();
                }
                None
            }
        }
    }

    fn complain(&mut self, what: &dyn std::fmt::Display) {
        self.complaints += 1;
        match self.complaints {
            ..MAX_COMPLAINTS => warn!("{}: {what}", self.vring.index()),
            MAX_COMPLAINTS => warn!("{}: {what} (and more, which are not shown)", self.vring.index()),
            _ => debug!("{}: {what}", self.vring.index()),
        }
    }
}

/// Where the guest's buffers are in this process.
fn host_buffers(
    memory: &GuestMemory,
    data: impl Iterator<Item = Segment>,
    buffers: &mut Vec<libc::iovec>,
) -> Result<(), vm_memory::GuestMemoryError> {
    buffers.clear();
    for segment in data {
        for slice in memory.map().get_slices(segment.addr, segment.len as usize) {
            let slice = slice?;
            buffers
                .push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
        }
    }
    Ok(())
}

/// Without its ring the thread can neither finish what is in flight nor be stopped.
fn give_up(error: &io::Error) -> ! {
    error!("io_uring failed: {error}");
    std::process::exit(ExitCode::Host as i32);
}
