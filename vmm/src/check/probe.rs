//! The probe: KVM is opened, asked what it can, and made to run a guest of a few instructions in long mode, ring 0.
//!
//! Some hosts have a /dev/kvm that opens and answers every question, and still does not run a kernel: it interprets ring
//! 0 and lacks instructions that every stock kernel uses. Only running them tells.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use kvm_bindings::CpuId;
use vm_memory::{Bytes, GuestAddress};

use super::Check;
use crate::arch::x86_64::regs::{CR4_OSFXSR, CR4_OSXMMEXCPT, long_mode};
use crate::arch::x86_64::{cpuid, msr};
use crate::kvm::vcpu::{EntryState, ExitHandler, VcpuConfig, VcpuEvent, VcpuHandle};
use crate::kvm::{Kvm, KvmError, Vm};
use crate::memory::{GuestRam, RamOptions, RamRegion};

/// Far more than the guest needs, even where KVM itself is emulated.
const TIME_LIMIT: Duration = Duration::from_secs(2);

const RAM: u64 = 2 << 20;
const CODE: u64 = 0x10_0000;
/// The first step puts the stack below this.
const SCRATCH: u64 = 0x8_0000;
const PORT: u16 = 0x510;
/// What comes out when every step did what it should: 1 + 0x1234, and the number of its bits.
const RESULT: u32 = 0x12_3506;

/// A group of instructions that a stock kernel uses, so that a failure can be named. `rsi` is [`SCRATCH`].
struct Step {
    name: &'static str,
    code: &'static [u8],
}

const STACK: Step = Step {
    name: "stack and calls",
    // mov esp, 0x90000; push 0x2a; call next; pop rdi; pop rax
    code: &[0xbc, 0, 0, 9, 0, 0x6a, 0x2a, 0xe8, 0, 0, 0, 0, 0x5f, 0x58],
};
const SSE: Step = Step {
    name: "SSE",
    // movd xmm0, eax; paddd xmm0, xmm0; movaps [rsi], xmm0; movd eax, xmm0
    code: &[0x66, 0x0f, 0x6e, 0xc0, 0x66, 0x0f, 0xfe, 0xc0, 0x0f, 0x29, 0x06, 0x66, 0x0f, 0x7e, 0xc0],
};
const CMPXCHG16B: Step = Step {
    name: "cmpxchg16b",
    // xor edx, edx; xor ecx, ecx; mov ebx, 0x1234; lock cmpxchg16b [rsi]; sete al; movzx eax, al; add eax, [rsi]
    code: &[
        0x31, 0xd2, 0x31, 0xc9, 0xbb, 0x34, 0x12, 0, 0, 0xf0, 0x48, 0x0f, 0xc7, 0x0e, 0x0f, 0x94, 0xc0, 0x0f,
        0xb6, 0xc0, 0x03, 0x06,
    ],
};
const POPCNT: Step = Step {
    name: "popcnt",
    // popcnt ecx, eax
    code: &[0xf3, 0x0f, 0xb8, 0xc8],
};
const WITHOUT_POPCNT: Step = Step {
    name: "popcnt",
    // mov ecx, 6: this CPU has none, and stock kernels do without
    code: &[0xb9, 6, 0, 0, 0],
};
const KEEP: Step = Step {
    name: "arithmetic",
    // shl eax, 8; or eax, ecx; mov ebp, eax
    code: &[0xc1, 0xe0, 0x08, 0x09, 0xc8, 0x89, 0xc5],
};
const EFER: Step = Step {
    name: "model-specific registers",
    // mov ecx, EFER; rdmsr; wrmsr
    code: &[0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, 0x0f, 0x30],
};
const PAGING: Step = Step {
    name: "page table switches",
    // mov rax, cr3; mov cr3, rax; invlpg [rsi]
    code: &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0x0f, 0x01, 0x3e],
};
const STRINGS: Step = Step {
    name: "string instructions",
    // mov rdi, rsi; mov ecx, 64; xor eax, eax; cld; rep stosq
    code: &[0x48, 0x89, 0xf7, 0xb9, 0x40, 0, 0, 0, 0x31, 0xc0, 0xfc, 0xf3, 0x48, 0xab],
};
const CPUID: Step = Step {
    name: "cpuid and rdtsc",
    // xor eax, eax; cpuid; rdtsc
    code: &[0x31, 0xc0, 0x0f, 0xa2, 0x0f, 0x31],
};
const FXSAVE: Step = Step {
    name: "fxsave",
    // fxsave [rsi]; fxrstor [rsi]
    code: &[0x0f, 0xae, 0x06, 0x0f, 0xae, 0x0e],
};
const REPORT: Step = Step {
    name: "port output",
    // mov dx, PORT; mov eax, ebp; out dx, eax; hlt; jmp to the hlt
    code: &[0x66, 0xba, 0x10, 0x05, 0x89, 0xe8, 0xef, 0xf4, 0xeb, 0xfd],
};

/// The guest's program, in order.
struct Program([&'static Step; 11]);

impl Program {
    fn for_host(supported: &CpuId) -> Self {
        const ECX_POPCNT: u32 = 1 << 23;
        let basic = supported.as_slice().iter().find(|leaf| leaf.function == 1);
        let popcnt = match basic {
            Some(leaf) if leaf.ecx & ECX_POPCNT != 0 => &POPCNT,
            _ => &WITHOUT_POPCNT,
        };
        Self([&STACK, &SSE, &CMPXCHG16B, popcnt, &KEEP, &EFER, &PAGING, &STRINGS, &CPUID, &FXSAVE, &REPORT])
    }

    fn code(&self) -> Vec<u8> {
        self.0.iter().flat_map(|step| step.code).copied().collect()
    }

    /// The step that `rip` is in.
    fn step_at(&self, rip: u64) -> Option<&'static str> {
        let mut start = CODE;
        self.0.iter().find_map(|step| {
            let end = start + step.code.len() as u64;
            let found = (start..end).contains(&rip);
            start = end;
            found.then_some(step.name)
        })
    }
}

/// The checks of KVM itself, and whether it runs a stock guest.
pub(super) fn kvm() -> (Vec<Check>, bool) {
    const NAME: &str = "kvm";
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            let text = with_causes(&error);
            let (detail, advice) =
                text.split_once(": ").unwrap_or((text.as_str(), "look at the kernel's log"));
            return (vec![Check::fail(NAME, detail, advice)], false);
        }
    };
    let opened = Check::ok(NAME, "/dev/kvm opens");
    let capabilities = capabilities(&kvm);
    let guest = guest(&kvm);
    let runs = guest.status == super::Status::Ok;
    (vec![opened, capabilities, guest], runs)
}

fn capabilities(kvm: &Kvm) -> Check {
    const NAME: &str = "capabilities";
    let missing: Vec<_> = kvm.missing().collect();
    if !missing.is_empty() {
        return Check::fail(
            NAME,
            format!("KVM lacks {}", missing.join(", ")),
            "use a newer kernel, 5.10 or later",
        );
    }
    let wanting: Vec<_> = kvm.wanting().collect();

    if wanting.is_empty() {
        Check::ok(NAME, "all there")
    } else {
        let detail = format!("KVM lacks {}, which guests can do without", wanting.join(", "));
        Check::warn(NAME, detail, "use a newer kernel, 5.10 or later")
    }
}

fn guest(kvm: &Kvm) -> Check {
    const NAME: &str = "guest";
    let advice = "this /dev/kvm is of no use for stock guests: use a host whose CPU has VT-x or AMD-V and whose kernel has kvm_intel or kvm_amd loaded";
    match run_guest(kvm) {
        Ok(time) => Check::ok(
            NAME,
            format!("a guest ran in long mode with SSE and cmpxchg16b ({} ms)", time.as_millis()),
        ),
        Err(reason) => Check::fail(NAME, format!("KVM does not run a stock guest: {reason}"), advice),
    }
}

/// How long the guest took, or why it did not do what it should.
fn run_guest(kvm: &Kvm) -> Result<Duration, String> {
    let supported = kvm.supported_cpuid().map_err(|error| with_causes(&error))?;
    let program = Program::for_host(&supported);
    let (vm, entry) = build(kvm, &program)?;
    let (sender, receiver) = channel();
    let vcpu = spawn(kvm, &vm, &supported, &sender).map_err(|error| with_causes(&error))?;

    let start = Instant::now();
    vcpu.reset(Some(entry));
    vcpu.run();
    let outcome = receiver.recv_timeout(TIME_LIMIT);
    let time = start.elapsed();
    stop(vcpu, &receiver);
    match outcome {
        Ok(News::Output(RESULT)) => Ok(time),
        Ok(News::Output(other)) => {
            Err(format!("its instructions compute wrongly ({other:#x} instead of {RESULT:#x})"))
        }
        Ok(News::Event(event)) => Err(describe(&event, &program)),
        Err(RecvTimeoutError::Timeout) => {
            Err(format!("the probe guest did not end within {} s", TIME_LIMIT.as_secs()))
        }
        Err(RecvTimeoutError::Disconnected) => Err("the vCPU's thread ended".to_owned()),
    }
}

fn build(kvm: &Kvm, program: &Program) -> Result<(Vm, EntryState), String> {
    let region = RamRegion { gpa: 0, size: RAM, file_offset: 0 };
    let ram = GuestRam::new(&RamOptions::default(), &[region]).map_err(|error| with_causes(&error))?;
    let memory = ram.memory();
    let write = || {
        memory.write_slice(&program.code(), GuestAddress(CODE))?;
        long_mode(memory, CODE, SCRATCH)
    };
    let mut entry = write().map_err(|error| with_causes(&error))?;
    entry.sregs.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT;
    let vm = Vm::new(kvm, Arc::new(ram)).map_err(|error| with_causes(&error))?;
    Ok((vm, entry))
}

fn spawn(kvm: &Kvm, vm: &Vm, supported: &CpuId, sender: &Sender<News>) -> Result<VcpuHandle, KvmError> {
    let processors = cpuid::Processors { count: 1, tsc_deadline_timer: kvm.tsc_deadline_timer() };
    let cpuid = cpuid::for_vcpu(supported, processors, 0).map_err(|error| KvmError::Ioctl {
        what: "take so many CPUID leaves",
        source: std::io::Error::other(error.to_string()),
    })?;
    let config = VcpuConfig { cpuid, msrs: msr::initial() };
    let events = Mutex::new(sender.clone());
    let sink = Arc::new(move |_, event| send(&events, News::Event(event)));
    VcpuHandle::spawn(vm, 0, &config, Arc::new(Ports(Mutex::new(sender.clone()))), sink)
}

/// Ends the vCPU's thread, unless KVM does not let go of it: then it ends with the process.
fn stop(vcpu: VcpuHandle, receiver: &Receiver<News>) {
    vcpu.park();
    let deadline = Instant::now() + TIME_LIMIT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(left) {
            Ok(News::Event(VcpuEvent::Parked)) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout) => {
                std::mem::forget(vcpu);
                return;
            }
        }
    }
}

enum News {
    Output(u32),
    Event(VcpuEvent),
}

fn send(to: &Mutex<Sender<News>>, news: News) {
    // A receiver that is gone has heard enough.
    if let Ok(sender) = to.lock() {
        let _ = sender.send(news);
    }
}

struct Ports(Mutex<Sender<News>>);

impl ExitHandler for Ports {
    fn pio_read(&self, _port: u16, _data: &mut [u8]) {}

    fn pio_write(&self, port: u16, data: &[u8]) {
        if let (PORT, Ok(value)) = (port, data.try_into()) {
            send(&self.0, News::Output(u32::from_le_bytes(value)));
        }
    }

    fn mmio_read(&self, _address: u64, _data: &mut [u8]) {}

    fn mmio_write(&self, _address: u64, _data: &[u8]) {}
}

/// One line: what happened, and at which instructions.
fn describe(event: &VcpuEvent, program: &Program) -> String {
    let (what, registers) = match event {
        VcpuEvent::TripleFault { registers } => ("triple fault".to_owned(), registers),
        VcpuEvent::InternalError { reason, registers } => (format!("internal error, {reason}"), registers),
        VcpuEvent::EntryFailure { reason, registers, .. } => {
            (format!("the processor refused its state (hardware reason {reason:#x})"), registers)
        }
        VcpuEvent::Unexpected { exit, registers } => (format!("unexpected exit {exit}"), registers),
        VcpuEvent::Error(error) => return with_causes(error),
        VcpuEvent::Parked | VcpuEvent::Shutdown | VcpuEvent::Reset => return event.to_string(),
    };
    match registers.rip() {
        Some(rip) => {
            let step = program.step_at(rip).unwrap_or("outside its code");
            format!("{what}, at rip {rip:#x} ({step})")
        }
        None => what,
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rip_names_its_step() {
        let program = Program::for_host(&CpuId::from_entries(&[]).unwrap());
        assert_eq!(program.step_at(CODE), Some("stack and calls"));
        let sse = CODE + STACK.code.len() as u64;
        assert_eq!(program.step_at(sse - 1), Some("stack and calls"));
        assert_eq!(program.step_at(sse), Some("SSE"));
        assert_eq!(program.step_at(CODE + program.code().len() as u64), None);
        assert_eq!(program.step_at(CODE - 1), None);
    }
}
