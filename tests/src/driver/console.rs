//! A virtio-console driver with many ports (virtio 1.2, 5.3): as much of Linux's as a device sees.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use cleave_common::vhost_user::features::virtio;

use super::{
    Buffer, DriverError, Frontend, GuestRam, InflightRegion, Negotiated, PATIENCE, Result, SplitQueue,
    inflight,
};

/// Feature bits (virtio 1.2, 5.3.3).
pub const SIZE: u64 = 1 << 0;
pub const MULTIPORT: u64 = 1 << 1;
pub const EMERG_WRITE: u64 = 1 << 2;

/// Bytes of a control message without what follows, and of a buffer for one.
const MESSAGE: usize = 8;
const MESSAGE_ROOM: u64 = 256;

/// Bytes of one chain, as Linux has them.
pub const CHUNK: usize = 32 << 10;
const RECEIVE_ROOM: u64 = 4096;

/// Events of control messages (virtio 1.2, 5.3.6.2).
pub mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const DEVICE_ADD: u16 = 1;
    pub const DEVICE_REMOVE: u16 = 2;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const RESIZE: u16 = 5;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// What the device has said of a port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Port {
    pub console: bool,
    pub name: Option<String>,
    pub host_open: bool,
    /// How often it was closed.
    pub closed: u32,
    /// Two numbers, in the order in which they came.
    pub size: Option<[u16; 2]>,
}

pub struct ConsoleDriver {
    pub frontend: Frontend,
    pub ram: GuestRam,
    pub queues: Vec<SplitQueue>,
    pub negotiated: Negotiated,
    pub ports: BTreeMap<u32, Port>,
    /// By head, of the control receive queue.
    messages: BTreeMap<u16, u64>,
    /// By queue and head: where chains are.
    rooms: BTreeMap<(usize, u16), u64>,
    /// Places for chains to send, by queue, that are free.
    free: BTreeMap<usize, Vec<u64>>,
    control_room: u64,
    receiving: Vec<bool>,
    /// Control messages about ports that were not added.
    pub strays: u32,
}

fn queue_of(port: u32) -> usize {
    if port == 0 { 0 } else { 2 * (port as usize + 1) }
}

impl ConsoleDriver {
    pub fn connect(socket: &Path) -> Result<Self> {
        Self::start(Frontend::connect(socket)?, !0, 64)
    }

    /// Negotiates `features` and starts all queues, of `size` entries.
    pub fn start(mut frontend: Frontend, features: u64, size: u16) -> Result<Self> {
        let negotiated = frontend.negotiate(features)?;
        let mut ram = GuestRam::new(128 << 20)?;
        let event_idx = negotiated.acked & virtio::RING_EVENT_IDX != 0;
        let count = if negotiated.acked & MULTIPORT == 0 { 2 } else { negotiated.num_queues };
        let queues = (0..count)
            .map(|_| SplitQueue::new(&mut ram, size, false, event_idx))
            .collect::<Result<Vec<_>>>()?;
        frontend.set_mem_table(&ram)?;
        for (index, queue) in (0..).zip(&queues) {
            frontend.start_queue(index, queue, 0)?;
        }
        let control_room = ram.allocate(MESSAGE_ROOM, 64);
        let receiving = vec![false; queues.len()];
        let mut driver = Self {
            frontend,
            ram,
            queues,
            negotiated,
            ports: BTreeMap::new(),
            messages: BTreeMap::new(),
            rooms: BTreeMap::new(),
            free: BTreeMap::new(),
            control_room,
            receiving,
            strays: 0,
        };
        if count > 2 {
            for _ in 0..size {
                driver.offer_message_room()?;
            }
            driver.kick(2)?;
        }
        Ok(driver)
    }

    fn offer_message_room(&mut self) -> Result<()> {
        let room = self.ram.allocate(MESSAGE_ROOM, 64);
        self.offer_room(room)
    }

    fn offer_room(&mut self, room: u64) -> Result<()> {
        let head = self.queues[2].add(&self.ram, &[Buffer::to_write(room, MESSAGE_ROOM as u32)])?;
        self.messages.insert(head.ok_or(DriverError::Missing("free descriptors"))?, room);
        Ok(())
    }

    fn kick(&mut self, queue: usize) -> Result<()> {
        self.queues[queue].kick(&self.ram)
    }

    /// Sends a control message, whatever it says, and has it taken.
    pub fn tell(&mut self, port: u32, event: u16, value: u16) -> Result<()> {
        let bytes = [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.tell_raw(&bytes)
    }

    pub fn tell_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.ram.write(self.control_room, bytes)?;
        self.request(3, &[Buffer::to_read(self.control_room, bytes.len() as u32)]).map(drop)
    }

    /// Makes a chain available on `queue` and waits for it.
    pub fn request(&mut self, queue: usize, chain: &[Buffer]) -> Result<u32> {
        let queue = &mut self.queues[queue];
        queue.add(&self.ram, chain)?.ok_or(DriverError::Missing("free descriptors"))?;
        queue.kick(&self.ram)?;
        queue.wait(&self.ram, PATIENCE)?;
        let used = queue.pop_used(&self.ram)?;
        used.map(|(_, written)| written).ok_or(DriverError::Timeout)
    }

    /// Says that the driver is there, and takes all ports that there are.
    pub fn come_up(&mut self, ports: usize) -> Result<()> {
        self.tell(0, event::DEVICE_READY, 1)?;
        self.hear_until(|driver| driver.ports.len() >= ports)
    }

    /// Takes control messages until `done` says so.
    pub fn hear_until(&mut self, done: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.hear()?;
            if done(self) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(DriverError::Timeout);
            }
            match self.queues[2].wait(&self.ram, left.min(Duration::from_millis(50))) {
                Ok(()) | Err(DriverError::Timeout) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes the control messages that are there, and answers as Linux does.
    pub fn hear(&mut self) -> Result<()> {
        while let Some((head, written)) = self.queues[2].pop_used(&self.ram)? {
            let room = self.messages.remove(&head).ok_or(DriverError::ForeignDescriptor(head.into()))?;
            let bytes = self.ram.read(room, written as usize)?;
            self.offer_room(room)?;
            self.kick(2)?;
            self.take_message(&bytes)?;
        }
        Ok(())
    }

    fn take_message(&mut self, bytes: &[u8]) -> Result<()> {
        let short = || DriverError::Daemon(format!("a control message of {} bytes", bytes.len()));
        let (header, rest) = bytes.split_at_checked(MESSAGE).ok_or_else(short)?;
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let id = u32::from(word(0)) | u32::from(word(2)) << 16;
        let (what, value) = (word(4), word(6));
        if what == event::DEVICE_REMOVE {
            self.ports.remove(&id);
            return Ok(());
        }
        if what == event::DEVICE_ADD {
            self.ports.entry(id).or_default();
            return self.tell(id, event::PORT_READY, 1);
        }
        // What was said before the driver began again may still come.
        let Some(port) = self.ports.get_mut(&id) else {
            self.strays += 1;
            return Ok(());
        };
        match what {
            event::CONSOLE_PORT => port.console = true,
            event::PORT_OPEN => {
                port.closed += u32::from(port.host_open && value == 0);
                port.host_open = value != 0;
            }
            event::PORT_NAME => {
                let name = rest.strip_suffix(&[0]).unwrap_or(rest);
                port.name = Some(String::from_utf8_lossy(name).into_owned());
            }
            event::RESIZE => {
                let &[a, b, c, d] = rest else { return Err(short()) };
                port.size = Some([u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])]);
            }
            other => return Err(DriverError::Daemon(format!("a control message with event {other}"))),
        }
        Ok(())
    }

    pub fn port(&self, id: u32) -> Port {
        self.ports.get(&id).cloned().unwrap_or_default()
    }

    /// Somebody in the guest opens a port, or closes it.
    pub fn open(&mut self, port: u32, open: bool) -> Result<()> {
        self.tell(port, event::PORT_OPEN, open.into())
    }

    /// Makes up to [`CHUNK`] bytes available to be sent. `false`: all places are taken.
    pub fn write(&mut self, port: u32, bytes: &[u8]) -> Result<bool> {
        let queue = queue_of(port) + 1;
        self.reap(port)?;
        if !self.free.contains_key(&queue) {
            let places = u64::from(self.queues[queue].size).min(16);
            let rooms = (0..places).map(|_| self.ram.allocate(CHUNK as u64, 4096)).collect();
            self.free.insert(queue, rooms);
        }
        let Some(room) = self.free.get_mut(&queue).and_then(Vec::pop) else { return Ok(false) };
        self.ram.write(room, bytes)?;
        let head = self.queues[queue].add(&self.ram, &[Buffer::to_read(room, bytes.len() as u32)])?;
        self.rooms.insert((queue, head.ok_or(DriverError::Missing("free descriptors"))?), room);
        self.kick(queue)?;
        Ok(true)
    }

    /// Takes back what has been sent; says how much is still to go.
    pub fn reap(&mut self, port: u32) -> Result<usize> {
        let queue = queue_of(port) + 1;
        while let Some((head, _)) = self.queues[queue].pop_used(&self.ram)? {
            let room =
                self.rooms.remove(&(queue, head)).ok_or(DriverError::ForeignDescriptor(head.into()))?;
            self.free.entry(queue).or_default().push(room);
        }
        Ok(self.queues[queue].in_flight())
    }

    /// Writes all of `bytes`, and waits until they have gone.
    pub fn write_all(&mut self, port: u32, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            while !self.write(port, chunk)? {
                self.wait_written(port)?;
            }
        }
        while self.reap(port)? != 0 {
            self.wait_written(port)?;
        }
        Ok(())
    }

    /// Waits until some of what was written has gone.
    pub fn wait_written(&mut self, port: u32) -> Result<()> {
        self.queues[queue_of(port) + 1].wait(&self.ram, PATIENCE)
    }

    /// What has come to a port. `None`: nothing yet.
    pub fn read(&mut self, port: u32) -> Result<Option<Vec<u8>>> {
        let queue = queue_of(port);
        if !std::mem::replace(&mut self.receiving[queue], true) {
            for _ in 0..self.queues[queue].size {
                let room = self.ram.allocate(RECEIVE_ROOM, 4096);
                self.offer_to_receive(queue, room)?;
            }
            self.kick(queue)?;
        }
        let Some((head, written)) = self.queues[queue].pop_used(&self.ram)? else { return Ok(None) };
        let room = self.rooms.remove(&(queue, head)).ok_or(DriverError::ForeignDescriptor(head.into()))?;
        let bytes = self.ram.read(room, written as usize)?;
        self.offer_to_receive(queue, room)?;
        self.kick(queue)?;
        Ok(Some(bytes))
    }

    fn offer_to_receive(&mut self, queue: usize, room: u64) -> Result<()> {
        let head = self.queues[queue].add(&self.ram, &[Buffer::to_write(room, RECEIVE_ROOM as u32)])?;
        self.rooms.insert((queue, head.ok_or(DriverError::Missing("free descriptors"))?), room);
        Ok(())
    }

    /// Reads until `len` bytes have come.
    pub fn read_exact(&mut self, port: u32, len: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            match self.read(port)? {
                Some(more) => bytes.extend(more),
                None => self.queues[queue_of(port)].wait(&self.ram, PATIENCE)?,
            }
        }
        Ok(bytes)
    }

    /// Has the chains of all queues kept in a fresh region from now on.
    pub fn track_inflight(&mut self) -> Result<InflightRegion> {
        inflight::track(&mut self.frontend, &self.queues)
    }

    /// Goes on with a successor of the backend.
    pub fn resume(&mut self, socket: &Path, region: Option<&InflightRegion>) -> Result<()> {
        self.frontend = Frontend::connect(socket)?;
        let vrings: Vec<_> = self.queues.iter().map(SplitQueue::vring).collect();
        self.negotiated = self.frontend.resume(self.negotiated.acked, &self.ram, &vrings, region)?;
        self.queues.iter_mut().try_for_each(SplitQueue::kick_now)
    }
}
