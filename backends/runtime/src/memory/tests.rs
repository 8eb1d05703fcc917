use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::Bytes;

use super::*;

const MIB: u64 = 1 << 20;

fn memfd(len: u64) -> OwnedFd {
    let fd = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, len).unwrap();
    fd
}

fn region(guest_addr: u64, size: u64) -> MemoryRegion {
    MemoryRegion { guest_addr, size, user_addr: 0x7000_0000_0000 + guest_addr, mmap_offset: 0 }
}

#[test]
fn user_addresses_translate_inside_one_region_only() {
    let memory =
        GuestMemory::from_table(&[region(0, MIB), region(MIB, MIB)], vec![memfd(MIB), memfd(MIB)]).unwrap();
    let user = 0x7000_0000_0000;
    assert_eq!(memory.translate(user + 100, 16), Some(GuestAddress(100)));
    assert_eq!(memory.translate(user + MIB, 16), Some(GuestAddress(MIB)));
    assert_eq!(memory.translate(user + 2 * MIB - 16, 16), Some(GuestAddress(2 * MIB - 16)));
    // Neighbours by address need not be neighbours in memory.
    assert_eq!(memory.translate(user + MIB - 8, 16), None);
    assert_eq!(memory.translate(user + 2 * MIB - 15, 16), None);
    assert_eq!(memory.translate(user - 1, 1), None);
    assert_eq!(memory.translate(100, 16), None, "a guest-physical address is no user address");
    assert_eq!(memory.translate(user, u64::MAX), None);
}

#[test]
fn whoever_holds_the_old_memory_keeps_it_mapped() {
    let old = GuestMemory::default().with_region(region(0, MIB), memfd(MIB)).unwrap();
    let new = old.without_region(region(0, MIB)).unwrap();
    assert!(new.is_empty());
    old.map().write_obj(7u8, GuestAddress(5)).unwrap();
    assert!(new.map().write_obj(7u8, GuestAddress(5)).is_err());
}

#[test]
fn regions_are_removed_by_all_of_their_address() {
    let memory = GuestMemory::default().with_region(region(0, MIB), memfd(MIB)).unwrap();
    for wrong in [region(0, MIB / 2), region(4096, MIB), MemoryRegion { user_addr: 1, ..region(0, MIB) }] {
        assert!(matches!(memory.without_region(wrong), Err(MemoryError::Unknown(_))));
    }
}

proptest! {
    #[test]
    fn no_region_makes_it_panic(guest_addr: u64, size in prop_oneof![any::<u64>(), 0..4 * MIB],
            user_addr: u64, mmap_offset in prop_oneof![any::<u64>(), 0..MIB], pages: bool) {
        let mask = if pages { !0xfff } else { !0 };
        let region = MemoryRegion {
            guest_addr: guest_addr & mask,
            size: size & mask,
            user_addr,
            mmap_offset: mmap_offset & mask,
        };
        let base = GuestMemory::default().with_region(self::region(0, MIB), memfd(MIB)).unwrap();
        if let Ok(memory) = base.with_region(region, memfd(2 * MIB)) {
            // What was accepted can be reached to its last byte.
            let last = memory.translate(region.user_addr + region.size - 1, 1).unwrap();
            memory.map().write_obj(1u8, last).unwrap();
        }
    }
}
