//! A virtio-scsi driver (virtio 1.2, 5.6): commands, task management and events over [`SplitQueue`]s of one frontend.

use std::path::Path;

use cleave_common::vhost_user::features::virtio;

use super::inflight::track;
use super::{
    Buffer, DriverError, Frontend, GuestRam, InflightRegion, Ledger, Negotiated, PATIENCE, Result, SplitQueue,
};

/// Queues before the request queues.
const CONTROL: usize = 0;
const EVENTS: usize = 1;
pub const REQUESTS: usize = 2;

/// Bytes of a request before its data, of a response, and of an event, with the sizes that a device starts with.
const REQUEST_LEN: u32 = 19 + 32;
const SENSE_LEN: usize = 96;
const RESPONSE_LEN: u32 = 12 + SENSE_LEN as u32;
const EVENT_LEN: u32 = 16;
/// Bytes between two heads' requests and responses.
const STRIDE: u64 = 256;
/// The most that one command moves here, by head.
const DATA_STRIDE: u64 = (1 << 20) + 4096;
const DATA_AREAS: u64 = 16;
/// What a response is before the device has written it.
const NOTHING: u8 = 0xaa;

/// A unit's address in the eight bytes of virtio-scsi.
pub fn lun(target: u8, lun: u16) -> [u8; 8] {
    let [high, low] = lun.to_be_bytes();
    [1, target, 0x40 | high, low, 0, 0, 0, 0]
}

/// What a device answers to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// VIRTIO_SCSI_S_*.
    pub response: u8,
    /// SAM-5 status.
    pub status: u8,
    pub residual: u32,
    pub sense: Vec<u8>,
    pub data: Vec<u8>,
    /// Bytes that the device says it wrote.
    pub written: u32,
}

impl Answer {
    /// Sense key, additional sense code and qualifier, of sense data in the fixed format.
    pub fn sense_code(&self) -> Option<(u8, u8, u8)> {
        (self.sense.len() >= 14).then(|| (self.sense[2] & 0xf, self.sense[12], self.sense[13]))
    }

    pub fn is_good(&self) -> bool {
        (self.response, self.status) == (0, 0)
    }
}

/// A command.
#[derive(Debug, Clone, Copy)]
pub struct Command<'a> {
    pub lun: [u8; 8],
    pub tag: u64,
    /// SIMPLE 0, ORDERED 1, HEAD OF QUEUE 2.
    pub attribute: u8,
    pub cdb: &'a [u8],
    pub data_out: &'a [u8],
    /// Bytes of room for what comes back.
    pub data_in: u32,
}

impl<'a> Command<'a> {
    pub fn new(lun: [u8; 8], cdb: &'a [u8]) -> Self {
        Self { lun, tag: 1, attribute: 0, cdb, data_out: &[], data_in: 0 }
    }
}

/// A driver with any number of request queues.
pub struct ScsiDriver {
    pub frontend: Frontend,
    pub ram: GuestRam,
    /// Control, events, then the request queues.
    pub queues: Vec<SplitQueue>,
    pub negotiated: Negotiated,
    headers: u64,
    /// By request queue and head, the first few.
    data: u64,
    /// By queue and head: room for data that was asked for.
    rooms: Vec<Vec<u32>>,
    events: u64,
    /// By request queue: what verified loads have written.
    pub ledgers: Vec<Ledger>,
}

impl ScsiDriver {
    /// Connects and starts `requests` request queues of `size` entries.
    pub fn connect(socket: &Path, requests: u16, size: u16) -> Result<Self> {
        Self::start(Frontend::connect(socket)?, requests, size, 64 << 20)
    }

    /// With `half` bytes of memory below the hole and as many above.
    pub fn start(mut frontend: Frontend, requests: u16, size: u16, half: u64) -> Result<Self> {
        let negotiated = frontend.negotiate(u64::MAX)?;
        let mut ram = GuestRam::new(half)?;
        let indirect = negotiated.acked & virtio::RING_INDIRECT_DESC != 0;
        let event_idx = negotiated.acked & virtio::RING_EVENT_IDX != 0;
        let count = REQUESTS + usize::from(requests);
        let queues = (0..count)
            .map(|_| SplitQueue::new(&mut ram, size, indirect, event_idx))
            .collect::<Result<_>>()?;
        let headers = ram.allocate(STRIDE * u64::from(size) * count as u64, 4096);
        let data = ram.allocate(DATA_STRIDE * DATA_AREAS, 4096);
        let events = ram.allocate(u64::from(EVENT_LEN) * u64::from(size), 64);
        frontend.set_mem_table(&ram)?;
        let rooms = vec![vec![0; usize::from(size)]; count];
        let mut driver =
            Self { frontend, ram, queues, negotiated, headers, data, rooms, events, ledgers: Vec::new() };
        driver.start_queues()?;
        Ok(driver)
    }

    fn start_queues(&mut self) -> Result<()> {
        for (index, queue) in self.queues.iter().enumerate() {
            self.frontend.start_queue(index as u16, queue, 0)?;
        }
        Ok(())
    }

    fn header(&self, queue: usize, head: u16) -> u64 {
        self.headers + STRIDE * (queue as u64 * u64::from(self.queues[queue].size) + u64::from(head))
    }

    /// Where the data of a head is.
    pub fn data_addr(&self, head: u16) -> u64 {
        self.data + DATA_STRIDE * (u64::from(head) % DATA_AREAS)
    }

    /// Makes `command` available on request queue `queue`, and kicks. Gives its head. Data areas are those of the first
    /// few heads: do not have more commands with data in flight.
    pub fn submit(&mut self, queue: usize, command: &Command<'_>) -> Result<u16> {
        let at = REQUESTS + queue;
        let buffers = 2 + usize::from(!command.data_out.is_empty()) + usize::from(command.data_in != 0);
        let head = self.queues[at].next_head(buffers).ok_or(DriverError::Missing("free descriptors"))?;
        let header = self.header(at, head);
        let mut request = [0; REQUEST_LEN as usize];
        request[0..8].copy_from_slice(&command.lun);
        request[8..16].copy_from_slice(&command.tag.to_le_bytes());
        request[16] = command.attribute;
        request[19..19 + command.cdb.len()].copy_from_slice(command.cdb);
        self.ram.write(header, &request)?;
        let response = header + u64::from(REQUEST_LEN);
        self.ram.write(response, &[NOTHING; RESPONSE_LEN as usize])?;
        let mut chain = vec![Buffer::to_read(header, REQUEST_LEN)];
        let data = self.data_addr(head);
        if !command.data_out.is_empty() {
            self.ram.write(data, command.data_out)?;
            chain.push(Buffer::to_read(data, command.data_out.len() as u32));
        }
        chain.push(Buffer::to_write(response, RESPONSE_LEN));
        if command.data_in != 0 {
            self.ram.write(data, &vec![0xee; command.data_in as usize])?;
            chain.push(Buffer::to_write(data, command.data_in));
        }
        self.rooms[at][usize::from(head)] = command.data_in;
        let added =
            self.queues[at].add(&self.ram, &chain)?.ok_or(DriverError::Missing("free descriptors"))?;
        self.queues[at].kick(&self.ram)?;
        Ok(added)
    }

    /// Waits for the next answer on request queue `queue`: its head and itself.
    pub fn answer(&mut self, queue: usize) -> Result<(u16, Answer)> {
        let at = REQUESTS + queue;
        let (head, written) = self.completion(at)?;
        let bytes = self.ram.read(self.header(at, head) + u64::from(REQUEST_LEN), RESPONSE_LEN as usize)?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let sense_len = (word(0) as usize).min(SENSE_LEN);
        let room = self.rooms[at][usize::from(head)] as usize;
        let answer = Answer {
            response: bytes[11],
            status: bytes[10],
            residual: word(4),
            sense: bytes[12..12 + sense_len].to_vec(),
            data: self.ram.read(self.data_addr(head), room)?,
            written,
        };
        Ok((head, answer))
    }

    /// Whether an answer has come on request queue `queue`, without taking it.
    pub fn has_answer(&self, queue: usize) -> Result<bool> {
        let queue = &self.queues[REQUESTS + queue];
        Ok(queue.device_used_idx(&self.ram)? != queue.used_idx())
    }

    fn completion(&mut self, queue: usize) -> Result<(u16, u32)> {
        loop {
            if let Some(used) = self.queues[queue].pop_used(&self.ram)? {
                return Ok(used);
            }
            self.queues[queue].wait(&self.ram, PATIENCE)?;
        }
    }

    /// One command from start to end, on the first request queue.
    pub fn execute(&mut self, command: &Command<'_>) -> Result<Answer> {
        let head = self.submit(0, command)?;
        let (done, answer) = self.answer(0)?;
        if done != head {
            return Err(DriverError::ForeignDescriptor(done.into()));
        }
        Ok(answer)
    }

    /// As [`ScsiDriver::execute`], past any unit attentions.
    pub fn run(&mut self, command: &Command<'_>) -> Result<Answer> {
        loop {
            let answer = self.execute(command)?;
            if answer.sense_code().is_none_or(|(key, ..)| key != 6) {
                return Ok(answer);
            }
        }
    }

    /// Blocks of the unit, by READ CAPACITY (16); the first block's bytes are 512 where nobody says otherwise.
    pub fn capacity(&mut self, lun: [u8; 8]) -> Result<u64> {
        let cdb = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
        let answer = self.run(&Command { data_in: 32, ..Command::new(lun, &cdb) })?;
        if !answer.is_good() {
            let what = format!("{answer:?}");
            return Err(DriverError::Answer { request: "READ CAPACITY (16)", what });
        }
        let last: [u8; 8] = std::array::from_fn(|at| answer.data[at]);
        Ok(u64::from_be_bytes(last) + 1)
    }

    pub fn read(&mut self, lun: [u8; 8], block: u32, blocks: u16, block_size: u32) -> Result<Answer> {
        let [b0, b1, b2, b3] = block.to_be_bytes();
        let [n0, n1] = blocks.to_be_bytes();
        let cdb = [0x28, 0, b0, b1, b2, b3, 0, n0, n1, 0];
        self.run(&Command { data_in: u32::from(blocks) * block_size, ..Command::new(lun, &cdb) })
    }

    pub fn write(&mut self, lun: [u8; 8], block: u32, data: &[u8], block_size: u32) -> Result<Answer> {
        let [b0, b1, b2, b3] = block.to_be_bytes();
        let [n0, n1] = ((data.len() as u32 / block_size) as u16).to_be_bytes();
        let cdb = [0x2a, 0, b0, b1, b2, b3, 0, n0, n1, 0];
        self.run(&Command { data_out: data, ..Command::new(lun, &cdb) })
    }

    /// Sends a task management function, without waiting. Gives its head.
    pub fn submit_function(&mut self, subtype: u32, lun: [u8; 8], tag: u64) -> Result<u16> {
        let head = self.queues[CONTROL].next_head(2).ok_or(DriverError::Missing("free descriptors"))?;
        let header = self.header(CONTROL, head);
        let mut request = [0; 24];
        request[4..8].copy_from_slice(&subtype.to_le_bytes());
        request[8..16].copy_from_slice(&lun);
        request[16..24].copy_from_slice(&tag.to_le_bytes());
        self.ram.write(header, &request)?;
        self.ram.write(header + 24, &[NOTHING])?;
        let chain = [Buffer::to_read(header, 24), Buffer::to_write(header + 24, 1)];
        let added = self.queues[CONTROL].add(&self.ram, &chain)?;
        self.queues[CONTROL].kick(&self.ram)?;
        added.ok_or(DriverError::Missing("free descriptors"))
    }

    /// The response to the next function that is answered.
    pub fn function_response(&mut self) -> Result<u8> {
        let (head, _) = self.completion(CONTROL)?;
        Ok(self.ram.read(self.header(CONTROL, head) + 24, 1)?[0])
    }

    pub fn function(&mut self, subtype: u32, lun: [u8; 8], tag: u64) -> Result<u8> {
        self.submit_function(subtype, lun, tag)?;
        self.function_response()
    }

    /// Leaves a buffer for an event.
    pub fn offer_event(&mut self) -> Result<()> {
        let head = self.queues[EVENTS].next_head(1).ok_or(DriverError::Missing("free descriptors"))?;
        let at = self.events + u64::from(EVENT_LEN) * u64::from(head);
        self.queues[EVENTS].add(&self.ram, &[Buffer::to_write(at, EVENT_LEN)])?;
        self.queues[EVENTS].kick(&self.ram)
    }

    /// The next event: its kind, whose it is, its reason.
    pub fn event(&mut self) -> Result<(u32, [u8; 8], u32)> {
        let (head, _) = self.completion(EVENTS)?;
        let bytes =
            self.ram.read(self.events + u64::from(EVENT_LEN) * u64::from(head), EVENT_LEN as usize)?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut lun = [0; 8];
        lun.copy_from_slice(&bytes[4..12]);
        Ok((word(0), lun, word(12)))
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

impl ScsiDriver {
    /// Has the requests of all queues kept in a fresh region from now on. Nothing may be in flight.
    pub fn track_inflight(&mut self) -> Result<InflightRegion> {
        track(&mut self.frontend, &self.queues)
    }

    /// Goes on with a successor of the backend, as [`super::BlockDriver::resume`] does.
    pub fn resume(&mut self, socket: &Path, region: Option<&InflightRegion>) -> Result<()> {
        self.frontend = Frontend::connect(socket)?;
        let vrings: Vec<_> = self.queues.iter().map(SplitQueue::vring).collect();
        self.negotiated = self.frontend.resume(self.negotiated.acked, &self.ram, &vrings, region)?;
        self.queues.iter_mut().try_for_each(SplitQueue::kick_now)
    }
}
