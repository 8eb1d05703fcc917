//! `--disk` and `--device`: the two ways a device comes to the machine. A disk is a daemon that we start; a device
//! is a daemon that someone else runs.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use cleave_common::cpus::CpuList;
use cleave_common::options;
use cleave_common::throttle::ThrottleConfig;
use cleave_common::virtio::DeviceType;
use serde::{Deserialize, Deserializer};

/// `--disk PATH[,format=raw|qcow2][,readonly=on][,queues=N][,cache=none|writeback|writethrough][,serial=S][,id=ID]`, and
/// `[,restart=always|on-failure|never][,restart-limit=N][,io-timeout=30s][,on-full=error|pause][,poll-us=N][,cpus=LIST][,throttle.KEY=N...]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskConfig {
    pub path: PathBuf,
    #[serde(default)]
    pub format: DiskFormat,
    #[serde(default)]
    pub readonly: bool,
    /// Virtqueues; as many as there are vCPUs, up to [`DiskConfig::DEFAULT_QUEUES`], if absent.
    pub queues: Option<u16>,
    #[serde(default)]
    pub cache: CacheMode,
    /// What the guest reads as the disk's serial number, at most 20 bytes.
    pub serial: Option<String>,
    pub id: Option<String>,
    #[serde(default)]
    pub restart: Restart,
    /// How often its daemon is started again at most, in the machine's life; without end if absent.
    pub restart_limit: Option<u32>,
    /// A daemon that answers and completes no request of a queue for so long is ended and started again; none is if absent.
    pub io_timeout: Option<TimeSpan>,
    #[serde(default)]
    pub on_full: OnFull,
    /// How long the daemon may look for work before it sleeps, in microseconds; it does not look if absent.
    pub poll_us: Option<u32>,
    /// Host CPUs for the daemon's queues, in turn.
    pub cpus: Option<CpuList>,
    #[serde(default)]
    pub throttle: ThrottleConfig,
}

impl DiskConfig {
    pub const MAX_QUEUES: u16 = 64;
    pub const DEFAULT_QUEUES: u16 = 4;
    /// A healthy disk may well take less time than this to come back from its own recovery.
    pub const LEAST_IO_TIMEOUT: Duration = Duration::from_secs(1);
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    #[default]
    Raw,
    Qcow2,
}

/// What becomes of a write that finds no room on the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFull {
    /// It fails.
    #[default]
    Error,
    /// It waits.
    Pause,
}

/// Whether a daemon of ours that ends is started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    #[default]
    Always,
    /// Unless it ended with exit code 0.
    OnFailure,
    Never,
}

/// A limit of what never happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "restart-limit={0} says how often a daemon is started again, and restart=never that it never is: leave one of them out"
)]
pub struct RestartLimitError(u32);

impl Restart {
    pub(super) fn check_limit(self, limit: Option<u32>) -> Result<(), RestartLimitError> {
        match (self, limit) {
            (Self::Never, Some(limit)) => Err(RestartLimitError(limit)),
            _ => Ok(()),
        }
    }
}

/// What stands between the guest's writes and the medium.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// O_DIRECT: the host's page cache is not used. The daemon refuses where the file system has it not.
    None,
    #[default]
    Writeback,
    Writethrough,
}

/// `--device type=block,socket=PATH[,wait=30s][,queues=N][,id=ID]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DeviceConfig {
    pub r#type: DeviceType,
    pub socket: PathBuf,
    #[serde(default = "DeviceConfig::default_wait")]
    pub wait: TimeSpan,
    /// Virtqueues, for a daemon that cannot say how many it has (no VHOST_USER_PROTOCOL_F_MQ).
    pub queues: Option<u16>,
    pub id: Option<String>,
}

impl DeviceConfig {
    /// The index of a virtqueue has 8 bits in vhost-user.
    pub const MAX_QUEUES: u16 = 256;

    /// How long to wait for a daemon to come up before the machine is given up.
    pub(super) fn default_wait() -> TimeSpan {
        TimeSpan(Duration::from_secs(30))
    }
}

/// A time as people write it: `30s`, `2min`, `0s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeSpan(pub Duration);

impl FromStr for TimeSpan {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let duration: Result<humantime::Duration, _> = text.parse();
        duration
            .map(|duration| Self(duration.into()))
            .map_err(|_| format!("'{text}' is no time span: write it as 30s, 500ms or 2min"))
    }
}

impl<'de> Deserialize<'de> for TimeSpan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        options::from_word(deserializer)
    }
}
