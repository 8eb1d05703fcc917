//! Orders of others, and the end of a vring.

use cleave_runtime::RingError;
use cleave_scsi::{Answer, Status, TaskName};

use super::{Queue, Stage, Work};
use crate::address::Address;
use crate::orders::{Order, Ticket, Which};
use crate::request::Response;

impl Queue<'_> {
    pub(super) fn take_orders(&mut self) {
        for order in self.controller.mail.take(self.queue) {
            let obeyed = match order {
                Order::End { which, response, ticket } => self.end_tasks(&which, response, &ticket),
                Order::Run(head) => self.run_from_line(head),
                Order::Proceed(head) => self.act(head),
                Order::Look => {
                    self.look_at_images();
                    Ok(())
                }
            };
            self.check(obeyed);
        }
    }

    /// Ends the tasks that are meant, or counts them. Those that the kernel has are answered when it is done with them.
    fn end_tasks(
        &mut self,
        which: &Which,
        response: Option<Response>,
        ticket: &std::sync::Arc<Ticket>,
    ) -> Result<(), RingError> {
        // The guest may have sent some that have not been looked at: they are older than the order.
        if !self.stopping && !self.broken && self.vring.is_started() {
            self.fetch_some(usize::from(self.vring.size()))?;
        }
        for head in 0..self.pending.len() as u16 {
            if !self.is_meant(which, head) {
                continue;
            }
            ticket.names_one();
            if let Some(response) = response {
                self.end_task(head, response, ticket)?;
            }
        }
        Ok(())
    }

    fn is_meant(&self, which: &Which, head: u16) -> bool {
        let pending = &self.pending[usize::from(head)];
        let Some(header) = &pending.header else { return false };
        let Some(address) = Address::decode(header.lun) else { return false };
        let name = TaskName { nexus: self.controller.nexus, lun: address.lun, tag: header.tag };
        !matches!(pending.stage, Stage::Free) && which.means(&name, address.target, (self.queue, head))
    }

    fn end_task(
        &mut self,
        head: u16,
        response: Response,
        ticket: &std::sync::Arc<Ticket>,
    ) -> Result<(), RingError> {
        let pending = &mut self.pending[usize::from(head)];
        pending.ended.get_or_insert(response);
        pending.tickets.push(ticket.clone());
        match &mut pending.stage {
            Stage::InLine(backing) => {
                let backing = backing.clone();
                // If it is not in line any more, its order to run is on its way.
                let Some(started) = backing.gate.withdraw((self.queue, head)) else { return Ok(()) };
                self.controller.run_started(&backing.gate, started);
                pending.stage = Stage::Free;
                self.respond(head, response, None)
            }
            Stage::Io(on_disk) => {
                let attachment = on_disk.attachment;
                let Some(attached) = &mut self.attachments[attachment] else { return Ok(()) };
                if !attached.waiting.withdraw(head, &attached.backing.admission, self.engine) {
                    return Ok(());
                }
                if let Work::Pieces(pieces) = &on_disk.work {
                    self.held -= pieces.held();
                }
                pending.stage = Stage::Free;
                self.detach(attachment);
                self.respond(head, response, None)
            }
            // It is as good as done; its answer waits for the ticket of none but itself.
            Stage::Actions { .. } | Stage::Free => Ok(()),
        }
    }

    /// The vring goes. What has not been answered stays with it, or is answered that it may come again.
    pub(super) fn leave(&mut self) {
        // Orders to run are of tasks that have passed their gates.
        for order in self.controller.mail.close(self.queue) {
            if let Order::Run(head) = order {
                let pending = &mut self.pending[usize::from(head)];
                if let Stage::InLine(backing) = std::mem::take(&mut pending.stage) {
                    pending.entered = Some(backing);
                    pending.stage = Stage::Free;
                }
            }
        }
        for head in 0..self.pending.len() as u16 {
            if self.pending[usize::from(head)].header.is_none() {
                continue;
            }
            self.leave_one(head);
        }
        self.detach_all();
        let signalled = self.vring.signal_used();
        self.check(signalled);
    }

    fn leave_one(&mut self, head: u16) {
        let pending = &mut self.pending[usize::from(head)];
        match std::mem::take(&mut pending.stage) {
            Stage::InLine(backing) => {
                // If it is not in line any more, whoever has let it through finds nobody, and takes it back.
                let started = backing.gate.withdraw((self.queue, head)).unwrap_or_default();
                self.controller.run_started(&backing.gate, started);
            }
            Stage::Io(on_disk) => {
                if let Work::Pieces(pieces) = &on_disk.work {
                    self.held -= pieces.held();
                }
            }
            Stage::Actions { .. } | Stage::Free => {}
        }
        if self.leaving {
            let pending = std::mem::take(&mut self.pending[usize::from(head)]);
            self.in_flight -= 1;
            if let Some(backing) = pending.entered {
                let started = backing.gate.leave();
                self.controller.run_started(&backing.gate, started);
            }
            return;
        }
        let busy = Answer { status: Status::Busy, sense: None, data_in: Vec::new(), residual: 0 };
        let answered = self.respond(head, Response::Ok, Some(&busy));
        self.check(answered);
    }
}
