//! One virtual machine: its memory slots, its interrupt controllers, its eventfds.
//!
//! Invariant: the RAM of every memory slot is kept alive by the machine, so KVM never maps a freed address.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes a host address")]

use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{Kvm, KvmError};
use crate::memory::GuestRam;

/// Three pages and one page that Intel hosts need for real-mode guests; in the hole below 4 GiB that no RAM, window
/// or table uses.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A virtual machine. Clones are the same machine.
#[derive(Debug, Clone)]
pub struct Vm {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    fd: VmFd,
    ram: Arc<GuestRam>,
    /// The interrupt controllers as they were created: what a reset puts back.
    irqchips: Vec<kvm_irqchip>,
    msr_indices: Vec<u32>,
    max_vcpus: usize,
}

impl Vm {
    /// A machine with `ram`, in-kernel PIC and IOAPIC, and no vCPU.
    pub fn new(kvm: &Kvm, ram: Arc<GuestRam>) -> Result<Self, KvmError> {
        kvm.require()?;
        let fd = kvm.fd.create_vm().map_err(KvmError::ioctl("create a virtual machine"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(KvmError::ioctl("place the identity map page"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(KvmError::ioctl("place the task state pages"))?;
        fd.create_irq_chip().map_err(KvmError::ioctl("create the interrupt controllers"))?;
        let irqchips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .into_iter()
            .map(|chip_id| {
                let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                fd.get_irqchip(&mut chip).map(|()| chip)
            })
            .collect::<Result<_, _>>()
            .map_err(KvmError::ioctl("read the interrupt controllers"))?;
        for (slot, region) in ram.regions().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.gpa,
                memory_size: region.size,
                userspace_addr: region.host_address,
            };
            // SAFETY: the range is one whole mapping of `ram`, which lives as long as the machine does.
            unsafe { fd.set_user_memory_region(slot) }
                .map_err(KvmError::ioctl("take a region of guest memory"))?;
        }
        let msr_indices = kvm.msr_indices()?;
        let max_vcpus = kvm.max_vcpus();
        Ok(Self { inner: Arc::new(Inner { fd, ram, irqchips, msr_indices, max_vcpus }) })
    }

    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.inner.ram
    }

    /// Signals `fd` when the guest writes to `address`, whatever the width and the value; the write does not reach
    /// the bus.
    pub fn ioeventfd(&self, address: IoEventAddress, fd: &EventFd) -> Result<(), KvmError> {
        self.inner
            .fd
            .register_ioevent(fd, &address, NoDatamatch)
            .map_err(KvmError::ioctl("register an ioeventfd"))
    }

    /// Undoes [`Vm::ioeventfd`] with the same arguments.
    pub fn remove_ioeventfd(&self, address: IoEventAddress, fd: &EventFd) -> Result<(), KvmError> {
        self.inner
            .fd
            .unregister_ioevent(fd, &address, NoDatamatch)
            .map_err(KvmError::ioctl("remove an ioeventfd"))
    }

    /// Puts PIC and IOAPIC back as they were created. vCPUs must be parked.
    pub fn reset_irqchips(&self) -> Result<(), KvmError> {
        self.inner
            .irqchips
            .iter()
            .try_for_each(|chip| self.inner.fd.set_irqchip(chip))
            .map_err(KvmError::ioctl("reset the interrupt controllers"))
    }

    pub(super) fn fd(&self) -> &VmFd {
        &self.inner.fd
    }

    pub(super) fn msr_indices(&self) -> &[u32] {
        &self.inner.msr_indices
    }

    pub(super) fn create_vcpu(&self, index: usize) -> Result<VcpuFd, KvmError> {
        let most = self.inner.max_vcpus;
        if index >= most {
            return Err(KvmError::TooManyVcpus { wanted: index + 1, most });
        }
        self.inner.fd.create_vcpu(index as u64).map_err(KvmError::ioctl("create a vCPU"))
    }
}
