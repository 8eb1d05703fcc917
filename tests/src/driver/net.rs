//! A virtio-net driver (virtio 1.2, 5.1): frames over [`SplitQueue`]s of one frontend.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cleave_common::vhost_user::features::virtio;

use super::{
    Buffer, DriverError, Frontend, GuestRam, InflightRegion, Negotiated, PATIENCE, Result, SplitQueue, Vring,
    inflight,
};

/// Bytes of the header before each frame.
pub const HEADER_LEN: usize = 12;

/// Where the header has the count of buffers.
const NUM_BUFFERS: usize = 10;

const MQ: u64 = 1 << 22;

/// Most bytes of one frame to send.
const SEND_ROOM: u64 = 80 << 10;

/// Most bytes of a control command and its answer.
const CONTROL_ROOM: u64 = 20 << 10;

/// A frame as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub header: [u8; HEADER_LEN],
    pub bytes: Vec<u8>,
    /// Buffers that it took.
    pub buffers: u16,
}

/// A driver with any number of pairs of queues, and a control queue.
pub struct NetDriver {
    pub frontend: Frontend,
    pub ram: GuestRam,
    /// Receive and transmit queue of each pair, then the control queue.
    pub queues: Vec<SplitQueue>,
    pub negotiated: Negotiated,
    /// By pair and head: the buffers for frames.
    offered: Vec<Vec<Vec<(u64, u32)>>>,
    /// Where a frame to send is put, by pair.
    send_rooms: Vec<u64>,
    control_room: u64,
}

impl NetDriver {
    /// Negotiates `features` and starts all queues, of `size` entries.
    pub fn start(mut frontend: Frontend, features: u64, size: u16) -> Result<Self> {
        let negotiated = frontend.negotiate(features)?;
        let mut ram = GuestRam::new(64 << 20)?;
        let pairs = if negotiated.acked & MQ == 0 { 1 } else { (negotiated.num_queues - 1) / 2 };
        let indirect = negotiated.acked & virtio::RING_INDIRECT_DESC != 0;
        let event_idx = negotiated.acked & virtio::RING_EVENT_IDX != 0;
        let queues = (0..2 * pairs + 1)
            .map(|_| SplitQueue::new(&mut ram, size, indirect, event_idx))
            .collect::<Result<Vec<_>>>()?;
        let send_rooms = (0..pairs).map(|_| ram.allocate(SEND_ROOM, 4096)).collect();
        let control_room = ram.allocate(CONTROL_ROOM, 4096);
        frontend.set_mem_table(&ram)?;
        let offered = vec![vec![Vec::new(); size.into()]; pairs as usize];
        let mut driver = Self { frontend, ram, queues, negotiated, offered, send_rooms, control_room };
        driver.start_queues()?;
        Ok(driver)
    }

    /// The usual: whatever the device offers, in queues of 256 entries.
    pub fn connect(socket: &Path) -> Result<Self> {
        Self::start(Frontend::connect(socket)?, u64::MAX, 256)
    }

    fn start_queues(&mut self) -> Result<()> {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            self.frontend.start_queue(index as u16, queue, 0)?;
            queue.kick_now()?;
        }
        Ok(())
    }

    pub fn pairs(&self) -> usize {
        self.offered.len()
    }

    /// Starts over, as after a device reset, in another session.
    pub fn reconnect(&mut self, socket: &Path, features: u64) -> Result<()> {
        let _ = self.frontend.channel.socket().shutdown(std::net::Shutdown::Both);
        self.frontend = Frontend::connect(socket)?;
        self.negotiated = self.frontend.negotiate(features)?;
        self.frontend.set_mem_table(&self.ram)?;
        self.queues.iter_mut().try_for_each(|queue| queue.reset(&self.ram))?;
        self.start_queues()
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

    /// Offers one chain of buffers of these lengths for frames on `pair`, without a kick.
    pub fn offer(&mut self, pair: usize, lens: &[u32]) -> Result<u16> {
        let buffers: Vec<(u64, u32)> =
            lens.iter().map(|len| (self.ram.allocate((*len).into(), 64), *len)).collect();
        self.offer_again(pair, buffers)
    }

    fn offer_again(&mut self, pair: usize, buffers: Vec<(u64, u32)>) -> Result<u16> {
        let chain: Vec<Buffer> = buffers.iter().map(|(addr, len)| Buffer::to_write(*addr, *len)).collect();
        let head =
            self.queues[2 * pair].add(&self.ram, &chain)?.ok_or(DriverError::Missing("free descriptors"))?;
        self.offered[pair][usize::from(head)] = buffers;
        Ok(head)
    }

    /// Offers `count` buffers of `len` bytes on `pair`, and kicks.
    pub fn offer_many(&mut self, pair: usize, count: usize, len: u32) -> Result<()> {
        for _ in 0..count {
            self.offer(pair, &[len])?;
        }
        self.kick(2 * pair)
    }

    pub fn kick(&mut self, queue: usize) -> Result<()> {
        self.queues[queue].kick(&self.ram)
    }

    /// The next frame on `pair`. Its buffers are offered again.
    pub fn receive(&mut self, pair: usize) -> Result<Frame> {
        self.receive_within(pair, PATIENCE)?.ok_or(DriverError::Timeout)
    }

    /// As [`NetDriver::receive`]; `None` when none comes in time.
    pub fn receive_within(&mut self, pair: usize, patience: Duration) -> Result<Option<Frame>> {
        let first = loop {
            if let Some(used) = self.queues[2 * pair].pop_used(&self.ram)? {
                break used;
            }
            match self.queues[2 * pair].wait(&self.ram, patience) {
                Err(DriverError::Timeout) => return Ok(None),
                waited => waited?,
            }
        };
        let mut bytes = self.take(pair, first)?;
        let header: [u8; HEADER_LEN] = bytes
            .get(..HEADER_LEN)
            .and_then(|header| header.try_into().ok())
            .ok_or_else(|| DriverError::Daemon(format!("{} bytes are no header", bytes.len())))?;
        let buffers = u16::from_le_bytes([header[NUM_BUFFERS], header[NUM_BUFFERS + 1]]);
        for _ in 1..buffers {
            // They are used together (virtio 1.2, 5.1.6.4): none is to be waited for.
            let next = self.queues[2 * pair].pop_used(&self.ram)?;
            let next =
                next.ok_or_else(|| DriverError::Daemon(format!("a frame of {buffers} buffers is cut off")))?;
            bytes.extend(self.take(pair, next)?);
        }
        bytes.drain(..HEADER_LEN);
        self.kick(2 * pair)?;
        Ok(Some(Frame { header, bytes, buffers }))
    }

    /// What was written to a chain, which is offered again.
    fn take(&mut self, pair: usize, (head, written): (u16, u32)) -> Result<Vec<u8>> {
        let buffers = std::mem::take(&mut self.offered[pair][usize::from(head)]);
        let mut bytes = Vec::new();
        for (addr, len) in &buffers {
            let part = (*len).min(written - bytes.len() as u32);
            bytes.extend(self.ram.read(*addr, part as usize)?);
        }
        if bytes.len() != written as usize {
            return Err(DriverError::Daemon(format!(
                "{written} bytes are said to be in {} bytes",
                bytes.len()
            )));
        }
        self.offer_again(pair, buffers)?;
        Ok(bytes)
    }

    /// Sends a frame on `pair` and waits until the device is done with it.
    pub fn send(&mut self, pair: usize, header: &[u8; HEADER_LEN], frame: &[u8]) -> Result<()> {
        let room = self.send_rooms[pair];
        self.ram.write(room, &[header, frame].concat())?;
        let len = (HEADER_LEN + frame.len()) as u32;
        self.send_chain(pair, &[Buffer::to_read(room, len)]).map(drop)
    }

    /// Sends whatever is in `chain`; what the device says that it wrote.
    pub fn send_chain(&mut self, pair: usize, chain: &[Buffer]) -> Result<u32> {
        self.request(2 * pair + 1, chain)
    }

    /// Where [`NetDriver::send`] puts its frame.
    pub fn send_room(&self, pair: usize) -> u64 {
        self.send_rooms[pair]
    }

    /// Makes a chain available on `queue` and waits for it.
    fn request(&mut self, queue: usize, chain: &[Buffer]) -> Result<u32> {
        let Self { queues, ram, .. } = self;
        let queue = &mut queues[queue];
        let head = queue.add(ram, chain)?.ok_or(DriverError::Missing("free descriptors"))?;
        queue.kick(ram)?;
        queue.wait(ram, PATIENCE)?;
        match queue.pop_used(ram)? {
            Some((done, written)) if done == head => Ok(written),
            Some((done, _)) => Err(DriverError::ForeignDescriptor(done.into())),
            None => Err(DriverError::Timeout),
        }
    }

    /// Gives a control command; the device's answer, 0 for yes.
    pub fn control(&mut self, class: u8, command: u8, data: &[u8]) -> Result<u8> {
        let words = [&[class, command], data].concat();
        let answer_to = self.control_room + CONTROL_ROOM - 8;
        self.ram.write(self.control_room, &words)?;
        self.ram.write(answer_to, &[0xaa])?;
        // The header by itself, as drivers do it.
        let mut chain = vec![Buffer::to_read(self.control_room, 2)];
        if !data.is_empty() {
            chain.push(Buffer::to_read(self.control_room + 2, data.len() as u32));
        }
        chain.push(Buffer::to_write(answer_to, 1));
        let control = self.queues.len() - 1;
        match self.request(control, &chain)? {
            1 => self.ram.read_byte(answer_to),
            other => Err(DriverError::Daemon(format!("the answer to a command has {other} bytes"))),
        }
    }
}
