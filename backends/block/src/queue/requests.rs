//! One request from its head to its answer.
#![expect(unsafe_code, reason = "the disk moves data to and from guest memory itself")]

use std::io;
use std::sync::atomic::Ordering;

use cleave_runtime::{GuestMemory, RingError, Segment};
use cleave_storage::{Direction, Range, RangeOp, Transfer, Waited};
use vm_memory::{GuestAddress, VolatileSlice};

use super::Queue;
use crate::request::{ID_LEN, Request, Status, Work, segments};

/// What is needed to answer a request once the disk has done its part.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pending {
    status: GuestAddress,
    work: Option<Work>,
    /// Bytes written for the guest if all goes well, without the status.
    written: u32,
    /// It has found the disk full.
    found_full: bool,
}

impl Queue<'_> {
    pub(super) fn begin(&mut self, head: u16) -> Result<(), RingError> {
        if self.engine.is_busy(head) {
            self.complain(&format_args!("descriptor {head} is made available again while it is in use"));
            return Ok(());
        }
        if let Err(error) = self.vring.read_chain(head, &mut self.chain) {
            self.complain(&error);
            return self.vring.push_used(head, 0);
        }
        let request = match Request::parse(&self.chain, self.vring.memory(), &self.disk.limits()) {
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
        self.finish(head, Pending { status: request.status, ..Pending::default() }, status)
    }

    /// Hands the work to the disk, or does it at once: then its status is the answer.
    fn start(&mut self, head: u16, request: &Request, work: Work) -> Option<Status> {
        let durable = self.disk.durable.load(Ordering::Relaxed);
        let mut pending = Pending { status: request.status, work: Some(work), ..Pending::default() };
        let started = match work {
            Work::Read { offset } => {
                pending.written = request.data_len;
                self.start_transfer(head, request, work, Transfer::read(offset))
            }
            Work::Write { offset } => {
                self.start_transfer(head, request, work, Transfer::write(offset, durable))
            }
            Work::Discard | Work::WriteZeroes => self.start_ranges(head, request, work, durable),
            Work::Flush => {
                self.engine.flush(head);
                Ok(())
            }
            Work::GetId => Err(self.write_id()),
        };
        self.pending[usize::from(head)] = pending;
        started.err()
    }

    /// # Errors
    /// The answer, already.
    fn start_transfer(
        &mut self,
        head: u16,
        request: &Request,
        work: Work,
        transfer: Transfer,
    ) -> Result<(), Status> {
        let data = Request::data(&self.chain, work);
        if let Err(error) = host_buffers(self.vring.memory(), data, &mut self.buffers) {
            self.complain(&error);
            return Err(Status::IoErr);
        }
        // SAFETY: the buffers are guest memory, mapped as long as `self.vring` holds it; `run` gives the vring back only
        // when nothing is in flight, and nothing parked.
        unsafe { self.engine.park_transfer(head, transfer, self.buffers.drain(..)) };
        let direction = if matches!(work, Work::Read { .. }) { Direction::Read } else { Direction::Write };
        self.waiting.admit(head, direction, request.data_len.into(), &self.disk.admission, self.engine);
        Ok(())
    }

    /// # Errors
    /// The answer, already.
    fn start_ranges(
        &mut self,
        head: u16,
        request: &Request,
        work: Work,
        durable: bool,
    ) -> Result<(), Status> {
        let limits = self.disk.limits();
        let (op, ranges) = segments::read(&self.chain, self.vring.memory(), request, work, &limits, durable)?;
        let bytes = cost(op, &ranges);
        self.engine.park_ranges(head, op, ranges);
        self.waiting.admit(head, Direction::Write, bytes, &self.disk.admission, self.engine);
        Ok(())
    }

    fn write_id(&self) -> Status {
        let mut id = [0; ID_LEN];
        id[..self.disk.serial.len()].copy_from_slice(self.disk.serial.as_bytes());
        let mut rest = &id[..];
        for segment in Request::data(&self.chain, Work::GetId) {
            let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
            if self.vring.memory().write(now, segment.addr).is_err() {
                return Status::IoErr;
            }
            rest = later;
        }
        Status::Ok
    }

    pub(super) fn complete(&mut self, head: u16, result: io::Result<()>) {
        let pending = self.pending[usize::from(head)];
        if pending.found_full {
            self.disk.admission.end_waiting_for_room(if result.is_ok() {
                Waited::Room
            } else {
                Waited::Failed
            });
            if result.is_ok() {
                self.waiting.room_found(self.engine);
            }
        }
        let status = match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                let advice = match error.kind() {
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                        " (--on-full=pause has writes wait for room)"
                    }
                    io::ErrorKind::UnexpectedEof => " (its file has become shorter)",
                    _ => "",
                };
                let what: &dyn std::fmt::Display = match &pending.work {
                    Some(work) => work,
                    None => &"a request",
                };
                let disk = self.disk.name.as_str();
                self.complain(&format_args!("disk {disk} failed {what}: {error}{advice}"));
                Status::IoErr
            }
        };
        let finished = self.finish(head, pending, status);
        self.check(finished);
    }

    /// The request of `head` is parked: it waits for room, unless the queue is to stop.
    pub(super) fn found_full(&mut self, head: u16, error: io::Error) {
        let pending = &mut self.pending[usize::from(head)];
        if !std::mem::replace(&mut pending.found_full, true) {
            self.disk.admission.begin_waiting_for_room(&error);
        }
        if !self.stopping {
            return self.waiting.park_full(head);
        }
        self.engine.abandon(head);
        if self.leaving {
            return self.disk.admission.end_waiting_for_room(Waited::Left);
        }
        self.disk.admission.end_waiting_for_room(Waited::Stopped);
        let finished = self.finish(head, self.pending[usize::from(head)], Status::IoErr);
        self.check(finished);
    }

    fn finish(&mut self, head: u16, pending: Pending, status: Status) -> Result<(), RingError> {
        self.vring.memory().write_obj(status as u8, pending.status)?;
        self.served += 1;
        let written = if status == Status::Ok { pending.written } else { 0 };
        self.vring.push_used(head, written + 1)
    }
}

/// Most bytes of a request to write zeroes that count for the rate limits: few disks have to be written for it.
const MAX_ZEROES_COST: u64 = 16 << 20;

/// Bytes that `op` on `ranges` counts for the rate limits. One command discards up to 64 GiB and moves nothing.
fn cost(op: RangeOp, ranges: &[Range]) -> u64 {
    match op {
        RangeOp::Discard | RangeOp::WriteZeroes { unmap: true, .. } => 0,
        RangeOp::WriteZeroes { unmap: false, .. } => {
            let bytes = ranges.iter().fold(0u64, |sum, range| sum.saturating_add(range.len));
            bytes.min(MAX_ZEROES_COST)
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
        for slice in memory.slices(segment.addr, segment.len as usize) {
            buffers.push(iovec(&slice?));
        }
    }
    Ok(())
}

fn iovec(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}
