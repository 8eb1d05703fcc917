//! What PCI devices ask of the virtual machine under them: message interrupts and doorbells.
//!
//! The traits are the seam at which registers are tested without KVM.

use std::fmt;
use std::io;

use crate::bus::Event;

/// A message-signalled interrupt as the guest programs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Message {
    pub address: u64,
    pub data: u32,
}

/// A global system interrupt: an entry of KVM's interrupt routing table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

impl fmt::Display for Gsi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GSI {}", self.0)
    }
}

/// The interrupt controller's side of MSI-X.
pub trait Interrupts: Send + Sync {
    /// Takes a GSI that nobody else uses.
    fn allocate(&self) -> io::Result<Gsi>;

    /// Says which message the GSI sends.
    fn route(&self, gsi: Gsi, message: Message) -> io::Result<()>;

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

/// A host that only keeps account, for tests of registers.
#[cfg(test)]
pub mod fake {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    pub struct Host {
        next: Mutex<u32>,
        pub routes: Mutex<BTreeMap<Gsi, Message>>,
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

        fn route(&self, gsi: Gsi, message: Message) -> io::Result<()> {
            self.routes.lock().unwrap().insert(gsi, message);
            Ok(())
        }

        fn attach(&self, gsi: Gsi, _event: &Event) -> io::Result<()> {
            assert!(self.attached.lock().unwrap().insert(gsi), "{gsi} is attached already");
            assert!(self.routes.lock().unwrap().contains_key(&gsi), "{gsi} has no route");
            Ok(())
        }

        fn detach(&self, gsi: Gsi, _event: &Event) -> io::Result<()> {
            assert!(self.attached.lock().unwrap().remove(&gsi), "{gsi} is not attached");
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
