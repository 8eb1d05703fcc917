//! Disks served by `cleave-block`, seen from the guest and compared on the host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::rig::{Rig, says};
use cleave_tests::driver::{BlockDriver, Daemon, IoStatus, RequestKind};
use cleave_tests::vm::Outcome;

pub const CASES: &[crate::Case] = &[
    ("disks::what_the_guest_writes_is_on_the_host_bit_for_bit", bit_for_bit),
    ("disks::every_queue_of_a_disk_works", every_queue),
    ("disks::a_readonly_disk_cannot_be_written", readonly),
    ("disks::cache_modes", cache_modes),
    ("disks::what_is_discarded_of_a_block_device_is_given_back", discard_of_a_device),
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

/// A file as a block device of the lab's machine, detached when it is dropped.
struct Loop(String);

impl Loop {
    fn attach(file: &Path) -> Outcome<Self> {
        run(Command::new("modprobe").arg("loop"))?;
        let device = run(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
        Ok(Self(device.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// Runs a program to its end and gives what it printed.
fn run(command: &mut Command) -> Outcome<String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// On a device DISCARD and WRITE_ZEROES are ioctls of the host's or their io_uring commands, and not holes in a file. The
/// loop device makes holes of them in the file below, where they can be seen.
fn discard_of_a_device(rig: &Rig) -> Outcome<()> {
    const SECTORS: u32 = 8 * MIB as u32 / 512;
    for cache in ["writeback", "none"] {
        let file = rig.write("below", &noise(8 * MIB))?;
        let device = Loop::attach(&file)?;
        let daemon = Daemon::start_other(&rig.daemon("cleave-block"), |socket| {
            let socket = socket.display().to_string();
            ["--socket-path", &socket, "--blk-file", &device.0, "--cache", cache].map(str::to_owned).to_vec()
        });
        let daemon = daemon.map_err(|error| error.to_string())?;
        discard_in_parts(&daemon, &file, SECTORS).map_err(|error| format!("--cache {cache}: {error}"))?;
    }
    Ok(())
}

fn discard_in_parts(daemon: &Daemon, below: &Path, sectors: u32) -> Outcome<()> {
    let told = |error: cleave_tests::driver::DriverError| error.to_string();
    let allocated = || {
        let meta = fs::metadata(below).map_err(|error| error.to_string())?;
        Ok::<_, String>(meta.blocks() * 512)
    };
    let mut driver = BlockDriver::connect(&daemon.socket, 1).map_err(told)?;
    let quarter = sectors / 4;
    let parts = [
        (RequestKind::Discard, 0),
        // VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP.
        (RequestKind::WriteZeroes, 1),
        // Last: where the file system below cannot zero a range, as a tmpfs cannot, the kernel takes the device for one that
        // can write no zeroes by itself from then on.
        (RequestKind::WriteZeroes, 0),
    ];
    let whole = allocated()?;
    for (at, (kind, flags)) in (0..).zip(parts) {
        let start = u64::from(at * quarter);
        let status = driver.deallocate(kind, &[(start, quarter, flags)]).map_err(told)?;
        let (read, bytes) = driver.read(start, 1 << 20).map_err(told)?;
        if (status, read) != (IoStatus::Ok, IoStatus::Ok) || bytes.iter().any(|byte| *byte != 0) {
            return Err(format!(
                "{kind:?} with flags {flags}: {status:?}, then {read:?} of what is not zeros"
            ));
        }
    }
    if driver.flush().map_err(told)? != IoStatus::Ok {
        return Err("FLUSH failed".to_owned());
    }
    let (left, read) = (allocated()?, driver.read(u64::from(3 * quarter), 1 << 20).map_err(told)?);
    let file = fs::read(below).map_err(|error| error.to_string())?;
    let tail = 3 * quarter as usize * 512;
    if read != (IoStatus::Ok, file[tail..tail + MIB].to_vec()) || file[tail..] != noise(8 * MIB)[tail..] {
        return Err("what was not discarded has changed".to_owned());
    }
    if file[..tail].iter().any(|byte| *byte != 0) {
        return Err("what was discarded is there still".to_owned());
    }
    // Two of the three quarters are holes; what becomes of the one to be kept allocated is the host's business.
    let given_back = whole.saturating_sub(left);
    if given_back < u64::from(2 * quarter) * 512 {
        return Err(format!("only {given_back} of {whole} bytes were given back"));
    }
    Ok(())
}
