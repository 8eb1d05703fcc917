//! vCPUs: one named thread each, which runs the guest and hands its accesses to an [`ExitHandler`].
//!
//! ```text
//!            run                          park, or a terminal exit
//!   Parked ───────> Running ──────────────────────────────────────> Parked
//!     │  ^ │
//!     │  └─┘ reset                stop, from either
//!     └──────────────────────────────────────────────> Stopped (thread ended)
//! ```
//!
//! Invariants:
//! - A vCPU starts parked. Only its own thread touches its KVM state; others send it commands.
//! - Commands are a queue, so none is lost and they take effect in order. `pending` only tells a running thread to look
//!   into the queue: it is set after the command is in, and the signal is sent after that.
//! - A parked vCPU answers every `park` with [`VcpuEvent::Parked`]; after a terminal exit the event itself is the answer,
//!   and the thread is parked when it is sent.
//! - A parked vCPU has no half-done instruction: what KVM keeps of one is completed before it parks.
//! - [`kick`] states why a signal cannot be lost between the look into the queue and KVM_RUN.

mod exit;
mod kick;
mod state;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{KvmError, Vm};
use crate::sandbox;
pub use exit::VcpuEvent;
use kick::ExitRequest;
pub use state::EntryState;
use state::ResetState;

/// Where the guest's port and memory-mapped accesses go. Called on the vCPU's thread: must not wait.
pub trait ExitHandler: Send + Sync + 'static {
    /// `data` is as wide as the access: 1, 2 or 4 bytes; it comes in as all ones.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    fn pio_write(&self, port: u16, data: &[u8]);
    /// `data` is as wide as the access: 1 to 8 bytes; it comes in as all ones.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    fn mmio_write(&self, address: u64, data: &[u8]);
}

/// Tells the machine what became of vCPU `usize`. Called on the vCPU's thread: must not wait.
pub type EventSink = Arc<dyn Fn(usize, VcpuEvent) + Send + Sync>;

/// What a vCPU is made of besides its index, which is also its APIC id.
#[derive(Debug, Clone)]
pub struct VcpuConfig {
    pub cpuid: CpuId,
    /// MSRs that differ from what KVM creates.
    pub msrs: Vec<kvm_msr_entry>,
}

enum Command {
    Run,
    Park,
    Reset(Option<Box<EntryState>>),
    Stop,
}

/// A vCPU's thread as the machine sees it. Dropping it stops the thread and waits for it.
#[derive(Debug)]
pub struct VcpuHandle {
    index: usize,
    commands: Sender<Command>,
    pending: Arc<AtomicBool>,
    thread_id: i32,
    /// Gone once joined.
    thread: Option<JoinHandle<()>>,
}

impl VcpuHandle {
    /// Creates vCPU `index` of `vm`, parked and in its power-on state; [`VcpuHandle::reset`] gives it an entry point.
    pub fn spawn<H: ExitHandler>(
        vm: &Vm,
        index: usize,
        config: &VcpuConfig,
        handler: Arc<H>,
        events: EventSink,
    ) -> Result<Self, KvmError> {
        kick::install_handler()?;
        let fd = vm.create_vcpu(index)?;
        fd.set_cpuid2(&config.cpuid).map_err(KvmError::ioctl("take the CPUID of a vCPU"))?;
        set_msrs(&fd, &config.msrs)?;
        let power_on = ResetState::capture(&fd, vm.msr_indices())?;
        let (commands, queue) = channel();
        let (tell_id, id) = channel();
        let pending = Arc::new(AtomicBool::new(false));
        let runner = Runner { index, fd, power_on, queue, pending: Arc::clone(&pending), handler, events };
        let thread = Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(256 << 10)
            .spawn(move || {
                // Nobody waits for it any more: the machine is not to be.
                let _ = tell_id.send(rustix::thread::gettid().as_raw_nonzero().get());
                runner.live();
            })
            .map_err(KvmError::Thread)?;
        let thread_id = id.recv().map_err(|error| KvmError::Thread(io::Error::other(error)))?;
        Ok(Self { index, commands, pending, thread_id, thread: Some(thread) })
    }

    pub fn index(&self) -> usize {
        self.index
    }

    /// Its thread's, as the host's kernel numbers it.
    pub fn thread_id(&self) -> i32 {
        self.thread_id
    }

    /// Parked -> Running.
    pub fn run(&self) {
        self.send(Command::Run);
    }

    /// Running -> Parked, soon: [`VcpuEvent::Parked`] tells when.
    pub fn park(&self) {
        self.send(Command::Park);
    }

    /// Back to power-on, and with `entry` ready to start there; without, waiting for a start-up IPI as every vCPU but
    /// the first does. Takes effect when parked, before a later `run`.
    pub fn reset(&self, entry: Option<EntryState>) {
        self.send(Command::Reset(entry.map(Box::new)));
    }

    fn send(&self, command: Command) {
        // A thread that has ended has said why with an event; there is nobody left to command.
        if self.commands.send(command).is_ok() {
            self.pending.store(true, Ordering::Release);
            if let Some(thread) = &self.thread {
                kick::signal(thread);
            }
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(cpu = self.index, "the thread of a vCPU panicked");
        }
    }
}

/// KVM stops at the first MSR it refuses and says how many it took; that one is named.
fn set_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let what = "set the initial MSRs of a vCPU";
    let msrs = Msrs::from_entries(entries)
        .map_err(|_| KvmError::Ioctl { what, source: io::ErrorKind::InvalidInput.into() })?;
    let taken = fd.set_msrs(&msrs).map_err(KvmError::ioctl(what))?;
    match entries.get(taken) {
        None => Ok(()),
        Some(refused) => Err(KvmError::Ioctl {
            what,
            source: io::Error::other(format!("MSR {:#x} does not take {:#x}", refused.index, refused.data)),
        }),
    }
}

/// The thread's side.
struct Runner<H> {
    index: usize,
    fd: VcpuFd,
    power_on: ResetState,
    queue: Receiver<Command>,
    pending: Arc<AtomicBool>,
    handler: Arc<H>,
    events: EventSink,
}

/// What a command does to the thread.
enum Next {
    Run,
    Park,
    Stop,
}

impl<H: ExitHandler> Runner<H> {
    fn live(mut self) {
        sandbox::confine_thread(sandbox::Thread::Vcpu);
        let request = ExitRequest::of(&mut self.fd);
        let mut next = Next::Park;
        loop {
            next = match next {
                // No sender left is the same as Stop.
                Next::Park => match self.queue.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => Next::Stop,
                },
                Next::Run => self.run(&request),
                Next::Stop => return,
            }
        }
    }

    /// A command that comes to a parked vCPU.
    fn obey(&mut self, command: Command) -> Next {
        match command {
            Command::Run => Next::Run,
            Command::Park => {
                self.tell(VcpuEvent::Parked);
                Next::Park
            }
            Command::Reset(entry) => {
                if let Err(error) = self.power_on.restore(&self.fd, entry.as_deref()) {
                    self.tell(VcpuEvent::Error(error));
                }
                Next::Park
            }
            Command::Stop => Next::Stop,
        }
    }

    /// Runs the guest until a command or a terminal exit ends it.
    fn run(&mut self, request: &ExitRequest) -> Next {
        loop {
            // This order is what keeps a signal from being lost; see `kick`.
            request.clear();
            if self.pending.swap(false, Ordering::AcqRel)
                && let Some(next) = self.obey_while_running(request)
            {
                return next;
            }
            if let Some(event) = exit::run_once(&mut self.fd, &*self.handler) {
                self.tell(event);
                return Next::Park;
            }
        }
    }

    /// The state that the commands in the queue leave a running vCPU in, if it is another.
    fn obey_while_running(&mut self, request: &ExitRequest) -> Option<Next> {
        while let Ok(command) = self.queue.try_recv() {
            match command {
                Command::Run => {}
                Command::Park => {
                    request.set();
                    let event = exit::settle(&mut self.fd, &*self.handler);
                    // So that the guest's watchdog does not take the pause for a hang. A guest without the clock has no such
                    // watchdog.
                    let _ = self.fd.kvmclock_ctrl();
                    self.tell(event.unwrap_or(VcpuEvent::Parked));
                    return Some(Next::Park);
                }
                Command::Stop => return Some(Next::Stop),
                Command::Reset(_) => {
                    // A reset under way would tear the guest's state: the machine parks first.
                    tracing::error!(cpu = self.index, "a running vCPU was told to reset; ignored");
                }
            }
        }
        None
    }

    fn tell(&self, event: VcpuEvent) {
        (self.events)(self.index, event);
    }
}
