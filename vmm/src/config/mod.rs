//! What a machine is to be: typed, validated, without I/O.
//!
//! [`Settings`] is what a person said, on the command line and in a configuration file; both are the same struct,
//! so there is one name for everything. [`Settings::validate`] makes a [`MachineConfig`] of it, in which nothing is
//! missing and everything that can be judged without touching the host holds.

mod address;
mod balloon;
mod console;
mod device;
mod file;
mod memory;
mod net;
mod scsi;
mod uart;

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cleave_common::size::ByteSize;
use cleave_common::socket::MAX_PATH_LEN;
use cleave_common::throttle::ThrottleError;
use serde::Deserialize;

pub use address::ControlAddress;
pub use balloon::BalloonConfig;
pub use console::{ConsoleDevice, Port, parse as parse_port};
pub use device::{CacheMode, DeviceConfig, DiskConfig, DiskFormat, OnFull, Restart, TimeSpan};
pub use file::parse as parse_file;
pub use memory::{Backing, MemoryConfig, Thp};
pub use net::{NetConfig, NetDevice, NetPeer};
pub use scsi::{Cdrom, ScsiAdapter, ScsiController, ScsiDisk};
pub use uart::UartConfig;

/// The most vCPUs a machine can have.
pub const MAX_VCPUS: u8 = 64;

/// Devices on the root bus: 32 slots less the host bridge.
pub const MAX_DEVICES: usize = 31;

/// Bytes of a device's name.
const MAX_ID_LEN: usize = 32;

/// Bytes of a disk's serial number (virtio 1.2, 5.2.6: VIRTIO_BLK_ID_BYTES).
const MAX_SERIAL_LEN: usize = 20;

const DEFAULT_APPEND: &str = "console=ttyS0";

/// What was asked for, where nothing need have been.
#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Settings {
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub append: Option<String>,
    pub cpus: Option<u32>,
    #[serde(default, deserialize_with = "memory::deserialize")]
    pub memory: Option<MemoryConfig>,
    pub uart: Option<UartConfig>,
    #[serde(default)]
    pub console: Vec<Port>,
    #[serde(default)]
    pub serial: Vec<Port>,
    pub sandbox: Option<bool>,
    pub name: Option<String>,
    #[serde(default)]
    pub qmp: Vec<ControlAddress>,
    #[serde(default)]
    pub disk: Vec<DiskConfig>,
    #[serde(default)]
    pub net: Vec<NetConfig>,
    #[serde(default, deserialize_with = "balloon::deserialize")]
    pub balloon: Option<BalloonConfig>,
    #[serde(default)]
    pub scsi: Vec<ScsiDisk>,
    #[serde(default)]
    pub cdrom: Vec<Cdrom>,
    pub scsi_controller: Option<ScsiController>,
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
    /// Whether the process confines itself.
    pub sandbox: bool,
    pub name: Option<String>,
    pub qmp: Vec<ControlAddress>,
    pub disks: Vec<DiskConfig>,
    pub nets: Vec<NetDevice>,
    pub scsi: Option<ScsiAdapter>,
    pub console: Option<ConsoleDevice>,
    pub balloon: Option<BalloonConfig>,
    pub devices: Vec<DeviceConfig>,
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ConfigError {
    #[error("no kernel is given; use --kernel PATH (a bzImage or an ELF vmlinux)")]
    NoKernel,
    #[error("--cpus {0}: a machine has 1 to {MAX_VCPUS} vCPUs")]
    Cpus(u32),
    #[error("--memory: {0}")]
    Memory(#[from] memory::MemoryConfigError),
    #[error("--disk {path}: queues={queues}: a disk has 1 to {max} queues", path = .path.display(), max = DiskConfig::MAX_QUEUES)]
    DiskQueues { path: PathBuf, queues: u16 },
    #[error("--disk {path}: {source}", path = .path.display())]
    RestartLimit { path: PathBuf, source: device::RestartLimitError },
    #[error("--disk {path}: io-timeout=: {reason}", path = .path.display())]
    IoTimeout { path: PathBuf, reason: &'static str },
    #[error("--device {name}: queues={queues}: a device has 1 to {max} queues", max = DeviceConfig::MAX_QUEUES)]
    DeviceQueues { name: String, queues: u16 },
    #[error("--disk {path}: throttle: {source}", path = .path.display())]
    DiskThrottle { path: PathBuf, source: ThrottleError },
    #[error("--net: {0}")]
    Net(#[from] net::NetError),
    #[error(transparent)]
    Scsi(#[from] scsi::ScsiError),
    #[error(transparent)]
    Console(#[from] console::ConsoleError),
    #[error("--balloon: {0}")]
    Balloon(#[from] balloon::BalloonError),
    #[error("the tap device {0} is given twice: each network device needs one of its own")]
    DuplicateTap(String),
    #[error("{0} devices are asked for, the PCI bus has room for {MAX_DEVICES}")]
    TooManyDevices(usize),
    #[error(
        "id={0:?}: a device's name is 1 to {MAX_ID_LEN} letters, digits, '-', '_' and '.', and begins with a letter or a digit"
    )]
    Id(String),
    #[error("--disk {path}: serial={serial:?}: up to {MAX_SERIAL_LEN} bytes of printable ASCII are possible", path = .path.display())]
    Serial { path: PathBuf, serial: String },
    #[error("{option}{path}: {reason}", path = .path.display())]
    Socket { option: &'static str, path: PathBuf, reason: String },
    #[error(
        "--name {0:?}: a machine's name is 1 to {MAX_ID_LEN} letters, digits, '-', '_' and '.', and begins with a letter or a digit"
    )]
    Name(String),
    #[error("--disk path=: the path is empty")]
    EmptyDiskPath,
    #[error("two devices are named '{0}'; give each its own id=")]
    DuplicateId(String),
    #[error("the disk {path} is given twice, and not both times readonly=on: a second writer would destroy it", path = .0.display())]
    DuplicateDisk(PathBuf),
}

impl Settings {
    /// These settings with `over` on top: its single values replace ours, its disks and devices come after ours.
    pub fn overridden_by(mut self, over: Self) -> Self {
        self.qmp.extend(over.qmp);
        self.disk.extend(over.disk);
        self.net.extend(over.net);
        self.scsi.extend(over.scsi);
        self.cdrom.extend(over.cdrom);
        self.console.extend(over.console);
        self.serial.extend(over.serial);
        self.device.extend(over.device);
        Self {
            kernel: over.kernel.or(self.kernel),
            initrd: over.initrd.or(self.initrd),
            append: over.append.or(self.append),
            cpus: over.cpus.or(self.cpus),
            memory: over.memory.or(self.memory),
            uart: over.uart.or(self.uart),
            console: self.console,
            serial: self.serial,
            sandbox: over.sandbox.or(self.sandbox),
            name: over.name.or(self.name),
            qmp: self.qmp,
            disk: self.disk,
            net: self.net,
            scsi: self.scsi,
            cdrom: self.cdrom,
            scsi_controller: over.scsi_controller.or(self.scsi_controller),
            balloon: over.balloon.or(self.balloon),
            device: self.device,
        }
    }

    pub fn validate(self) -> Result<MachineConfig, ConfigError> {
        let asked = self.cpus.unwrap_or(1);
        let cpus = u8::try_from(asked).ok().filter(|cpus| (1..=MAX_VCPUS).contains(cpus));
        let cpus = cpus.ok_or(ConfigError::Cpus(asked))?;
        let memory = self.memory.unwrap_or_default();
        memory.validate()?;
        check_disks(&self.disk)?;
        let nets = network_devices(self.net)?;
        let console = console::device(self.console, self.serial, self.uart.as_ref())?;
        let scsi = ScsiAdapter::new(self.scsi, self.cdrom, self.scsi_controller)?;
        check_scsi(scsi.as_ref(), &self.disk)?;
        let balloon = balloon_device(self.balloon, memory.size)?;
        let adapters = scsi.as_ref().map(ScsiAdapter::name);
        let consoles = console.as_ref().map(|_| ConsoleDevice::NAME.to_owned());
        let single = [adapters, consoles, balloon.as_ref().map(BalloonConfig::name)];
        check_devices(&self.disk, &nets, single.into_iter().flatten(), &self.device)?;
        // The person's terminal is the console's, and the kernel prints there.
        let at_console = console.as_ref().is_some_and(ConsoleDevice::has_terminal);
        let append = if at_console { "console=hvc0" } else { DEFAULT_APPEND };
        let uart = self.uart.unwrap_or(if at_console { UartConfig::Off } else { UartConfig::default() });
        if let UartConfig::Unix(path) = &uart {
            check_socket("--uart unix=", path)?;
        }
        for address in &self.qmp {
            if let ControlAddress::Unix(path) = address {
                check_socket("--qmp unix:", path)?;
            }
        }
        if let Some(bad) = self.name.as_ref().filter(|name| !is_name(name)) {
            return Err(ConfigError::Name(bad.clone()));
        }
        Ok(MachineConfig {
            kernel: self.kernel.ok_or(ConfigError::NoKernel)?,
            initrd: self.initrd,
            append: self.append.unwrap_or_else(|| append.to_owned()),
            cpus,
            memory,
            uart,
            sandbox: self.sandbox.unwrap_or(true),
            name: self.name,
            qmp: self.qmp,
            disks: self.disk,
            nets,
            scsi,
            console,
            balloon,
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
        let refused = |source| ConfigError::RestartLimit { path: disk.path.clone(), source };
        disk.restart.check_limit(disk.restart_limit).map_err(refused)?;
        check_io_timeout(disk)?;
        let refused = |source| ConfigError::DiskThrottle { path: disk.path.clone(), source };
        disk.throttle.validate().map_err(refused)?;
        if disk.path.as_os_str().is_empty() {
            return Err(ConfigError::EmptyDiskPath);
        }
        let printable = |serial: &&String| serial.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        if let Some(serial) = &disk.serial
            && Some(serial).filter(printable).is_none_or(|serial| serial.len() > MAX_SERIAL_LEN)
        {
            return Err(ConfigError::Serial { path: disk.path.clone(), serial: serial.clone() });
        }
        let shares = |other: &DiskConfig| other.path == disk.path && !(other.readonly && disk.readonly);
        if disks[at + 1..].iter().any(shares) {
            return Err(ConfigError::DuplicateDisk(disk.path.clone()));
        }
    }
    Ok(())
}

/// A write that waits for room is no sign of a daemon that hangs.
fn check_io_timeout(disk: &DiskConfig) -> Result<(), ConfigError> {
    let Some(TimeSpan(timeout)) = disk.io_timeout else { return Ok(()) };
    let refuse = |reason| Err(ConfigError::IoTimeout { path: disk.path.clone(), reason });
    if timeout < DiskConfig::LEAST_IO_TIMEOUT {
        return refuse("it is at least 1s, and better 30s: a disk that is only slow is to be left alone");
    }
    match (disk.on_full, disk.restart) {
        (OnFull::Pause, _) => refuse("on-full=pause lets writes wait without end: leave one of them out"),
        (_, Restart::Never) => refuse("it has the daemon started again, and restart=never forbids that"),
        _ => Ok(()),
    }
}

/// Those that were asked for after the last `none`.
fn network_devices(nets: Vec<NetConfig>) -> Result<Vec<NetDevice>, ConfigError> {
    if nets.iter().any(|net| net.is_none() && net.says_more()) {
        return Err(net::NetError::NotAlone.into());
    }
    let first = nets.iter().rposition(NetConfig::is_none).map_or(0, |none| none + 1);
    let devices = nets.into_iter().skip(first).enumerate().map(|(at, net)| net.validate(at));
    let devices: Vec<NetDevice> = devices.collect::<Result<_, _>>()?;
    let mut taps: Vec<&String> = devices.iter().filter_map(NetDevice::tap).collect();
    taps.sort_unstable();
    match taps.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(ConfigError::DuplicateTap(pair[0].clone())),
        None => Ok(devices),
    }
}

/// No image has two writers.
fn check_scsi(scsi: Option<&ScsiAdapter>, disks: &[DiskConfig]) -> Result<(), ConfigError> {
    let Some(scsi) = scsi else { return Ok(()) };
    for (at, written) in scsi.written_images().enumerate() {
        let mut others = scsi.written_images().skip(at + 1);
        if others.any(|other| other == written) || disks.iter().any(|disk| disk.path == *written) {
            return Err(ConfigError::DuplicateDisk(written.clone()));
        }
    }
    match &scsi.controller.control {
        Some(path) => check_socket("--scsi-controller control=", path),
        None => Ok(()),
    }
}

/// If one is asked for.
fn balloon_device(
    asked: Option<BalloonConfig>,
    memory: ByteSize,
) -> Result<Option<BalloonConfig>, ConfigError> {
    let Some(balloon) = asked else { return Ok(None) };
    balloon.validate(memory)?;
    if let Some(path) = &balloon.control {
        check_socket("--balloon control=", path)?;
    }
    Ok(Some(balloon).filter(|balloon| !balloon.is_off()))
}

/// `single` are the names of those devices of which there is one at most.
fn check_devices(
    disks: &[DiskConfig],
    nets: &[NetDevice],
    single: impl Iterator<Item = String>,
    devices: &[DeviceConfig],
) -> Result<(), ConfigError> {
    for (at, device) in devices.iter().enumerate() {
        check_socket("--device socket=", &device.socket)?;
        if let Some(queues) = device.queues
            && !(1..=DeviceConfig::MAX_QUEUES).contains(&queues)
        {
            return Err(ConfigError::DeviceQueues { name: device.name(at), queues });
        }
    }
    for net in nets {
        if let NetPeer::Socket { socket, .. } = &net.peer {
            check_socket("--net socket=", socket)?;
        }
    }
    let disks = disks.iter().enumerate().map(|(at, disk)| disk.name(at));
    let devices = devices.iter().enumerate().map(|(at, device)| device.name(at));
    let nets = nets.iter().map(|net| net.name.clone());
    let mut names: Vec<_> = disks.chain(nets).chain(single).chain(devices).collect();
    if names.len() > MAX_DEVICES {
        return Err(ConfigError::TooManyDevices(names.len()));
    }
    if let Some(bad) = names.iter().find(|name| !is_name(name)) {
        return Err(ConfigError::Id(bad.clone()));
    }
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(ConfigError::DuplicateId(pair[0].clone())),
        None => Ok(()),
    }
}

/// A name is a thread's, a process's and one day a file's.
fn is_name(id: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphanumeric();
    id.len() <= MAX_ID_LEN
        && id.bytes().next().is_some_and(letter)
        && id.bytes().all(|byte| letter(byte) || matches!(byte, b'-' | b'_' | b'.'))
}

fn check_socket(option: &'static str, path: &Path) -> Result<(), ConfigError> {
    let bytes = path.as_os_str().as_bytes();
    let reason = match bytes.len() {
        0 => "the path is empty".to_owned(),
        _ if bytes.contains(&0) => "the path has a NUL byte in it".to_owned(),
        length if length > MAX_PATH_LEN => {
            format!("the path has {length} bytes, and that of a unix socket at most {MAX_PATH_LEN}")
        }
        _ => return Ok(()),
    };
    Err(ConfigError::Socket { option, path: path.to_owned(), reason })
}

impl DiskConfig {
    /// What messages call the disk; `at` is its place among the disks.
    pub fn name(&self, at: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("disk{at}"))
    }
}

impl DeviceConfig {
    /// What messages call the device; `at` is its place among the devices.
    pub fn name(&self, at: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("{}{at}", self.r#type))
    }
}

#[cfg(test)]
mod tests;
