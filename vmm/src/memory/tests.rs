use std::os::unix::fs::FileExt;

use vm_memory::Bytes;

use super::*;

const MIB: u64 = 1 << 20;

fn options(backing: Backing) -> RamOptions {
    RamOptions { backing, page_size: None, prefault: false }
}

fn split() -> [RamRegion; 2] {
    [
        RamRegion { gpa: 0, size: 2 * MIB, file_offset: 0 },
        RamRegion { gpa: 4 << 30, size: MIB, file_offset: 2 * MIB },
    ]
}

#[test]
fn what_the_guest_writes_is_in_the_file_at_the_regions_offset() {
    let ram = GuestRam::new(&options(Backing::Memfd), &split()).unwrap();
    ram.memory().write_obj(0x1234_5678_u32, GuestAddress((4 << 30) + 0x1000)).unwrap();
    let mut word = [0; 4];
    ram.file().read_exact_at(&mut word, 2 * MIB + 0x1000).unwrap();
    assert_eq!(u32::from_le_bytes(word), 0x1234_5678);
    assert_eq!(ram.size, 3 * MIB);
    assert!(ram.memory().write_obj(0_u32, GuestAddress(2 * MIB)).is_err(), "the hole is no memory");
}

#[test]
fn the_file_keeps_its_size() {
    let ram = GuestRam::new(&options(Backing::Memfd), &split()).unwrap();
    assert!(ram.file().set_len(4 * MIB).is_err());
    assert!(ram.file().set_len(MIB).is_err());
}

#[test]
fn clearing_zeroes_and_gives_back() {
    let ram = GuestRam::new(&options(Backing::Memfd), &split()).unwrap();
    ram.memory().write_obj(0xff_u8, GuestAddress(0x1000)).unwrap();
    assert_ne!(rustix::fs::fstat(ram.file()).unwrap().st_blocks, 0);
    ram.clear().unwrap();
    assert_eq!(rustix::fs::fstat(ram.file()).unwrap().st_blocks, 0);
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 0);
}

#[test]
fn prefault_takes_every_page() {
    let options = RamOptions { prefault: true, ..options(Backing::Memfd) };
    let ram = GuestRam::new(&options, &split()).unwrap();
    assert_eq!(rustix::fs::fstat(ram.file()).unwrap().st_blocks as u64 * 512, 3 * MIB);
}

#[test]
fn more_than_the_host_has_is_refused_with_both_figures() {
    let region = RamRegion { gpa: 0, size: 1 << 46, file_offset: 0 };
    let error = GuestRam::new(&options(Backing::Memfd), &[region]).unwrap_err().to_string();
    assert!(error.starts_with("64T of guest memory is more than the "), "{error}");
}

#[test]
fn a_layout_that_overlaps_or_wraps_is_refused() {
    let mut regions = split();
    regions[1].gpa = MIB;
    let error = GuestRam::new(&options(Backing::Memfd), &regions).unwrap_err();
    assert!(matches!(error, MemoryError::BadLayout(_)), "{error}");
    regions[1].gpa = u64::MAX - 0xfff;
    let error = GuestRam::new(&options(Backing::Memfd), &regions).unwrap_err();
    assert!(matches!(error, MemoryError::BadLayout(_)), "{error}");
    assert!(matches!(GuestRam::new(&options(Backing::Memfd), &[]), Err(MemoryError::Empty)));
}

#[test]
fn too_few_huge_pages_says_how_many_and_how_to_get_them() {
    for pool in HugePages::all() {
        let needed = pool.free + 3;
        let error = pool.require(needed).unwrap_err().to_string();
        let advice = format!("get them with: echo {} > {}", pool.total + 3, pool.control().display());
        assert!(error.contains(&format!("{needed} are needed, {} are free", pool.free)), "{error}");
        assert!(error.ends_with(&advice), "{error}");
    }
    let error = HugePages::of(Some(12345)).unwrap_err().to_string();
    assert!(error.starts_with("this host has no huge pages of 12345; it has: "), "{error}");
}
