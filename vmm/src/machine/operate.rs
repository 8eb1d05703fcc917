//! What the machine does at the word of whoever controls it, and what it tells them.
//!
//! A machine that is *held* (`stop`) runs no vCPU until it is let go (`cont`), whatever happens meanwhile: daemons come and
//! go, and a reset leaves the guest loaded at its entry, and held.

use std::time::Instant;

use cleave_common::control::ControlError;

use super::{Ending, Machine, Phase, Then};
use crate::control::{Answer, Asked, Command, Control, Cpu, DeviceInfo, Notice, RunState};
use crate::kvm::vcpu::VcpuHandle;

/// Who controls the machine, if anybody can.
#[derive(Default)]
pub struct Operator {
    /// `stop` was said last, and not `cont`.
    held: bool,
    /// Those who wait until the vCPUs have paused.
    pausing: Vec<Asked>,
    control: Option<Control>,
    /// What the machine was named.
    name: Option<String>,
}

impl Operator {
    pub fn new(control: Option<Control>, name: Option<String>) -> Self {
        Self { control, name, ..Self::default() }
    }

    pub fn notify(&self, notice: Notice) {
        if let Some(control) = &self.control {
            control.notify(notice);
        }
    }

    pub fn is_held(&self) -> bool {
        self.held
    }

    /// The vCPUs have paused: `changed` if they ran until now.
    pub fn paused(&mut self, changed: bool) {
        if changed {
            self.notify(Notice::Stop);
        }
        for asked in self.pausing.drain(..) {
            asked.answer(Ok(Answer::Done));
        }
    }
}

impl Machine {
    pub(super) fn obey(&mut self, asked: Asked) -> Option<Ending> {
        let outcome = match &asked.command {
            Command::QueryStatus => Ok(Answer::Status(self.run_state())),
            Command::QueryName => Ok(Answer::Name(self.operator.name.clone())),
            Command::QueryCpus => Ok(Answer::Cpus(self.vcpus.iter().map(cpu).collect())),
            Command::QueryDevices => Ok(Answer::Devices(self.device_infos())),
            Command::Stop => {
                // It is answered when they have.
                self.operator.pausing.push(asked);
                self.hold();
                return None;
            }
            Command::Continue => {
                self.let_go();
                Ok(Answer::Done)
            }
            Command::PowerDown => {
                self.press_power_button();
                Ok(Answer::Done)
            }
            Command::Reset => {
                self.reset_by(Notice::Reset { guest: false, reason: "host-qmp-system-reset" });
                Ok(Answer::Done)
            }
            Command::Quit => {
                asked.answer(Ok(Answer::Done));
                return Some(Ending::Quit("host-qmp-quit"));
            }
            Command::RestartDevice { name } => self.restart_device(name).map(|()| Answer::Done),
        };
        asked.answer(outcome);
        None
    }

    pub(super) fn press_power_button(&self) {
        self.power_button.signal();
        self.operator.notify(Notice::PowerDown);
    }

    fn run_state(&self) -> RunState {
        if self.operator.held { RunState::Paused } else { RunState::Running }
    }

    fn hold(&mut self) {
        self.operator.held = true;
        match self.phase {
            Phase::Running => {
                tracing::info!("the machine pauses");
                self.park(Then::Hold);
            }
            Phase::Held => self.operator.paused(false),
            // They wait for what is under way: it ends held.
            Phase::Parking { .. } | Phase::Resetting | Phase::Draining { .. } => {}
        }
    }

    fn let_go(&mut self) {
        if !std::mem::replace(&mut self.operator.held, false) {
            return;
        }
        tracing::info!("the machine goes on");
        // Whoever waited for a pause that does not come has one behind them as good as it gets.
        self.operator.paused(false);
        self.operator.notify(Notice::Resume);
        if matches!(self.phase, Phase::Held) {
            self.vcpus.iter().for_each(VcpuHandle::run);
            self.phase = Phase::Running;
        }
    }

    fn device_infos(&self) -> Vec<DeviceInfo> {
        let now = Instant::now();
        let info = |health: &super::health::Health| DeviceInfo {
            name: health.name.clone(),
            state: health.state.name(),
            since_ms: now.saturating_duration_since(health.since).as_millis() as u64,
            restarts: health.restarts,
            replayed: health.replayed,
            last_error: health.last_error.clone(),
            pid: health.pid,
            socket: health.socket.as_ref().map(|path| path.display().to_string()),
        };
        self.health.iter().map(info).collect()
    }

    /// As if it had crashed, which loses nothing.
    fn restart_device(&mut self, name: &str) -> Result<(), ControlError> {
        let Some((slot, health)) = self.health.find(name) else {
            let near = cleave_common::options::did_you_mean(
                name,
                self.health.iter().map(|health| health.name.as_str()),
            );
            return Err(ControlError::not_found(format!("there is no device '{name}'{near}")));
        };
        if let Some(socket) = &health.socket {
            return Err(ControlError::new(format!(
                "someone else runs the daemon of '{name}', at {}: restart it where it was started",
                socket.display()
            )));
        }
        self.daemons.restart(slot).map_err(|reason| ControlError::new(format!("'{name}': {reason}")))
    }
}

fn cpu(vcpu: &VcpuHandle) -> Cpu {
    let index = vcpu.index();
    Cpu {
        cpu_index: index,
        qom_path: format!("/machine/vcpu{index}"),
        thread_id: vcpu.thread_id(),
        target: "x86_64",
    }
}
