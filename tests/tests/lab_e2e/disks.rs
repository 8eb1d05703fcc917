//! Disks served by `cleave-block`, seen from the guest and compared on the host.

use std::fs;

use crate::rig::{Rig, says};
use cleave_tests::vm::Outcome;

pub const CASES: &[crate::Case] = &[
    ("disks::what_the_guest_writes_is_on_the_host_bit_for_bit", bit_for_bit),
    ("disks::every_queue_of_a_disk_works", every_queue),
    ("disks::a_readonly_disk_cannot_be_written", readonly),
    ("disks::cache_modes", cache_modes),
];

const MIB: usize = 1 << 20;

/// Bytes that repeat nowhere.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}

fn same(rig: &Rig, a: &str, b: &str) -> Outcome<()> {
    let read = |name: &str| fs::read(rig.path(name)).map_err(|error| format!("read {name}: {error}"));
    let (a, b) = (read(a)?, read(b)?);
    match a.iter().zip(&b).position(|(a, b)| a != b) {
        None if a.len() == b.len() => Ok(()),
        place => Err(format!("the disks differ: lengths {} and {}, first at {place:?}", a.len(), b.len())),
    }
}

fn bit_for_bit(rig: &Rig) -> Outcome<()> {
    let from = rig.write("from", &noise(24 * MIB))?;
    let to = rig.blank("to", 24 * MIB as u64)?;
    // In pieces of many sizes: large, small and not a multiple of a page.
    let script = "
        dd if=/dev/vda of=/dev/vdb bs=1M count=16 2>/dev/null
        dd if=/dev/vda of=/dev/vdb bs=4k count=1024 skip=4096 seek=4096 oflag=direct iflag=direct 2>/dev/null
        dd if=/dev/vda of=/dev/vdb bs=512 count=8192 skip=40960 seek=40960 2>/dev/null
        sync; echo 3 >/proc/sys/vm/drop_caches; cmp /dev/vda /dev/vdb && echo GUEST-SAYS-SAME";
    let exit = rig.guest(script)?.disk(&from, ",readonly=on").disk(&to, "").finish()?;
    says(&exit.screen, "GUEST-SAYS-SAME")?;
    same(rig, "from", "to")
}

fn every_queue(rig: &Rig) -> Outcome<()> {
    let disk = rig.blank("disk", 8 * MIB as u64)?;
    let script = "
        ls /sys/block/vda/mq | wc -l
        for cpu in 0 1; do taskset -c $cpu dd if=/dev/vda of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null; done
        grep virtio /proc/interrupts | tr -s ' '";
    let exit = rig.guest(script)?.disk(&disk, ",queues=2").with(["--cpus", "2"]).finish()?;
    for queue in ["req.0", "req.1"] {
        let line = exit
            .screen
            .lines()
            .find(|line| line.trim_end().ends_with(queue))
            .ok_or_else(|| format!("no interrupt for {queue}\n{}", exit.screen))?;
        let count: u64 =
            line.split_whitespace().skip(1).take(2).filter_map(|count| count.parse::<u64>().ok()).sum();
        if count == 0 {
            return Err(format!("the interrupt of {queue} never came\n{}", exit.screen));
        }
    }
    Ok(())
}

fn readonly(rig: &Rig) -> Outcome<()> {
    let disk = rig.write("disk", &noise(MIB))?;
    rig.write("copy", &noise(MIB))?;
    let script =
        "cat /sys/block/vda/ro; dd if=/dev/zero of=/dev/vda bs=4k count=1 2>/dev/null || echo REFUSED";
    let exit = rig.guest(script)?.disk(&disk, ",readonly=on").finish()?;
    says(&exit.screen, "REFUSED")?;
    same(rig, "disk", "copy")
}

fn cache_modes(rig: &Rig) -> Outcome<()> {
    let script = "
        for disk in vda vdb vdc; do
            cat /sys/block/$disk/queue/write_cache
            dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>/dev/null
            dd if=/tmp/data of=/dev/$disk bs=64k conv=fsync 2>/dev/null
            echo 3 >/proc/sys/vm/drop_caches
            head -c 262144 /dev/$disk | cmp - /tmp/data && echo $disk-SAME
        done";
    let mut guest = rig.guest(script)?;
    for mode in ["none", "writeback", "writethrough"] {
        let disk = rig.blank(mode, MIB as u64)?;
        guest = guest.disk(&disk, &format!(",cache={mode}"));
    }
    let exit = guest.finish()?;
    ["vda-SAME", "vdb-SAME", "vdc-SAME", "write through"]
        .iter()
        .try_for_each(|words| says(&exit.screen, words))
}
