//! The GSI routing table and the irqfds on it.
//!
//! KVM takes the whole table at once (KVM_SET_GSI_ROUTING), so it has one owner. GSIs 0 to 23 are the pins of the IOAPIC
//! (0 to 15 of the PICs too) and always routed; those above are handed out for MSIs and routed when a message is set.
//!
//! Invariants:
//! - The table KVM holds equals `Table` whenever the lock is free. A change that KVM refuses is not kept.
//! - An irqfd may sit on a GSI without a route: its signals are then dropped by KVM, so whoever masks takes it off.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, Vm};

/// A global system interrupt: an IOAPIC pin below [`Gsi::PINS`], a message above.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gsi(pub u32);

impl Gsi {
    /// Pins of the IOAPIC.
    pub const PINS: u32 = 24;
}

/// What a device writes to interrupt (PCI 3.0, 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

/// More than any machine uses; KVM's own limit is 4096.
const MOST_GSIS: usize = 4096;

/// The routing table of one machine. Clones are the same table.
#[derive(Debug, Clone)]
pub struct Routes {
    vm: Vm,
    table: Arc<Mutex<Table>>,
}

/// Allocated GSIs, each with its message if it has one.
#[derive(Debug, Clone, Default)]
struct Table {
    messages: BTreeMap<u32, Option<MsiMessage>>,
}

impl Routes {
    /// The table as KVM has it after the interrupt controllers' creation: pins only.
    pub fn new(vm: Vm) -> Result<Self, KvmError> {
        let routes = Self { vm, table: Arc::default() };
        routes.commit(&Table::default())?;
        Ok(routes)
    }

    /// A GSI for one message, without a route yet.
    pub fn alloc_gsi(&self) -> Result<Gsi, KvmError> {
        let mut table = self.lock();
        let free = (Gsi::PINS..MOST_GSIS as u32).find(|gsi| !table.messages.contains_key(gsi));
        let gsi = free.ok_or(KvmError::NoGsi(MOST_GSIS))?;
        table.messages.insert(gsi, None);
        Ok(Gsi(gsi))
    }

    /// Routes an allocated GSI to a message.
    pub fn set_msi(&self, gsi: Gsi, message: MsiMessage) -> Result<(), KvmError> {
        self.change(|table| table.messages.insert(gsi.0, Some(message)) != Some(Some(message)))
    }

    /// Every signal of `fd` raises `gsi`. A count already in `fd` raises it at once.
    pub fn irqfd(&self, gsi: Gsi, fd: &EventFd) -> Result<(), KvmError> {
        self.vm.fd().register_irqfd(fd, gsi.0).map_err(KvmError::ioctl("register an irqfd"))
    }

    /// From here on `fd` only counts.
    pub fn unirqfd(&self, gsi: Gsi, fd: &EventFd) -> Result<(), KvmError> {
        self.vm.fd().unregister_irqfd(fd, gsi.0).map_err(KvmError::ioctl("remove an irqfd"))
    }

    /// `edit` says whether it changed a route; then KVM gets the table, and if it refuses, the edit is undone.
    fn change(&self, edit: impl FnOnce(&mut Table) -> bool) -> Result<(), KvmError> {
        let mut table = self.lock();
        let before = table.clone();
        if edit(&mut table)
            && let Err(error) = self.commit(&table)
        {
            *table = before;
            return Err(error);
        }
        Ok(())
    }

    fn commit(&self, table: &Table) -> Result<(), KvmError> {
        let entries = table.entries();
        // The only error of from_entries is a table above KVM's maximum, which MOST_GSIS is below.
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|_| KvmError::NoGsi(MOST_GSIS))?;
        self.vm.fd().set_gsi_routing(&routing).map_err(KvmError::ioctl("route interrupts"))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let pins = (0..Gsi::PINS).flat_map(|pin| {
            let pic = match pin {
                0..8 => Some(pin_route(pin, KVM_IRQCHIP_PIC_MASTER, pin)),
                8..16 => Some(pin_route(pin, KVM_IRQCHIP_PIC_SLAVE, pin - 8)),
                _ => None,
            };
            pic.into_iter().chain([pin_route(pin, KVM_IRQCHIP_IOAPIC, pin)])
        });
        let messages = self.messages.iter().filter_map(|(gsi, message)| Some(msi_route(*gsi, (*message)?)));
        pins.chain(messages).collect()
    }
}

fn pin_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_come_first_and_only_messages_that_are_set_are_routed() {
        let mut table = Table::default();
        assert_eq!(table.entries().len(), 16 + 24);
        let message = MsiMessage { address: 0x1_fee0_0000, data: 0x41 };
        table.messages.insert(24, None);
        table.messages.insert(25, Some(message));
        let entries = table.entries();
        let last = entries.last().unwrap();
        assert_eq!((entries.len(), last.gsi, last.type_), (41, 25, KVM_IRQ_ROUTING_MSI));
    }
}
