//! The two address spaces a vCPU's accesses go to.

use std::sync::Arc;

use crate::bus::Bus;
use crate::kvm::vcpu::ExitHandler;

pub struct Buses {
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
}

impl Buses {
    pub fn new() -> Self {
        Self { pio: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()) }
    }
}

impl ExitHandler for Buses {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.pio.read(port.into(), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.pio.write(port.into(), data);
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }
}
