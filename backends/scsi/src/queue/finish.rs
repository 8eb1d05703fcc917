//! One request from what the disk says to its answer.

use std::io;

use cleave_runtime::RingError;
use cleave_scsi::{Action, Answer, Failure, Status};
use cleave_storage::{Transfer, Waited};
use vm_memory::Bytes;

use super::pieces::Next;
use super::start::{iovec, name_of};
use super::{OnDisk, Queue, Stage, Work};
use crate::orders::{Order, Ticket, Which};
use crate::request::{Response, ResponseBytes, write_all};

fn failure(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Failure::NoSpace,
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Failure::WriteProtected,
        _ => Failure::Medium { at: None },
    }
}

impl Queue<'_> {
    /// The engine is done with what it had of `head`.
    pub(super) fn complete(&mut self, head: u16, result: io::Result<()>) {
        let finished = match std::mem::take(&mut self.pending[usize::from(head)].stage) {
            Stage::Io(on_disk) => self.go_on(head, on_disk, result),
            Stage::Actions { task, rest, attachment } => {
                if let Some(attachment) = attachment {
                    self.detach(attachment);
                }
                match result {
                    Ok(()) => {
                        self.pending[usize::from(head)].stage =
                            Stage::Actions { task, rest, attachment: None };
                        self.act(head)
                    }
                    Err(error) => {
                        self.complain(&format_args!("a disk failed: {error}"));
                        self.finish(head, task.complete(Err(failure(&error))))
                    }
                }
            }
            other => {
                self.pending[usize::from(head)].stage = other;
                Ok(())
            }
        };
        self.check(finished);
    }

    fn go_on(&mut self, head: u16, mut on_disk: OnDisk, result: io::Result<()>) -> Result<(), RingError> {
        if std::mem::take(&mut on_disk.found_full) {
            self.room_was_found(on_disk.attachment, result.is_ok());
        }
        if let Err(error) = result {
            return self.failed(head, on_disk, &error);
        }
        if self.pending[usize::from(head)].ended.is_some() {
            return self.over(head, on_disk, Err(Failure::Aborted));
        }
        if let Some(attached) = &self.attachments[on_disk.attachment] {
            self.engine.select(attached.disk);
        }
        match std::mem::replace(&mut on_disk.work, Work::Answer) {
            Work::Answer => return self.over(head, on_disk, Ok(())),
            Work::Flush => self.engine.flush(head),
            Work::Read { offset, buffers } => self.transfer(head, Transfer::read(offset), buffers),
            Work::Pieces(mut pieces) => match pieces.moved(self.vring.memory()) {
                Next::Over(outcome) => {
                    self.held -= pieces.held();
                    return self.over(head, on_disk, outcome);
                }
                Next::Move(transfer, len) => {
                    let buffer = iovec(&mut pieces.buffer()[..len]);
                    on_disk.work = Work::Pieces(pieces);
                    self.transfer(head, transfer, vec![buffer]);
                }
            },
        }
        self.pending[usize::from(head)].stage = Stage::Io(on_disk);
        Ok(())
    }

    fn failed(&mut self, head: u16, on_disk: OnDisk, error: &io::Error) -> Result<(), RingError> {
        if let Some(attached) = &self.attachments[on_disk.attachment] {
            let advice = match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    " (on-full=pause has writes wait for room)"
                }
                io::ErrorKind::UnexpectedEof => " (its file has become shorter)",
                _ => "",
            };
            let name = name_of(&attached.backing);
            self.complain(&format_args!("{name}: the disk failed: {error}{advice}"));
        }
        self.over(head, on_disk, Err(failure(error)))
    }

    /// A request leaves its disk.
    fn over(&mut self, head: u16, on_disk: OnDisk, outcome: Result<(), Failure>) -> Result<(), RingError> {
        if let Work::Pieces(pieces) = &on_disk.work {
            self.held -= pieces.held();
        }
        self.detach(on_disk.attachment);
        let ended = self.pending[usize::from(head)].ended;
        match ended {
            Some(response) => self.respond(head, response, None),
            None => {
                let answer = on_disk.task.complete(outcome);
                let good = answer.status == Status::Good;
                self.respond_io(head, &answer, on_disk.reads && good)
            }
        }
    }

    fn room_was_found(&mut self, attachment: usize, found: bool) {
        if let Some(attached) = &mut self.attachments[attachment] {
            let waited = if found { Waited::Room } else { Waited::Failed };
            attached.backing.admission.end_waiting_for_room(waited);
            if found {
                attached.waiting.room_found(self.engine);
            }
        }
    }

    /// The request of `head` is parked: it waits for room, if its unit does and the queue goes on.
    pub(super) fn found_full(&mut self, head: u16, error: io::Error) {
        let ended = self.pending[usize::from(head)].ended.is_some();
        let Stage::Io(on_disk) = &mut self.pending[usize::from(head)].stage else { return };
        let Some(attached) = &mut self.attachments[on_disk.attachment] else { return };
        let admission = &attached.backing.admission;
        if attached.backing.waits_for_room && !ended {
            if !std::mem::replace(&mut on_disk.found_full, true) {
                admission.begin_waiting_for_room(&error);
            }
            if !self.stopping {
                return attached.waiting.park_full(head);
            }
            self.engine.abandon(head);
            on_disk.found_full = false;
            if self.leaving {
                return admission.end_waiting_for_room(Waited::Left);
            }
            admission.end_waiting_for_room(Waited::Stopped);
        } else {
            if std::mem::take(&mut on_disk.found_full) {
                admission.end_waiting_for_room(Waited::Failed);
            }
            self.engine.abandon(head);
        }
        if let Stage::Io(on_disk) = std::mem::take(&mut self.pending[usize::from(head)].stage) {
            let finished = self.failed(head, on_disk, &error);
            self.check(finished);
        }
    }

    /// Does what is next of a command's actions.
    pub(super) fn act(&mut self, head: u16) -> Result<(), RingError> {
        let Some(address) = self.pending[usize::from(head)].entered.as_ref().map(|entered| entered.address)
        else {
            return Ok(());
        };
        loop {
            let Stage::Actions { rest, .. } = &mut self.pending[usize::from(head)].stage else {
                return Ok(());
            };
            let outcome = match rest.pop_front() {
                None => return self.acted(head, Ok(())),
                Some(Action::Flush) => match self.begin_flush(head) {
                    true => return Ok(()),
                    false => Ok(()),
                },
                Some(Action::Save(_)) => self.controller.save(),
                Some(Action::Ejected) => self.controller.ejected(address),
                // What was in the drive went with the tray: there is nothing to load.
                Some(Action::Closed) => Ok(()),
                Some(Action::Abort(nexuses)) => {
                    let (controller, queue) = (self.controller.clone(), self.queue);
                    let ticket = Ticket::new(move |_| {
                        controller.mail.post(queue, Order::Proceed(head));
                    });
                    self.controller.mail.post_all(|| Order::End {
                        which: Which::Of { nexuses: nexuses.clone(), at: address, but: (queue, head) },
                        response: Some(Response::Aborted),
                        ticket: ticket.clone(),
                    });
                    return Ok(());
                }
            };
            if let Err(error) = outcome {
                self.complain(&format_args!("--state: the change of unit {address} is not kept: {error}"));
                return self.acted(head, Err(Failure::Internal));
            }
        }
    }

    fn acted(&mut self, head: u16, outcome: Result<(), Failure>) -> Result<(), RingError> {
        match std::mem::take(&mut self.pending[usize::from(head)].stage) {
            Stage::Actions { task, .. } => self.finish(head, task.complete(outcome)),
            _ => Ok(()),
        }
    }

    /// `false`: there is no image to flush.
    fn begin_flush(&mut self, head: u16) -> bool {
        let Some(backing) = self.pending[usize::from(head)].entered.clone() else { return false };
        let controller = self.controller.clone();
        let bus = controller.bus();
        let Some(slot) = bus.slot(backing.address) else { return false };
        let Some(loaded) = &slot.loaded else { return false };
        let Ok(at) = self.attach(slot, loaded) else { return false };
        if let Stage::Actions { attachment, .. } = &mut self.pending[usize::from(head)].stage {
            *attachment = Some(at);
        }
        if let Some(attached) = &self.attachments[at] {
            self.engine.select(attached.disk);
            self.engine.flush(head);
        }
        true
    }

    /// The command has been carried out, or refused; the chain is in [`Queue::chain`] if there is data to go back.
    pub(super) fn finish(&mut self, head: u16, answer: Answer) -> Result<(), RingError> {
        if let Some(response) = self.pending[usize::from(head)].ended {
            return self.respond(head, response, None);
        }
        if !answer.data_in.is_empty()
            && let Some(header) = self.pending[usize::from(head)].header
        {
            let room = header.data_in(&self.chain, answer.data_in.len() as u64);
            if let Err(error) = write_all(room, self.vring.memory(), &answer.data_in) {
                self.complain(&error);
                return self.respond(head, Response::Failure, None);
            }
        }
        self.respond(head, Response::Ok, Some(&answer))
    }

    fn respond_io(&mut self, head: u16, answer: &Answer, read: bool) -> Result<(), RingError> {
        let data_in = self.pending[usize::from(head)].header.map_or(0, |header| header.data_in);
        let written = if read { data_in.saturating_sub(answer.residual) } else { 0 };
        self.push(head, Response::Ok, Some(answer), written)
    }

    pub(super) fn respond(
        &mut self,
        head: u16,
        response: Response,
        answer: Option<&Answer>,
    ) -> Result<(), RingError> {
        let written = answer.map_or(0, |answer| answer.data_in.len() as u64);
        self.push(head, response, answer, written)
    }

    /// Gives the request back to the guest, which has got `written` bytes of data.
    fn push(
        &mut self,
        head: u16,
        response: Response,
        answer: Option<&Answer>,
        written: u64,
    ) -> Result<(), RingError> {
        let pending = std::mem::take(&mut self.pending[usize::from(head)]);
        self.in_flight -= 1;
        self.served += 1;
        if let Some(backing) = &pending.entered {
            let started = backing.gate.leave();
            self.controller.run_started(&backing.gate, started);
        }
        let Some(header) = pending.header else { return Ok(()) };
        let bytes = ResponseBytes::new(&header, response, answer);
        let memory = self.vring.memory();
        let put = match pending.response_at {
            Some(at) => memory.map().write_slice(bytes.as_slice(), at),
            None => match self.vring.read_chain(head, &mut self.chain) {
                Ok(()) => {
                    let room = self.chain.writable().iter().copied();
                    write_all(room, self.vring.memory(), bytes.as_slice())
                }
                Err(error) => {
                    self.complain(&error);
                    Ok(())
                }
            },
        };
        if let Err(error) = put {
            self.complain(&format_args!("there is no room for a response: {error}"));
        }
        let len = u64::from(header.response_len) + written;
        self.vring.push_used(head, u32::try_from(len).unwrap_or(u32::MAX))
    }
}
