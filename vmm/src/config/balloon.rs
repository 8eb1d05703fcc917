//! `--balloon`: a memory balloon (virtio 1.2, 5.5) whose daemon we start.

use std::path::PathBuf;

use cleave_common::options;
use cleave_common::size::ByteSize;
use serde::{Deserialize, Deserializer};

use super::device::{Restart, RestartLimitError, TimeSpan};

/// `--balloon [on|off][,target=SIZE][,min=SIZE][,auto=on,free=SIZE][,stats=5s][,reporting=off][,control=PATH][,restart=...][,id=ID]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BalloonConfig {
    /// The word in front, where there is one.
    pub kind: Option<BalloonKind>,
    /// What the guest has at first; all of its memory if absent.
    pub target: Option<ByteSize>,
    /// What it is left in any case.
    pub min: Option<ByteSize>,
    /// Whether its available memory is kept near `free`.
    #[serde(default)]
    pub auto: bool,
    pub free: Option<ByteSize>,
    /// How often the guest is asked for statistics.
    pub stats: Option<TimeSpan>,
    /// Whether what the guest reports free goes back to the host.
    pub reporting: Option<bool>,
    /// Where the daemon takes commands.
    pub control: Option<PathBuf>,
    #[serde(default)]
    pub restart: Restart,
    pub restart_limit: Option<u32>,
    pub id: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalloonKind {
    On,
    /// Also not the one that was asked for before.
    Off,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BalloonError {
    #[error("'off' stands alone: it takes nothing else")]
    NotAlone,
    #[error("auto=on takes free=SIZE: what the guest is to have available")]
    NoMark,
    #[error("free= is for auto=on")]
    MarkWithoutAuto,
    #[error("auto=on sets the target itself: leave target= out")]
    TargetWithAuto,
    #[error("target={target} is more than the guest's memory, {memory}")]
    TargetTooLarge { target: ByteSize, memory: ByteSize },
    #[error("target={target} is less than min={min}, which the guest is left in any case")]
    TargetTooSmall { target: ByteSize, min: ByteSize },
    #[error("{key}={size} is more than the guest's memory, {memory}")]
    TooLarge { key: &'static str, size: ByteSize, memory: ByteSize },
    #[error("stats=: a guest is asked every 100ms at most")]
    Stats,
    #[error(transparent)]
    RestartLimit(#[from] RestartLimitError),
}

impl BalloonConfig {
    /// What the guest is left unless `min=` says otherwise, as far as it has so much.
    pub const DEFAULT_MIN: ByteSize = ByteSize(128 << 20);

    const LEAST_STATS: std::time::Duration = std::time::Duration::from_millis(100);

    /// What messages call the device.
    pub fn name(&self) -> String {
        self.id.clone().unwrap_or_else(|| "balloon0".to_owned())
    }

    pub fn is_off(&self) -> bool {
        self.kind == Some(BalloonKind::Off)
    }

    /// Judges it for a guest with `memory`.
    pub(super) fn validate(&self, memory: ByteSize) -> Result<(), BalloonError> {
        if self.is_off() {
            let alone = *self == Self { kind: self.kind, ..Self::default() };
            return if alone { Ok(()) } else { Err(BalloonError::NotAlone) };
        }
        match (self.auto, self.free, self.target) {
            (true, None, _) => return Err(BalloonError::NoMark),
            (false, Some(_), _) => return Err(BalloonError::MarkWithoutAuto),
            (true, _, Some(_)) => return Err(BalloonError::TargetWithAuto),
            _ => {}
        }
        for (key, size) in [("min", self.min), ("free", self.free)] {
            if let Some(size) = size.filter(|size| *size > memory) {
                return Err(BalloonError::TooLarge { key, size, memory });
            }
        }
        if let Some(target) = self.target {
            let min = self.min.unwrap_or(Self::DEFAULT_MIN).min(memory);
            if target > memory {
                return Err(BalloonError::TargetTooLarge { target, memory });
            } else if target < min {
                return Err(BalloonError::TargetTooSmall { target, min });
            }
        }
        if self.stats.is_some_and(|TimeSpan(every)| !every.is_zero() && every < Self::LEAST_STATS) {
            return Err(BalloonError::Stats);
        }
        Ok(self.restart.check_limit(self.restart_limit)?)
    }
}

/// In a file: `balloon = "on"` or a table.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<BalloonConfig>, D::Error> {
    options::table_or_text(deserializer, Some("kind")).map(Some)
}
