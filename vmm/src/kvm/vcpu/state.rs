//! A vCPU's power-on state, captured before its first run and put back at every reset.
//!
//! Order matters on the way back: sregs carry the APIC base and EFER, on which the local APIC and several MSRs depend; the
//! TSC-deadline MSR does nothing until the local APIC's timer mode is restored; mp_state and pending events come last, or
//! a restored register would wake the vCPU.
#![expect(unsafe_code, reason = "KVM_SET_XSAVE reads a buffer whose size depends on the guest's features")]

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use crate::kvm::KvmError;

const IA32_TSC: u32 = 0x10;
const IA32_TSC_ADJUST: u32 = 0x3b;
const IA32_APIC_BASE: u32 = 0x1b;

/// Where a reset vCPU starts: its general registers, and the segments, control registers and descriptor tables of
/// `sregs`. The APIC base and pending interrupts of `sregs` are not used.
#[derive(Debug, Clone)]
pub struct EntryState {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
}

/// Everything of a vCPU that the guest can change.
pub(super) struct ResetState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    /// None where KVM has no nested state to speak of.
    nested: Option<Box<KvmNestedStateBuffer>>,
}

impl ResetState {
    pub(super) fn capture(fd: &VcpuFd, msr_indices: &[u32]) -> Result<Self, KvmError> {
        let capture = || -> Result<Self, kvm_ioctls::Error> {
            Ok(Self {
                regs: fd.get_regs()?,
                sregs: fd.get_sregs()?,
                xsave: Box::new(fd.get_xsave()?),
                xcrs: fd.get_xcrs()?,
                debug_regs: fd.get_debug_regs()?,
                lapic: fd.get_lapic()?,
                msrs: readable_msrs(fd, msr_indices)?,
                mp_state: fd.get_mp_state()?,
                events: fd.get_vcpu_events()?,
                nested: nested_state(fd),
            })
        };
        capture().map_err(KvmError::ioctl("read the state of a vCPU"))
    }

    /// Puts the power-on state back, then `entry` on top of it.
    pub(super) fn restore(&self, fd: &VcpuFd, entry: Option<&EntryState>) -> Result<(), KvmError> {
        self.try_restore(fd, entry).map_err(KvmError::ioctl("reset a vCPU"))
    }

    fn try_restore(&self, fd: &VcpuFd, entry: Option<&EntryState>) -> Result<(), kvm_ioctls::Error> {
        // Out of a nested guest first: KVM refuses to switch its virtualisation off under it.
        if let Some(nested) = &self.nested {
            fd.set_nested_state(nested)?;
        }
        fd.set_sregs(&self.sregs_at(entry))?;
        fd.set_regs(entry.map_or(&self.regs, |entry| &entry.regs))?;
        // SAFETY: the buffer came from KVM_GET_XSAVE of this vCPU, whose features do not change after its creation.
        unsafe { fd.set_xsave(&self.xsave) }?;
        fd.set_xcrs(&self.xcrs)?;
        fd.set_debug_regs(&self.debug_regs)?;
        fd.set_lapic(&self.lapic)?;
        self.restore_msrs(fd)?;
        fd.set_vcpu_events(&self.events)?;
        let mp_state = match entry {
            Some(_) => kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE },
            None => self.mp_state,
        };
        fd.set_mp_state(mp_state)
    }

    fn sregs_at(&self, entry: Option<&EntryState>) -> kvm_sregs {
        match entry {
            None => self.sregs,
            Some(entry) => kvm_sregs {
                apic_base: self.sregs.apic_base,
                interrupt_bitmap: self.sregs.interrupt_bitmap,
                ..entry.sregs
            },
        }
    }

    /// KVM stops at an MSR it refuses; that one is skipped, since it was read from the same vCPU and so is one that
    /// the guest cannot have changed.
    fn restore_msrs(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let mut rest = &self.msrs[..];
        while !rest.is_empty() {
            let batch = Msrs::from_entries(&rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)])
                .map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
            let taken = fd.set_msrs(&batch)?;
            if taken < batch.as_slice().len() {
                tracing::debug!(msr = format_args!("{:#x}", rest[taken].index), "not restored");
                rest = &rest[taken + 1..];
            } else {
                rest = &rest[taken..];
            }
        }
        Ok(())
    }
}

/// The MSRs of `indices` that this vCPU has, with the values they are to have after a reset.
fn readable_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let mut found = Vec::with_capacity(indices.len());
    let wanted: Vec<_> = indices
        .iter()
        // The APIC base comes with sregs.
        .filter(|index| **index != IA32_APIC_BASE)
        .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
        .collect();
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let mut batch = Msrs::from_entries(&rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)])
            .map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
        let read = fd.get_msrs(&mut batch)?;
        found.extend_from_slice(&batch.as_slice()[..read]);
        let skip = usize::from(read < batch.as_slice().len());
        rest = &rest[read + skip..];
    }
    for entry in &mut found {
        // A TSC written as 0 is what KVM takes for "in step with the other vCPUs"; any other value would set each
        // vCPU's apart by the time between the writes.
        if matches!(entry.index, IA32_TSC | IA32_TSC_ADJUST) {
            entry.data = 0;
        }
    }
    Ok(found)
}

fn nested_state(fd: &VcpuFd) -> Option<Box<KvmNestedStateBuffer>> {
    let mut buffer = Box::new(KvmNestedStateBuffer::empty());
    fd.nested_state(&mut buffer).ok().map(|_| buffer)
}
