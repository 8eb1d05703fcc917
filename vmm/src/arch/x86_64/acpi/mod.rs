//! ACPI tables (ACPI 6.5): a hardware-reduced platform, which has no PIC, PIT, RTC, i8042 or fixed-event registers, so
//! that a stock kernel looks for none of them.
//!
//! Tables: RSDP, XSDT, FADT, MADT, MCFG, DSDT. Power off and reset are register writes; the power button is an interrupt
//! that the generic event device (ACPI 6.5, 5.6.9) turns into a notification.

mod dsdt;
#[cfg(test)]
mod tests;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use super::layout::{ACPI_ROOM, IOAPIC, LOCAL_APIC};

const OEM_ID: [u8; 6] = *b"CLEAVE";
const OEM_TABLE_ID: [u8; 8] = *b"CLEAVEVM";
const OEM_REVISION: u32 = 1;

/// SLP_TYP of soft off, as written to the sleep control register.
pub const SLEEP_TYPE_S5: u8 = 5;

/// What the tables describe. Addresses and ranges are guest-physical, in bytes.
#[derive(Debug, Clone)]
pub struct AcpiInput {
    /// 1 to 254; a vCPU's APIC id is its index.
    pub vcpus: u8,
    pub ecam: Ecam,
    /// Windows for BARs.
    pub mmio32: Range<u32>,
    pub mmio64: Range<u64>,
    pub uart: Option<Uart>,
    pub pm: Pm,
    /// The edge-triggered GSI that signals a press of the power button.
    pub power_button_gsi: u32,
}

/// The PCI configuration space in memory (PCI Express 5.0, 7.2.2): 1 MiB a bus, from bus 0.
#[derive(Debug, Clone, Copy)]
pub struct Ecam {
    pub base: u64,
    /// 1 to 256.
    pub buses: u16,
}

impl Ecam {
    pub fn range(&self) -> Range<u64> {
        self.base..self.base + (u64::from(self.buses) << 20)
    }

    fn last_bus(&self) -> u8 {
        self.buses.saturating_sub(1).min(255) as u8
    }
}

/// A 16550: eight ports and one edge-triggered GSI.
#[derive(Debug, Clone, Copy)]
pub struct Uart {
    pub port: u16,
    pub gsi: u32,
}

/// One-byte registers at ports.
#[derive(Debug, Clone, Copy)]
pub struct Pm {
    /// SLP_TYP in bits 2 to 4, SLP_EN is bit 5 (ACPI 6.5, 4.8.3.7).
    pub sleep_control: u16,
    /// WAK_STS is bit 7 (ACPI 6.5, 4.8.3.7).
    pub sleep_status: u16,
    pub reset: u16,
    /// The byte that resets when written to `reset`.
    pub reset_value: u8,
}

#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("the ACPI tables take {size} bytes, and there is room for {ACPI_ROOM}")]
    TooLarge { size: usize },
}

/// All tables as one image to be written at guest-physical `base`, a multiple of 16; the RSDP is at its start.
pub fn build(input: &AcpiInput, base: u64) -> Result<Vec<u8>, AcpiError> {
    let mut image = Image { base, bytes: vec![0; Rsdp::len()] };
    let dsdt = image.append(&dsdt::table(input));
    let fadt = image.append(&fadt(input, dsdt));
    let madt = image.append(&madt(input));
    let mcfg = image.append(&mcfg(&input.ecam));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    [fadt, madt, mcfg].into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = image.append(&xsdt);
    let rsdp = serialized(&Rsdp::new(OEM_ID, xsdt));
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    match image.bytes.len() {
        size if size as u64 > ACPI_ROOM => Err(AcpiError::TooLarge { size }),
        _ => Ok(image.bytes),
    }
}

struct Image {
    base: u64,
    bytes: Vec<u8>,
}

impl Image {
    /// The guest-physical address at which `table` comes to lie.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = self.base + self.bytes.len() as u64;
        self.bytes.extend(serialized(table));
        at
    }
}

fn serialized(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// IAPC_BOOT_ARCH (ACPI 6.5, table 5.11): no i8042 and no legacy devices (both bits clear), no VGA, no ASPM, no RTC.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 4 | 1 << 5;

fn fadt(input: &AcpiInput, dsdt: u64) -> impl Aml + use<> {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION).dsdt_64(dsdt);
    // PwrButton and SlpButton say that the buttons, if any, are devices and no fixed registers.
    for flag in [
        Flags::Wbinvd,
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::ResetRegSup,
        Flags::Headless,
        Flags::HwReducedAcpi,
    ] {
        table = table.flag(flag);
    }
    table.iapc_boot_arch = BOOT_ARCH.into();
    table.reset_reg = port(input.pm.reset);
    table.reset_value = input.pm.reset_value;
    table.sleep_control_reg = port(input.pm.sleep_control);
    table.sleep_status_reg = port(input.pm.sleep_status);
    table.hypervisor_vendor_identity = u64::from_le_bytes(*b"CLEAVE\0\0").into();
    table.finalize()
}

fn madt(input: &AcpiInput) -> MADT {
    let controller = LocalInterruptController::Address(LOCAL_APIC);
    let mut table = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, controller);
    for index in 0..input.vcpus {
        table.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    // KVM creates its IOAPIC with id 0, and Linux believes the register.
    table.add_structure(IoApic::new(0, IOAPIC, 0));
    table
}

fn mcfg(ecam: &Ecam) -> MCFG {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.add_ecam(ecam.base, 0, 0, ecam.last_bus());
    table
}
