//! KVM as the host of PCI devices: MSI routes with irqfds, ioeventfds.

use std::io;

use kvm_ioctls::IoEventAddress;

use super::host::{Doorbells, Gsi, Interrupts, Message};
use crate::bus::Event;
use crate::kvm::irq::{self, MsiMessage, Routes};
use crate::kvm::{KvmError, Vm};

impl Interrupts for Routes {
    fn allocate(&self) -> io::Result<Gsi> {
        self.alloc_gsi().map(|gsi| Gsi(gsi.0)).map_err(io::Error::other)
    }

    fn route(&self, gsi: Gsi, message: Message) -> io::Result<()> {
        let message = MsiMessage { address: message.address, data: message.data };
        self.set_msi(irq::Gsi(gsi.0), message).map_err(io::Error::other)
    }

    fn attach(&self, gsi: Gsi, event: &Event) -> io::Result<()> {
        self.irqfd(irq::Gsi(gsi.0), event.eventfd()).map_err(io::Error::other)
    }

    fn detach(&self, gsi: Gsi, event: &Event) -> io::Result<()> {
        self.unirqfd(irq::Gsi(gsi.0), event.eventfd()).map_err(io::Error::other)
    }
}

impl Doorbells for Vm {
    fn ring_at(&self, address: u64, event: &Event) -> io::Result<()> {
        self.ioeventfd(IoEventAddress::Mmio(address), event.eventfd()).map_err(io::Error::other)
    }

    fn silence(&self, address: u64, event: &Event) -> io::Result<()> {
        self.remove_ioeventfd(IoEventAddress::Mmio(address), event.eventfd()).map_err(io::Error::other)
    }
}
