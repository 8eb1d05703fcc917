//! The split virtqueue, driver side (virtio 1.2, 2.7).

use std::num::Wrapping;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vm_memory::Bytes;

use super::{DriverError, GuestRam, Result};

/// Bits of a descriptor's flags.
pub struct Flags;

impl Flags {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// Most buffers of an indirect chain.
const INDIRECT_LEN: u64 = 160;

/// A piece of guest memory in a request.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub addr: u64,
    pub len: u32,
    pub device_writes: bool,
}

impl Buffer {
    pub fn to_read(addr: u64, len: u32) -> Self {
        Self { addr, len, device_writes: false }
    }

    pub fn to_write(addr: u64, len: u32) -> Self {
        Self { addr, len, device_writes: true }
    }
}

/// Where a virtqueue is, and its two eventfds: what a frontend tells a backend. Addresses are guest-physical.
pub struct Vring {
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Vring {
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Completions that the device has announced, modulo 2^16.
    pub fn device_used_idx(&self, ram: &GuestRam) -> Result<u16> {
        ram.load(self.used + 2)
    }

    /// Kicks, whether or not the device asks for it.
    pub fn kick_now(&self) -> Result<()> {
        signal(&self.kick).map_err(|errno| DriverError::io("kick")(errno.into()))
    }

    /// Interrupts the driver in the device's place.
    pub fn call_now(&self) -> Result<()> {
        signal(&self.call).map_err(|errno| DriverError::io("call")(errno.into()))
    }
}

fn signal(eventfd: &OwnedFd) -> rustix::io::Result<()> {
    rustix::io::write(eventfd, &1u64.to_ne_bytes()).map(drop)
}

/// The driver's side of one virtqueue.
pub struct SplitQueue {
    vring: Arc<Vring>,
    pub indirect: bool,
    pub event_idx: bool,
    indirect_tables: u64,
    free: Vec<u16>,
    /// By head: the descriptors of its chain, to free.
    chains: Vec<Vec<u16>>,
    avail_idx: Wrapping<u16>,
    kicked_idx: Wrapping<u16>,
    used_idx: Wrapping<u16>,
    /// Kicks sent, and the times the call eventfd was waited on.
    pub kicks: u64,
    pub interrupts: u64,
}

impl Deref for SplitQueue {
    type Target = Vring;

    fn deref(&self) -> &Vring {
        &self.vring
    }
}

impl SplitQueue {
    pub fn new(ram: &mut GuestRam, size: u16, indirect: bool, event_idx: bool) -> Result<Self> {
        let n = u64::from(size);
        let new_eventfd = || {
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|errno| DriverError::io("eventfd")(errno.into()))
        };
        let tables = if indirect { ram.allocate(n * INDIRECT_LEN * 16, 4096) } else { 0 };
        let vring = Vring {
            size,
            descriptors: ram.allocate(16 * n, 4096),
            available: ram.allocate(6 + 2 * n, 4096),
            used: ram.allocate(6 + 8 * n, 4096),
            kick: new_eventfd()?,
            call: new_eventfd()?,
        };
        Ok(Self {
            vring: Arc::new(vring),
            indirect,
            event_idx,
            indirect_tables: tables,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail_idx: Wrapping(0),
            kicked_idx: Wrapping(0),
            used_idx: Wrapping(0),
            kicks: 0,
            interrupts: 0,
        })
    }

    /// What a session needs to set up this queue while another thread drives it.
    pub fn vring(&self) -> Arc<Vring> {
        self.vring.clone()
    }

    pub fn avail_idx(&self) -> u16 {
        self.avail_idx.0
    }

    /// Completions taken so far, modulo 2^16.
    pub fn used_idx(&self) -> u16 {
        self.used_idx.0
    }

    /// Heads whose completion has not been taken.
    pub fn in_flight(&self) -> usize {
        self.chains.iter().filter(|chain| !chain.is_empty()).count()
    }

    pub fn set_descriptor(
        &self,
        ram: &GuestRam,
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) -> Result<()> {
        put_descriptor(ram, self.descriptors + 16 * u64::from(index), addr, len, flags, next)
    }

    fn is_direct(&self, buffers: usize) -> bool {
        !self.indirect || buffers == 1
    }

    /// The head that [`SplitQueue::add`] will give to a chain of that many buffers, if there is room for it.
    pub fn next_head(&self, buffers: usize) -> Option<u16> {
        let needed = if self.is_direct(buffers) { buffers } else { 1 };
        self.free.len().checked_sub(needed).map(|at| self.free[at])
    }

    /// Makes a chain of `buffers` available without telling the device. `None`: no descriptors are left.
    pub fn add(&mut self, ram: &GuestRam, buffers: &[Buffer]) -> Result<Option<u16>> {
        let direct = self.is_direct(buffers.len());
        let needed = if direct { buffers.len() } else { 1 };
        if self.free.len() < needed {
            return Ok(None);
        }
        let chain = self.free.split_off(self.free.len() - needed);
        let head = chain[0];
        if direct {
            self.write_chain(ram, self.descriptors, buffers, &chain)?;
        } else {
            let table = self.indirect_tables + u64::from(head) * INDIRECT_LEN * 16;
            let order: Vec<u16> = (0..buffers.len() as u16).collect();
            self.write_chain(ram, table, buffers, &order)?;
            self.set_descriptor(ram, head, table, 16 * buffers.len() as u32, Flags::INDIRECT, 0)?;
        }
        self.chains[usize::from(head)] = chain;
        self.make_available(ram, head)?;
        Ok(Some(head))
    }

    fn write_chain(&self, ram: &GuestRam, table: u64, buffers: &[Buffer], order: &[u16]) -> Result<()> {
        for (at, (buffer, index)) in buffers.iter().zip(order).enumerate() {
            let next = order.get(at + 1).copied();
            let flags = if next.is_some() { Flags::NEXT } else { 0 };
            let flags = flags | if buffer.device_writes { Flags::WRITE } else { 0 };
            let place = table + 16 * u64::from(*index);
            put_descriptor(ram, place, buffer.addr, buffer.len, flags, next.unwrap_or(0))?;
        }
        Ok(())
    }

    /// Takes descriptor `head` for one that the test makes available itself.
    pub fn expect_raw(&mut self, head: u16) {
        self.free.retain(|free| *free != head);
        self.chains[usize::from(head)] = vec![head];
    }

    /// Names `head` in the available ring, whatever is behind it.
    pub fn make_available(&mut self, ram: &GuestRam, head: u16) -> Result<()> {
        let slot = u64::from(self.avail_idx.0 & (self.size - 1));
        ram.put(self.available + 4 + 2 * slot, head)?;
        self.avail_idx += 1;
        self.set_avail_idx(ram, self.avail_idx.0)
    }

    /// Writes the index itself.
    pub fn set_avail_idx(&mut self, ram: &GuestRam, idx: u16) -> Result<()> {
        self.avail_idx = Wrapping(idx);
        ram.store(self.available + 2, idx)
    }

    /// Kicks if the device asks for it.
    pub fn kick(&mut self, ram: &GuestRam) -> Result<()> {
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked_idx, self.avail_idx);
        let wanted = if self.event_idx {
            let avail_event = Wrapping(ram.load(self.used + 4 + 8 * u64::from(self.size))?);
            self.avail_idx - avail_event - Wrapping(1) < self.avail_idx - old
        } else {
            ram.load(self.used)? & 1 == 0
        };
        if wanted { self.kick_now() } else { Ok(()) }
    }

    pub fn kick_now(&mut self) -> Result<()> {
        self.kicks += 1;
        self.vring.kick_now()
    }

    /// The next completion: its head and the bytes written.
    pub fn pop_used(&mut self, ram: &GuestRam) -> Result<Option<(u16, u32)>> {
        if ram.load(self.used + 2)? == self.used_idx.0 {
            return Ok(None);
        }
        let slot = u64::from(self.used_idx.0 & (self.size - 1));
        let element: u64 = ram.map().read_obj(vm_memory::GuestAddress(self.used + 4 + 8 * slot))?;
        let (id, len) = (element as u32, (element >> 32) as u32);
        self.used_idx += 1;
        let chain = self.chains.get_mut(id as usize).ok_or(DriverError::ForeignDescriptor(id))?;
        if chain.is_empty() {
            return Err(DriverError::ForeignDescriptor(id));
        }
        // Backwards, so that the head is taken first again.
        self.free.extend(chain.drain(..).rev());
        Ok(Some((id as u16, len)))
    }

    /// Wants an interrupt at the next completion. `true`: one is there already.
    fn enable_calls(&mut self, ram: &GuestRam) -> Result<bool> {
        if self.event_idx {
            ram.store(self.available + 4 + 2 * u64::from(self.size), self.used_idx.0)?;
        } else {
            ram.store(self.available, 0)?;
        }
        fence(Ordering::SeqCst);
        Ok(ram.load(self.used + 2)? != self.used_idx.0)
    }

    /// Waits by interrupt until a completion is there to be taken.
    pub fn wait(&mut self, ram: &GuestRam, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while !self.enable_calls(ram)? {
            if !self.wait_for_call(deadline.saturating_duration_since(Instant::now()))? {
                return Err(DriverError::Timeout);
            }
        }
        Ok(())
    }

    /// Waits for an interrupt, and takes it. `false`: none came.
    pub fn wait_for_call(&mut self, patience: Duration) -> Result<bool> {
        let timeout = Timespec::try_from(patience).ok();
        let mut fds = [PollFd::new(&self.vring.call, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(errno) => return Err(DriverError::io("wait for an interrupt")(errno.into())),
        }
        self.interrupts += 1;
        let _ = rustix::io::read(&self.vring.call, &mut [0; 8]);
        Ok(true)
    }

    /// Goes on in a fresh ring, as after a device reset: nothing is in flight, all indices are 0.
    pub fn reset(&mut self, ram: &GuestRam) -> Result<()> {
        let n = u64::from(self.size);
        ram.write(self.available, &vec![0; 6 + 2 * usize::from(self.size)])?;
        ram.write(self.used, &vec![0; (6 + 8 * n) as usize])?;
        self.free = (0..self.size).rev().collect();
        self.chains.iter_mut().for_each(Vec::clear);
        (self.avail_idx, self.kicked_idx, self.used_idx) = Default::default();
        Ok(())
    }
}

fn put_descriptor(ram: &GuestRam, at: u64, addr: u64, len: u32, flags: u16, next: u16) -> Result<()> {
    let raw = u128::from(addr) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
    ram.put(at, raw)
}
