//! One KVM_RUN, and what its end means: an access for the handler, nothing, or the end of the guest's run.
#![expect(unsafe_code, reason = "the fields of kvm_run that kvm-ioctls does not hand out")]

use std::fmt;
use std::io;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_regs,
    kvm_segment, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::ExitHandler;
use crate::kvm::KvmError;

/// Why a vCPU's thread no longer runs the guest.
#[derive(Debug)]
pub enum VcpuEvent {
    /// It was told to park.
    Parked,
    /// The guest took an exception that it could not take: on hardware, a reset.
    TripleFault { registers: Registers },
    /// KVM gave up on the guest.
    InternalError { reason: InternalError, registers: Registers },
    /// The processor refused the guest's state.
    EntryFailure { reason: u64, host_cpu: u32, registers: Registers },
    /// The guest asked for a shutdown through KVM.
    Shutdown,
    /// The guest asked for a reset through KVM.
    Reset,
    /// An exit that a machine like ours never has.
    Unexpected { exit: String, registers: Registers },
    /// KVM_RUN or a reset failed.
    Error(KvmError),
}

impl fmt::Display for VcpuEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parked => write!(f, "parked"),
            Self::TripleFault { registers } if registers.after_init() => {
                write!(
                    f,
                    "triple fault; this host's processor loses the state, what follows is that after INIT\n{registers}"
                )
            }
            Self::TripleFault { registers } => write!(f, "triple fault\n{registers}"),
            Self::InternalError { reason, registers } => {
                write!(f, "KVM internal error: {reason}\n{registers}")
            }
            Self::EntryFailure { reason, host_cpu, registers } => write!(
                f,
                "the processor refused the guest's state (hardware reason {reason:#x}, host CPU {host_cpu})\n{registers}"
            ),
            Self::Shutdown => write!(f, "shutdown"),
            Self::Reset => write!(f, "reset"),
            Self::Unexpected { exit, registers } => write!(f, "unexpected exit {exit}\n{registers}"),
            Self::Error(error) => {
                write!(f, "{error}")?;
                match std::error::Error::source(error) {
                    Some(source) => write!(f, ": {source}"),
                    None => Ok(()),
                }
            }
        }
    }
}

/// KVM_EXIT_INTERNAL_ERROR (KVM API, 5. The kvm_run structure).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InternalError {
    pub suberror: u32,
    pub data: Vec<u64>,
}

impl InternalError {
    /// The bytes of the instruction KVM could not emulate, if it says.
    pub fn instruction(&self) -> Option<Vec<u8>> {
        const HAS_INSTRUCTION: u64 = 1;
        if self.suberror != KVM_INTERNAL_ERROR_EMULATION || self.data.first()? & HAS_INSTRUCTION == 0 {
            return None;
        }
        let bytes: Vec<u8> = self.data.get(1..3)?.iter().flat_map(|word| word.to_le_bytes()).collect();
        let (size, bytes) = bytes.split_first()?;
        Some(bytes[..usize::from(*size).min(bytes.len())].to_vec())
    }
}

impl fmt::Display for InternalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.suberror {
            KVM_INTERNAL_ERROR_EMULATION => write!(f, "it cannot emulate an instruction")?,
            KVM_INTERNAL_ERROR_SIMUL_EX => write!(f, "simultaneous exceptions")?,
            KVM_INTERNAL_ERROR_DELIVERY_EV => write!(f, "an exit while it delivered an event")?,
            KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => write!(f, "an exit it does not know")?,
            other => write!(f, "suberror {other}")?,
        }
        match self.instruction() {
            Some(bytes) => {
                write!(f, " (bytes")?;
                bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))?;
                write!(f, ")")
            }
            None if self.data.is_empty() => Ok(()),
            None => write!(f, " (data {:x?})", self.data),
        }
    }
}

/// What a person wants to see of a vCPU that died.
#[derive(Debug, Clone)]
pub struct Registers(Option<Box<(kvm_regs, kvm_sregs)>>);

impl Registers {
    pub(super) fn of(fd: &VcpuFd) -> Self {
        Self(fd.get_regs().ok().zip(fd.get_sregs().ok()).map(Box::new))
    }

    /// Whether this is the state after INIT, which KVM on AMD leaves behind a triple fault.
    fn after_init(&self) -> bool {
        self.0.as_ref().is_some_and(|both| both.0.rip == 0xfff0 && both.1.cs.base == 0xffff_0000)
    }

    pub fn rip(&self) -> Option<u64> {
        self.0.as_ref().map(|both| both.0.rip)
    }
}

impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(both) = &self.0 else { return write!(f, "  (no registers: KVM does not give them)") };
        let (r, s) = both.as_ref();
        let segment = |name: &str, s: &kvm_segment| {
            format!(
                "{name} {:04x} base {:016x} limit {:08x} l={} db={}",
                s.selector, s.base, s.limit, s.l, s.db
            )
        };
        writeln!(
            f,
            "  rip {:016x}  rflags {:016x}  rsp {:016x}  rbp {:016x}",
            r.rip, r.rflags, r.rsp, r.rbp
        )?;
        writeln!(f, "  rax {:016x}  rbx    {:016x}  rcx {:016x}  rdx {:016x}", r.rax, r.rbx, r.rcx, r.rdx)?;
        writeln!(f, "  rsi {:016x}  rdi    {:016x}  r8  {:016x}  r9  {:016x}", r.rsi, r.rdi, r.r8, r.r9)?;
        writeln!(f, "  r10 {:016x}  r11    {:016x}  r12 {:016x}  r13 {:016x}", r.r10, r.r11, r.r12, r.r13)?;
        writeln!(f, "  r14 {:016x}  r15    {:016x}", r.r14, r.r15)?;
        writeln!(f, "  cr0 {:016x}  cr2    {:016x}  cr3 {:016x}  cr4 {:016x}", s.cr0, s.cr2, s.cr3, s.cr4)?;
        writeln!(f, "  cr8 {:016x}  efer   {:016x}  apic_base {:016x}", s.cr8, s.efer, s.apic_base)?;
        writeln!(f, "  {}", segment("cs", &s.cs))?;
        writeln!(f, "  {}", segment("ss", &s.ss))?;
        writeln!(f, "  {}", segment("tr", &s.tr))?;
        write!(
            f,
            "  gdt base {:016x} limit {:04x}  idt base {:016x} limit {:04x}",
            s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit
        )
    }
}

/// What became of one KVM_RUN.
enum Entry {
    /// It ended without an access: a signal, or the wait for a start-up IPI is over.
    Interrupted,
    /// It ended with an access, which is answered.
    Handled,
    Ended(VcpuEvent),
}

/// Enters the guest once. The event, if the guest cannot go on.
pub(super) fn run_once<H: ExitHandler + ?Sized>(fd: &mut VcpuFd, handler: &H) -> Option<VcpuEvent> {
    match enter(fd, handler) {
        Entry::Interrupted | Entry::Handled => None,
        Entry::Ended(event) => Some(event),
    }
}

/// Completes the instruction whose access the last exit was for, and runs no other; `immediate_exit` must be set.
/// Until then part of it is kept inside KVM (KVM API, 5, KVM_EXIT_MMIO), where a reset of the registers would meet it.
pub(super) fn settle<H: ExitHandler + ?Sized>(fd: &mut VcpuFd, handler: &H) -> Option<VcpuEvent> {
    loop {
        match enter(fd, handler) {
            Entry::Interrupted => return None,
            // The instruction has one more access.
            Entry::Handled => {}
            Entry::Ended(event) => return Some(event),
        }
    }
}

fn enter<H: ExitHandler + ?Sized>(fd: &mut VcpuFd, handler: &H) -> Entry {
    let exit = match fd.run() {
        Ok(exit) => exit,
        Err(error) => {
            return match error.errno() {
                // EAGAIN: a vCPU that waited for its start-up IPI has got it.
                libc::EINTR | libc::EAGAIN => Entry::Interrupted,
                _ => Entry::Ended(VcpuEvent::Error(KvmError::Ioctl {
                    what: "run a vCPU",
                    source: error.into(),
                })),
            };
        }
    };
    match exit {
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => pio(fd, handler),
        VcpuExit::MmioRead(address, data) => {
            data.fill(0xff);
            handler.mmio_read(address, data);
        }
        VcpuExit::MmioWrite(address, data) => handler.mmio_write(address, data),
        other => {
            let end = End::of(&other);
            return end.event(fd).map_or(Entry::Handled, Entry::Ended);
        }
    }
    Entry::Handled
}

/// A port access, one element at a time: a string instruction brings many at once, and kvm-ioctls does not say how
/// wide each is.
fn pio<H: ExitHandler + ?Sized>(fd: &mut VcpuFd, handler: &H) {
    let run = fd.get_kvm_run();
    // SAFETY: called only after KVM_EXIT_IO, for which this is the member of the union that KVM filled.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (width, count) = (usize::from(io.size), io.count as usize);
    if !matches!(width, 1 | 2 | 4) {
        return;
    }
    // SAFETY: KVM put `count` elements of `size` bytes at `data_offset` from the start of kvm_run, inside the mapping
    // that the vCPU owns; the guest is not running, and nothing else refers to them.
    let data = unsafe {
        let start = (&raw mut *run).cast::<u8>().add(io.data_offset as usize);
        std::slice::from_raw_parts_mut(start, width * count)
    };
    for element in data.chunks_exact_mut(width) {
        if u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_IN {
            element.fill(0xff);
            handler.pio_read(io.port, element);
        } else {
            handler.pio_write(io.port, element);
        }
    }
}

/// The end of a run, free of the borrow that [`VcpuExit`] holds, so that registers can be read.
enum End {
    None,
    TripleFault,
    InternalError,
    EntryFailure(u64, u32),
    SystemEvent(u32),
    Unexpected(String),
}

impl End {
    fn of(exit: &VcpuExit<'_>) -> Self {
        match exit {
            VcpuExit::Intr => Self::None,
            VcpuExit::Shutdown => Self::TripleFault,
            VcpuExit::InternalError => Self::InternalError,
            VcpuExit::FailEntry(reason, cpu) => Self::EntryFailure(*reason, *cpu),
            VcpuExit::SystemEvent(kind, _) => Self::SystemEvent(*kind),
            other => Self::Unexpected(format!("{other:?}")),
        }
    }

    fn event(self, fd: &mut VcpuFd) -> Option<VcpuEvent> {
        let registers = Registers::of(fd);
        Some(match self {
            Self::None => return None,
            Self::TripleFault => VcpuEvent::TripleFault { registers },
            Self::InternalError => {
                // SAFETY: this end is only made of KVM_EXIT_INTERNAL_ERROR, whose member of the union this is.
                let error = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
                let words = (error.ndata as usize).min(error.data.len());
                let reason = InternalError { suberror: error.suberror, data: error.data[..words].to_vec() };
                VcpuEvent::InternalError { reason, registers }
            }
            Self::EntryFailure(reason, host_cpu) => VcpuEvent::EntryFailure { reason, host_cpu, registers },
            Self::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN) => VcpuEvent::Shutdown,
            Self::SystemEvent(KVM_SYSTEM_EVENT_RESET) => VcpuEvent::Reset,
            Self::SystemEvent(kind) => {
                VcpuEvent::Unexpected { exit: format!("system event {kind}"), registers }
            }
            Self::Unexpected(exit) => VcpuEvent::Unexpected { exit, registers },
        })
    }
}

impl From<io::Error> for VcpuEvent {
    fn from(source: io::Error) -> Self {
        Self::Error(KvmError::Ioctl { what: "run a vCPU", source })
    }
}
