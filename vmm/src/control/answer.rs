//! What a machine says: answers to commands, and notices of what happens. Their JSON is QMP's, under QMP's names where it
//! has them.

use serde::Serialize;
use serde_json::{Value, json};

/// Whether the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    Running,
    Paused,
}

/// A vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cpu {
    pub cpu_index: usize,
    pub qom_path: String,
    /// Its thread, as the host's kernel numbers it.
    pub thread_id: i32,
    pub target: &'static str,
}

/// A device, and how it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceInfo {
    pub name: String,
    /// starting, connected, lost, reconnecting or failed.
    pub state: &'static str,
    /// Milliseconds since it went over to that state.
    pub since_ms: u64,
    pub restarts: u32,
    /// Requests that were in flight when a daemon was lost, and were given to its successor.
    pub replayed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// Of a daemon that is ours, while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Where a daemon that someone else runs listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

/// What comes of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Done,
    Status(RunState),
    /// The machine's, if it was given one.
    Name(Option<String>),
    Cpus(Vec<Cpu>),
    Devices(Vec<DeviceInfo>),
}

impl Answer {
    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Done => json!({}),
            Self::Status(state) => json!({"status": state, "running": *state == RunState::Running}),
            Self::Name(Some(name)) => json!({"name": name}),
            Self::Name(None) => json!({}),
            Self::Cpus(cpus) => json!(cpus),
            Self::Devices(devices) => json!(devices),
        }
    }
}

/// What happens by itself, or by somebody else's command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// The vCPUs have paused.
    Stop,
    Resume,
    /// The power button was pressed.
    PowerDown,
    /// `guest`: the guest did it, and nobody outside.
    Reset {
        guest: bool,
        reason: &'static str,
    },
    /// The machine ends.
    Shutdown {
        guest: bool,
        reason: &'static str,
    },
    DeviceLost {
        device: String,
        reason: String,
    },
    DeviceRecovered {
        device: String,
        /// Milliseconds without a daemon.
        downtime_ms: u64,
        replayed: u64,
    },
}

/// Every event there is, by its name, with the members of its data.
pub(super) const EVENTS: &[(&str, &[(&str, &str)])] = &[
    ("STOP", &[]),
    ("RESUME", &[]),
    ("POWERDOWN", &[]),
    ("RESET", &[("guest", "bool"), ("reason", "str")]),
    ("SHUTDOWN", &[("guest", "bool"), ("reason", "str")]),
    ("X_CLEAVE_DEVICE_LOST", &[("device", "str"), ("reason", "str")]),
    ("X_CLEAVE_DEVICE_RECOVERED", &[("device", "str"), ("downtime-ms", "int"), ("replayed", "int")]),
];

impl Notice {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Stop => "STOP",
            Self::Resume => "RESUME",
            Self::PowerDown => "POWERDOWN",
            Self::Reset { .. } => "RESET",
            Self::Shutdown { .. } => "SHUTDOWN",
            Self::DeviceLost { .. } => "X_CLEAVE_DEVICE_LOST",
            Self::DeviceRecovered { .. } => "X_CLEAVE_DEVICE_RECOVERED",
        }
    }

    pub(super) fn data(&self) -> Option<Value> {
        match self {
            Self::Stop | Self::Resume | Self::PowerDown => None,
            Self::Reset { guest, reason } | Self::Shutdown { guest, reason } => {
                Some(json!({"guest": guest, "reason": reason}))
            }
            Self::DeviceLost { device, reason } => Some(json!({"device": device, "reason": reason})),
            Self::DeviceRecovered { device, downtime_ms, replayed } => {
                Some(json!({"device": device, "downtime-ms": downtime_ms, "replayed": replayed}))
            }
        }
    }
}
