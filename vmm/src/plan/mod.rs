//! From what was asked for to where everything goes: a pure function, so that everything that can be refused is
//! refused before KVM or a daemon is touched.
//!
//! Guest-physical addresses:
//!
//! ```text
//! 0               RAM, up to 3 GiB
//! 0xc000_0000     32-bit MMIO window (nothing of ours is in it: all BARs are 64-bit)
//! 0xe000_0000     ECAM, bus 0
//! 0xfec0_0000     I/O APIC, local APIC, KVM's own pages
//! 0x1_0000_0000   the rest of RAM
//! above RAM       64-bit MMIO window: one BAR a device
//! ```

mod network;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cleave_common::size::ByteSize;
use cleave_common::virtio::DeviceType;

use crate::config::{
    BalloonConfig, CacheMode, ConsoleDevice, DiskConfig, DiskFormat, MachineConfig, OnFull, Restart,
    ScsiAdapter,
};
use crate::memory::RamRegion;

const GIB: u64 = 1 << 30;
/// RAM ends here at the latest, and goes on at [`HIGH_RAM`].
const LOW_RAM_END: u64 = 3 * GIB;
const HIGH_RAM: u64 = 4 * GIB;

pub const MMIO32: Window = Window { base: LOW_RAM_END, size: GIB / 2 };
/// Configuration space of one bus.
pub const ECAM: Window = Window { base: 0xe000_0000, size: 1 << 20 };

/// More than 31 devices' BARs need, so that a guest that likes to move them finds room.
const MMIO64_SIZE: u64 = 16 * GIB;

/// Signalled when the power button is pressed.
pub const POWER_BUTTON_GSI: u32 = 5;

/// A range of guest-physical addresses, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub base: u64,
    pub size: u64,
}

/// Where everything of one machine goes.
#[derive(Debug, PartialEq)]
pub struct MachinePlan {
    pub ram: Vec<RamRegion>,
    pub mmio64: Window,
    pub slots: Vec<SlotPlan>,
}

/// One device on the root bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotPlan {
    /// What messages call the device: the `id=` given, or its kind and number (`disk0`, `rng1`).
    pub name: String,
    pub device_type: DeviceType,
    /// PCI device number, 1 to 31.
    pub device_number: u8,
    /// Virtqueues to assume of a daemon that cannot say how many it has.
    pub queues: Option<u16>,
    pub backend: Backend,
}

/// Who serves a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// A daemon that we start and end; the vhost-user socket is added to its arguments.
    Spawn(DaemonSpec),
    /// A daemon that someone else runs.
    Attach { socket: PathBuf, wait: Duration },
}

/// A daemon to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSpec {
    /// The program's name: "cleave-block". It is looked for beside our own executable, then in PATH.
    pub program: String,
    /// The device it serves, for messages: "disk0".
    pub device: String,
    /// Its arguments, but for `--fd`.
    pub args: Vec<OsString>,
    pub restart: Restart,
    /// How often it is started again at most; without end if absent.
    pub restart_limit: Option<u32>,
    /// How long it may complete nothing of a queue that has work; without end if absent.
    pub io_timeout: Option<Duration>,
    /// What it finds at [`ConsoleDevice::TERMINAL_FD`].
    pub terminal: Terminal,
    /// It gets a file, as `--state-fd`, that outlives it, and finds there what its predecessor left.
    pub keeps_state: bool,
    /// What it has to know, where it is a program that is not ours.
    pub needs: Option<Need>,
}

/// The end of a connection to the machine's terminal, which a daemon inherits, and its successors after it.
#[derive(Debug, Clone, Default)]
pub enum Terminal {
    /// The daemon does not have it.
    #[default]
    None,
    /// It is to have it.
    Wanted,
    Given(Arc<OwnedFd>),
}

/// Two are the same that are of the same connection.
impl PartialEq for Terminal {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::None, Self::None) | (Self::Wanted, Self::Wanted) => true,
            (Self::Given(a), Self::Given(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl Eq for Terminal {}

/// An option that a program lists in its `--help`, or is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    pub option: &'static str,
    /// What to do about one that does not.
    pub advice: &'static str,
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    #[error(
        "--memory {size}: with its devices the machine would end at {end:#x}, and this CPU has {bits} bits of physical address"
    )]
    TooLarge { size: ByteSize, end: u64, bits: u8 },
}

/// Lays out the machine for a CPU with `address_bits` bits of physical address.
pub fn plan(config: &MachineConfig, address_bits: u8) -> Result<MachinePlan, PlanError> {
    let size = config.memory.size;
    let too_large = |end| PlanError::TooLarge { size, end, bits: address_bits };
    let ram = lay_out_ram(size.bytes());
    let ram_end = ram.iter().map(|region| region.gpa.saturating_add(region.size)).max().unwrap_or(0);
    let base = ram_end.max(HIGH_RAM).checked_next_multiple_of(GIB).ok_or_else(|| too_large(u64::MAX))?;
    let end = base.checked_add(MMIO64_SIZE).ok_or_else(|| too_large(u64::MAX))?;
    if end > 1_u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX) {
        return Err(too_large(end));
    }
    let mmio64 = Window { base, size: MMIO64_SIZE };
    Ok(MachinePlan { ram, mmio64, slots: assign_slots(config) })
}

fn lay_out_ram(size: u64) -> Vec<RamRegion> {
    let low = size.min(LOW_RAM_END);
    let mut ram = vec![RamRegion { gpa: 0, size: low, file_offset: 0 }];
    if size > low {
        ram.push(RamRegion { gpa: HIGH_RAM, size: size - low, file_offset: low });
    }
    ram
}

/// Disks first, then networks, then the SCSI adapter, the console and the balloon, each kind in the order given: what a
/// guest calls vda is the first disk.
fn assign_slots(config: &MachineConfig) -> Vec<SlotPlan> {
    let disks = config.disks.iter().enumerate().map(|(at, disk)| {
        let name = disk.name(at);
        let queues = disk.queues.unwrap_or_else(|| u16::from(config.cpus).min(DiskConfig::DEFAULT_QUEUES));
        let args = block_arguments(disk, queues);
        let backend = Backend::Spawn(DaemonSpec {
            program: "cleave-block".to_owned(),
            device: name.clone(),
            args,
            restart: disk.restart,
            restart_limit: disk.restart_limit,
            io_timeout: disk.io_timeout.map(|timeout| timeout.0),
            terminal: Terminal::None,
            keeps_state: false,
            needs: None,
        });
        (name, DeviceType::BLOCK, Some(queues), backend)
    });
    let nets = config.nets.iter().map(|net| {
        let (queues, backend) = network::daemon(net);
        (net.name.clone(), DeviceType::NET, queues, backend)
    });
    let scsi = config.scsi.iter().map(|adapter| {
        let name = adapter.name();
        let asked = adapter.controller.queues;
        let requests = asked.unwrap_or_else(|| u16::from(config.cpus).min(DiskConfig::DEFAULT_QUEUES));
        let backend = Backend::Spawn(DaemonSpec {
            program: "cleave-scsi".to_owned(),
            device: name.clone(),
            args: scsi_arguments(adapter, requests),
            restart: adapter.controller.restart,
            restart_limit: adapter.controller.restart_limit,
            io_timeout: None,
            terminal: Terminal::None,
            keeps_state: false,
            needs: None,
        });
        // Beside them there are one for control and one for events.
        (name, DeviceType::SCSI, Some(requests + 2), backend)
    });
    let console = config.console.as_ref().map(|console| {
        let name = ConsoleDevice::NAME.to_owned();
        let spec = DaemonSpec {
            program: "cleave-serial".to_owned(),
            device: name.clone(),
            args: console.texts().map(|port| format!("--port={port}").into()).collect(),
            restart: Restart::Always,
            restart_limit: None,
            io_timeout: None,
            terminal: if console.has_terminal() { Terminal::Wanted } else { Terminal::None },
            keeps_state: false,
            needs: None,
        };
        (name, DeviceType::CONSOLE, None, Backend::Spawn(spec))
    });
    let balloon = config.balloon.iter().map(|balloon| {
        let backend = Backend::Spawn(DaemonSpec {
            program: "cleave-balloon".to_owned(),
            device: balloon.name(),
            args: balloon_arguments(balloon),
            restart: balloon.restart,
            restart_limit: balloon.restart_limit,
            io_timeout: None,
            terminal: Terminal::None,
            keeps_state: true,
            needs: None,
        });
        (balloon.name(), DeviceType::BALLOON, None, backend)
    });
    let devices = config.devices.iter().enumerate().map(|(at, device)| {
        let name = device.name(at);
        let backend = Backend::Attach { socket: device.socket.clone(), wait: device.wait.0 };
        (name, device.r#type, device.queues, backend)
    });
    (1_u8..)
        .zip(disks.chain(nets).chain(scsi).chain(console).chain(balloon).chain(devices))
        .map(|(device_number, (name, device_type, queues, backend))| SlotPlan {
            name,
            device_type,
            device_number,
            queues,
            backend,
        })
        .collect()
}

fn scsi_arguments(adapter: &ScsiAdapter, requests: u16) -> Vec<OsString> {
    let word = |key: &str, value: OsString| {
        let mut word = OsString::from(format!("--{key}="));
        word.push(value);
        word
    };
    let controller = &adapter.controller;
    let path = |key: &str, path: &Option<PathBuf>| path.clone().map(|path| word(key, path.into()));
    let mut arguments: Vec<OsString> = adapter.disks.iter().map(|disk| word("lun", disk.words())).collect();
    arguments.extend(adapter.cdroms.iter().map(|cdrom| word("cdrom", cdrom.words())));
    arguments.push(word("num-queues", requests.to_string().into()));
    arguments.extend(path("control", &controller.control));
    arguments.extend(path("state", &controller.state));
    arguments.extend(controller.poll_us.map(|us| word("poll-us", us.to_string().into())));
    arguments.extend(controller.cpus.as_ref().map(|cpus| word("cpus", cpus.to_string().into())));
    arguments
}

fn balloon_arguments(balloon: &BalloonConfig) -> Vec<OsString> {
    let value = |key: &str, value: Option<String>| value.map(|value| format!("--{key}={value}").into());
    let control = balloon.control.as_ref().map(|path| {
        let mut argument = OsString::from("--control=");
        argument.push(path);
        argument
    });
    [
        value("target", balloon.target.map(|size| size.to_string())),
        value("min", balloon.min.map(|size| size.to_string())),
        value("auto", balloon.free.filter(|_| balloon.auto).map(|free| format!("free={free}"))),
        value("reporting", balloon.reporting.map(|on| if on { "on" } else { "off" }.to_owned())),
        value("stats-interval", balloon.stats.map(|every| every.0.as_secs_f64().to_string())),
        control,
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn block_arguments(disk: &DiskConfig, queues: u16) -> Vec<OsString> {
    let format = match disk.format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    };
    let cache = match disk.cache {
        CacheMode::None => "none",
        CacheMode::Writeback => "writeback",
        CacheMode::Writethrough => "writethrough",
    };
    // One word each: a value that starts with a dash is a value all the same.
    let mut image = OsString::from("--blk-file=");
    image.push(&disk.path);
    let mut arguments = vec![image];
    arguments.extend(["--format", format, "--cache", cache, "--num-queues"].map(OsString::from));
    arguments.push(queues.to_string().into());
    if let Some(serial) = &disk.serial {
        arguments.push(format!("--serial={serial}").into());
    }
    if disk.readonly {
        arguments.push("--read-only".into());
    }
    if disk.on_full == OnFull::Pause {
        arguments.push("--on-full=pause".into());
    }
    if let Some(microseconds) = disk.poll_us {
        arguments.push(format!("--poll-us={microseconds}").into());
    }
    if let Some(cpus) = &disk.cpus {
        arguments.push(format!("--cpus={cpus}").into());
    }
    if !disk.throttle.is_empty() {
        arguments.push(format!("--throttle={}", disk.throttle).into());
    }
    arguments
}

#[cfg(test)]
mod tests;
