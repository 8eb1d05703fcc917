use std::fs;
use std::process::{Command, Stdio};

use proptest::prelude::*;

use super::machine::MachineError;
use super::process::Process;
use super::smaps::{FileId, parse};
use super::*;

const SMAPS: &str = "\
55d0a0000000-55d0a0004000 r-xp 00001000 fe:00 77                         /usr/bin/cleave
Size:                 16 kB
Rss:                  12 kB
Pss:                   6 kB
Swap:                  4 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0020000000 rw-s 00000000 00:01 1030                       /memfd:cleave-ram (deleted)
Size:             524288 kB
Rss:                8192 kB
Pss:                5000 kB
ShmemPmdMapped:     4096 kB
Swap:               2048 kB
SwapPss:               0 kB
VmFlags: rd wr sh mr mw me ms
7f0020000000-7f0020200000 rw-s 00000000 00:0f 9                          /dev/hugepages/cleave-ram.12.0 (deleted)
Rss:                   0 kB
Shared_Hugetlb:     2048 kB
7f0030000000-7f0030001000 rw-s 00000000 00:01 1031                       /memfd:cleave-ramp (deleted)
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
";

#[test]
fn mappings_are_read_with_their_figures() {
    let mappings = parse(SMAPS);
    assert_eq!(mappings.len(), 5);
    let memory = &mappings[1];
    assert_eq!(memory.file, FileId { device: (0, 1), inode: 1030 });
    assert_eq!((memory.size, memory.mapped, memory.huge), (512 << 20, 8 << 20, 4 << 20));
    assert_eq!((memory.pss, memory.swap), (5000 << 10, 2 << 20));
    assert_eq!((mappings[2].mapped, mappings[2].huge), (2 << 20, 2 << 20));
    let is_memory: Vec<_> = mappings.iter().map(|mapping| mapping.is_guest_memory()).collect();
    assert_eq!(is_memory, [false, true, true, false, false]);
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text: String, line in "[0-9a-f]{1,17}-[0-9a-f]{1,17} [rwxps-]{4} [0-9a-f]* [0-9a-f:]{1,9} [0-9]{1,22}.*") {
        parse(&text);
        parse(&format!("{line}\nRss: 99999999999999999999 kB\nRss: 18446744073709551615 kB\n{text}"));
    }
}

/// smaps is the long form of smaps_rollup.
#[test]
fn the_sum_is_what_smaps_rollup_says() {
    let mut child = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().unwrap();
    let process = Process::of(child.id()).unwrap();
    let rollup = || {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid)).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap().trim().to_owned();
        line.strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
    };
    // The child may still be on its way into its program.
    let equal = (0..500).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        let before = rollup();
        let sum: u64 = process.smaps().unwrap().iter().map(|mapping| mapping.mapped).sum();
        before == sum && sum > 0
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(equal);
}

fn sharer(pid: u32, name: &str, figures: Option<[u64; 4]>) -> Sharer {
    let figures = figures.map(|[mapped, huge, own, own_swapped]| Figures { mapped, huge, own, own_swapped });
    Sharer { pid, name: name.to_owned(), figures }
}

fn machine() -> Machine {
    Machine {
        pid: 183,
        guest: 512 << 20,
        resident: 200 << 20,
        swapped: 12 << 20,
        holes: 300 << 20,
        processes: vec![
            sharer(183, "cleave", Some([198 << 20, 128 << 20, 2148 << 10, 0])),
            sharer(184, "cleave-block", Some([12 << 20, 0, 1400 << 10, 8 << 10])),
            sharer(1200, "virtiofsd", None),
        ],
    }
}

#[test]
fn the_table_has_a_line_for_each_process() {
    assert_eq!(
        format!("\n{}", Table(&[machine()])),
        "
 PID  PROCESS         GUEST  RESIDENT  SWAPPED  HOLES  MAPPED  HUGE    OWN  OWN-SWAP
 183  cleave           512M      200M   12288K   300M    198M  128M  2148K         0
 184    cleave-block      -         -        -      -  12288K     0  1400K        8K
1200    virtiofsd         -         -        -      -       ?     ?      ?         ?
"
    );
}

#[test]
fn programs_get_bytes() {
    let json = serde_json::to_value([machine()]).unwrap();
    assert_eq!(json[0]["guest"], 512 << 20);
    assert_eq!(json[0]["processes"][1]["own-swapped"], 8 << 10);
    assert_eq!(json[0]["processes"][2], serde_json::json!({ "pid": 1200, "name": "virtiofsd" }));
}

#[test]
fn what_is_no_machine_is_named() {
    let this = std::process::id();
    let error = machine::one(this).unwrap_err();
    assert!(matches!(error, MachineError::NoMachine { pid, .. } if pid == this), "{error}");
    let error = machine::one(u32::MAX).unwrap_err().to_string();
    assert!(error.starts_with("4294967295: no process has this pid"), "{error}");
}

#[test]
fn sizes_have_few_digits() {
    for (bytes, text) in [
        (0, "0"),
        (4096, "4K"),
        (15 << 20, "15360K"),
        (512 << 20, "512M"),
        (64 << 30, "65536M"),
        (1 << 40, "1024G"),
    ] {
        assert_eq!(readable(bytes), text);
    }
}
