//! The DSDT: PCI root, reserved ranges, uart, power button, soft off.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt, Method, Name,
    Notify, ONE, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{AcpiInput, Ecam, OEM_ID, OEM_REVISION, OEM_TABLE_ID, SLEEP_TYPE_S5, Uart, serialized};

const HEADER: u32 = 36;
/// Integers of 64 bits (ACPI 6.5, table 5.4: DSDT revision 2 and above).
const REVISION: u8 = 2;
/// Status change of a power button (ACPI 6.5, 4.8.3.1.2).
const BUTTON_PRESSED: u8 = 0x80;

pub(super) fn table(input: &AcpiInput) -> Sdt {
    let mut table = Sdt::new(*b"DSDT", HEADER, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut scope = pci_root(input);
    scope.extend(motherboard(&input.ecam));
    if let Some(uart) = &input.uart {
        scope.extend(com1(uart));
    }
    scope.extend(power_button(input.power_button_gsi));
    table.append_slice(&Scope::raw(path("_SB_"), scope));
    // Only the first element is read on hardware-reduced platforms (ACPI 6.5, 7.4.2).
    let soft_off = Package::new(vec![&SLEEP_TYPE_S5]);
    table.append_slice(&serialized(&Name::new(path("_S5_"), &soft_off)));
    table
}

/// Host bridge. No _PRT: there are no INTx lines; no _OSC: there is nothing whose control could be handed over.
fn pci_root(input: &AcpiInput) -> Vec<u8> {
    let buses = AddressSpace::<u16>::new_bus_number(0, input.ecam.last_bus().into());
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let below = AddressSpace::<u16>::new_io(0, 0xcf7, None);
    let above = AddressSpace::<u16>::new_io(0xd00, 0xffff, None);
    let mmio32 = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        input.mmio32.start,
        input.mmio32.end - 1,
        None,
    );
    let mmio64 = AddressSpace::<u64>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        input.mmio64.start,
        input.mmio64.end - 1,
        None,
    );
    let resources = ResourceTemplate::new(vec![&buses, &config_ports, &below, &above, &mmio32, &mmio64]);
    let (pcie, pci) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    serialized(&Device::new(
        path("PCI0"),
        vec![
            &Name::new(path("_HID"), &pcie),
            &Name::new(path("_CID"), &pci),
            &Name::new(path("_SEG"), &ZERO),
            &Name::new(path("_BBN"), &ZERO),
            &Name::new(path("_UID"), &ZERO),
            // Cache-coherent DMA, as on every x86.
            &Name::new(path("_CCA"), &ONE),
            &Name::new(path("_CRS"), &resources),
        ],
    ))
}

/// Keeps everyone else off the ECAM; without it Linux does not use it.
fn motherboard(ecam: &Ecam) -> Vec<u8> {
    let range = ecam.range();
    let window = AddressSpace::<u64>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        range.start,
        range.end - 1,
        None,
    );
    serialized(&Device::new(
        path("MBRD"),
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&window])),
        ],
    ))
}

fn com1(uart: &Uart) -> Vec<u8> {
    let ports = IO::new(uart.port, uart.port, 0, 8);
    let interrupt = Interrupt::new(true, true, false, false, uart.gsi);
    serialized(&Device::new(
        path("COM1"),
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0501")),
            &Name::new(path("_UID"), &ONE),
            &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    ))
}

fn power_button(gsi: u32) -> Vec<u8> {
    let mut devices = serialized(&Device::new(
        path("PWRB"),
        vec![&Name::new(path("_HID"), &EISAName::new("PNP0C0C")), &Name::new(path("_UID"), &ZERO)],
    ));

    let interrupt = Interrupt::new(true, true, false, false, gsi);
    let (event, button) = (Arg(0), path("PWRB"));
    let pressed = Equal::new(&event, &gsi);
    let notify = Notify::new(&button, &BUTTON_PRESSED);
    devices.extend(serialized(&Device::new(
        path("GED_"),
        vec![
            &Name::new(path("_HID"), &"ACPI0013"),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(path("_EVT"), 1, true, vec![&If::new(&pressed, vec![&notify])]),
        ],
    )));
    devices
}

fn path(name: &str) -> Path {
    Path::new(name)
}
