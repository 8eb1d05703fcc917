//! What PCI devices ask of the virtual machine under them: message interrupts and doorbells.
//!
//! The traits are the seam at which registers are tested without KVM.

use std::io;

use crate::bus::Event;
use crate::kvm::irq::{Gsi, MsiMessage, Routes};
use crate::kvm::{IoEventAddress, Vm};

/// The interrupt controller's side of MSI-X.
pub trait Interrupts: Send + Sync {
    /// Takes a GSI that nobody else uses.
    fn allocate(&self) -> io::Result<Gsi>;

    /// Says which message the GSI sends.
    fn route(&self, gsi: Gsi, message: MsiMessage) -> io::Result<()>;

    /// From now on a signal of `event` sends the GSI's message; one that it holds already does at once.
    fn attach(&self, gsi: Gsi, event: &Event) -> io::Result<()>;

    /// From now on `event` keeps its signals.
    fn detach(&self, gsi: Gsi, event: &Event) -> io::Result<()>;
}

/// Writes of the guest that become signals without an exit to us.
pub trait Doorbells: Send + Sync {
    /// Any write at the guest-physical `address` signals `event`.
    fn ring_at(&self, address: u64, event: &Event) -> io::Result<()>;

    fn silence(&self, address: u64, event: &Event) -> io::Result<()>;
}

impl Interrupts for Routes {
    fn allocate(&self) -> io::Result<Gsi> {
        self.alloc_gsi().map_err(io::Error::other)
    }

    fn route(&self, gsi: Gsi, message: MsiMessage) -> io::Result<()> {
        self.set_msi(gsi, message).map_err(io::Error::other)
    }

    fn attach(&self, gsi: Gsi, event: &Event) -> io::Result<()> {
        self.irqfd(gsi, event.eventfd()).map_err(io::Error::other)
    }

    fn detach(&self, gsi: Gsi, event: &Event) -> io::Result<()> {
        self.unirqfd(gsi, event.eventfd()).map_err(io::Error::other)
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

/// A host that only keeps account, for tests of registers.
#[cfg(test)]
pub mod fake {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    pub struct Host {
        next: Mutex<u32>,
        pub routes: Mutex<BTreeMap<Gsi, MsiMessage>>,
        pub attached: Mutex<BTreeSet<Gsi>>,
        pub doorbells: Mutex<BTreeSet<u64>>,
        /// Doorbells asked for or silenced, in all.
        pub doorbell_calls: Mutex<u32>,
    }

    impl Interrupts for Host {
        fn allocate(&self) -> io::Result<Gsi> {
            let mut next = self.next.lock().unwrap();
            *next += 1;
            Ok(Gsi(23 + *next))
        }

        fn route(&self, gsi: Gsi, message: MsiMessage) -> io::Result<()> {
            self.routes.lock().unwrap().insert(gsi, message);
            Ok(())
        }

        fn attach(&self, gsi: Gsi, _event: &Event) -> io::Result<()> {
            assert!(self.attached.lock().unwrap().insert(gsi), "{gsi:?} is attached already");
            assert!(self.routes.lock().unwrap().contains_key(&gsi), "{gsi:?} has no route");
            Ok(())
        }

        fn detach(&self, gsi: Gsi, _event: &Event) -> io::Result<()> {
            assert!(self.attached.lock().unwrap().remove(&gsi), "{gsi:?} is not attached");
            Ok(())
        }
    }

    impl Doorbells for Host {
        fn ring_at(&self, address: u64, _event: &Event) -> io::Result<()> {
            *self.doorbell_calls.lock().unwrap() += 1;
            assert!(self.doorbells.lock().unwrap().insert(address), "{address:#x} rings already");
            Ok(())
        }

        fn silence(&self, address: u64, _event: &Event) -> io::Result<()> {
            *self.doorbell_calls.lock().unwrap() += 1;
            assert!(self.doorbells.lock().unwrap().remove(&address), "{address:#x} does not ring");
            Ok(())
        }
    }
}
