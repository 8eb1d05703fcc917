//! What a PC's firmware would leave in memory: the tables, the kernel, the initrd. There is no firmware: this is done
//! anew at every power-on, from the files that were opened at the start.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use cleave_common::exit::Failure;
use vm_memory::{Bytes, GuestAddress};

use crate::arch::x86_64::acpi::{self, AcpiInput, Ecam, Pm};
use crate::arch::x86_64::boot::{self, BootSource};
use crate::arch::x86_64::layout::ACPI_TABLES;
use crate::config::{MachineConfig, UartConfig};
use crate::kvm::vcpu::EntryState;
use crate::legacy::{power, uart};
use crate::memory::GuestRam;
use crate::plan::{self, MachinePlan};

pub struct Firmware {
    kernel: File,
    initrd: Option<File>,
    command_line: String,
    acpi: Vec<u8>,
    reserved: Vec<Range<u64>>,
}

impl Firmware {
    /// Opens the files and refuses a kernel that is none; nothing of the host is touched yet.
    pub fn open(config: &MachineConfig, plan: &MachinePlan) -> Result<Self, Failure> {
        let kernel = open("--kernel", &config.kernel)?;
        boot::check(&kernel).map_err(|error| named("--kernel", &config.kernel, error))?;
        let initrd = config.initrd.as_deref().map(|path| open("--initrd", path)).transpose()?;
        let input = acpi_input(config, plan);
        let acpi = acpi::build(&input, ACPI_TABLES).map_err(Failure::internal)?;
        let reserved = vec![input.ecam.range()];
        Ok(Self { kernel, initrd, command_line: config.append.clone(), acpi, reserved })
    }

    /// Fills `ram`, which reads as zeroes, and says how the first vCPU starts.
    pub fn load(&self, ram: &GuestRam) -> Result<EntryState, Failure> {
        let source = BootSource {
            kernel: &self.kernel,
            initrd: self.initrd.as_ref(),
            command_line: &self.command_line,
            rsdp: ACPI_TABLES,
            reserved: &self.reserved,
        };
        ram.memory().write_slice(&self.acpi, GuestAddress(ACPI_TABLES)).map_err(Failure::internal)?;
        boot::load(ram.memory(), &source).map_err(Failure::usage)
    }
}

fn open(option: &str, path: &Path) -> Result<File, Failure> {
    let file = File::open(path).map_err(|error| named(option, path, error))?;
    match file.metadata() {
        Ok(found) if found.is_dir() => {
            Err(Failure::usage(format!("{option} {}: is a directory", path.display())))
        }
        _ => Ok(file),
    }
}

fn named(option: &str, path: &Path, error: impl std::fmt::Display) -> Failure {
    Failure::usage(format!("{option} {}: {error}", path.display()))
}

fn acpi_input(config: &MachineConfig, plan: &MachinePlan) -> AcpiInput {
    let mmio32 = plan::MMIO32;
    AcpiInput {
        vcpus: config.cpus,
        ecam: Ecam { base: plan::ECAM.base, buses: 1 },
        mmio32: mmio32.base as u32..(mmio32.base + mmio32.size) as u32,
        mmio64: plan.mmio64.base..plan.mmio64.base + plan.mmio64.size,
        uart: (config.uart != UartConfig::Off).then_some(acpi::Uart { port: uart::PORT, gsi: uart::IRQ }),
        pm: Pm {
            sleep_control: power::SLEEP_CONTROL_PORT,
            sleep_status: power::SLEEP_STATUS_PORT,
            reset: power::RESET_PORT,
            reset_value: power::RESET_VALUE,
        },
        power_button_gsi: plan::POWER_BUTTON_GSI,
    }
}
