//! A virtio-blk driver (virtio 1.2, 5.2): requests over [`SplitQueue`]s of one frontend.

use std::path::Path;

use cleave_common::vhost_user::features::virtio;

use super::{Buffer, DriverError, Frontend, GuestRam, Ledger, Negotiated, PATIENCE, Result, SplitQueue};

/// Bytes between the data areas of two heads: the most that one request moves here, and room to misalign it.
const DATA_STRIDE: u64 = (1 << 20) + 4096;
const HEADER_LEN: u32 = 16;
/// What the status byte is before the device has written it.
const NO_STATUS: u8 = 0xaa;

/// Request types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RequestKind {
    In = 0,
    Out = 1,
    Flush = 4,
    GetId = 8,
    Discard = 11,
    WriteZeroes = 13,
    /// A type that no device knows.
    Unknown = 4242,
}

/// The last byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoStatus {
    Ok,
    IoErr,
    Unsupported,
    /// The device has not written it.
    None,
    Other(u8),
}

impl From<u8> for IoStatus {
    fn from(byte: u8) -> Self {
        match byte {
            0 => Self::Ok,
            1 => Self::IoErr,
            2 => Self::Unsupported,
            NO_STATUS => Self::None,
            other => Self::Other(other),
        }
    }
}

/// What config space says, as the driver reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskConfig {
    pub sectors: u64,
    pub seg_max: u32,
    pub blk_size: u32,
    pub writeback: bool,
    pub num_queues: u16,
}

/// A driver with any number of queues. Requests of the simple methods go through queue 0, one at a time.
pub struct BlockDriver {
    pub frontend: Frontend,
    pub ram: GuestRam,
    pub queues: Vec<SplitQueue>,
    pub negotiated: Negotiated,
    /// By queue and head: header and status.
    headers: Vec<u64>,
    /// One data area, for the simple methods.
    pub data: u64,
    /// By queue: what verified loads have written.
    pub ledgers: Vec<Ledger>,
}

impl BlockDriver {
    /// Negotiates `features` and starts `num_queues` queues of `size` entries.
    pub fn start(frontend: Frontend, features: u64, num_queues: u16, size: u16) -> Result<Self> {
        Self::with_memory(frontend, features, num_queues, size, 32 << 20)
    }

    /// With `half` bytes of memory below the hole and as many above.
    pub fn with_memory(
        mut frontend: Frontend,
        features: u64,
        num_queues: u16,
        size: u16,
        half: u64,
    ) -> Result<Self> {
        let negotiated = frontend.negotiate(features)?;
        let mut ram = GuestRam::new(half)?;
        let indirect = negotiated.acked & virtio::RING_INDIRECT_DESC != 0;
        let event_idx = negotiated.acked & virtio::RING_EVENT_IDX != 0;
        let mut queues = Vec::new();
        let mut headers = Vec::new();
        for _ in 0..num_queues {
            queues.push(SplitQueue::new(&mut ram, size, indirect, event_idx)?);
            headers.push(ram.allocate(32 * u64::from(size), 64));
        }
        let data = ram.allocate(DATA_STRIDE, 4096);
        frontend.set_mem_table(&ram)?;
        let mut driver = Self { frontend, ram, queues, negotiated, headers, data, ledgers: Vec::new() };
        driver.start_queues()?;
        Ok(driver)
    }

    fn start_queues(&mut self) -> Result<()> {
        for (index, queue) in self.queues.iter().enumerate() {
            self.frontend.start_queue(index as u16, queue, 0)?;
        }
        Ok(())
    }

    /// The usual: connect and start with indirect descriptors, event indices and whatever the device offers.
    pub fn connect(socket: &Path, num_queues: u16) -> Result<Self> {
        Self::start(Frontend::connect(socket)?, u64::MAX, num_queues, 128)
    }

    pub fn config(&mut self) -> Result<DiskConfig> {
        let bytes = self.frontend.config(0, 60)?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Ok(DiskConfig {
            sectors: u64::from(word(0)) | u64::from(word(4)) << 32,
            seg_max: word(12),
            blk_size: word(20),
            writeback: bytes[32] != 0,
            num_queues: u16::from_le_bytes([bytes[34], bytes[35]]),
        })
    }

    /// Makes a request available on `queue`, without a kick, and gives its head. `data` is in the request's direction.
    pub fn submit(
        &mut self,
        queue: usize,
        kind: RequestKind,
        sector: u64,
        data: &[Buffer],
    ) -> Result<Option<u16>> {
        let Some(head) = self.queues[queue].next_head(data.len() + 2) else { return Ok(None) };
        let header = self.header(queue, head);
        let mut bytes = [0; HEADER_LEN as usize];
        bytes[0..4].copy_from_slice(&(kind as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        self.ram.write(header, &bytes)?;
        self.ram.put(header + u64::from(HEADER_LEN), NO_STATUS)?;
        let mut buffers = vec![Buffer::to_read(header, HEADER_LEN)];
        buffers.extend_from_slice(data);
        buffers.push(Buffer::to_write(header + u64::from(HEADER_LEN), 1));
        self.queues[queue].add(&self.ram, &buffers)
    }

    /// Where the request of this head has its header, its status 16 bytes behind.
    pub fn header_addr(&self, queue: usize, head: u16) -> u64 {
        self.header(queue, head)
    }

    fn header(&self, queue: usize, head: u16) -> u64 {
        self.headers[queue] + 32 * u64::from(head)
    }

    /// The status of the last request that had this head.
    pub fn status(&self, queue: usize, head: u16) -> Result<IoStatus> {
        let byte = self.ram.read(self.header(queue, head) + u64::from(HEADER_LEN), 1)?[0];
        Ok(byte.into())
    }

    pub fn kick(&mut self, queue: usize) -> Result<()> {
        self.queues[queue].kick(&self.ram)
    }

    /// Waits for the next completion on `queue`.
    pub fn completion(&mut self, queue: usize) -> Result<(u16, u32)> {
        loop {
            if let Some(used) = self.queues[queue].pop_used(&self.ram)? {
                return Ok(used);
            }
            self.queues[queue].wait(&self.ram, PATIENCE)?;
        }
    }

    /// One request from start to end: its status and the bytes the device says it wrote.
    pub fn request(&mut self, kind: RequestKind, sector: u64, data: &[Buffer]) -> Result<(IoStatus, u32)> {
        self.request_on(0, kind, sector, data)
    }

    pub fn request_on(
        &mut self,
        queue: usize,
        kind: RequestKind,
        sector: u64,
        data: &[Buffer],
    ) -> Result<(IoStatus, u32)> {
        let head = self.submit(queue, kind, sector, data)?.ok_or(DriverError::Missing("free descriptors"))?;
        self.kick(queue)?;
        let (done, written) = self.completion(queue)?;
        if done != head {
            return Err(DriverError::ForeignDescriptor(done.into()));
        }
        Ok((self.status(queue, head)?, written))
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> Result<IoStatus> {
        self.ram.write(self.data, bytes)?;
        Ok(self.request(RequestKind::Out, sector, &[Buffer::to_read(self.data, bytes.len() as u32)])?.0)
    }

    pub fn read(&mut self, sector: u64, len: u32) -> Result<(IoStatus, Vec<u8>)> {
        self.ram.write(self.data, &vec![0xee; len as usize])?;
        let (status, _) = self.request(RequestKind::In, sector, &[Buffer::to_write(self.data, len)])?;
        Ok((status, self.ram.read(self.data, len as usize)?))
    }

    /// DISCARD or WRITE_ZEROES of segments: sector, sectors, flags.
    pub fn deallocate(&mut self, kind: RequestKind, segments: &[(u64, u32, u32)]) -> Result<IoStatus> {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in segments {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.ram.write(self.data, &bytes)?;
        Ok(self.request(kind, 0, &[Buffer::to_read(self.data, bytes.len() as u32)])?.0)
    }

    pub fn flush(&mut self) -> Result<IoStatus> {
        Ok(self.request(RequestKind::Flush, 0, &[])?.0)
    }

    /// Hangs up and starts over on a new connection, with the same memory and fresh rings.
    pub fn reconnect(&mut self, socket: &Path) -> Result<()> {
        let _ = self.frontend.channel.socket().shutdown(std::net::Shutdown::Both);
        self.frontend = Frontend::connect(socket)?;
        self.negotiated = self.frontend.negotiate(self.negotiated.acked)?;
        self.frontend.set_mem_table(&self.ram)?;
        for queue in &mut self.queues {
            queue.reset(&self.ram)?;
        }
        self.start_queues()
    }
}
