//! MSI-X (PCI Local Bus Specification 3.0, 6.8.2) on irqfds. Each vector has one event, which the device signals:
//!
//! ```text
//!            enabled, neither the function nor the vector masked
//!   Held ────────────────────────────────────────────────────────> Live
//!   the event keeps what comes:           the event is the irqfd of a GSI whose
//!   a signalled event is a pending bit    route is the message in the table
//!        <────────────────────────────────────────────────────────
//!                          masked or disabled
//! ```
//!
//! Invariants: an event is an irqfd exactly while its vector is live; a vector goes live with the message the table
//! holds, and what its event kept is sent then; the pending bit of a live vector reads as zero.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::host::Interrupts;
use crate::bus::Event;
use crate::kvm::irq::{Gsi, MsiMessage};

/// Capability id.
pub const CAPABILITY_ID: u8 = 0x11;
/// Most vectors one function may have.
pub const MAX_VECTORS: u16 = 2048;
/// Bytes of one vector in the table: address, data, control.
pub const ENTRY_LEN: u64 = 16;
/// Offset of message control in the capability, and the bits of it that software writes.
pub const CONTROL_OFFSET: usize = 2;
pub const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;
/// The table after a reset.
const UNSET: MsiMessage = MsiMessage { address: 0, data: 0 };

/// What follows id and link in the capability of a function with `vectors` vectors, whose table and pending bits
/// are at these offsets in the BAR.
pub fn capability(vectors: u16, bar: u8, table: u32, pending: u32) -> [u8; 10] {
    let mut body = [0; 10];
    body[0..2].copy_from_slice(&(vectors - 1).to_le_bytes());
    body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
    body[6..10].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
    body
}

struct Vector {
    event: Arc<Event>,
    gsi: Gsi,
    message: MsiMessage,
    masked: bool,
    live: bool,
    /// What the GSI's route says, once it has one.
    routed: Option<MsiMessage>,
}

struct State {
    control: u16,
    vectors: Vec<Vector>,
}

/// The vectors of one function.
pub struct MsiX {
    interrupts: Arc<dyn Interrupts>,
    state: Mutex<State>,
}

impl MsiX {
    /// `count` vectors, 1 to [`MAX_VECTORS`], each with an event and a GSI.
    ///
    /// # Errors
    /// When the process has no file descriptor left or KVM no GSI.
    pub fn new(count: u16, interrupts: Arc<dyn Interrupts>) -> io::Result<Self> {
        let vectors = (0..count.clamp(1, MAX_VECTORS))
            .map(|_| {
                Ok(Vector {
                    event: Arc::new(Event::new()?),
                    gsi: interrupts.allocate()?,
                    message: UNSET,
                    masked: true,
                    live: false,
                    routed: None,
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { interrupts, state: Mutex::new(State { control: 0, vectors }) })
    }

    /// The event to signal for this vector; `None` if there is no such vector.
    pub fn event(&self, vector: u16) -> Option<Arc<Event>> {
        self.lock().vectors.get(usize::from(vector)).map(|vector| Arc::clone(&vector.event))
    }

    /// Follows a write to message control.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        state.control = control;
        for at in 0..state.vectors.len() {
            self.settle(&mut state, at);
        }
    }

    /// Back to disabled and masked, with no interrupt pending.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.control = 0;
        for at in 0..state.vectors.len() {
            state.vectors[at].masked = true;
            state.vectors[at].message = UNSET;
            self.settle(&mut state, at);
            state.vectors[at].event.clear();
        }
    }

    /// Forgets what is pending: after a reset, once nothing signals the events any more. Until then a late call may
    /// have made a bit pending that whoever programs the function next would get as an interrupt.
    pub fn forget_pending(&self) {
        for vector in self.lock().vectors.iter().filter(|vector| !vector.live) {
            vector.event.clear();
        }
    }

    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (at, byte) in (offset..).zip(data) {
            let vector = usize::try_from(at / ENTRY_LEN).ok().and_then(|index| state.vectors.get(index));
            *byte = vector.map_or(0, |vector| vector.bytes()[(at % ENTRY_LEN) as usize]);
        }
    }

    /// Takes an aligned write of 4 or 8 bytes, the only ones that the specification allows.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let len = data.len() as u64;
        if !matches!(len, 4 | 8) || !offset.is_multiple_of(len) {
            return;
        }
        let mut state = self.lock();
        let Ok(at) = usize::try_from(offset / ENTRY_LEN) else { return };
        let Some(vector) = state.vectors.get_mut(at) else { return };
        let mut bytes = vector.bytes();
        let start = (offset % ENTRY_LEN) as usize;
        bytes[start..start + data.len()].copy_from_slice(data);
        vector.set_bytes(bytes);
        self.settle(&mut state, at);
    }

    /// The pending bits, 64 vectors to 8 bytes.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at.saturating_mul(8)).unwrap_or(usize::MAX);
            let vectors = state.vectors.iter().skip(first).take(8);
            *byte =
                vectors.enumerate().fold(0, |bits, (bit, vector)| bits | u8::from(vector.pending()) << bit);
        }
    }

    /// Brings the vector to the state its mask and the function's control ask for.
    fn settle(&self, state: &mut State, at: usize) {
        let open = state.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE;
        let vector = &mut state.vectors[at];
        let wanted = open && !vector.masked;
        if let Err(error) = vector.bring_to(wanted, self.interrupts.as_ref()) {
            tracing::warn!("MSI-X vector {at} (GSI {}) is lost: {error}", vector.gsi.0);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vector {
    fn bring_to(&mut self, live: bool, interrupts: &dyn Interrupts) -> io::Result<()> {
        if live && self.routed != Some(self.message) {
            interrupts.route(self.gsi, self.message)?;
            self.routed = Some(self.message);
        }
        if live && !self.live {
            interrupts.attach(self.gsi, &self.event)?;
        } else if self.live && !live {
            interrupts.detach(self.gsi, &self.event)?;
        }
        self.live = live;
        Ok(())
    }

    fn pending(&self) -> bool {
        !self.live && self.event.is_signalled()
    }

    fn bytes(&self) -> [u8; ENTRY_LEN as usize] {
        let mut bytes = [0; ENTRY_LEN as usize];
        bytes[0..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12..16].copy_from_slice(&u32::from(self.masked).to_le_bytes());
        bytes
    }

    fn set_bytes(&mut self, bytes: [u8; ENTRY_LEN as usize]) {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        // The two low bits of the address are reserved: a message is a write of 4 aligned bytes.
        self.message.address = u64::from(word(0) & !0b11) | u64::from(word(4)) << 32;
        self.message.data = word(8);
        self.masked = word(12) & VECTOR_MASKED != 0;
    }
}

#[cfg(test)]
mod tests;
