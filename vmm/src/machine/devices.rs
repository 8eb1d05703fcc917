//! The machine's part in its devices' daemons: what it makes of their coming and going, and what it says of it.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Machine;
use super::event::{Event, SlotIndex};
use super::health::{DeviceState, span};
use super::supervise::{Ended, Started, Stillborn};
use crate::control::Notice;
use crate::daemon::{Daemon, DaemonError, Decision};
use crate::virtio::DeviceEvent;

impl Machine {
    pub(super) fn hear_device(&mut self, slot: SlotIndex, event: DeviceEvent) {
        let device = self.health.device(slot);
        let name = device.name.clone();
        match event {
            DeviceEvent::Running => {
                tracing::debug!("device {name} runs");
                device.needs_reset = false;
                device.has_daemon = true;
                device.enter(DeviceState::Connected);
            }
            DeviceEvent::Lost { serial, reason } => {
                tracing::warn!("device {name} is lost: {reason}; the machine goes on");
                self.operator.notify(Notice::DeviceLost { device: name, reason: reason.clone() });
                device.has_daemon = false;
                // Why it failed says more than what followed from it, and so does how its daemon ended.
                if device.state != DeviceState::Failed && !device.has_ended(serial) {
                    device.enter(DeviceState::Lost);
                    device.last_error = Some(reason);
                }
                self.daemons.force(slot, serial);
            }
            DeviceEvent::Reconnected { after, replayed } => {
                let downtime_ms = after.as_millis() as u64;
                let after = span(after);
                tracing::warn!("device {name} is back after {after}; {}", submitted_again(replayed));
                device.replayed += replayed;
                device.has_daemon = true;
                if !device.needs_reset {
                    device.enter(DeviceState::Connected);
                }
                self.operator.notify(Notice::DeviceRecovered { device: name, downtime_ms, replayed });
            }
            DeviceEvent::AttemptFailed { serial, reason, absent } => {
                if absent {
                    tracing::info!("device {name}: {reason}");
                } else {
                    tracing::warn!("device {name} is not back: {reason}; it is tried again");
                }
                if device.state != DeviceState::Failed {
                    device.enter(DeviceState::Reconnecting);
                    device.last_error = Some(reason);
                }
                self.daemons.force(slot, serial);
            }
            DeviceEvent::NeedsReset { reason } => {
                tracing::error!("device {name} needs a reset by the guest's driver: {reason}");
                device.needs_reset = true;
                device.fail(reason);
            }
            DeviceEvent::Reset => device.mend(),
            DeviceEvent::Refused { reason } => {
                tracing::error!("the driver of device {name} set it up in a way that cannot be: {reason}");
            }
        }
    }

    /// Takes leave of the daemons that have ended and starts those that are due.
    pub(super) fn look_after_daemons(&mut self) {
        for ended in self.daemons.reap() {
            self.hear_end(ended);
        }
        for stillborn in self.daemons.start_due(&self.queue.sender()) {
            self.hear_stillborn(&stillborn);
        }
    }

    pub(super) fn hear_spawned(
        &mut self,
        slot: SlotIndex,
        result: Result<Box<(Daemon, UnixStream)>, DaemonError>,
    ) {
        match self.daemons.spawned(slot, result) {
            Some(Ok(started)) => self.introduce(started),
            Some(Err(stillborn)) => self.hear_stillborn(&stillborn),
            None => {}
        }
    }

    fn hear_end(&mut self, Ended { slot, exit, decision }: Ended) {
        let device = self.health.device(slot);
        device.pid = None;
        device.has_daemon = false;
        if device.state == DeviceState::Connected {
            device.enter(DeviceState::Lost);
        }
        if device.state != DeviceState::Failed {
            device.last_error = Some(exit.to_string());
        }
        match decision {
            Decision::Restart(pause) if pause.is_zero() => tracing::warn!("{exit}; it is started again"),
            Decision::Restart(pause) => {
                tracing::warn!("{exit}; it is started again in {}", span(pause));
            }
            Decision::GiveUp(why) => {
                tracing::error!("{exit}; {why}: the machine goes on without its device");
                device.give_up(format!("{exit}; {why}"));
            }
        }
    }

    fn introduce(&mut self, Started { slot, pid, successor }: Started) {
        let device = self.health.device(slot);
        device.pid = Some(pid);
        device.restarts = successor.serial;
        if !device.needs_reset {
            device.enter(DeviceState::Reconnecting);
        }
        self.devices[slot.0].reconnect(successor);
    }

    fn hear_stillborn(&mut self, Stillborn { slot, error, decision }: &Stillborn) {
        let device = self.health.device(*slot);
        let error = cleave_common::exit::one_line(error);
        match decision {
            Decision::Restart(pause) => {
                tracing::warn!("device {} is not back: {error}; again in {}", device.name, span(*pause));
                device.last_error = Some(error);
            }
            Decision::GiveUp(why) => {
                tracing::error!("{error}; {why}: the machine goes on without device {}", device.name);
                device.give_up(format!("{error}; {why}"));
            }
        }
    }

    /// Waits until the devices are reset, no longer than to `deadline`. A daemon that hangs is killed on the way.
    pub(super) fn await_devices(&mut self, deadline: Instant) {
        loop {
            for event in self.queue.take() {
                match event {
                    Event::DevicesReset => return,
                    Event::Device { slot, event } => self.hear_device(slot, event),
                    // One that has just come up is ended with the others, who are asked to leave before they are killed.
                    Event::Spawned { slot, result } => drop(self.daemons.spawned(slot, result)),
                    _ => {}
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let timeout = Timespec::try_from(left).ok();
            let wake = self.queue.wake();
            // A signal or a failure only means one look too many.
            let _ = poll(&mut [PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN)], timeout.as_ref());
        }
    }
}

fn submitted_again(requests: u64) -> String {
    match requests {
        0 => "nothing was in flight".to_owned(),
        1 => "1 request that was in flight is submitted again".to_owned(),
        many => format!("{many} requests that were in flight are submitted again"),
    }
}
