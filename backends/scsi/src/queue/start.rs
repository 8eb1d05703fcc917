//! One request from its head to where its work is done.
#![expect(unsafe_code, reason = "the disks move data to and from guest memory themselves")]

use std::collections::VecDeque;
use std::sync::Arc;

use cleave_runtime::{GuestMemory, RingError, Segment};
use cleave_scsi::{Attribute, Failure, Io, Request, Step, Task};
use cleave_storage::{Direction, Range, RangeOp, Transfer};

use super::pieces::{Next, Pieces};
use super::{OnDisk, Pending, Queue, Stage, Work};
use crate::address::Address;
use crate::bus::Backing;
use crate::gate::Order;
use crate::request::{Header, Response, read_all};

/// Whose other tasks on the unit must not come between.
const COMPARE_AND_WRITE: u8 = 0x89;

/// Most bytes of a request to write zeroes that count for the rate limits: few disks have to be written for it.
const MAX_ZEROES_COST: u64 = 16 << 20;

fn order(header: &Header) -> Order {
    match (header.attribute, header.cdb().first()) {
        (Attribute::HeadOfQueue, _) => Order::Ahead,
        (Attribute::Ordered, _) | (_, Some(&COMPARE_AND_WRITE)) => Order::Alone,
        _ => Order::Any,
    }
}

impl Queue<'_> {
    pub(super) fn begin(&mut self, head: u16) -> Result<(), RingError> {
        if !matches!(self.pending[usize::from(head)].stage, Stage::Free) {
            self.complain(&format_args!("descriptor {head} is made available again while it is in use"));
            return Ok(());
        }
        if let Err(error) = self.vring.read_chain(head, &mut self.chain) {
            self.complain(&error);
            return self.vring.push_used(head, 0);
        }
        let header = match Header::read(&self.chain, self.vring.memory(), &self.controller.sizes) {
            Ok(header) => header,
            Err(error) => {
                self.complain(&error);
                return self.vring.push_used(head, 0);
            }
        };
        let response_at = header.response_at(&self.chain);
        self.pending[usize::from(head)] = Pending { header: Some(header), response_at, ..Pending::default() };
        self.in_flight += 1;
        let Some(address) = Address::decode(header.lun) else {
            return self.respond(head, Response::BadTarget, None);
        };
        let backing = self.controller.bus().slot(address).map(|slot| slot.backing.clone());
        let Some(backing) = backing else { return self.look_at(head, &header, address) };
        match backing.gate.arrive((self.queue, head), order(&header)) {
            Ok(()) => {
                self.pending[usize::from(head)].entered = Some(backing);
                self.look_at(head, &header, address)
            }
            Err(started) => {
                // It may be among them: it runs like the others, when its order comes.
                self.pending[usize::from(head)].stage = Stage::InLine(backing.clone());
                self.controller.run_started(&backing.gate, started);
                Ok(())
            }
        }
    }

    /// The task of `head` is first in line.
    pub(super) fn run_from_line(&mut self, head: u16) -> Result<(), RingError> {
        let pending = &mut self.pending[usize::from(head)];
        let Stage::InLine(backing) = std::mem::take(&mut pending.stage) else { return Ok(()) };
        pending.entered = Some(backing);
        if let Some(response) = pending.ended {
            return self.respond(head, response, None);
        }
        let Some(header) = pending.header else { return Ok(()) };
        let Some(address) = Address::decode(header.lun) else { return Ok(()) };
        if let Err(error) = self.vring.read_chain(head, &mut self.chain) {
            self.complain(&error);
            return self.respond(head, Response::Failure, None);
        }
        // The guest may have changed it, and shall not gain by that.
        if !header.fits(&self.chain) {
            self.complain(&"a request has been changed while it was waited for");
            return self.respond(head, Response::Failure, None);
        }
        self.look_at(head, &header, address)
    }

    /// Has the core look at the command in [`Queue::chain`], and does what it says.
    fn look_at(&mut self, head: u16, header: &Header, address: Address) -> Result<(), RingError> {
        let controller = self.controller.clone();
        let bus = controller.bus();
        let Some(target) = bus.target(address.target) else {
            drop(bus);
            return self.respond(head, Response::BadTarget, None);
        };
        let request = Request {
            nexus: controller.nexus,
            cdb: header.cdb(),
            attribute: header.attribute,
            data_out: header.data_out,
            data_in: header.data_in,
        };
        let mut step = target.execute(address.lun, &request);
        while let Step::Gather { len, command } = step {
            let mut list = vec![0; len];
            let segments = header.data_out(&self.chain, len as u64);
            if let Err(error) = read_all(segments, self.vring.memory(), &mut list) {
                drop(bus);
                self.complain(&error);
                return self.respond(head, Response::Failure, None);
            }
            step = target.resume(address.lun, &command, &list);
        }
        match step {
            Step::Done(answer) => {
                drop(bus);
                self.finish(head, answer)
            }
            Step::Overrun { .. } => {
                drop(bus);
                self.respond(head, Response::Overrun, None)
            }
            Step::Io { io, task } => {
                let slot = bus.slot(address);
                let attached = slot
                    .and_then(|slot| Some((slot, slot.loaded.as_ref()?)))
                    .map(|(slot, loaded)| self.attach(slot, loaded));
                drop(bus);
                match attached {
                    Some(Ok(attachment)) => self.start_io(head, header, io, task, attachment),
                    Some(Err(error)) => {
                        self.complain(&format_args!("unit {address}: {error}"));
                        self.finish(head, task.complete(Err(Failure::Busy)))
                    }
                    None => self.finish(head, task.complete(Err(Failure::Internal))),
                }
            }
            Step::Control { actions, task } => {
                drop(bus);
                self.pending[usize::from(head)].stage =
                    Stage::Actions { task, rest: VecDeque::from(actions), attachment: None };
                self.act(head)
            }
            // The loop above has gone on with it.
            Step::Gather { .. } => Ok(()),
        }
    }

    fn start_io(
        &mut self,
        head: u16,
        header: &Header,
        io: Io,
        task: Task,
        attachment: usize,
    ) -> Result<(), RingError> {
        let reads = matches!(io, Io::Read { .. });
        match self.park(head, header, io, attachment) {
            Ok((work, admission)) => {
                let on_disk = OnDisk { task, attachment, work, reads, found_full: false };
                self.pending[usize::from(head)].stage = Stage::Io(on_disk);
                if let Some((direction, bytes)) = admission
                    && let Some(attached) = &mut self.attachments[attachment]
                {
                    let admission = &attached.backing.admission;
                    attached.waiting.admit(head, direction, bytes, admission, self.engine);
                }
                Ok(())
            }
            Err(failure) => {
                self.detach(attachment);
                self.finish(head, task.complete(Err(failure)))
            }
        }
    }

    /// Hands the work to the engine: parked, with what the rate limits are to count, or started already.
    fn park(
        &mut self,
        head: u16,
        header: &Header,
        io: Io,
        attachment: usize,
    ) -> Result<(Work, Option<(Direction, u64)>), Failure> {
        if let Some(attached) = &self.attachments[attachment] {
            self.engine.select(attached.disk);
        }
        let to_engine = |range: cleave_scsi::Range| Range { offset: range.offset, len: range.len };
        match io {
            Io::Read { range, fua } => {
                self.find_buffers(header, range.len, Direction::Read)?;
                if fua {
                    let buffers = self.buffers.drain(..).collect();
                    self.engine.flush(head);
                    return Ok((Work::Read { offset: range.offset, buffers }, None));
                }
                self.park_transfer(head, Transfer::read(range.offset));
                Ok((Work::Answer, Some((Direction::Read, range.len))))
            }
            Io::Write { range, durable } => {
                self.find_buffers(header, range.len, Direction::Write)?;
                self.park_transfer(head, Transfer::write(range.offset, durable));
                Ok((Work::Answer, Some((Direction::Write, range.len))))
            }
            Io::Flush => {
                self.engine.flush(head);
                Ok((Work::Answer, None))
            }
            Io::Unmap { ranges, durable } => {
                let ranges = ranges.into_iter().map(to_engine).collect();
                self.engine.park_ranges(head, RangeOp::Discard, ranges);
                let work = if durable { Work::Flush } else { Work::Answer };
                Ok((work, Some((Direction::Write, 0))))
            }
            Io::WriteZeroes { range, unmap, durable } => {
                self.engine.park_ranges(
                    head,
                    RangeOp::WriteZeroes { unmap, durable },
                    vec![to_engine(range)],
                );
                let cost = if unmap { 0 } else { range.len.min(MAX_ZEROES_COST) };
                Ok((Work::Answer, Some((Direction::Write, cost))))
            }
            other => self.park_pieces(head, header, other),
        }
    }

    fn park_pieces(
        &mut self,
        head: u16,
        header: &Header,
        io: Io,
    ) -> Result<(Work, Option<(Direction, u64)>), Failure> {
        let data_out = |len| header.data_out(&self.chain, len).collect();
        let pieces = Pieces::new(io, data_out, self.vring.memory()).ok_or(Failure::Internal)??;
        let mut pieces = Box::new(pieces);
        match pieces.next() {
            Next::Over(outcome) => Err(outcome.err().unwrap_or(Failure::Internal)),
            Next::Move(transfer, len) => {
                self.held += pieces.held();
                self.buffers.clear();
                self.buffers.push(iovec(&mut pieces.buffer()[..len]));
                self.park_transfer(head, transfer);
                let cost = pieces.cost();
                Ok((Work::Pieces(pieces), Some(cost)))
            }
        }
    }

    /// Moves on with what is in [`Queue::buffers`].
    fn park_transfer(&mut self, head: u16, transfer: Transfer) {
        // SAFETY: the buffers are guest memory, mapped as long as `self.vring` holds it, which is given back only when
        // nothing is in flight and nothing parked; or the request's own, which its stage has until its event is out.
        unsafe { self.engine.park_transfer(head, transfer, self.buffers.drain(..)) };
    }

    /// Goes on with a request that the rate limits have let go already.
    pub(super) fn transfer(&mut self, head: u16, transfer: Transfer, buffers: Vec<libc::iovec>) {
        self.buffers = buffers;
        self.park_transfer(head, transfer);
        self.engine.submit(head);
    }

    /// Finds the guest's buffers in this process, into [`Queue::buffers`].
    fn find_buffers(&mut self, header: &Header, len: u64, direction: Direction) -> Result<(), Failure> {
        self.buffers.clear();
        let memory = self.vring.memory();
        let found = match direction {
            Direction::Read => host_buffers(memory, header.data_in(&self.chain, len), &mut self.buffers),
            Direction::Write => host_buffers(memory, header.data_out(&self.chain, len), &mut self.buffers),
        };
        found.map_err(|error| {
            self.complain(&error);
            Failure::Internal
        })
    }
}

/// Where the guest's buffers are in this process.
fn host_buffers(
    memory: &GuestMemory,
    data: impl Iterator<Item = Segment>,
    buffers: &mut Vec<libc::iovec>,
) -> Result<(), vm_memory::GuestMemoryError> {
    for segment in data {
        for slice in memory.slices(segment.addr, segment.len as usize) {
            let slice = slice?;
            let base = slice.ptr_guard_mut().as_ptr().cast();
            buffers.push(libc::iovec { iov_base: base, iov_len: slice.len() });
        }
    }
    Ok(())
}

pub(super) fn iovec(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

/// Used by those who look for a unit's name in messages.
pub(super) fn name_of(backing: &Arc<Backing>) -> String {
    format!("unit {}", backing.address)
}
