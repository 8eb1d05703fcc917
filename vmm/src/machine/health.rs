//! How each device is, for people and for whoever controls the machine.
//!
//! ```text
//!   Starting ──> Connected ──> Lost ──> Reconnecting ──> Connected
//!                    │           └──────────┴──> Failed: its daemon is not started again
//!                    └──> Failed: the driver has to reset it ──> Connected
//! ```
//!
//! Invariant: the machine thread alone writes these records, from the events it handles.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::event::SlotIndex;
use crate::plan::{Backend, SlotPlan};

/// Where a device is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// Its daemon has not answered yet.
    Starting,
    Connected,
    /// Its daemon is gone or hangs.
    Lost,
    /// There is no other daemon yet, or it has not answered, or it will not do.
    Reconnecting,
    /// It does not come back by itself; `last_error` says why.
    Failed,
}

impl DeviceState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Connected => "connected",
            Self::Lost => "lost",
            Self::Reconnecting => "reconnecting",
            Self::Failed => "failed",
        }
    }
}

/// One device's record.
#[derive(Debug, Clone)]
pub struct Health {
    pub name: String,
    pub state: DeviceState,
    pub since: Instant,
    /// How often its daemon was started again.
    pub restarts: u32,
    /// Requests that were in flight when a daemon was lost, and were given to its successor.
    pub replayed: u64,
    pub last_error: Option<String>,
    /// What its driver runs is gone, and its daemon may be there: it waits for a reset by the driver.
    pub needs_reset: bool,
    /// A daemon has come back since the last loss.
    pub has_daemon: bool,
    /// Of a daemon that is ours, while it runs.
    pub pid: Option<u32>,
    /// Where a daemon that someone else runs listens.
    pub socket: Option<PathBuf>,
}

impl Health {
    fn new(slot: &SlotPlan) -> Self {
        let socket = match &slot.backend {
            Backend::Spawn(_) => None,
            Backend::Attach { socket, .. } => Some(socket.clone()),
        };
        Self {
            name: slot.name.clone(),
            state: DeviceState::Starting,
            since: Instant::now(),
            restarts: 0,
            replayed: 0,
            last_error: None,
            needs_reset: false,
            has_daemon: false,
            pid: None,
            socket,
        }
    }

    /// Whether its daemon of this serial, one of ours, is known to have ended: the machine may hear of that before the
    /// session tells that its connection is closed.
    pub fn has_ended(&self, serial: u32) -> bool {
        self.socket.is_none() && (self.pid.is_none() || self.restarts != serial)
    }

    /// Goes over to `state`; one that it is in already goes on.
    pub fn enter(&mut self, state: DeviceState) {
        if self.state != state {
            self.state = state;
            self.since = Instant::now();
        }
    }

    pub fn fail(&mut self, error: impl fmt::Display) {
        self.enter(DeviceState::Failed);
        self.last_error = Some(error.to_string());
    }

    /// Its daemon is not started again: no reset helps.
    pub fn give_up(&mut self, error: impl fmt::Display) {
        self.needs_reset = false;
        self.fail(error);
    }

    /// The reset that it waited for has come; it may have no driver from now on.
    pub fn mend(&mut self) {
        if std::mem::take(&mut self.needs_reset) {
            self.enter(if self.has_daemon { DeviceState::Connected } else { DeviceState::Reconnecting });
        }
    }

    fn columns(&self, now: Instant) -> [String; 7] {
        let dash = || "-".to_owned();
        let daemon = match (&self.socket, self.pid) {
            (Some(socket), _) => socket.display().to_string(),
            (None, Some(pid)) => format!("pid {pid}"),
            (None, None) => dash(),
        };
        [
            self.name.clone(),
            self.state.name().to_owned(),
            span(now.saturating_duration_since(self.since)),
            self.restarts.to_string(),
            self.replayed.to_string(),
            daemon,
            self.last_error.clone().unwrap_or_else(dash),
        ]
    }
}

/// A time for a person: whole seconds, tenths below ten.
pub fn span(time: Duration) -> String {
    match time {
        time if time < Duration::from_secs(1) => format!("{}ms", time.as_millis()),
        time if time < Duration::from_secs(10) => format!("{:.1}s", time.as_secs_f64()),
        time => humantime::format_duration(Duration::from_secs(time.as_secs())).to_string(),
    }
}

/// The records, by slot.
pub struct HealthTable(Vec<Health>);

impl HealthTable {
    pub fn new(slots: &[SlotPlan]) -> Self {
        Self(slots.iter().map(Health::new).collect())
    }

    /// By slot.
    pub fn iter(&self) -> impl Iterator<Item = &Health> {
        self.0.iter()
    }

    /// The device of this name.
    pub fn find(&self, name: &str) -> Option<(SlotIndex, &Health)> {
        let mut devices = self.0.iter().enumerate().map(|(at, health)| (SlotIndex(at), health));
        devices.find(|(_, health)| health.name == name)
    }

    /// # Panics
    /// If the slot is not of the plan that this was made for.
    pub fn device(&mut self, slot: SlotIndex) -> &mut Health {
        &mut self.0[slot.0]
    }
}

impl fmt::Display for HealthTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const TITLES: [&str; 7] =
            ["DEVICE", "STATE", "SINCE", "RESTARTS", "REPLAYED", "DAEMON", "LAST ERROR"];
        let now = Instant::now();
        let rows: Vec<_> = std::iter::once(TITLES.map(str::to_owned))
            .chain(self.0.iter().map(|device| device.columns(now)))
            .collect();
        let mut widths = [0; 7];
        for row in &rows {
            widths.iter_mut().zip(row).for_each(|(width, cell)| *width = (*width).max(cell.chars().count()));
        }
        for row in &rows {
            let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use cleave_common::virtio::DeviceType;

    use super::*;

    #[test]
    fn the_table_is_aligned_and_says_times_as_people_do() {
        let slot = |name: &str, socket: &str| SlotPlan {
            name: name.into(),
            device_type: DeviceType::BLOCK,
            device_number: 1,
            queues: None,
            backend: Backend::Attach { socket: socket.into(), wait: Duration::ZERO },
        };
        let mut table = HealthTable::new(&[slot("disk0", "/run/a"), slot("a-long-name", "/run/longer.sock")]);
        let device = table.device(SlotIndex(0));
        device.enter(DeviceState::Connected);
        device.restarts = 3;
        device.fail("the driver has to reset it");
        (device.needs_reset, device.has_daemon) = (true, true);
        device.mend();
        assert_eq!(device.state, DeviceState::Connected);
        assert!(!device.has_ended(3), "whether a daemon that someone else runs has ended cannot be known");
        (device.pid, device.socket) = (Some(7), None);
        assert!(!device.has_ended(3) && device.has_ended(2));
        (device.pid, device.socket) = (None, Some("/run/a".into()));
        device.needs_reset = true;
        device.give_up("no daemon listens");
        device.mend();
        let text = table.to_string();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("disk0        failed    "), "{text}");
        assert!(lines[1].ends_with("  no daemon listens"), "{text}");
        assert!(lines[2].starts_with("a-long-name  starting  "), "{text}");
        assert!(lines[2].ends_with("/run/longer.sock  -"), "{text}");
        let column = |line: &str, word: &str| line.find(word).unwrap();
        assert_eq!(column(lines[0], "DAEMON"), column(lines[1], "/run/a"), "{text}");
        let spans = [(5, "5ms"), (2345, "2.3s"), (61_500, "1m 1s"), (7_200_000, "2h")];
        spans.iter().for_each(|(ms, text)| assert_eq!(span(Duration::from_millis(*ms)), *text));
    }
}
