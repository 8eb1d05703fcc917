//! One virtqueue of a driver in a hurry: chains that never change, offered again as soon as they come back.
//!
//! ```text
//!   sending:    free --offer--> with the device --reap--> free
//!   receiving:  with the device --reap: its bytes are counted--> with the device
//! ```
//!
//! The descriptors are written once. A chain of several pieces has a table of its own (an indirect one).

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use cleave_tests::driver::{Buffer, DriverError, Flags, GuestRam, HEADER_LEN, SplitQueue, Vring};
use vm_memory::{GuestMemoryBackend, VolatileArrayRef, VolatileMemory};

use crate::frame::PIECE;
use crate::{BenchError, Result};

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: u64 = 10;

/// What has come back.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    pub frames: u64,
    /// Without headers.
    pub bytes: u64,
}

/// Rings whose chains are set up: made before the device is told of them.
pub struct Track {
    pub queue: SplitQueue,
    /// By head: where its first piece is.
    places: Vec<u64>,
}

impl Track {
    /// For frames to send: as many chains as the ring has entries, each with `frame`.
    pub fn to_send(ram: &mut GuestRam, size: u16, frame: &[u8]) -> Result<Self> {
        let pieces = frame.len().div_ceil(PIECE);
        Self::new(ram, size, pieces, |ram, pieces| {
            let mut chain = Vec::new();
            for (part, at) in frame.chunks(PIECE).zip(0..) {
                ram.write(pieces + at * PIECE as u64, part)?;
                chain.push(Buffer::to_read(pieces + at * PIECE as u64, part.len() as u32));
            }
            Ok(chain)
        })
    }

    /// For frames to come: buffers of `len` bytes.
    pub fn to_receive(ram: &mut GuestRam, size: u16, len: u32) -> Result<Self> {
        Self::new(ram, size, (len as usize).div_ceil(PIECE), |_, place| {
            Ok(vec![Buffer::to_write(place, len)])
        })
    }

    fn new(
        ram: &mut GuestRam,
        size: u16,
        pieces: usize,
        chain: impl Fn(&GuestRam, u64) -> std::result::Result<Vec<Buffer>, DriverError>,
    ) -> Result<Self> {
        let queue = SplitQueue::new(ram, size, false, true)?;
        let mut places = Vec::new();
        for head in 0..size {
            let place = ram.allocate((pieces * PIECE) as u64, PIECE as u64);
            let chain = chain(ram, place)?;
            match &chain[..] {
                [one] => queue.set_descriptor(ram, head, one.addr, one.len, flags(one), 0)?,
                many => {
                    let table = ram.allocate(16 * many.len() as u64, 16);
                    for (piece, at) in many.iter().zip(1_u16..) {
                        let last = usize::from(at) == many.len();
                        let (flags, next) = if last { (0, 0) } else { (Flags::NEXT, at) };
                        put(ram, table + 16 * u64::from(at - 1), piece, flags | self::flags(piece), next)?;
                    }
                    let len = 16 * many.len() as u32;
                    queue.set_descriptor(ram, head, table, len, Flags::INDIRECT, 0)?;
                }
            }
            places.push(place);
        }
        Ok(Self { queue, places })
    }
}

fn flags(buffer: &Buffer) -> u16 {
    if buffer.device_writes { Flags::WRITE } else { 0 }
}

fn put(ram: &GuestRam, at: u64, piece: &Buffer, flags: u16, next: u16) -> Result<()> {
    let words = u128::from(piece.addr) | u128::from(piece.len) << 64;
    ram.put(at, words | u128::from(flags) << 96 | u128::from(next) << 112)?;
    Ok(())
}

/// A track in use. All its memory is looked up once.
pub struct Lane<'r> {
    vring: Arc<Vring>,
    size: u16,
    avail_idx: &'r AtomicU16,
    avail: VolatileArrayRef<'r, u16>,
    used_event: &'r AtomicU16,
    used_idx: &'r AtomicU16,
    used: VolatileArrayRef<'r, u64>,
    avail_event: &'r AtomicU16,
    next_avail: Wrapping<u16>,
    kicked: Wrapping<u16>,
    next_used: Wrapping<u16>,
    free: Vec<u16>,
    /// Of receiving: by head, where its header says how many buffers a frame has.
    num_buffers: Vec<&'r AtomicU16>,
    /// Buffers of a frame whose first was seen.
    frame_left: u16,
    pub kicks: u64,
}

impl<'r> Lane<'r> {
    pub fn new(ram: &'r GuestRam, track: &Track) -> Result<Self> {
        let vring = track.queue.vring();
        let region = ram.map().iter().next().ok_or(DriverError::Missing("memory"))?;
        let failed = |error| BenchError::io("use a ring")(std::io::Error::other(error));
        let word = |at: u64| region.get_atomic_ref::<AtomicU16>(at as usize).map_err(failed);
        let (n, size) = (u64::from(vring.size), usize::from(vring.size));
        Ok(Self {
            size: vring.size,
            avail_idx: word(vring.available + 2)?,
            avail: region.get_array_ref(vring.available as usize + 4, size).map_err(failed)?,
            used_event: word(vring.available + 4 + 2 * n)?,
            used_idx: word(vring.used + 2)?,
            used: region.get_array_ref(vring.used as usize + 4, size).map_err(failed)?,
            avail_event: word(vring.used + 4 + 8 * n)?,
            next_avail: Wrapping(0),
            kicked: Wrapping(0),
            next_used: Wrapping(0),
            free: (0..vring.size).rev().collect(),
            num_buffers: track
                .places
                .iter()
                .map(|at| word(at + NUM_BUFFERS))
                .collect::<std::result::Result<_, _>>()?,
            frame_left: 0,
            kicks: 0,
            vring,
        })
    }

    pub fn vring(&self) -> &Vring {
        &self.vring
    }

    /// Offers up to `most` of the chains that are free, and kicks if the device asks for it.
    pub fn offer(&mut self, most: usize) -> Result<()> {
        let count = most.min(self.free.len());
        for head in self.free.drain(self.free.len() - count..) {
            self.avail.store(usize::from(self.next_avail.0 & (self.size - 1)), head.to_le());
            self.next_avail += 1;
        }
        if count != 0 {
            self.avail_idx.store(self.next_avail.0.to_le(), Ordering::Release);
            self.kick()?;
        }
        Ok(())
    }

    fn kick(&mut self) -> Result<()> {
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked, self.next_avail);
        let event = Wrapping(u16::from_le(self.avail_event.load(Ordering::Relaxed)));
        if self.next_avail - event - Wrapping(1) < self.next_avail - old {
            self.kicks += 1;
            self.vring.kick_now()?;
        }
        Ok(())
    }

    /// Takes chains back, up to a ring full of them.
    pub fn reap(&mut self) -> Result<Tally> {
        let mut tally = Tally::default();
        let there = Wrapping(u16::from_le(self.used_idx.load(Ordering::Acquire)));
        while self.next_used != there {
            let element = self.used.load(usize::from(self.next_used.0 & (self.size - 1)));
            let (head, len) = (u64::from_le(element) as u32, (u64::from_le(element) >> 32) as u32);
            self.next_used += 1;
            let header = self.num_buffers.get(head as usize).ok_or(DriverError::ForeignDescriptor(head))?;
            self.free.push(head as u16);
            tally.bytes += u64::from(len);
            if self.frame_left == 0 {
                // A sent chain has a header that says 0 or what the device has left there.
                self.frame_left = u16::from_le(header.load(Ordering::Relaxed)).max(1);
                tally.frames += 1;
                tally.bytes = tally.bytes.saturating_sub(HEADER_LEN as u64);
            }
            self.frame_left -= 1;
        }
        Ok(tally)
    }

    /// Asks for an interrupt at the next chain that comes back. `true`: one is there already.
    pub fn wants_call(&self) -> bool {
        self.used_event.store(self.next_used.0.to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        u16::from_le(self.used_idx.load(Ordering::Acquire)) != self.next_used.0
    }

    /// Asks for no interrupt for now: for one at a chain that is far away. To be said often.
    pub fn wants_no_call(&self) {
        const FAR: Wrapping<u16> = Wrapping(0x8000);
        let event = Wrapping(u16::from_le(self.used_event.load(Ordering::Relaxed)));
        if (event - self.next_used).0 < FAR.0 / 2 || (event - self.next_used).0 > FAR.0 {
            self.used_event.store((self.next_used + FAR).0.to_le(), Ordering::Relaxed);
        }
    }
}
