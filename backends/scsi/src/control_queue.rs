//! The control queue: task management (virtio 1.2, 5.6.6.2), which acts on requests that the other queues' threads have.
//!
//! ```text
//!   a function:  fetched --orders to all request queues--> running --their tickets are called in--> answered
//! ```
//!
//! A function runs for as long as the kernel has a request that it names. Others are looked at meanwhile, and a session
//! that ends leaves it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use cleave_runtime::{Chain, Command, Complaints, GuestMemory, Inbox, RingError, Stop, Vring};
use cleave_scsi::TaskManagement;
use cleave_storage::{Engine, Event, WatchId};
use rustix::event::{EventfdFlags, eventfd};
use tracing::{debug, error};
use vm_memory::GuestAddress;

use crate::address::Address;
use crate::controller::Controller;
use crate::orders::{Order, Ticket, Which};
use crate::request::{Response, data, read_all, write_all};

/// `type` of a control request.
const TASK_MANAGEMENT: u32 = 0;
const NOTIFICATION_QUERY: u32 = 1;
const NOTIFICATION_SUBSCRIBE: u32 = 2;

/// Bytes of a task management function, and of one about asynchronous notification.
const TMF_LEN: usize = 24;
const NOTIFICATION_LEN: usize = 16;

/// Most requests of a turn.
const BATCH: usize = 16;

/// Serves vrings of the control queue, one after the other, until the device is gone.
pub(crate) fn serve(engine: Engine, inbox: &Inbox, controller: &Arc<Controller>) {
    if let Err(error) = Server::new(engine, controller).and_then(|server| server.run(inbox)) {
        error!("the control queue is not served any more: {error}");
        std::process::exit(cleave_common::exit::ExitCode::Host as i32);
    }
}

/// A function whose tasks are ending.
#[derive(Debug)]
struct Running {
    head: u16,
    response_at: GuestAddress,
    function: TaskManagement,
    address: Address,
}

struct Server<'c> {
    engine: Engine,
    controller: &'c Arc<Controller>,
    told: Receiver<(u64, usize)>,
    teller: Sender<(u64, usize)>,
    wake: Arc<OwnedFd>,
    next: u64,
}

struct Ring {
    vring: Vring,
    running: BTreeMap<u64, Running>,
    chain: Chain,
    complaints: Complaints,
    broken: bool,
}

impl<'c> Server<'c> {
    fn new(engine: Engine, controller: &'c Arc<Controller>) -> io::Result<Self> {
        let (teller, told) = mpsc::channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        Ok(Self { engine, controller, told, teller, wake, next: 0 })
    }

    fn run(mut self, inbox: &Inbox) -> io::Result<()> {
        let command = self.engine.watch(inbox.wake_fd());
        let ended = self.wake.clone();
        let ended = self.engine.watch(ended.as_fd());
        while let Some(first) = inbox.next() {
            if let Command::Start(vring) = first {
                let kick = self.engine.watch(vring.kick_fd());
                let ring = Ring {
                    vring,
                    running: BTreeMap::new(),
                    chain: Chain::default(),
                    complaints: Complaints::default(),
                    broken: false,
                };
                let vring = self.serve(ring, inbox, [command, ended, kick])?;
                self.engine.unwatch(kick);
                inbox.give_back(vring);
            }
        }
        Ok(())
    }

    fn serve(
        &mut self,
        mut ring: Ring,
        inbox: &Inbox,
        [command, _ended, kick]: [WatchId; 3],
    ) -> io::Result<Vring> {
        loop {
            let turned = self.turn(&mut ring);
            let more = turned.unwrap_or_else(|error| ring.give_up(&error));
            if more {
                self.engine.poll()?
            } else {
                self.engine.wait()?
            }
            while let Some(event) = self.engine.next_event() {
                match event {
                    Event::Readable(id) if id == kick => ring.vring.start(),
                    Event::Readable(id) if id == command => {
                        if let Some(Command::Stop(stop)) = inbox.try_next() {
                            return Ok(ring.end(stop));
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// `true`: there is more to do.
    fn turn(&mut self, ring: &mut Ring) -> Result<bool, RingError> {
        while let Ok((id, named)) = self.told.try_recv() {
            if let Some(running) = ring.running.remove(&id) {
                let response = self.conclude(&running, named);
                ring.respond(running.head, Some(running.response_at), response)?;
            }
        }
        if ring.broken || !ring.vring.is_started() {
            return Ok(false);
        }
        ring.vring.disable_kicks()?;
        for _ in 0..BATCH {
            match ring.vring.next_head()? {
                Some(head) => self.begin(ring, head)?,
                None => break,
            }
        }
        ring.vring.signal_used()?;
        Ok(ring.vring.has_available()? || ring.vring.enable_kicks()?)
    }

    fn begin(&mut self, ring: &mut Ring, head: u16) -> Result<(), RingError> {
        if let Err(error) = ring.vring.read_chain(head, &mut ring.chain) {
            ring.complaints.add(ring.vring.index(), &error);
            return ring.vring.push_used(head, 0);
        }
        let mut bytes = [0; TMF_LEN];
        let memory = ring.vring.memory().clone();
        if read_all(data(ring.chain.readable(), 0, TMF_LEN as u64), &memory, &mut bytes).is_err() {
            ring.complaints.add(ring.vring.index(), &"a control request is outside of memory");
            return ring.vring.push_used(head, 0);
        }
        let len: u64 = ring.chain.readable().iter().map(|segment| u64::from(segment.len)).sum();
        match (u32::from_le_bytes(first_of(&bytes)), len) {
            (TASK_MANAGEMENT, TMF_LEN_U64..) => self.begin_function(ring, head, &bytes),
            // None is offered, so none is subscribed to: event_actual is 0.
            (NOTIFICATION_QUERY | NOTIFICATION_SUBSCRIBE, NOTIFICATION_LEN_U64..) => {
                let answer = [0, 0, 0, 0, Response::Ok as u8];
                ring.answer(head, &memory, &answer)
            }
            (kind, len) => {
                let what = format_args!("a control request of type {kind} and {len} bytes");
                ring.complaints.add(ring.vring.index(), &what);
                ring.answer(head, &memory, &[Response::Failure as u8])
            }
        }
    }

    fn begin_function(&mut self, ring: &mut Ring, head: u16, bytes: &[u8; TMF_LEN]) -> Result<(), RingError> {
        let response_at =
            ring.chain.writable().iter().find(|segment| segment.len != 0).map(|segment| segment.addr);
        let subtype = u32::from_le_bytes(first_of(&bytes[4..]));
        let tag = u64::from_le_bytes(first_of(&bytes[16..]));
        let Some(address) = Address::decode(first_of(&bytes[8..])) else {
            return ring.respond(head, response_at, Response::BadTarget);
        };
        if let Some(refusal) = self.refuses(address) {
            return ring.respond(head, response_at, refusal);
        }
        let Some(function) = function(subtype, tag) else {
            return ring.respond(head, response_at, Response::FunctionRejected);
        };
        let Some(at) = response_at else { return ring.respond(head, None, Response::Failure) };
        debug!("{function:?} of unit {address}");
        let response = match function {
            TaskManagement::LogicalUnitReset | TaskManagement::NexusReset => Response::Reset,
            _ => Response::Aborted,
        };
        let response = function.ends_tasks().then_some(response);
        self.next += 1;
        let id = self.next;
        let (teller, wake) = (self.teller.clone(), self.wake.clone());
        let ticket = Ticket::new(move |named| {
            // Nobody to hear it: the device is being dropped.
            let _ = teller.send((id, named));
            let _ = rustix::io::write(&*wake, &1u64.to_ne_bytes());
        });
        ring.running.insert(id, Running { head, response_at: at, function, address });
        let from = self.controller.nexus;
        self.controller.mail.post_all(|| Order::End {
            which: Which::Named { function, from, at: address },
            response,
            ticket: ticket.clone(),
        });
        Ok(())
    }

    fn refuses(&self, address: Address) -> Option<Response> {
        let bus = self.controller.bus();
        if bus.target(address.target).is_none() {
            return Some(Response::BadTarget);
        }
        (!bus.has(address)).then_some(Response::IncorrectLun)
    }

    /// The function's tasks have ended, or were counted.
    fn conclude(&self, running: &Running, named: usize) -> Response {
        let Running { function, address, .. } = *running;
        if !function.ends_tasks() {
            return if named == 0 { Response::FUNCTION_COMPLETE } else { Response::FunctionSucceeded };
        }
        let nexus = self.controller.nexus;
        let ended: &[_] = if named == 0 { &[] } else { &[nexus] };
        let bus = self.controller.bus();
        let managed =
            bus.target(address.target).map(|target| target.manage(nexus, address.lun, function, ended));
        match managed {
            Some(Ok(())) => Response::FUNCTION_COMPLETE,
            _ => Response::IncorrectLun,
        }
    }
}

const TMF_LEN_U64: u64 = TMF_LEN as u64;
const NOTIFICATION_LEN_U64: u64 = NOTIFICATION_LEN as u64;

/// The first bytes of `from`, which has enough of them.
fn first_of<const N: usize>(from: &[u8]) -> [u8; N] {
    std::array::from_fn(|at| from.get(at).copied().unwrap_or(0))
}

/// `None`: CLEAR ACA, for there is no ACA condition, and what is unknown.
fn function(subtype: u32, tag: u64) -> Option<TaskManagement> {
    Some(match subtype {
        0 => TaskManagement::AbortTask(tag),
        1 => TaskManagement::AbortTaskSet,
        3 => TaskManagement::ClearTaskSet,
        4 => TaskManagement::NexusReset,
        5 => TaskManagement::LogicalUnitReset,
        6 => TaskManagement::QueryTask(tag),
        7 => TaskManagement::QueryTaskSet,
        _ => return None,
    })
}

impl Ring {
    fn respond(
        &mut self,
        head: u16,
        response_at: Option<GuestAddress>,
        response: Response,
    ) -> Result<(), RingError> {
        let written = response_at.is_some_and(|at| self.vring.memory().write_obj(response as u8, at).is_ok());
        if !written {
            self.complaints.add(self.vring.index(), &"a control request has no room for its response");
        }
        self.vring.push_used(head, u32::from(written))?;
        self.vring.signal_used()
    }

    fn answer(&mut self, head: u16, memory: &GuestMemory, bytes: &[u8]) -> Result<(), RingError> {
        let room = self.chain.writable().iter().copied();
        let written = write_all(room, memory, bytes).is_ok();
        self.vring.push_used(head, if written { bytes.len() as u32 } else { 0 })
    }

    fn give_up(&mut self, error: &RingError) -> bool {
        if !std::mem::replace(&mut self.broken, true) {
            tracing::warn!("{} is broken until it is set up again: {error}", self.vring.index());
            self.vring.signal_broken();
        }
        false
    }

    /// The vring goes. Functions that run come again with it, or fail.
    fn end(mut self, stop: Stop) -> Vring {
        if !self.vring.remembers_in_flight() && stop == Stop::Drain {
            for (_, running) in std::mem::take(&mut self.running) {
                let _ = self.respond(running.head, Some(running.response_at), Response::Failure);
            }
        }
        self.vring
    }
}
