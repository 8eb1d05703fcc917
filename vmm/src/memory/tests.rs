use std::os::unix::fs::FileExt;

use vm_memory::Bytes;

use super::*;

const MIB: u64 = 1 << 20;

fn options(backing: Backing) -> RamOptions {
    RamOptions { backing, ..RamOptions::default() }
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
    let options = RamOptions { prefault: true, prefault_threads: Some(1), ..options(Backing::Memfd) };
    let ram = GuestRam::new(&options, &split()).unwrap();
    let taken = || rustix::fs::fstat(ram.file()).unwrap().st_blocks as u64 * 512;
    let mut last = 0;
    let mut watch = |progress: Progress| {
        assert_eq!(progress.total, 3 * MIB);
        last = progress.done;
        ControlFlow::Continue(())
    };
    assert_eq!(taken(), 0);
    assert_eq!(ram.prefault(&mut watch).unwrap(), ControlFlow::Continue(()));
    assert_eq!(taken(), 3 * MIB);
    assert!(last > 0);
    ram.clear().unwrap();
    assert_eq!(taken(), 3 * MIB, "a reset machine has all of it again");
}

#[test]
fn prefault_can_be_broken_off() {
    let region = RamRegion { gpa: 0, size: 64 * MIB, file_offset: 0 };
    let options = RamOptions { prefault: true, prefault_threads: Some(1), ..options(Backing::Memfd) };
    let ram = GuestRam::new(&options, &[region]).unwrap();
    let mut heard = 0;
    let flow = ram.prefault(&mut |_| {
        heard += 1;
        ControlFlow::Break(())
    });
    assert_eq!((flow.unwrap(), heard), (ControlFlow::Break(()), 1));
    assert!((rustix::fs::fstat(ram.file()).unwrap().st_blocks as u64 * 512) < 64 * MIB);
}

/// The flags of the mapping that begins at `address` (proc_pid_smaps(5), VmFlags).
fn flags_of(address: u64) -> Vec<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let begin = format!("{address:x}-");
    let lines = smaps.lines().skip_while(|line| !line.starts_with(&begin));
    let flags = lines.map_while(Some).find_map(|line| line.strip_prefix("VmFlags:"));
    flags.unwrap().split_whitespace().map(str::to_owned).collect()
}

#[test]
fn a_mapping_is_dumped_and_in_huge_pages_as_asked() {
    for (thp, dump, has, has_not) in [
        (None, true, "hg", "dd"),
        (Some(Thp::Advise), true, "hg", "dd"),
        (Some(Thp::Never), true, "nh", "dd"),
        (None, false, "dd", "nh"),
    ] {
        let options = RamOptions { thp, dump, ..options(Backing::Memfd) };
        let ram = GuestRam::new(&options, &split()).unwrap();
        for region in ram.regions() {
            let flags = flags_of(region.host_address);
            assert!(flags.iter().any(|flag| flag == has), "{thp:?}, dump {dump}: {flags:?}");
            assert!(!flags.iter().any(|flag| flag == has_not), "{thp:?}, dump {dump}: {flags:?}");
        }
    }
}

#[test]
fn memory_is_bound_to_a_node_for_whoever_touches_it() {
    let options = RamOptions { host_nodes: vec![0], ..options(Backing::Memfd) };
    let ram = match GuestRam::new(&options, &split()) {
        Err(MemoryError::NoNuma) => return,
        ram => ram.unwrap(),
    };
    ram.memory().write_obj(1_u8, GuestAddress(0)).unwrap();
    let address = ram.regions().next().unwrap().host_address;
    let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
    let line = maps.lines().find(|line| line.starts_with(&format!("{address:08x} bind:0 "))).unwrap();
    assert!(line.contains(" N0="), "{line}");
    let options = RamOptions { host_nodes: vec![0, 900], ..options };
    let error = GuestRam::new(&options, &split()).unwrap_err().to_string();
    assert!(error.starts_with("host-node=900: this process may use memory of "), "{error}");
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
