//! Requests on an image whose bytes are where its tables say: each goes piece by piece, in order of addresses.
//!
//! ```text
//!   a piece:  located --in a file--> in flight ------.
//!                |------zeros--> filled ------------>|--> the next piece, until all are moved
//!                |------the worker's--> a job ------>|
//!                `------the gate is closed--> parked until the port's descriptor is readable, then located again
//! ```

use std::io;
use std::sync::Arc;

use super::transfer::{Direction, Progress, Slot, Target};
use super::{Engine, Event, Token, WatchId};
use crate::qcow2::{Buffers, Place, Port, Work};

/// An engine's way to a mapped image.
pub(super) struct Mapping {
    pub(super) port: Arc<Port>,
    /// The port's descriptor.
    pub(super) watch: WatchId,
    /// Requests that met a closed gate.
    parked: Vec<u16>,
    /// By tag: what is under way.
    pieces: Vec<Piece>,
    /// Requests that are over without the kernel.
    pub(super) finished: Vec<(u16, io::Result<()>)>,
}

#[derive(Debug, Default, Clone, Copy)]
enum Piece {
    #[default]
    None,
    /// The port is owed a [`Port::left`].
    InFile,
    /// A write in place whose tables may not be durable: the file is synced after it.
    InFileThenSync,
    Sync,
    Job(usize),
}

/// What to do with a request.
pub(super) enum Step {
    Submit(Target),
    Sync,
    /// It is under way, or waits.
    Wait,
    Over(io::Result<()>),
}

impl Engine {
    pub(super) fn completed_mapped(&mut self, tag: u16, result: i32) {
        let slot = &mut self.slots[usize::from(tag)];
        let bounced = slot.bounced();
        if let Some(mapping) = &mut self.mapping {
            let step = mapping.completed(tag, slot, result);
            self.take_step(tag, step, bounced);
        }
    }

    /// Goes on with requests that waited for the image's worker.
    pub(super) fn take_news(&mut self) {
        let Some(mapping) = &mut self.mapping else { return };
        let (done, parked) = mapping.take_news();
        for (tag, result) in done {
            let slot = &mut self.slots[usize::from(tag)];
            let bounced = slot.bounced();
            if let Some(mapping) = &mut self.mapping {
                let step = mapping.job_done(tag, slot, result);
                self.take_step(tag, step, bounced);
            }
        }
        for tag in parked {
            self.submit_slot(tag);
        }
    }

    pub(super) fn take_step(&mut self, tag: u16, step: Step, bounced: usize) {
        let slot = &mut self.slots[usize::from(tag)];
        let entry = match step {
            Step::Submit(target) => slot.entry_at(target),
            Step::Sync => slot.entry_at(Target::whole_image()),
            Step::Wait => return,
            Step::Over(result) => {
                slot.free();
                self.bounced -= bounced;
                if let Some(mapping) = &mut self.mapping {
                    mapping.finished.push((tag, result));
                }
                return;
            }
        };
        self.push(entry.user_data(Token::Slot(tag).encode()));
    }
}

impl Mapping {
    pub(super) fn new(port: Arc<Port>, watch: WatchId) -> Self {
        Self { port, watch, parked: Vec::new(), pieces: Vec::new(), finished: Vec::new() }
    }

    fn piece(&mut self, tag: u16) -> &mut Piece {
        let at = usize::from(tag);
        if at >= self.pieces.len() {
            self.pieces.resize(at + 1, Piece::None);
        }
        &mut self.pieces[at]
    }

    /// The next step of a request that moves bytes.
    pub(super) fn next_step(&mut self, tag: u16, slot: &mut Slot) -> Step {
        loop {
            let Some((transfer, remaining)) = slot.rest() else { return Step::Over(Ok(())) };
            if remaining == 0 {
                return Step::Over(Ok(()));
            }
            let (offset, len) = (transfer.offset, remaining as u64);
            let located = match transfer.direction {
                Direction::Read => self.port.locate_read(offset, len),
                Direction::Write { .. } => self.port.locate_write(offset, len),
            };
            match located {
                Ok(Place::File { file, offset, len }) => {
                    let durable = matches!(transfer.direction, Direction::Write { durable: true });
                    let sync = durable && !self.port.tables_are_durable();
                    *self.piece(tag) = if sync { Piece::InFileThenSync } else { Piece::InFile };
                    return Step::Submit(Target { file, offset, len: as_len(len) });
                }
                Ok(Place::Zeros { len }) => slot.fill_zeros(as_len(len)),
                Ok(Place::Worker { len, pending }) => {
                    self.send(tag, slot, as_len(len), pending);
                    return Step::Wait;
                }
                Ok(Place::Later) => {
                    self.parked.push(tag);
                    return Step::Wait;
                }
                Err(error) => return Step::Over(Err(error)),
            }
        }
    }

    fn send(&mut self, tag: u16, slot: &Slot, len: usize, pending: Option<u64>) {
        let Some((transfer, remaining)) = slot.rest() else { return };
        let work = match transfer.direction {
            Direction::Read => Work::Read,
            Direction::Write { durable } => Work::Write { durable },
        };
        *self.piece(tag) = Piece::Job(len.min(remaining));
        self.port.send(tag, work, transfer.offset, Buffers(slot.next_buffers(len)), pending);
    }

    /// The kernel is done with what a request had submitted.
    pub(super) fn completed(&mut self, tag: u16, slot: &mut Slot, result: i32) -> Step {
        let piece = std::mem::take(self.piece(tag));
        if matches!(piece, Piece::InFile | Piece::InFileThenSync) {
            self.port.left();
        }
        // The file ends in the middle of its last cluster, or before the cluster: the worker tells which.
        if result == 0
            && matches!(piece, Piece::InFile)
            && let Some((transfer, 1..)) = slot.rest()
            && transfer.direction == Direction::Read
        {
            self.send(tag, slot, usize::MAX, None);
            return Step::Wait;
        }
        match (slot.advance(result), piece) {
            (Progress::Done(Ok(())), Piece::InFileThenSync) => {
                *self.piece(tag) = Piece::Sync;
                slot.begin_flush();
                Step::Sync
            }
            (Progress::Done(result), _) => Step::Over(result),
            (Progress::More, _) => self.next_step(tag, slot),
        }
    }

    /// What the port has to say: the requests to go on with, and how their jobs went.
    pub(super) fn take_news(&mut self) -> (Vec<(u16, io::Result<()>)>, Vec<u16>) {
        (self.port.take_done(), std::mem::take(&mut self.parked))
    }

    /// A job is done.
    pub(super) fn job_done(&mut self, tag: u16, slot: &mut Slot, result: io::Result<()>) -> Step {
        let Piece::Job(len) = std::mem::take(self.piece(tag)) else { return Step::Wait };
        match result {
            Ok(()) => {
                slot.moved(len);
                self.next_step(tag, slot)
            }
            Err(error) => Step::Over(Err(error)),
        }
    }

    pub(super) fn next_finished(&mut self) -> Option<Event> {
        self.finished.pop().map(|(tag, result)| Event::Done { tag, result })
    }
}

fn as_len(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.port.close();
    }
}
