//! The control queues (virtio 1.2, 5.3.6.2): messages in and out.

use cleave_runtime::{QueueIndex, RingError};

use super::Worker;
use super::queue::{Direction, Queue};
use crate::kept::Kept;
use crate::ports::{HEADER_LEN, Message, Told};

/// Messages of one turn, each way: then the ports have theirs.
const BATCH: usize = 64;

const RECEIVE: QueueIndex = QueueIndex(2);
const TRANSMIT: QueueIndex = QueueIndex(3);

impl Worker {
    pub(super) fn serve_control(&mut self) {
        if self.role(TRANSMIT).is_none() {
            return;
        }
        if let Some(mut queue) = self.take_queue(TRANSMIT) {
            let heard = self.hear_all(&mut queue);
            self.control_mark |= queue.settle(heard);
            self.queues[usize::from(TRANSMIT.0)] = Some(queue);
        }
        if let Some(mut queue) = self.take_queue(RECEIVE) {
            let told = self.tell_all(&mut queue);
            self.control_mark |= queue.settle(told);
            self.queues[usize::from(RECEIVE.0)] = Some(queue);
        }
    }

    fn take_queue(&mut self, QueueIndex(index): QueueIndex) -> Option<Queue> {
        self.queues[usize::from(index)].take_if(|queue| queue.can_run())
    }

    /// Whether there is more.
    fn hear_all(&mut self, queue: &mut Queue) -> Result<bool, RingError> {
        queue.vring.disable_kicks()?;
        for _ in 0..BATCH {
            if !queue.fetch(Direction::FromGuest, &self.kept)? {
                return Ok(false);
            }
            let Some(current) = &queue.current else { return Ok(false) };
            let mut start = Vec::with_capacity(HEADER_LEN);
            current.iovecs.copy_out(|part| {
                let left = HEADER_LEN - start.len();
                start.extend_from_slice(&part[..part.len().min(left)]);
            });
            match Told::decode(&start) {
                Ok(told) => {
                    tracing::debug!("the driver says {told:?}");
                    if !self.ports.hear(told) {
                        queue.complain(&format_args!("{told:?} is about a port that there is not"));
                    }
                    // Before the message is used: a successor hears what this one has not kept.
                    self.keep_bits();
                    self.marks.fill(true);
                }
                Err(error) => queue.complain(&error),
            }
            queue.finish(0, &self.kept)?;
        }
        Ok(true)
    }

    /// As [`Worker::hear_all`].
    fn tell_all(&mut self, queue: &mut Queue) -> Result<bool, RingError> {
        for _ in 0..BATCH {
            // A message is taken when there is a buffer for it.
            if !queue.fetch(Direction::ToGuest, &self.kept)? {
                return Ok(false);
            }
            let Some(message) = self.ports.next_message() else { return Ok(false) };
            tracing::debug!("the driver is told {message:?}");
            self.tell(queue, &message)?;
            // After it was used: a successor tells again what this one has not kept.
            self.keep_bits();
        }
        Ok(true)
    }

    fn tell(&self, queue: &mut Queue, message: &Message) -> Result<(), RingError> {
        let bytes = message.encode(self.order);
        let Some(current) = &queue.current else { return Ok(()) };
        let room = current.iovecs.len();
        let written = if room < bytes.len() { 0 } else { current.iovecs.copy_in(&bytes) };
        if written == 0 {
            queue.complain(&format_args!("a buffer of {room} bytes has no room for {message:?}"));
        }
        finish(queue, written, &self.kept)
    }
}

fn finish(queue: &mut Queue, written: usize, kept: &Kept) -> Result<(), RingError> {
    // A message has a few hundred bytes at most.
    queue.finish(written as u32, kept)
}
