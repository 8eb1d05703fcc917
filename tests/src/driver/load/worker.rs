//! One queue's part of a load, and the thread that works on some of them.

use std::sync::atomic::Ordering;
use std::time::Instant;

use hdrhistogram::Histogram;

use super::super::{Buffer, DriverError, GuestRam, IoStatus, PATIENCE, RequestKind, Result, SplitQueue};
use super::aim::Aim;
use super::{Ledger, Load, Report, Stop};

/// How a block device is asked.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum Dialect {
    /// virtio-blk.
    Block,
    /// virtio-scsi, of this unit.
    Scsi([u8; 8]),
}

impl Dialect {
    /// Bytes of a request before its data, and of its answer.
    fn lens(self) -> (u32, u32) {
        match self {
            Self::Block => (16, 1),
            Self::Scsi(_) => (19 + 32, 12 + 96),
        }
    }

    /// A request that moves `len` bytes at `sector`.
    fn request(self, write: bool, sector: u64, len: u32) -> [u8; 51] {
        let mut bytes = [0; 51];
        match self {
            Self::Block => {
                let kind = if write { RequestKind::Out } else { RequestKind::In };
                bytes[..4].copy_from_slice(&(kind as u32).to_le_bytes());
                bytes[8..16].copy_from_slice(&sector.to_le_bytes());
            }
            Self::Scsi(lun) => {
                bytes[..8].copy_from_slice(&lun);
                // READ (16), WRITE (16)
                bytes[19] = if write { 0x8a } else { 0x88 };
                bytes[21..29].copy_from_slice(&sector.to_be_bytes());
                bytes[29..33].copy_from_slice(&(len / 512).to_be_bytes());
            }
        }
        bytes
    }

    /// What the answer `bytes` says.
    fn status(self, bytes: &[u8]) -> IoStatus {
        match self {
            Self::Block => bytes[0].into(),
            // Status, and response.
            Self::Scsi(_) if bytes[10..12] == [0, 0] => IoStatus::Ok,
            Self::Scsi(_) => IoStatus::Other(bytes[10] | bytes[11]),
        }
    }
}

/// Bytes that a request and its answer take up at most.
pub(super) const ENVELOPE: u64 = 192;

/// One request's place in memory.
pub(super) struct Slot {
    header: u64,
    data: u64,
    submitted: Instant,
    block: u64,
    write: bool,
}

impl Slot {
    pub(super) fn new(header: u64, data: u64) -> Self {
        Self { header, data, submitted: Instant::now(), block: 0, write: false }
    }
}

pub(super) struct Worker<'d> {
    ram: &'d GuestRam,
    queue: &'d mut SplitQueue,
    load: &'d Load,
    dialect: Dialect,
    aim: Aim,
    ledger: Option<&'d mut Ledger>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// By head.
    slot_of: Vec<usize>,
    /// Where a verified block is made and looked at.
    scratch: Vec<u8>,
    report: Report,
}

/// Works on the queues of `share` until `stop`, and says what they have done together.
pub(super) fn run(mut share: Vec<Worker<'_>>, stop: &Stop) -> Result<Report> {
    let start = Instant::now();
    let before: Vec<_> = share.iter().map(|worker| (worker.queue.kicks, worker.queue.interrupts)).collect();
    let outcome = if share.first().is_some_and(|worker| worker.load.poll) {
        poll(&mut share, stop)
    } else {
        share.iter_mut().try_for_each(|worker| worker.by_interrupt(stop))
    };
    if outcome.is_err() {
        stop.abandoned.store(true, Ordering::Relaxed);
    }
    outcome?;
    let elapsed = start.elapsed();
    let mut total = Report::default();
    for (mut worker, (kicks, interrupts)) in share.into_iter().zip(before) {
        worker.report.elapsed = elapsed;
        worker.report.kicks = worker.queue.kicks - kicks;
        worker.report.interrupts = worker.queue.interrupts - interrupts;
        total.merge(&worker.report);
    }
    Ok(total)
}

/// One completion at a time, so that its successor is submitted at once.
fn poll(share: &mut [Worker<'_>], stop: &Stop) -> Result<()> {
    let mut now = Instant::now();
    let mut last = now;
    loop {
        let stopping = stop.is_due(now);
        let (mut done, mut idle) = (true, true);
        for worker in &mut *share {
            if !stopping {
                worker.submit_all(now)?;
            }
            if let Some((head, _)) = worker.queue.pop_used(worker.ram)? {
                now = Instant::now();
                worker.complete(head, now)?;
                idle = false;
            }
            done &= worker.is_idle();
        }
        if done && (stopping || idle) {
            return Ok(());
        }
        if !idle {
            last = now;
            continue;
        }
        std::hint::spin_loop();
        now = Instant::now();
        if now > last + PATIENCE {
            return Err(DriverError::Timeout);
        }
        if stop.abandoned.load(Ordering::Relaxed) {
            return Ok(());
        }
    }
}

impl<'d> Worker<'d> {
    pub(super) fn new(
        ram: &'d GuestRam,
        queue: &'d mut SplitQueue,
        (load, dialect): (&'d Load, Dialect),
        aim: Aim,
        ledger: Option<&'d mut Ledger>,
        slots: Vec<Slot>,
    ) -> Self {
        let (free, slot_of) = ((0..slots.len()).collect(), vec![0; usize::from(queue.size)]);
        let scratch = vec![0; load.block_size as usize];
        Self {
            ram,
            queue,
            load,
            dialect,
            aim,
            ledger,
            slots,
            free,
            slot_of,
            scratch,
            report: Report::default(),
        }
    }

    fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    fn by_interrupt(&mut self, stop: &Stop) -> Result<()> {
        let mut now = Instant::now();
        loop {
            if !stop.is_due(now) {
                self.submit_all(now)?;
            }
            if self.is_idle() || stop.abandoned.load(Ordering::Relaxed) {
                return Ok(());
            }
            self.queue.wait(self.ram, PATIENCE)?;
            now = Instant::now();
            while let Some((head, _)) = self.queue.pop_used(self.ram)? {
                self.complete(head, now)?;
            }
        }
    }

    fn submit_all(&mut self, now: Instant) -> Result<()> {
        let mut submitted = false;
        while let Some(at) = self.free.last().copied() {
            let Some((block, write)) = self.aim.pick(self.ledger.as_deref()) else { break };
            self.free.pop();
            self.submit(at, block, write, now)?;
            submitted = true;
        }
        if submitted { self.queue.kick(self.ram) } else { Ok(()) }
    }

    fn submit(&mut self, at: usize, block: u64, write: bool, now: Instant) -> Result<()> {
        let sector = self.aim.sector(block, self.load.block_size);
        let slot = &mut self.slots[at];
        (slot.submitted, slot.block, slot.write) = (now, block, write);
        if let Some(ledger) = &mut self.ledger {
            if write {
                ledger.begin_write(block, sector, &mut self.scratch);
            } else {
                // What the device does not write is not what is due.
                self.scratch.fill(0xee);
                ledger.begin_read(block);
            }
            self.ram.write(slot.data, &self.scratch)?;
        }
        let (header_len, answer_len) = self.dialect.lens();
        let request = self.dialect.request(write, sector, self.load.block_size);
        self.ram.write(slot.header, &request[..header_len as usize])?;
        let answer = slot.header + u64::from(header_len);
        // What no device answers.
        self.ram.write(answer, &[0xff; 12][..answer_len.min(12) as usize])?;
        let data = Buffer { addr: slot.data, len: self.load.block_size, device_writes: !write };
        let (header, answer) =
            (Buffer::to_read(slot.header, header_len), Buffer::to_write(answer, answer_len));
        let chain = match self.dialect {
            Dialect::Scsi(_) if !write => [header, answer, data],
            _ => [header, data, answer],
        };
        let head = self.queue.add(self.ram, &chain)?.ok_or(DriverError::Missing("free descriptors"))?;
        self.slot_of[usize::from(head)] = at;
        Ok(())
    }

    fn complete(&mut self, head: u16, now: Instant) -> Result<()> {
        let at = self.slot_of[usize::from(head)];
        let slot = &self.slots[at];
        let sector = self.aim.sector(slot.block, self.load.block_size);
        let (header_len, answer_len) = self.dialect.lens();
        let mut answer = [0; 12];
        let answer = &mut answer[..answer_len.min(12) as usize];
        self.ram.read_into(slot.header + u64::from(header_len), answer)?;
        let status = self.dialect.status(answer);
        if status != IoStatus::Ok {
            let what = format!("status {status:?} at sector {sector}");
            return Err(DriverError::Answer { request: if slot.write { "a write" } else { "a read" }, what });
        }
        if let Some(ledger) = &mut self.ledger {
            ledger.end(slot.block);
            if !slot.write {
                self.ram.read_into(slot.data, &mut self.scratch)?;
                self.report.verified += u64::from(ledger.check(slot.block, sector, &self.scratch)?);
            }
        }
        let side: &mut Histogram<u64> =
            if slot.write { &mut self.report.writes } else { &mut self.report.reads };
        side.saturating_record((now - slot.submitted).as_nanos() as u64);
        self.report.requests += 1;
        self.free.push(at);
        Ok(())
    }
}
