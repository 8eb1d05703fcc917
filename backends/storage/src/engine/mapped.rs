//! Requests on an image whose bytes are where its tables say: each goes piece by piece, in order of addresses.
//!
//! ```text
//!   a piece:  located --in a file--> in flight ------.
//!                |------zeros--> filled ------------>|--> the next piece, until all are moved
//!                |------the worker's--> a job ------>|
//!                `------the gate is closed--> waits until the port's descriptor is readable, then located again
//! ```

use std::io;
use std::sync::Arc;

use io_uring::{opcode, types};

use super::range::{Range, RangeOp, Support};
use super::transfer::{Direction, Progress, Slot, Target};
use super::{DiskId, Engine, Token, WatchId, disk_of};
use crate::qcow2::{Buffers, Place, Port, Work};

/// An engine's way to a mapped image.
pub(super) struct Mapping {
    pub(super) port: Arc<Port>,
    /// By the number that the port gives to each.
    files: Vec<types::Fd>,
    /// The port's descriptor.
    pub(super) watch: WatchId,
    /// Requests that met a closed gate.
    waiting: Vec<u16>,
    /// By tag: what is under way.
    pieces: Vec<Piece>,
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
    /// `Done` or `Full`.
    Over(Progress),
}

impl Engine {
    pub(super) fn submit_mapped(&mut self, tag: u16) {
        let slot = &mut self.slots[usize::from(tag)];
        let bounced = slot.bounced();
        if let Some(mapping) = &mut disk_of(&mut self.disks, slot).mapping {
            let step = if slot.is_flush() { Step::Sync } else { mapping.next_step(tag, slot) };
            self.take_step(tag, step, bounced);
        }
    }

    pub(super) fn completed_mapped(&mut self, tag: u16, result: i32) {
        let slot = &mut self.slots[usize::from(tag)];
        let bounced = slot.bounced();
        let disk = disk_of(&mut self.disks, slot);
        if let Some(mapping) = &mut disk.mapping {
            let step = mapping.completed(tag, slot, result, &mut disk.support);
            self.take_step(tag, step, bounced);
        }
    }

    fn mapping(&mut self, DiskId(disk): DiskId) -> Option<&mut Mapping> {
        self.disks.get_mut(usize::from(disk))?.as_mut()?.mapping.as_mut()
    }

    /// Goes on with requests that waited for the image's worker.
    pub(super) fn take_news(&mut self, disk: DiskId) {
        let Some(mapping) = self.mapping(disk) else { return };
        let (done, waiting) = mapping.take_news();
        for (tag, result) in done {
            let slot = &mut self.slots[usize::from(tag)];
            let bounced = slot.bounced();
            if let Some(mapping) = &mut disk_of(&mut self.disks, slot).mapping {
                let step = mapping.job_done(tag, slot, result);
                self.take_step(tag, step, bounced);
            }
        }
        for tag in waiting {
            self.submit_mapped(tag);
        }
    }

    fn take_step(&mut self, tag: u16, step: Step, bounced: usize) {
        let slot = &mut self.slots[usize::from(tag)];
        let entry = match step {
            Step::Submit(target) => slot.entry_at(target),
            Step::Sync => {
                // What a write held went with its last byte; the sync after it holds nothing.
                self.bounced -= bounced;
                let image = disk_of(&mut self.disks, slot).support.image();
                opcode::Fsync::new(image).flags(types::FsyncFlags::DATASYNC).build()
            }
            Step::Wait => return,
            Step::Over(progress) => {
                if matches!(progress, Progress::Done(_)) {
                    slot.free();
                }
                self.finished.push((tag, bounced, progress));
                return;
            }
        };
        // SAFETY: what the entry points to is the slot's, and lives until its completion.
        unsafe { self.ring.push(entry.user_data(Token::Slot(tag).encode())) };
    }

    pub(super) fn has_finished(&self) -> bool {
        !self.finished.is_empty()
    }

    /// The image whose port's descriptor is watched as `id`.
    pub(super) fn port_of(&self, id: WatchId) -> Option<DiskId> {
        let is_its = |disk: &Option<super::Disk>| {
            disk.as_ref().and_then(|disk| disk.mapping.as_ref()).is_some_and(|mapping| mapping.watch == id)
        };
        self.disks.iter().position(is_its).map(|at| DiskId(at as u16))
    }
}

impl Mapping {
    pub(super) fn new(port: Arc<Port>, files: Vec<types::Fd>, watch: WatchId) -> Self {
        Self { port, files, watch, waiting: Vec::new(), pieces: Vec::new() }
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
            if let Some((op, range)) = slot.next_range() {
                return self.send_range(tag, op, range);
            }
            let Some((transfer, remaining @ 1..)) = slot.rest() else {
                return Step::Over(Progress::Done(Ok(())));
            };
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
                    let file = self.files[file as usize];
                    return Step::Submit(Target { file, offset, len: as_len(len) });
                }
                Ok(Place::Zeros { len }) => slot.fill_zeros(as_len(len)),
                Ok(Place::Worker { len, pending }) => {
                    self.send(tag, slot, as_len(len), pending);
                    return Step::Wait;
                }
                Ok(Place::Later) => {
                    self.waiting.push(tag);
                    return Step::Wait;
                }
                Err(error) => return Step::Over(Progress::Done(Err(error))),
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

    fn send_range(&mut self, tag: u16, op: RangeOp, Range { offset, len }: Range) -> Step {
        let work = match op {
            RangeOp::Discard => Work::Discard { len },
            RangeOp::WriteZeroes { unmap, durable } => Work::Zeroes { len, unmap, durable },
        };
        *self.piece(tag) = Piece::Job(as_len(len));
        self.port.send_range(tag, work, offset, len);
        Step::Wait
    }

    /// The kernel is done with what a request had submitted.
    pub(super) fn completed(
        &mut self,
        tag: u16,
        slot: &mut Slot,
        result: i32,
        support: &mut Support,
    ) -> Step {
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
        match (slot.advance(result, support), piece) {
            (Progress::Done(Ok(())), Piece::InFileThenSync) => {
                *self.piece(tag) = Piece::Sync;
                slot.begin_flush();
                slot.set_parked(false);
                Step::Sync
            }
            (Progress::More, _) => self.next_step(tag, slot),
            (over, _) => Step::Over(over),
        }
    }

    /// What the port has to say: the requests to go on with, and how their jobs went.
    pub(super) fn take_news(&mut self) -> (Vec<(u16, io::Result<()>)>, Vec<u16>) {
        (self.port.take_done(), std::mem::take(&mut self.waiting))
    }

    /// A job is done.
    pub(super) fn job_done(&mut self, tag: u16, slot: &mut Slot, result: io::Result<()>) -> Step {
        let Piece::Job(len) = std::mem::take(self.piece(tag)) else { return Step::Wait };
        match result {
            Ok(()) => {
                slot.moved(len);
                self.next_step(tag, slot)
            }
            Err(error) => Step::Over(Progress::of_error(error, false)),
        }
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
