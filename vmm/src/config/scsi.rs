//! `--scsi`, `--cdrom` and `--scsi-controller`: one SCSI host adapter (virtio 1.2, 5.6) with all disks and CD-ROM drives,
//! served by a daemon that we start.

use std::ffi::OsString;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cleave_common::cpus::CpuList;
use cleave_common::throttle::{ThrottleConfig, ThrottleError};
use serde::Deserialize;

use super::device::{CacheMode, DiskFormat, OnFull, Restart, RestartLimitError};

/// `--scsi disk=PATH[,lun=N][,target=N][,format=raw|qcow2][,readonly=on][,cache=none|writeback|writethrough][,serial=S]
/// [,product=S][,wwn=N][,on-full=error|pause][,throttle.KEY=N...]`: the keys of `cleave-scsi --lun`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ScsiDisk {
    pub disk: PathBuf,
    pub lun: Option<u16>,
    pub target: Option<u8>,
    #[serde(default)]
    pub format: DiskFormat,
    #[serde(default)]
    pub readonly: bool,
    #[serde(default)]
    pub cache: CacheMode,
    pub serial: Option<String>,
    pub product: Option<String>,
    pub wwn: Option<String>,
    #[serde(default)]
    pub on_full: OnFull,
    #[serde(default)]
    pub throttle: ThrottleConfig,
}

/// `--cdrom PATH|none[,lun=N][,target=N][,serial=S][,wwn=N]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Cdrom {
    /// An empty drive if absent.
    pub path: Option<PathBuf>,
    pub lun: Option<u16>,
    pub target: Option<u8>,
    pub serial: Option<String>,
    pub wwn: Option<String>,
}

/// `--scsi-controller [queues=N][,control=PATH][,state=PATH][,poll-us=N][,cpus=LIST][,restart=...][,restart-limit=N][,id=ID]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ScsiController {
    /// Request queues; as many as there are vCPUs, up to [`super::DiskConfig::DEFAULT_QUEUES`], if absent.
    pub queues: Option<u16>,
    /// Where the daemon takes commands.
    pub control: Option<PathBuf>,
    /// Where it keeps what its successor has to know.
    pub state: Option<PathBuf>,
    pub poll_us: Option<u32>,
    pub cpus: Option<CpuList>,
    #[serde(default)]
    pub restart: Restart,
    pub restart_limit: Option<u32>,
    pub id: Option<String>,
}

/// An adapter that can be planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScsiAdapter {
    pub disks: Vec<ScsiDisk>,
    pub cdroms: Vec<Cdrom>,
    pub controller: ScsiController,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScsiError {
    #[error("--scsi {disk}: throttle: {source}", disk = .disk.display())]
    Throttle { disk: PathBuf, source: ThrottleError },
    #[error("--scsi disk=: the path is empty")]
    EmptyPath,
    #[error("--scsi-controller: {0}")]
    RestartLimit(#[from] RestartLimitError),
    #[error("--scsi-controller: queues={0}: it has 1 to {max} request queues", max = ScsiAdapter::MAX_QUEUES)]
    Queues(u16),
}

impl ScsiAdapter {
    pub const MAX_QUEUES: u16 = 62;

    /// The adapter that is asked for, if one is.
    pub fn new(
        disks: Vec<ScsiDisk>,
        cdroms: Vec<Cdrom>,
        controller: Option<ScsiController>,
    ) -> Result<Option<Self>, ScsiError> {
        if disks.is_empty() && cdroms.is_empty() && controller.is_none() {
            return Ok(None);
        }
        for disk in &disks {
            let refused = |source| ScsiError::Throttle { disk: disk.disk.clone(), source };
            disk.throttle.validate().map_err(refused)?;
            if disk.disk.as_os_str().is_empty() {
                return Err(ScsiError::EmptyPath);
            }
        }
        let controller = controller.unwrap_or_default();
        controller.restart.check_limit(controller.restart_limit)?;
        if let Some(queues) = controller.queues.filter(|queues| !(1..=Self::MAX_QUEUES).contains(queues)) {
            return Err(ScsiError::Queues(queues));
        }
        Ok(Some(Self { disks, cdroms, controller }))
    }

    /// What messages call the device.
    pub fn name(&self) -> String {
        self.controller.id.clone().unwrap_or_else(|| "scsi0".to_owned())
    }

    /// Those that it is to write.
    pub fn written_images(&self) -> impl Iterator<Item = &PathBuf> {
        self.disks.iter().filter(|disk| !disk.readonly).map(|disk| &disk.disk)
    }
}

/// Words of the option grammar.
#[derive(Default)]
struct Words(OsString);

impl Words {
    fn key(&mut self, key: &str) {
        if !self.0.is_empty() {
            self.0.push(",");
        }
        self.0.push(key);
        self.0.push("=");
    }

    fn path(&mut self, key: &str, path: &Path) {
        self.key(key);
        for (at, part) in path.as_os_str().as_bytes().split(|byte| *byte == b',').enumerate() {
            self.0.push(if at == 0 { "" } else { ",," });
            self.0.push(std::ffi::OsStr::from_bytes(part));
        }
    }

    fn text(&mut self, key: &str, text: Option<&str>) {
        if let Some(text) = text {
            self.path(key, Path::new(text));
        }
    }

    fn number(&mut self, key: &str, number: Option<u16>) {
        self.text(key, number.map(|number| number.to_string()).as_deref());
    }
}

impl ScsiDisk {
    /// As `cleave-scsi --lun` reads it.
    pub fn words(&self) -> OsString {
        let mut words = Words::default();
        words.path("disk", &self.disk);
        words.number("lun", self.lun);
        words.number("target", self.target.map(u16::from));
        let format = match self.format {
            DiskFormat::Raw => None,
            DiskFormat::Qcow2 => Some("qcow2"),
        };
        words.text("format", format);
        words.text("readonly", self.readonly.then_some("on"));
        let cache = match self.cache {
            CacheMode::Writeback => None,
            CacheMode::None => Some("none"),
            CacheMode::Writethrough => Some("writethrough"),
        };
        words.text("cache", cache);
        words.text("serial", self.serial.as_deref());
        words.text("product", self.product.as_deref());
        words.text("wwn", self.wwn.as_deref());
        words.text("on-full", (self.on_full == OnFull::Pause).then_some("pause"));
        let mut throttle = String::new();
        // It is written as keys and values itself.
        let _ = write!(throttle, "{}", self.throttle);
        for pair in throttle.split(',').filter(|pair| !pair.is_empty()) {
            words.0.push(format!(",throttle.{pair}"));
        }
        words.0
    }
}

impl Cdrom {
    /// As `cleave-scsi --cdrom` reads it.
    pub fn words(&self) -> OsString {
        let mut words = Words::default();
        words.path("path", self.path.as_deref().unwrap_or(Path::new("none")));
        words.number("lun", self.lun);
        words.number("target", self.target.map(u16::from));
        words.text("serial", self.serial.as_deref());
        words.text("wwn", self.wwn.as_deref());
        words.0
    }
}

#[cfg(test)]
mod tests {
    use cleave_common::options;

    use super::*;

    #[test]
    fn what_is_written_for_the_daemon_is_what_was_read() {
        for (text, written) in [
            ("disk=a.raw", "disk=a.raw"),
            (
                "disk=a,,b,lun=3,target=1,format=qcow2,readonly=on,cache=none,serial=S 1,wwn=0x5,on-full=pause,throttle.iops-total=7,throttle.bps-read=1M",
                "disk=a,,b,lun=3,target=1,format=qcow2,readonly=on,cache=none,serial=S 1,wwn=0x5,on-full=pause,throttle.iops-total=7,throttle.bps-read=1048576",
            ),
        ] {
            let disk: ScsiDisk = options::parse(text, None).unwrap();
            assert_eq!(disk.words(), written);
            let again: ScsiDisk = options::parse(disk.words().to_str().unwrap(), None).unwrap();
            assert_eq!(again, disk);
        }
        let cdrom: Cdrom = options::parse("x.iso,lun=2", Some("path")).unwrap();
        assert_eq!(cdrom.words(), "path=x.iso,lun=2");
        assert_eq!(Cdrom::default().words(), "path=none");
    }

    #[test]
    fn an_adapter_is_there_if_anything_asks_for_it() {
        assert_eq!(ScsiAdapter::new(vec![], vec![], None), Ok(None));
        let adapter = ScsiAdapter::new(vec![], vec![Cdrom::default()], None).unwrap().unwrap();
        assert_eq!(adapter.name(), "scsi0");
        let controller = ScsiController { queues: Some(0), ..ScsiController::default() };
        assert_eq!(ScsiAdapter::new(vec![], vec![], Some(controller)), Err(ScsiError::Queues(0)));
    }
}
