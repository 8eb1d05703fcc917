//! A port's two queues (virtio 1.2, 5.3.6): what the guest prints goes to the line, what the line has goes to the guest.

use std::os::fd::AsFd;

use cleave_runtime::RingError;

use super::queue::{Direction, Queue};
use super::{MULTIPORT, Worker, token};
use crate::kept::Kept;
use crate::line::{Line, Received, Sent, Watch};

/// Chains of a port in each direction, before others have their turn.
const BATCH: usize = 32;

impl Worker {
    /// Does what there is to do for port `id`, some of it.
    pub(super) fn attend(&mut self, id: u32) {
        let at = id as usize;
        if !std::mem::take(&mut self.marks[at]) {
            return;
        }
        let Some(line) = &mut self.lines[at] else { return };
        line.look(&Watch { epoll: self.epoll.as_fd(), token, port: id });
        line.flush();
        let multiport = self.features & MULTIPORT != 0;
        let first = if id == 0 { 0 } else { 2 * (at + 1) };
        let [from_guest, to_guest] = &mut self.moved[at];
        let mut again = false;
        if let Some(queue) = self.queues[first + 1].as_mut().filter(|queue| queue.can_run()) {
            let done = transmit(queue, line, &self.kept, from_guest);
            again |= queue.settle(done);
        }
        if let Some(queue) = self.queues[first].as_mut().filter(|queue| queue.can_run())
            && (!multiport || self.ports.is_guest_open(id))
        {
            let done = receive(queue, line, &self.kept, to_guest);
            again |= queue.settle(done);
        }
        // Clients may have gone meanwhile.
        line.look(&Watch { epoll: self.epoll.as_fd(), token, port: id });
        self.marks[at] = again;
        let (is_open, size) = (line.is_open(), line.take_size());
        self.ports.set_host_open(id, is_open);
        self.control_mark = true;
        if let Some(size) = size {
            self.tell_size(id, size);
        }
    }
}

/// Whether there may be more to do at once.
fn transmit(queue: &mut Queue, line: &mut Line, kept: &Kept, moved: &mut u64) -> Result<bool, RingError> {
    queue.vring.disable_kicks()?;
    for _ in 0..BATCH {
        if !line.is_shared() && !line.takes_output() || !queue.fetch(Direction::FromGuest, kept)? {
            return Ok(false);
        }
        let (index, Some(current)) = (queue.index(), &mut queue.current) else { return Ok(false) };
        if line.is_shared() {
            let len = current.iovecs.len();
            if !line.has_room(len) {
                return Ok(false);
            }
            line.print(&current.iovecs);
            line.flush();
            *moved += len as u64;
            queue.finish(0, kept)?;
            continue;
        }
        let Sent::Bytes(count) = line.send(kept, index, current.done, &current.iovecs) else {
            return Ok(false);
        };
        *moved += count as u64;
        current.iovecs.advance(count);
        // A chain has less than 4 GiB.
        current.done += count as u32;
        if current.iovecs.len() == 0 {
            queue.finish(0, kept)?;
        }
    }
    Ok(true)
}

/// As [`transmit`].
fn receive(queue: &mut Queue, line: &mut Line, kept: &Kept, moved: &mut u64) -> Result<bool, RingError> {
    queue.vring.disable_kicks()?;
    for _ in 0..BATCH {
        if !line.has_input() || !queue.fetch(Direction::ToGuest, kept)? {
            return Ok(false);
        }
        let (index, Some(current)) = (queue.index(), &queue.current) else { return Ok(false) };
        let count = match line.is_shared() {
            true => line.take_typed(&current.iovecs),
            false => match line.receive(kept, index, &current.iovecs) {
                Received::Bytes(count) => count,
                Received::Wait => 0,
            },
        };
        if count == 0 {
            return Ok(false);
        }
        *moved += count as u64;
        queue.finish(count as u32, kept)?;
    }
    Ok(true)
}
