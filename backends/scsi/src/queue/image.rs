//! The images that a queue's engine has: attached by the first request, let go of when no unit has them any more.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use cleave_storage::{DiskId, Waiting};

use super::Queue;
use crate::bus::{Backing, Loaded, Slot};

/// An image that the engine has, and what waits for it.
pub(super) struct Attachment {
    /// Of the [`Loaded`].
    number: u64,
    pub(super) disk: DiskId,
    pub(super) backing: Arc<Backing>,
    pub(super) waiting: Waiting,
    /// Requests on it.
    users: usize,
    /// The unit has it no more.
    stale: bool,
}

impl Queue<'_> {
    /// The attachment of what is in `slot`, as `loaded`, with one more request on it.
    pub(super) fn attach(&mut self, slot: &Slot, loaded: &Loaded) -> io::Result<usize> {
        let known = self.attachments.iter().position(|attachment| {
            attachment.as_ref().is_some_and(|attachment| attachment.number == loaded.number)
        });
        let at = match known {
            Some(at) => at,
            None => self.attach_new(slot, loaded)?,
        };
        if let Some(attachment) = &mut self.attachments[at] {
            attachment.users += 1;
        }
        Ok(at)
    }

    fn attach_new(&mut self, slot: &Slot, loaded: &Loaded) -> io::Result<usize> {
        let attachment = Attachment {
            number: loaded.number,
            disk: self.engine.attach(loaded.image.clone())?,
            backing: slot.backing.clone(),
            waiting: Waiting::new(self.queue),
            users: 0,
            stale: false,
        };
        let at = self.attachments.iter().position(Option::is_none).unwrap_or(self.attachments.len());
        if at == self.attachments.len() {
            self.attachments.push(None);
        }
        self.attachments[at] = Some(attachment);
        Ok(at)
    }

    /// A request is on it no more.
    pub(super) fn detach(&mut self, at: usize) {
        let Some(attachment) = &mut self.attachments[at] else { return };
        attachment.users -= 1;
        if attachment.users == 0 && attachment.stale {
            self.engine.detach(attachment.disk);
            self.attachments[at] = None;
        }
    }

    /// Lets go of what no unit has any more.
    pub(super) fn look_at_images(&mut self) {
        let bus = self.controller.bus();
        for place in &mut self.attachments {
            let Some(attachment) = place else { continue };
            let loaded = bus.slot(attachment.backing.address).and_then(|slot| slot.loaded.as_ref());
            if loaded.is_some_and(|loaded| loaded.number == attachment.number) {
                continue;
            }
            attachment.stale = true;
            if attachment.users == 0 {
                self.engine.detach(attachment.disk);
                *place = None;
            }
        }
    }

    /// Lets go of all.
    pub(super) fn detach_all(&mut self) {
        for attachment in std::mem::take(&mut self.attachments).into_iter().flatten() {
            self.engine.detach(attachment.disk);
        }
    }

    /// When something that waits may go at the earliest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.attachments.iter().flatten().filter_map(|attachment| attachment.waiting.deadline()).min()
    }

    pub(super) fn submit_due(&mut self, nudged: bool) {
        let now = Instant::now();
        for attachment in self.attachments.iter_mut().flatten() {
            let Attachment { waiting, backing, .. } = attachment;
            waiting.submit_due(now, nudged, &backing.admission, self.engine);
        }
    }
}
