//! The first serial port, a 16550 at I/O port 0x3f8 on interrupt 4, for early messages and a login.
//!
//! Its registers are vm-superio's; its wires are the [`line`](super::line).

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::{NoEvents, SerialEvents};
use vm_superio::{Serial, Trigger};

use super::line::{Output, Transmitter};
use crate::bus::{BusDevice, Event};

/// First of the eight I/O ports.
pub const PORT: u16 = 0x3f8;
pub const PORTS: u16 = 8;
/// Global system interrupt.
pub const IRQ: u32 = 4;

pub struct Uart {
    serial: Mutex<Registers>,
    interrupt: Arc<Event>,
    output: Arc<Output>,
    wake: Arc<Event>,
}

type Registers = Serial<Interrupt, RoomForInput, Transmitter>;

impl Uart {
    /// `interrupt` is the irqfd of [`IRQ`]; `wake` is signalled when the guest has read all input there was.
    pub fn new(interrupt: Arc<Event>, output: Arc<Output>, wake: Arc<Event>) -> Self {
        let serial = Mutex::new(registers(&interrupt, &output, &wake));
        Self { serial, interrupt, output, wake }
    }

    /// Hands the guest as many of `bytes` as its FIFO has room for, and says how many those were.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let mut serial = self.lock();
        let count = bytes.len().min(serial.fifo_capacity());
        if count == 0 {
            return 0;
        }
        // In loopback mode the port is deaf: what comes then stays with the sender.
        serial.enqueue_raw_bytes(&bytes[..count]).unwrap_or(0)
    }

    /// Back to how the machine found it at power-on.
    pub fn reset(&self) {
        *self.lock() = registers(&self.interrupt, &self.output, &self.wake);
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn registers(interrupt: &Arc<Event>, output: &Arc<Output>, wake: &Arc<Event>) -> Registers {
    let events = RoomForInput { wake: wake.clone(), none: NoEvents };
    Serial::with_events(Interrupt(interrupt.clone()), events, Transmitter(output.clone()))
}

impl BusDevice for Uart {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The registers are bytes; a wider access finds one of them and ones above it.
        data.fill(0xff);
        if let [first, ..] = data {
            *first = self.lock().read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [first, ..] = data
            && let Err(error) = self.lock().write(offset as u8, *first)
        {
            tracing::debug!("uart: {error:?}");
        }
    }
}

struct Interrupt(Arc<Event>);

impl Trigger for Interrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.signal();
        Ok(())
    }
}

struct RoomForInput {
    wake: Arc<Event>,
    none: NoEvents,
}

impl SerialEvents for RoomForInput {
    fn buffer_read(&self) {
        self.none.buffer_read();
    }

    fn out_byte(&self) {
        self.none.out_byte();
    }

    fn tx_lost_byte(&self) {
        self.none.tx_lost_byte();
    }

    fn in_buffer_empty(&self) {
        self.wake.signal();
    }
}
