use super::*;

fn input() -> AcpiInput {
    AcpiInput {
        vcpus: 4,
        ecam: Ecam { base: 0xe000_0000, buses: 1 },
        mmio32: 0xc000_0000..0xe000_0000,
        mmio64: 0x1_0000_0000..0x10_0000_0000,
        uart: Some(Uart { port: 0x3f8, gsi: 4 }),
        pm: Pm { sleep_control: 0x600, sleep_status: 0x601, reset: 0x602, reset_value: 1 },
        power_button_gsi: 5,
    }
}

const BASE: u64 = 0xe_0000;

/// A table's bytes by its address, checked.
fn table(image: &[u8], address: u64) -> &[u8] {
    let at = (address - BASE) as usize;
    let length = u32::from_le_bytes(*image[at + 4..].first_chunk().unwrap()) as usize;
    let bytes = &image[at..at + length];
    assert_eq!(bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    bytes
}

fn address(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().unwrap())
}

#[test]
fn every_table_is_reached_from_the_rsdp_and_sums_to_zero() {
    let image = build(&input(), BASE).unwrap();
    assert_eq!(&image[..8], b"RSD PTR ");
    let xsdt = table(&image, address(&image, 24));
    let tables: Vec<_> = xsdt[36..].chunks_exact(8).map(|entry| table(&image, address(entry, 0))).collect();
    let signatures: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
    assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);

    let (fadt, madt) = (tables[0], tables[1]);
    assert_eq!(&table(&image, address(fadt, 140))[..4], b"DSDT");
    // Sleep control and status (244, 256) and reset (116): system I/O, 8 bits, byte access.
    for (at, port) in [(244, 0x600), (256, 0x601), (116, 0x602)] {
        assert_eq!(fadt[at..at + 4], [1, 8, 0, 1]);
        assert_eq!(address(fadt, at + 4), port);
    }
    let lapics = madt[44..].chunks_exact(8).take(4).map(|lapic| (lapic[0], lapic[3])).collect::<Vec<_>>();
    assert_eq!(lapics, [(0, 0), (0, 1), (0, 2), (0, 3)]);
    assert_eq!(madt[44 + 4 * 8], 1, "the IOAPIC comes last");
}

#[test]
fn the_most_vcpus_fit() {
    let image = build(&AcpiInput { vcpus: 254, ..input() }, BASE).unwrap();
    assert!((image.len() as u64) < ACPI_ROOM);
}
