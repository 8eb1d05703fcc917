//! KVM: the only user of kvm-ioctls. Knows memory, interrupts and vCPUs; knows no device.
//!
//! [`Kvm`] is /dev/kvm, [`Vm`] one virtual machine, [`irq::Routes`] its interrupt routing, [`vcpu`] its threads.

pub mod irq;
#[cfg(test)]
mod tests;
pub mod vcpu;
mod vm;

use std::io;

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;

pub use kvm_ioctls::IoEventAddress;
pub use vm::Vm;

const DEVICE: &str = "/dev/kvm";

/// Why the host gives no virtual machine. Every message ends with what to do.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error(
        "{DEVICE} does not exist: switch virtualisation on in the firmware, then `modprobe kvm_intel` or `modprobe kvm_amd`"
    )]
    Missing,
    #[error(
        "no permission to open {DEVICE}: add the user to its group (usually `usermod -aG kvm USER`), or run as root"
    )]
    Permission,
    #[error("{DEVICE} is in use: another hypervisor on this host keeps virtualisation for itself; stop it")]
    Busy,
    #[error("cannot open {DEVICE}; run `cleave check`")]
    Open(#[source] io::Error),
    #[error("KVM speaks version {0} of its API, and Cleave {KVM_API_VERSION}: use a current kernel")]
    ApiVersion(i32),
    #[error(
        "KVM on this host lacks {0}: use a newer kernel (5.10 or later); `cleave check` lists what is needed"
    )]
    Capability(&'static str),
    #[error("KVM cannot {what}")]
    Ioctl {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("KVM takes no more than {most} vCPUs in one machine: {wanted} were asked for")]
    TooManyVcpus { wanted: usize, most: usize },
    #[error("no interrupt route is left: all {0} are in use")]
    NoGsi(usize),
    #[error("the thread of a vCPU cannot be started")]
    Thread(#[source] io::Error),
}

impl KvmError {
    /// For `map_err` at an ioctl: `what` completes "KVM cannot ...".
    pub(crate) fn ioctl(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Ioctl { what, source: error.into() }
    }
}

/// A capability this program cannot do without, by its KVM_CAP_ name.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
];

/// A capability that makes guests faster or is worth telling.
const USEFUL: &[(Cap, &str)] = &[
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::NestedState, "KVM_CAP_NESTED_STATE"),
];

/// /dev/kvm, opened and found usable.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    pub fn open() -> Result<Self, KvmError> {
        let fd = kvm_ioctls::Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::Missing,
            libc::EACCES | libc::EPERM => KvmError::Permission,
            libc::EBUSY => KvmError::Busy,
            _ => KvmError::Open(error.into()),
        })?;
        let version = fd.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::ApiVersion(version));
        }
        Ok(Self { fd })
    }

    /// Refuses a host without what every machine needs.
    pub fn require(&self) -> Result<(), KvmError> {
        match self.missing().next() {
            Some(name) => Err(KvmError::Capability(name)),
            None => Ok(()),
        }
    }

    /// The required capabilities that this host lacks.
    pub(crate) fn missing(&self) -> impl Iterator<Item = &'static str> {
        self.lacking(REQUIRED)
    }

    /// The useful capabilities that this host lacks.
    pub(crate) fn wanting(&self) -> impl Iterator<Item = &'static str> {
        self.lacking(USEFUL)
    }

    fn lacking(&self, of: &'static [(Cap, &'static str)]) -> impl Iterator<Item = &'static str> {
        of.iter().filter(|(cap, _)| !self.fd.check_extension(*cap)).map(|(_, name)| *name)
    }

    /// The most vCPUs a machine may have.
    pub fn max_vcpus(&self) -> usize {
        self.fd.get_max_vcpus()
    }

    /// What KVM can show a guest of this host's CPU (KVM_GET_SUPPORTED_CPUID).
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::ioctl("list its CPUID leaves"))
    }

    /// Whether the local APIC's timer has the TSC-deadline mode; KVM_GET_SUPPORTED_CPUID does not say.
    pub fn tsc_deadline_timer(&self) -> bool {
        self.fd.check_extension(Cap::TscDeadlineTimer)
    }

    /// The MSRs that make up a vCPU's state.
    pub(crate) fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        let list = self.fd.get_msr_index_list().map_err(KvmError::ioctl("list its MSRs"))?;
        Ok(list.as_slice().to_vec())
    }
}
