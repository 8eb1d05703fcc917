//! A virtio-balloon driver (virtio 1.2, 5.5): pages by their numbers over [`SplitQueue`]s of one frontend.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use cleave_common::vhost_user::features::virtio;
use rustix::fs::{SeekFrom, fstat, seek};

use super::{
    Buffer, DriverError, Frontend, GuestRam, InflightRegion, Negotiated, PATIENCE, Result, SplitQueue, Vring,
    inflight,
};

/// Bytes of a page as the balloon counts them.
pub const BALLOON_PAGE: u64 = 4096;

/// Most pages of one request.
const MOST_PAGES: u64 = 1 << 17;

/// Most bytes of the statistics.
const STATISTICS_ROOM: u64 = 4096;

/// What config space says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonConfig {
    pub num_pages: u32,
    pub actual: u32,
    pub hint_cmd_id: u32,
    pub poison_val: u32,
}

/// A driver with the five queues, by the specification's numbers.
pub struct BalloonDriver {
    pub frontend: Frontend,
    pub ram: GuestRam,
    /// Inflate, deflate, statistics, hinting, reporting.
    pub queues: Vec<SplitQueue>,
    pub negotiated: Negotiated,
    /// Where a request's page numbers are.
    pub pfns: u64,
    pub statistics: u64,
}

impl BalloonDriver {
    pub const INFLATE: usize = 0;
    pub const DEFLATE: usize = 1;
    pub const STATISTICS: usize = 2;
    pub const HINTING: usize = 3;
    pub const REPORTING: usize = 4;

    /// Negotiates `features` and starts all queues.
    pub fn start(frontend: Frontend, ram: GuestRam, features: u64) -> Result<Self> {
        let mut driver = Self::prepare(frontend, ram, features)?;
        (0..driver.queues.len()).try_for_each(|index| driver.start_queue(index))?;
        Ok(driver)
    }

    /// Negotiates `features`; no queue runs.
    pub fn prepare(mut frontend: Frontend, mut ram: GuestRam, features: u64) -> Result<Self> {
        let negotiated = frontend.negotiate(features)?;
        let indirect = negotiated.acked & virtio::RING_INDIRECT_DESC != 0;
        let event_idx = negotiated.acked & virtio::RING_EVENT_IDX != 0;
        let queues = (0..negotiated.num_queues)
            .map(|_| SplitQueue::new(&mut ram, 128, indirect, event_idx))
            .collect::<Result<Vec<_>>>()?;
        let pfns = ram.allocate(4 * MOST_PAGES, 4096);
        let statistics = ram.allocate(STATISTICS_ROOM, 4096);
        frontend.set_mem_table(&ram)?;
        Ok(Self { frontend, ram, queues, negotiated, pfns, statistics })
    }

    /// The usual: all features, `half` bytes of memory in each of two regions.
    pub fn connect(socket: &Path, half: u64) -> Result<Self> {
        Self::start(Frontend::connect(socket)?, GuestRam::new(half)?, u64::MAX)
    }

    pub fn start_queue(&mut self, index: usize) -> Result<()> {
        self.frontend.start_queue(index as u16, &self.queues[index], 0)?;
        self.queues[index].kick_now()
    }

    /// Has the requests of all queues kept in a fresh region from now on. Nothing may be in flight.
    pub fn track_inflight(&mut self) -> Result<InflightRegion> {
        let region = inflight::track(&mut self.frontend, &self.queues)?;
        self.queues.iter_mut().try_for_each(SplitQueue::kick_now)?;
        Ok(region)
    }

    /// Goes on with a successor of the backend, and kicks each queue once.
    pub fn resume(&mut self, socket: &Path, region: Option<&InflightRegion>) -> Result<()> {
        self.frontend = Frontend::connect(socket)?;
        let vrings: Vec<Arc<Vring>> = self.queues.iter().map(SplitQueue::vring).collect();
        self.negotiated = self.frontend.resume(self.negotiated.acked, &self.ram, &vrings, region)?;
        self.queues.iter_mut().try_for_each(SplitQueue::kick_now)
    }

    pub fn config(&mut self) -> Result<BalloonConfig> {
        let bytes = self.frontend.config(0, 16)?;
        let field = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Ok(BalloonConfig {
            num_pages: field(0),
            actual: field(4),
            hint_cmd_id: field(8),
            poison_val: field(12),
        })
    }

    /// Makes a request of `queue` available and kicks.
    pub fn submit(&mut self, queue: usize, buffers: &[Buffer]) -> Result<u16> {
        let head = self.queues[queue].add(&self.ram, buffers)?;
        let head = head.ok_or(DriverError::Missing("free descriptors"))?;
        self.queues[queue].kick(&self.ram)?;
        Ok(head)
    }

    /// Waits for the next completion of `queue`: its head and the bytes written.
    pub fn complete(&mut self, queue: usize) -> Result<(u16, u32)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.queues[queue].pop_used(&self.ram)? {
                return Ok(used);
            }
            self.queues[queue].wait(&self.ram, deadline.saturating_duration_since(Instant::now()))?;
        }
    }

    /// Makes a request available, and waits until it is used.
    pub fn request(&mut self, queue: usize, buffers: &[Buffer]) -> Result<()> {
        let head = self.submit(queue, buffers)?;
        match self.complete(queue)? {
            (used, 0) if used == head => Ok(()),
            other => Err(DriverError::Daemon(format!("request {head} was answered by {other:?}"))),
        }
    }

    /// One request with these page numbers, without waiting for it.
    pub fn submit_pages(&mut self, queue: usize, pfns: &[u32]) -> Result<u16> {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.ram.write(self.pfns, &bytes)?;
        self.submit(queue, &[Buffer::to_read(self.pfns, bytes.len() as u32)])
    }

    pub fn inflate(&mut self, pfns: &[u32]) -> Result<()> {
        self.submit_pages(Self::INFLATE, pfns)?;
        self.complete(Self::INFLATE).map(drop)
    }

    pub fn deflate(&mut self, pfns: &[u32]) -> Result<()> {
        self.submit_pages(Self::DEFLATE, pfns)?;
        self.complete(Self::DEFLATE).map(drop)
    }

    /// Reports free pages, each an address and a length.
    pub fn report(&mut self, free: &[(u64, u32)]) -> Result<()> {
        let buffers: Vec<Buffer> = free.iter().map(|(addr, len)| Buffer::to_write(*addr, *len)).collect();
        self.request(Self::REPORTING, &buffers)
    }

    /// Gives the device statistics: tags and values.
    pub fn tell_statistics(&mut self, entries: &[(u16, u64)]) -> Result<u16> {
        let entry = |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let bytes: Vec<u8> = entries.iter().flat_map(entry).collect();
        self.ram.write(self.statistics, &bytes)?;
        self.submit(Self::STATISTICS, &[Buffer::to_read(self.statistics, bytes.len() as u32)])
    }
}

impl GuestRam {
    /// Bytes of the host's memory that the file has.
    pub fn allocated(&self) -> Result<u64> {
        let stat = fstat(self.fd()).map_err(|errno| DriverError::io("fstat")(errno.into()))?;
        Ok(stat.st_blocks as u64 * 512)
    }

    /// Whether the whole page at guest-physical address `addr` is a hole. It is looked at in the file: reading it through a
    /// mapping would fill it.
    pub fn is_hole(&self, addr: u64) -> Result<bool> {
        let region = self
            .regions()
            .iter()
            .find(|region| (region.guest_addr..region.guest_addr + region.size).contains(&addr));
        let region = region.ok_or(DriverError::Missing("memory at that address"))?;
        let at = addr - region.guest_addr + region.mmap_offset;
        match seek(self.fd(), SeekFrom::Data(at)) {
            Ok(data) => Ok(data >= at + BALLOON_PAGE),
            Err(rustix::io::Errno::NXIO) => Ok(true),
            Err(errno) => Err(DriverError::io("look for a hole")(errno.into())),
        }
    }
}
