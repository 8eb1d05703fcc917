//! What a machine is to be: typed, validated, without I/O.
//!
//! [`Settings`] is what a person said, on the command line and in a configuration file; both are the same struct,
//! so there is one name for everything. [`Settings::validate`] makes a [`MachineConfig`] of it, in which nothing is
//! missing and everything that can be judged without touching the host holds.

mod device;
mod memory;
mod uart;

use std::path::PathBuf;

use serde::Deserialize;

pub use device::{CacheMode, DeviceConfig, DiskConfig, DiskFormat, Restart};
pub use memory::{Backing, MemoryConfig};
pub use uart::UartConfig;

/// The most vCPUs a machine can have.
pub const MAX_VCPUS: u8 = 64;

/// Devices on the root bus: 32 slots less the host bridge.
pub const MAX_DEVICES: usize = 31;

const DEFAULT_APPEND: &str = "console=ttyS0";

/// What was asked for, where nothing need have been.
#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Settings {
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub append: Option<String>,
    pub cpus: Option<u8>,
    #[serde(default, deserialize_with = "memory::deserialize")]
    pub memory: Option<MemoryConfig>,
    pub uart: Option<UartConfig>,
    #[serde(default)]
    pub disk: Vec<DiskConfig>,
    #[serde(default)]
    pub device: Vec<DeviceConfig>,
}

/// A machine that can be planned.
#[derive(Debug, Clone, PartialEq)]
pub struct MachineConfig {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// The kernel command line.
    pub append: String,
    /// 1 to [`MAX_VCPUS`].
    pub cpus: u8,
    pub memory: MemoryConfig,
    pub uart: UartConfig,
    pub disks: Vec<DiskConfig>,
    pub devices: Vec<DeviceConfig>,
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ConfigError {
    #[error("no kernel is given; use --kernel PATH (a bzImage or an ELF vmlinux)")]
    NoKernel,
    #[error("--cpus {0}: a machine has 1 to {MAX_VCPUS} vCPUs")]
    Cpus(u8),
    #[error("--memory: {0}")]
    Memory(#[from] memory::MemoryConfigError),
    #[error("--disk {path}: queues={queues}: a disk has 1 to {max} queues", path = .path.display(), max = DiskConfig::MAX_QUEUES)]
    DiskQueues { path: PathBuf, queues: u16 },
    #[error("{0} devices are asked for, the PCI bus has room for {MAX_DEVICES}")]
    TooManyDevices(usize),
    #[error("two devices are named '{0}'; give each its own id=")]
    DuplicateId(String),
    #[error("the disk {path} is given twice, and not both times readonly=on: a second writer would destroy it", path = .0.display())]
    DuplicateDisk(PathBuf),
}

impl Settings {
    /// These settings with `over` on top: its single values replace ours, its disks and devices come after ours.
    pub fn overridden_by(mut self, over: Self) -> Self {
        self.disk.extend(over.disk);
        self.device.extend(over.device);
        Self {
            kernel: over.kernel.or(self.kernel),
            initrd: over.initrd.or(self.initrd),
            append: over.append.or(self.append),
            cpus: over.cpus.or(self.cpus),
            memory: over.memory.or(self.memory),
            uart: over.uart.or(self.uart),
            disk: self.disk,
            device: self.device,
        }
    }

    pub fn validate(self) -> Result<MachineConfig, ConfigError> {
        let cpus = self.cpus.unwrap_or(1);
        if !(1..=MAX_VCPUS).contains(&cpus) {
            return Err(ConfigError::Cpus(cpus));
        }
        let memory = self.memory.unwrap_or_default();
        memory.validate()?;
        check_disks(&self.disk)?;
        check_devices(&self.disk, &self.device)?;
        Ok(MachineConfig {
            kernel: self.kernel.ok_or(ConfigError::NoKernel)?,
            initrd: self.initrd,
            append: self.append.unwrap_or_else(|| DEFAULT_APPEND.to_owned()),
            cpus,
            memory,
            uart: self.uart.unwrap_or_default(),
            disks: self.disk,
            devices: self.device,
        })
    }
}

fn check_disks(disks: &[DiskConfig]) -> Result<(), ConfigError> {
    for (at, disk) in disks.iter().enumerate() {
        if let Some(queues) = disk.queues
            && !(1..=DiskConfig::MAX_QUEUES).contains(&queues)
        {
            return Err(ConfigError::DiskQueues { path: disk.path.clone(), queues });
        }
        let shares = |other: &DiskConfig| other.path == disk.path && !(other.readonly && disk.readonly);
        if disks[at + 1..].iter().any(shares) {
            return Err(ConfigError::DuplicateDisk(disk.path.clone()));
        }
    }
    Ok(())
}

fn check_devices(disks: &[DiskConfig], devices: &[DeviceConfig]) -> Result<(), ConfigError> {
    let count = disks.len() + devices.len();
    if count > MAX_DEVICES {
        return Err(ConfigError::TooManyDevices(count));
    }
    let mut ids: Vec<&str> = disks
        .iter()
        .filter_map(|d| d.id.as_deref())
        .chain(devices.iter().filter_map(|d| d.id.as_deref()))
        .collect();
    ids.sort_unstable();
    match ids.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(ConfigError::DuplicateId(pair[0].to_owned())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
