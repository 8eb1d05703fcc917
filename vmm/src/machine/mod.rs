//! One machine, from its plan to its end. Its thread, the main thread, owns all control state; everybody else sends
//! it an [`Event`].
//!
//! ```text
//!                                      ┌──── Held <─── vCPUs parked ──┐
//!                all daemons answer    v cont         stop or reset     │  vCPUs parked, for a reset
//!   Connecting ───────────────────> Running ─────────────────────> Parking ──────────────────> Resetting
//!       │                           │  ^                                                         │ devices reset
//!       │                           │  └──────────────────────────────────────────────── Draining
//!       │ a daemon cannot be had    │ power off, quit, fault        killed daemons gone, guest loaded again
//!       └───────────> Ended <───────┘ (and from all others)        (to Held, if stop was said)
//! ```
//!
//! Invariants: a vCPU runs only in Running; guest memory is written only while no vCPU and no daemon uses it
//! (Connecting, Draining); a daemon that is lost never ends the machine.

mod build;
mod buses;
mod connect;
mod devices;
mod event;
mod firmware;
mod health;
mod operate;
mod ram;
mod signals;
mod supervise;
mod terminal_link;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cleave_common::exit::{ExitCode, Failure};
use cleave_common::logging;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub use build::build;
use event::{Event, EventQueue};
use health::HealthTable;
use operate::Operator;
use signals::{Request, Signals};
use supervise::Supervisor;
use terminal_link::TerminalLink;

use crate::arch::x86_64::boot::Boot;
use crate::bus;
use crate::control::Notice;
use crate::daemon::{self, KILL_LIMIT};
use crate::kvm::Vm;
use crate::kvm::vcpu::{VcpuEvent, VcpuHandle};
use crate::legacy::line::Line;
use crate::legacy::power::PowerRequest;
use crate::legacy::terminal::{self, Command};
use crate::legacy::uart::Uart;
use crate::pci;
use crate::vhost::DEFAULT_DEADLINE;
use crate::virtio::Device;

/// How long all sessions may take to stop: a start under way, then the stop, each with its deadline.
const STOP_LIMIT: Duration = Duration::from_secs(2 * DEFAULT_DEADLINE.as_secs() + 1);

/// How long a daemon may take to end when it is asked to.
const DAEMON_GRACE: Duration = Duration::from_secs(2);

/// Where the machine is in its life, once it runs.
#[derive(Debug)]
enum Phase {
    Running,
    /// The vCPUs are to park; these have not yet.
    Parking {
        running: Vec<usize>,
        then: Then,
    },
    /// They are parked until somebody lets them go on.
    Held,
    /// The devices are on their way back to power-on.
    Resetting,
    /// They are there; a daemon that was killed may still write to guest memory until it is gone, or we give up on that.
    Draining {
        until: Instant,
    },
}

/// What vCPUs park for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Hold,
    Reset,
}

/// Why a machine ended, where nothing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    PowerOff,
    /// Somebody outside wanted it, for this reason.
    Quit(&'static str),
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
    /// By slot.
    devices: Vec<Arc<Device>>,
    health: HealthTable,
    uart: Arc<Uart>,
    line: Line,
    /// With `--console stdio`.
    terminal: Option<TerminalLink>,
    power_button: Arc<bus::Event>,
    boot: Boot,
    operator: Operator,
    /// Last, so that the sessions with them have ended.
    daemons: Supervisor,
}

impl Machine {
    /// Runs the guest until it, or somebody who may, ends it.
    pub fn run(mut self) -> Result<Ending, Failure> {
        self.line.take_terminal();
        self.terminal.iter_mut().for_each(TerminalLink::take_terminal);
        let result = self.power_on(false).and_then(|()| self.work());
        self.operator.notify(match &result {
            Ok(Ending::PowerOff) => Notice::Shutdown { guest: true, reason: "guest-shutdown" },
            Ok(Ending::Quit(reason)) => Notice::Shutdown { guest: false, reason },
            Err(failure) if failure.code == ExitCode::GuestFault => {
                Notice::Shutdown { guest: true, reason: "guest-panic" }
            }
            Err(_) => Notice::Shutdown { guest: false, reason: "host-error" },
        });
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
            let mut commands = self.line.serve(|input| self.uart.receive(input));
            commands.extend(self.terminal.iter_mut().flat_map(TerminalLink::serve));
            for command in commands {
                if let Some(ending) = self.obey_key(command) {
                    return Ok(ending);
                }
            }
            self.look_after_daemons();
            self.drained()?;
        }
    }

    /// Sleeps until something wants the machine thread.
    fn wait(&self) {
        let at_terminal = self.terminal.as_ref().and_then(TerminalLink::stalled);
        let stalled = [self.line.output().stalled(), at_terminal];
        let daemons = self.daemons.fds().map(|fd| (fd, PollFlags::IN));
        let mut fds: Vec<_> = [(self.queue.wake().as_fd(), PollFlags::IN)]
            .into_iter()
            .chain(self.signals.fds().map(|fd| (fd, PollFlags::IN)))
            .chain(self.line.interest())
            .chain(self.terminal.iter().flat_map(TerminalLink::interest))
            .chain(stalled.iter().flatten().map(|fd| (fd.as_fd(), PollFlags::OUT)))
            .chain(daemons)
            .map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
            .collect();
        let draining = match self.phase {
            Phase::Draining { until } => Some(until),
            _ => None,
        };
        let due = [self.daemons.next_due(), draining].into_iter().flatten().min();
        let left = due.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        // A signal or a failure only means one look too many.
        let _ = poll(&mut fds, timeout.as_ref());
    }

    fn handle(&mut self, event: Event) -> Result<Option<Ending>, Failure> {
        match event {
            Event::Vcpu { index, event } => return self.handle_vcpu(index, event),
            Event::Power(PowerRequest::PowerOff) => return Ok(Some(Ending::PowerOff)),
            Event::Power(PowerRequest::Reset) => self.reset(),
            Event::Asked(asked) => return Ok(self.obey(asked)),
            Event::DevicesReset => {
                if matches!(self.phase, Phase::Resetting) {
                    self.phase = Phase::Draining { until: Instant::now() + KILL_LIMIT };
                }
            }
            Event::Device { slot, event } => self.hear_device(slot, event),
            Event::Spawned { slot, result } => self.hear_spawned(slot, result),
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

    fn reset(&mut self) {
        self.reset_by(Notice::Reset { guest: true, reason: "guest-reset" });
    }

    /// Running or Held -> Parking. Whoever asks again meanwhile has asked once.
    fn reset_by(&mut self, notice: Notice) {
        match &mut self.phase {
            Phase::Running | Phase::Held => self.park(Then::Reset),
            Phase::Parking { then: then @ Then::Hold, .. } => *then = Then::Reset,
            Phase::Parking { .. } | Phase::Resetting | Phase::Draining { .. } => return,
        }
        tracing::info!("the guest is reset");
        self.operator.notify(notice);
    }

    /// Every vCPU answers, one that is parked already too.
    fn park(&mut self, then: Then) {
        self.vcpus.iter().for_each(VcpuHandle::park);
        self.phase = Phase::Parking { running: (0..self.vcpus.len()).collect(), then };
    }

    /// Parking -> Held or Resetting, with the last vCPU.
    fn parked(&mut self, index: usize) {
        let Phase::Parking { running, then } = &mut self.phase else { return };
        running.retain(|other| *other != index);
        if !running.is_empty() {
            return;
        }
        match then {
            Then::Hold => self.go_on(true),
            Then::Reset => {
                self.phase = Phase::Resetting;
                let events = self.queue.sender();
                self.root.reset(move || events.send(Event::DevicesReset));
            }
        }
    }

    /// To Running, or to Held if that is wanted: `ran` says whether the guest ran until now.
    fn go_on(&mut self, ran: bool) {
        if self.operator.is_held() {
            self.phase = Phase::Held;
            self.operator.paused(ran);
        } else {
            self.vcpus.iter().for_each(VcpuHandle::run);
            self.phase = Phase::Running;
        }
    }

    /// Draining -> Running, once no daemon that was killed is left.
    fn drained(&mut self) -> Result<(), Failure> {
        let Phase::Draining { until } = self.phase else { return Ok(()) };
        if self.daemons.is_killing() {
            if Instant::now() < until {
                return Ok(());
            }
            tracing::error!(
                "a daemon does not end, even by SIGKILL: the guest is started again, and what the daemon has in flight may still reach its memory"
            );
        }
        self.power_on(true)
    }

    /// Loads the guest and starts the first vCPU at its entry; the others wait for the guest to start them.
    fn power_on(&mut self, again: bool) -> Result<(), Failure> {
        if again {
            self.vm.ram().clear().map_err(Failure::host)?;
            self.vm.reset_irqchips().map_err(Failure::host)?;
            self.uart.reset();
        }
        let mut entry = Some(self.boot.load(self.vm.ram()).map_err(Failure::usage)?);
        self.vcpus.iter().for_each(|vcpu| vcpu.reset(entry.take()));
        self.go_on(false);
        Ok(())
    }

    /// Stops the guest, lets every daemon finish what it has in flight, then ends the daemons.
    fn shut_down(&mut self) {
        self.vcpus.clear();
        let events = self.queue.sender();
        self.root.reset(move || events.send(Event::DevicesReset));
        // Every session meets its deadline by then; a daemon that did not is ended below all the same.
        self.await_devices(Instant::now() + STOP_LIMIT);
        for exit in daemon::stop_all(std::mem::take(&mut self.daemons).into_daemons(), DAEMON_GRACE) {
            if !exit.success() {
                tracing::warn!("{exit}");
            }
        }
    }

    fn obey_signal(&mut self, request: Request) -> Option<Ending> {
        match request {
            Request::Terminate if !std::mem::replace(&mut self.terminating, true) => {
                tracing::info!("SIGTERM: pressing the power button; once more stops the machine at once");
                self.press_power_button();
                None
            }
            Request::Terminate | Request::Quit => Some(Ending::Quit("host-signal")),
            Request::Report => {
                logging::print(&self.health.to_string());
                None
            }
        }
    }

    fn obey_key(&self, command: Command) -> Option<Ending> {
        match command {
            Command::Quit => return Some(Ending::Quit("host-ui")),
            Command::PowerButton => self.press_power_button(),
            Command::Help => eprintln!("\n{}", terminal::HELP),
        }
        None
    }
}
