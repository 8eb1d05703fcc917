//! What stands in for a PC's firmware: the files a guest is started from, opened and judged before anything else, and
//! the tables it reads.

use std::fs::File;
use std::path::Path;

use cleave_common::exit::Failure;

use crate::arch::x86_64::acpi::{self, AcpiInput, Ecam, Pm};
use crate::arch::x86_64::boot::{self, Boot, BootFile};
use crate::arch::x86_64::layout::ACPI_TABLES;
use crate::config::{MachineConfig, UartConfig};
use crate::legacy::{power, uart};
use crate::plan::{self, MachinePlan};

/// Opens the kernel and the initrd and makes the ACPI tables. What cannot be started is refused here, from its files and
/// the plan; nothing of the host is touched yet.
pub fn prepare(config: &MachineConfig, plan: &MachinePlan) -> Result<Boot, Failure> {
    let kernel = open("--kernel", &config.kernel)?;
    let initrd = config.initrd.as_deref().map(|path| open("--initrd", path)).transpose()?;
    let input = acpi_input(config, plan);
    let acpi_tables = acpi::build(&input, ACPI_TABLES).map_err(Failure::internal)?;
    let reset_vector = boot::reset_vector(power::RESET_PORT, power::RESET_VALUE);
    let reserved = vec![input.ecam.range()];
    let command_line = config.append.clone();
    let boot = Boot { kernel, initrd, command_line, acpi_tables, reset_vector, reserved };
    let low_ram = plan.ram.iter().find(|region| region.gpa == 0);
    boot.check(low_ram.map_or(0, |region| region.size)).map_err(Failure::usage)?;
    Ok(boot)
}

/// Looked at before it is opened: opening a FIFO waits for somebody to write to it.
fn open(option: &str, path: &Path) -> Result<BootFile, Failure> {
    let found = std::fs::metadata(path).map_err(|error| named(option, path, error))?;
    match found.is_file() {
        true => File::open(path)
            .map(|file| BootFile { path: path.to_owned(), file })
            .map_err(|error| named(option, path, error)),
        false if found.is_dir() => Err(named(option, path, "is a directory")),
        false => Err(named(option, path, "is not a regular file")),
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
