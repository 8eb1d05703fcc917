use std::io::Write;

use super::*;
use crate::memory::{GuestRam, RamOptions, RamRegion};

const MIB: u64 = 1 << 20;

fn ram(size: u64) -> GuestRam {
    GuestRam::new(&RamOptions::default(), &[RamRegion { gpa: 0, size, file_offset: 0 }]).unwrap()
}

fn file(path: &str, bytes: &[u8]) -> BootFile {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    BootFile { path: path.into(), file }
}

/// Loads it, and demands that the files alone are judged in the same way.
fn boot(size: u64, kernel: &[u8], initrd: Option<&[u8]>, line: &str) -> Result<EntryState, String> {
    let boot = Boot {
        kernel: file("vmlinuz", kernel),
        initrd: initrd.map(|initrd| file("initrd.img", initrd)),
        command_line: line.to_owned(),
        acpi_tables: b"RSD PTR ".to_vec(),
        reset_vector: reset_vector(0x602, 1),
        reserved: Vec::new(),
    };
    let loaded = boot.load(&ram(size)).map_err(|error| error.to_string());
    let checked = boot.check(size).map_err(|error| error.to_string());
    assert_eq!(checked.as_ref().err(), loaded.as_ref().err());
    loaded
}

/// A bzImage of one real-mode sector whose kernel proper is 4 KiB of `0xcc`, to be at 16 MiB with 8 MiB of room.
fn bzimage() -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    bytes[0x1f1] = 1;
    bytes[0x1f4..0x1f8].copy_from_slice(&(4096_u32 / 16).to_le_bytes());
    bytes[0x201] = 0x6a;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    bytes[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    bytes[0x236] = 1;
    bytes[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
    bytes[0x258..0x260].copy_from_slice(&(16 * MIB).to_le_bytes());
    bytes[0x260..0x264].copy_from_slice(&(8_u32 << 20).to_le_bytes());
    bytes.extend([0xcc; 4096]);
    bytes
}

/// An ELF kernel with one segment of 4 KiB at `paddr` and, if asked for, a PVH note with entry 0x100_1000.
fn elf(paddr: u64, memory_size: u64, pvh: bool) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..5].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2]);
    bytes[18..20].copy_from_slice(&62_u16.to_le_bytes());
    bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
    bytes[54..56].copy_from_slice(&56_u16.to_le_bytes());
    bytes[56..58].copy_from_slice(&2_u16.to_le_bytes());
    let mut header = |kind: u32, offset: u64, file_size: u64, memory_size: u64| {
        bytes.extend(u64::from(kind).to_le_bytes());
        for word in [offset, 0, paddr, file_size, memory_size, 0] {
            bytes.extend(word.to_le_bytes());
        }
    };
    let kind = if pvh { 18_u32 } else { 1 };
    header(1, 0x1000, 4096, memory_size);
    header(4, 0x200, 32, 32);
    bytes.resize(0x200, 0);
    for word in [4_u32, 8, kind, u32::from_le_bytes(*b"Xen\0"), 0x0100_1000, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.resize(0x1000, 0);
    bytes.extend([0xcc; 4096]);
    bytes
}

#[test]
fn a_bzimage_starts_in_long_mode_at_its_64_bit_entry() {
    let ram = ram(64 * MIB);
    let boot = Boot {
        kernel: file("vmlinuz", &bzimage()),
        initrd: Some(file("initrd.img", &[0x55; 5000])),
        command_line: "quiet".to_owned(),
        acpi_tables: b"RSD PTR ".to_vec(),
        reset_vector: reset_vector(0x602, 1),
        reserved: std::iter::once(0xe000_0000..0xe010_0000).collect(),
    };
    let entry = boot.load(&ram).unwrap();
    assert_eq!((entry.regs.rip, entry.regs.rsi), (16 * MIB + 0x200, 0x7000));
    assert_eq!(entry.sregs.cs.l, 1);
    let at = |gpa: u64| ram.memory().read_obj::<u32>(GuestAddress(gpa)).unwrap();
    assert_eq!(at(16 * MIB), 0xcccc_cccc);
    assert_eq!(at(0xf_fff0), 0xb006_02ba);
    assert_eq!(at(ACPI_TABLES), u32::from_le_bytes(*b"RSD "));
    assert_eq!(at(0x7000 + 0x218), 64 * MIB as u32 - 8192, "initrd at the top");
    assert_eq!(at(64 * MIB - 8192), 0x5555_5555);
    assert_eq!(at(0x7000 + 0x21c), 5000);
    assert_eq!(at(u64::from(at(0x7000 + 0x228))), u32::from_le_bytes(*b"quie"));
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x71e8)).unwrap(), 4, "e820 entries");
    assert_eq!(at(0x72d0 + 3 * 20), 0xe000_0000);

    // A reset reads the same files again.
    ram.clear().unwrap();
    boot.load(&ram).unwrap();
    assert_eq!(at(16 * MIB), 0xcccc_cccc);
}

#[test]
fn an_elf_kernel_starts_in_protected_mode_at_its_pvh_entry() {
    let entry = boot(64 * MIB, &elf(16 * MIB, 2 * MIB, true), Some(b"initrd"), "quiet").unwrap();
    assert_eq!((entry.regs.rip, entry.regs.rbx), (0x0100_1000, 0x6000));
    assert_eq!((entry.sregs.cs.l, entry.sregs.cs.db), (0, 1));
    assert_eq!(entry.sregs.cr0 >> 31, 0, "paging is off");
}

#[test]
fn what_is_no_kernel_is_refused_with_its_first_bytes() {
    let error = boot(64 * MIB, b"#!/bin/sh\n", None, "").unwrap_err();
    assert!(error.starts_with("--kernel vmlinuz: is neither a bzImage nor"), "{error}");
    assert!(error.contains("it starts with 23 21 2f 62 69 6e 2f 73, and"), "{error}");
    assert!(boot(64 * MIB, b"", None, "").unwrap_err().contains("nothing: it is empty"));
    let error = boot(64 * MIB, &elf(16 * MIB, MIB, false), None, "").unwrap_err();
    assert!(error.contains("CONFIG_PVH"), "{error}");
}

#[test]
fn what_does_not_fit_is_refused_with_figures() {
    let error = boot(20 * MIB, &bzimage(), None, "").unwrap_err();
    assert!(error.contains("it needs 0x1000000 to 0x1800000, and RAM ends at 0x1400000 (20M)"), "{error}");
    let error = boot(64 * MIB, &elf(0x1000, 4096, true), None, "").unwrap_err();
    assert!(error.contains("below 1 MiB"), "{error}");
    let error = boot(64 * MIB, &elf(u64::MAX - 4096, 8192, true), None, "").unwrap_err();
    assert!(error.contains("does not fit"), "{error}");
    let error = boot(25 * MIB, &bzimage(), Some(&vec![1; 2 * MIB as usize]), "").unwrap_err();
    assert!(
        error.starts_with("--initrd initrd.img: its 2097152 bytes")
            && error.contains("there are 1048576 bytes"),
        "{error}"
    );
    let error = boot(64 * MIB, &bzimage(), None, &"x".repeat(2048)).unwrap_err();
    assert_eq!(error, "--append: the command line is 2048 bytes long, and this kernel takes 2047");
}

#[test]
fn a_truncated_kernel_is_an_error() {
    for kernel in [bzimage(), elf(16 * MIB, 4096, true)] {
        assert!(boot(24 * MIB, &kernel, None, "").is_ok());
        for length in (0..kernel.len()).step_by(61).chain([kernel.len() - 1]) {
            assert!(boot(24 * MIB, &kernel[..length], None, "").is_err(), "{length} bytes");
        }
    }
    let error = boot(24 * MIB, &bzimage()[..2048], None, "").unwrap_err();
    assert!(
        error.contains("its header promises 4096 bytes after the real-mode part, and there are 1024"),
        "{error}"
    );
    // Signed kernels have something after what the header counts.
    let mut signed = bzimage();
    signed.extend([0; 700]);
    assert!(boot(24 * MIB, &signed, None, "").is_ok());
}

#[test]
fn no_garbled_header_makes_it_panic() {
    for kernel in [bzimage(), elf(16 * MIB, 4096, true)] {
        let headers = 0x268;
        let refused = (0..headers).step_by(3).filter(|at| {
            let mut garbled = kernel.clone();
            garbled[*at] ^= 0xff;
            boot(24 * MIB, &garbled, None, "").is_err()
        });
        assert!(refused.count() > 3);
    }
}
