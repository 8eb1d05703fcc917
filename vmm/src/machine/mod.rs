//! One machine, from its plan to its end. Its thread, the main thread, owns all control state; everybody else sends
//! it an [`Event`].
//!
//! ```text
//!                all daemons answer             guest resets            vCPUs parked
//!   Connecting ───────────────────> Running ─────────────────> Parking ────────────> Resetting
//!       │                           │  ^                                                │
//!       │                           │  └────────────────────────────────────────────────┘
//!       │ a daemon cannot be had    │ power off, quit, fault       devices reset, guest loaded again
//!       └───────────> Ended <───────┘ (and from Parking and Resetting)
//! ```
//!
//! Invariants: a vCPU runs only in Running; guest memory is written only while no vCPU and no daemon uses it
//! (Connecting, Resetting); a daemon that is lost never ends the machine.

mod build;
mod buses;
mod connect;
mod event;
mod firmware;
mod signals;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use cleave_common::exit::{ExitCode, Failure};
use rustix::event::{PollFd, PollFlags, poll};

pub use build::build;
use event::{Event, EventQueue, SlotIndex};
use signals::{Request, Signals};

use crate::arch::x86_64::boot::Boot;
use crate::bus;
use crate::daemon::{self, Daemon};
use crate::kvm::Vm;
use crate::kvm::vcpu::{VcpuEvent, VcpuHandle};
use crate::legacy::line::Line;
use crate::legacy::power::PowerRequest;
use crate::legacy::terminal::{self, Command};
use crate::legacy::uart::Uart;
use crate::pci;
use crate::vhost::DEFAULT_DEADLINE;
use crate::virtio::DeviceEvent;

/// How long all sessions may take to stop: a start under way, then the stop, each with its deadline.
const STOP_LIMIT: Duration = Duration::from_secs(2 * DEFAULT_DEADLINE.as_secs() + 1);

/// How long a daemon may take to end when it is asked to.
const DAEMON_GRACE: Duration = Duration::from_secs(2);

/// Where the machine is in its life, once it runs.
#[derive(Debug)]
enum Phase {
    Running,
    /// The guest asked for a reset; these vCPUs have not parked yet.
    Parking {
        running: Vec<usize>,
    },
    /// The devices are on their way back to power-on.
    Resetting,
}

/// Why a machine ended, where nothing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    PowerOff,
    Quit,
}

/// A machine whose daemons have all been reached.
pub struct Machine {
    phase: Phase,
    queue: EventQueue,
    signals: Signals,
    /// SIGTERM has pressed the power button once.
    terminating: bool,
    vm: Vm,
    /// Dropped before the devices they access.
    vcpus: Vec<VcpuHandle>,
    root: Arc<pci::Root>,
    /// What messages call the devices, by slot.
    names: Vec<String>,
    uart: Arc<Uart>,
    line: Line,
    power_button: Arc<bus::Event>,
    boot: Boot,
    /// Last, so that the sessions with them have ended.
    daemons: Vec<Daemon>,
}

impl Machine {
    /// Runs the guest until it, or somebody who may, ends it.
    pub fn run(mut self) -> Result<Ending, Failure> {
        self.line.take_terminal();
        let result = self.power_on().and_then(|()| self.work());
        self.shut_down();
        result
    }

    fn work(&mut self) -> Result<Ending, Failure> {
        loop {
            self.wait();
            for event in self.queue.take() {
                if let Some(ending) = self.handle(event)? {
                    return Ok(ending);
                }
            }
            for request in self.signals.take() {
                if let Some(ending) = self.obey_signal(request) {
                    return Ok(ending);
                }
            }
            for command in self.line.serve(|input| self.uart.receive(input)) {
                if let Some(ending) = self.obey_key(command) {
                    return Ok(ending);
                }
            }
            self.reap_daemons();
        }
    }

    /// Sleeps until something wants the machine thread.
    fn wait(&self) {
        let stalled = self.line.output().stalled();
        let daemons = self.daemons.iter().map(|daemon| (daemon.as_fd(), PollFlags::IN));
        let mut fds: Vec<_> = [(self.queue.wake().as_fd(), PollFlags::IN)]
            .into_iter()
            .chain(self.signals.fds().map(|fd| (fd, PollFlags::IN)))
            .chain(self.line.interest())
            .chain(stalled.as_ref().map(|fd| (fd.as_fd(), PollFlags::OUT)))
            .chain(daemons)
            .map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
            .collect();
        // A signal or a failure only means one look too many.
        let _ = poll(&mut fds, None);
    }

    fn handle(&mut self, event: Event) -> Result<Option<Ending>, Failure> {
        match event {
            Event::Vcpu { index, event } => return self.handle_vcpu(index, event),
            Event::Power(PowerRequest::PowerOff) => return Ok(Some(Ending::PowerOff)),
            Event::Power(PowerRequest::Reset) => self.reset(),
            Event::DevicesReset => {
                if matches!(self.phase, Phase::Resetting) {
                    self.power_on()?;
                }
            }
            Event::Device { slot, event } => self.report(slot, &event),
            // All of them were taken before there was a machine.
            Event::Connected { .. } => {}
        }
        Ok(None)
    }

    fn handle_vcpu(&mut self, index: usize, event: VcpuEvent) -> Result<Option<Ending>, Failure> {
        match event {
            VcpuEvent::Parked => self.parked(index),
            VcpuEvent::Reset => {
                self.reset();
                self.parked(index);
            }
            VcpuEvent::Shutdown => return Ok(Some(Ending::PowerOff)),
            VcpuEvent::Error(error) => return Err(Failure::internal(error)),
            fault => return Err(Failure::new(ExitCode::GuestFault, format!("vcpu{index}: {fault}"))),
        }
        Ok(None)
    }

    /// Running -> Parking. A guest that asks again meanwhile has asked once.
    fn reset(&mut self) {
        if matches!(self.phase, Phase::Running) {
            tracing::info!("the guest resets");
            self.vcpus.iter().for_each(VcpuHandle::park);
            self.phase = Phase::Parking { running: (0..self.vcpus.len()).collect() };
        }
    }

    /// Parking -> Resetting, with the last vCPU.
    fn parked(&mut self, index: usize) {
        let Phase::Parking { running } = &mut self.phase else { return };
        running.retain(|other| *other != index);
        if running.is_empty() {
            self.phase = Phase::Resetting;
            let events = self.queue.sender();
            self.root.reset(move || events.send(Event::DevicesReset));
        }
    }

    /// Loads the guest and starts the first vCPU at its entry; the others wait for the guest to start them.
    fn power_on(&mut self) -> Result<(), Failure> {
        if matches!(self.phase, Phase::Resetting) {
            self.vm.ram().clear().map_err(Failure::host)?;
            self.vm.reset_irqchips().map_err(Failure::host)?;
            self.uart.reset();
        }
        let mut entry = Some(self.boot.load(self.vm.ram()).map_err(Failure::usage)?);
        for vcpu in &self.vcpus {
            vcpu.reset(entry.take());
            vcpu.run();
        }
        self.phase = Phase::Running;
        Ok(())
    }

    /// Stops the guest, lets every daemon finish what it has in flight, then ends the daemons.
    fn shut_down(&mut self) {
        self.vcpus.clear();
        let (done, wait) = std::sync::mpsc::channel();
        self.root.reset(move || {
            let _ = done.send(());
        });
        // Every session meets its deadline by then; a daemon that did not is ended below all the same.
        let _ = wait.recv_timeout(STOP_LIMIT);
        for exit in daemon::stop_all(std::mem::take(&mut self.daemons), DAEMON_GRACE) {
            if !exit.success() {
                tracing::warn!("{exit}");
            }
        }
    }

    fn obey_signal(&mut self, request: Request) -> Option<Ending> {
        match request {
            Request::Terminate if !std::mem::replace(&mut self.terminating, true) => {
                tracing::info!("SIGTERM: pressing the power button; once more stops the machine at once");
                self.power_button.signal();
                None
            }
            Request::Terminate | Request::Quit => Some(Ending::Quit),
        }
    }

    fn obey_key(&self, command: Command) -> Option<Ending> {
        match command {
            Command::Quit => return Some(Ending::Quit),
            Command::PowerButton => self.power_button.signal(),
            Command::Help => eprintln!("\n{}", terminal::HELP),
        }
        None
    }

    fn reap_daemons(&mut self) {
        self.daemons.retain_mut(|daemon| match daemon.exit() {
            Some(exit) => {
                tracing::error!("{exit}; the machine goes on without its device");
                false
            }
            None => true,
        });
    }

    fn report(&self, slot: SlotIndex, event: &DeviceEvent) {
        let device = self.names.get(slot.0).map_or("?", String::as_str);
        match event {
            DeviceEvent::Running => tracing::debug!("device {device} runs"),
            DeviceEvent::Lost { reason } => {
                tracing::error!("device {device} is lost: {reason}; the machine goes on without it");
                // One of ours that hangs must not wake up later and write to memory that is no longer its buffers.
                if let Some(daemon) = self.daemons.iter().find(|daemon| daemon.device() == device) {
                    daemon.force();
                }
            }
            DeviceEvent::Refused { reason } => {
                tracing::error!("the driver of device {device} set it up in a way that cannot be: {reason}");
            }
        }
    }
}
