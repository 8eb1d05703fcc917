//! SCSI disks and CD-ROM drives in a Debian guest, with the tools that people use on them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cleave_tests::cache::Cache;
use cleave_tests::tools::Tools;
use cleave_tests::vm::{Outcome, Vm};

use crate::rig::{Rig, SOON, nothing_left_behind, processes, says};

pub const CASES: &[crate::Case] = &[
    ("scsi::a_disk_answers_the_tools_and_its_daemon_may_die", disk),
    ("scsi::a_cdrom_is_mounted_ejected_and_changed", cdrom),
    ("scsi::units_come_go_and_grow_under_the_guest", units),
];

const KILLS: u32 = 15;
/// systemd's boot takes about 25 s in an emulated host that has the machine for itself.
const BOOT: Duration = Duration::from_secs(200);
const FIO: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;

/// A Debian with `words`, logged in; its root is the lab's disk.
fn debian(rig: &Rig, words: &[&str]) -> Outcome<Vm> {
    let root = std::env::var_os("LAB_DISK0").map(PathBuf::from).ok_or("there is no disk in $LAB_DISK0")?;
    let mut command = rig.cleave(["run", "--kernel"]);
    command.arg(&rig.debian.kernel).arg("--initrd").arg(&rig.debian.initrd);
    command.args(["--append", "console=ttyS0 root=/dev/vda quiet", "--cpus", "2", "--memory", "512M"]);
    command.arg("--disk").arg(root);
    let mut vm = Vm::start(command.args(words))?;
    vm.expect("cleave-guest login:", BOOT)?;
    vm.send("root")?;
    vm.expect("root@cleave-guest:~#", BOOT)?;
    run(&mut vm, "stty cols 500; PS1=; modprobe -a sg sr_mod; udevadm settle", SOON)?;
    Ok(vm)
}

/// What a command in the guest says; it has to end well.
fn run(vm: &mut Vm, command: &str, within: Duration) -> Outcome<String> {
    vm.send(&format!("{command}; echo \"ENDED-$((40 + 2)) WITH $?.\""))?;
    let said = vm.expect("ENDED-42 WITH ", within)?;
    let code = vm.expect(".", within)?;
    match code.as_str() {
        "0." => Ok(said),
        code => Err(format!("'{command}' ended with {code}\n{said}")),
    }
}

/// Commands, and what each has to say.
fn each_says(vm: &mut Vm, commands: &[(&str, &[&str])]) -> Outcome<()> {
    for (command, wanted) in commands {
        let said = run(vm, command, SOON)?;
        for words in *wanted {
            says(&said, words).map_err(|error| format!("{command}: {error}"))?;
        }
    }
    Ok(())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// `cleave-scsi ctl`.
fn ctl(rig: &Rig, words: &[&str]) -> Outcome<String> {
    let output = rig.program("cleave-scsi").arg("ctl").arg(rig.path("ctl")).args(words).output();
    let output = output.map_err(|error| format!("ctl: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn kill_scsi(vm: &Vm, not: Option<u32>) -> Outcome<u32> {
    let deadline = Instant::now() + SOON;
    loop {
        match processes("cleave-scsi", Some(vm.pid()))[..] {
            [pid] if Some(pid) != not => {
                let status = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
                status.map_err(|error| format!("kill: {error}"))?;
                return Ok(pid);
            }
            _ if Instant::now() > deadline => return Err("no SCSI daemon came up".to_owned()),
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn disk(rig: &Rig) -> Outcome<()> {
    let (image, slow) = (rig.blank("disk", 64 * MIB)?, rig.blank("slow", 8 * MIB)?);
    let controller = format!("queues=2,state={}", text(&rig.path("state")));
    let scsi = format!("disk={},lun=1,serial=CLEAVE1,wwn=0x5000000000000abc", text(&image));
    let slow = format!("disk={},lun=3,throttle.iops-total=1,throttle.iops-size=4K", text(&slow));
    let words = ["--scsi", &scsi, "--scsi", &slow, "--scsi-controller", &controller];
    let mut vm = debian(rig, &words)?;
    // Named by their addresses: the order of sda and sdb is the kernel's affair.
    let find = "d=/dev/$(basename /sys/bus/scsi/devices/0:0:0:1/block/*); s=/dev/$(basename /sys/bus/scsi/devices/0:0:0:3/block/*)";
    run(&mut vm, find, SOON)?;
    each_says(
        &mut vm,
        &[
            ("lsscsi", &["[0:0:0:1]", "disk", "CLEAVE", "VIRTUAL-DISK", "[0:0:0:3]"]),
            ("sg_inq $d", &["Vendor identification: CLEAVE", "Unit serial number: CLEAVE1", "SPC-4"]),
            (
                "sg_vpd -a $d",
                &[
                    "Unit serial number: CLEAVE1",
                    "0x5000000000000abc",
                    "Block limits VPD page",
                    "Non-rotating medium",
                ],
            ),
            ("sg_readcap -l $d", &["Last LBA=131071", "Logical block length=512 bytes"]),
            ("sg_readcap -1 $d 2>/dev/null || sg_readcap $d", &["131071"]),
            ("sg_luns $d", &["0001000000000000", "0003000000000000"]),
            (
                "sg_opcodes $d",
                &["Read(10)", "Unmap", "Compare and write", "Persistent reserve out, register"],
            ),
            ("sg_modes $d", &["Caching", "Control"]),
            ("sg_turs -v $d; sg_requests $d; sg_sync $d; sg_verify --lba=0 --count=8 $d", &[]),
            (
                "sdparm --clear=WCE $d; sdparm --get=WCE $d; sdparm --set=WCE $d; sdparm --get=WCE $d; true",
                &["WCE           1", "WCE           0"],
            ),
        ],
    )?;
    each_says(
        &mut vm,
        &[
            ("sg_persist --out --register --param-sark=abc $d && sg_persist --in -k $d", &["0xabc"]),
            (
                "sg_persist --out --reserve --param-rk=abc --prout-type=1 $d && sg_persist --in -r $d",
                &["Write Exclusive"],
            ),
            (
                "sg_persist --out --release --param-rk=abc --prout-type=1 $d && sg_persist --in -r $d",
                &["NO reservation held"],
            ),
            (
                "head -c 65536 /dev/urandom >/run/a && dd if=/run/a of=$d oflag=direct bs=64k && sg_write_same --unmap --lba=8 --num=8 --in=/dev/zero --xferlen=512 $d; cmp -n 4096 /run/a $d && dd if=$d bs=4k skip=1 count=1 iflag=direct | tr -d '\\0' | wc -c",
                &["\n0"],
            ),
            (
                "sg_unmap --lba=32 --num=32 $d; dd if=$d bs=512 skip=32 count=32 iflag=direct | tr -d '\\0' | wc -c",
                &["\n0"],
            ),
            (
                "cat /sys/block/${d#/dev/}/queue/discard_max_bytes; blkdiscard $d && dd if=$d bs=64k count=1 iflag=direct | tr -d '\\0' | wc -c",
                &["\n0"],
            ),
        ],
    )?;
    stalled(&mut vm)?;
    verified_under_kills(&mut vm)?;
    each_says(&mut vm, &[("sg_persist --in -k $d", &["0xabc"])])?;
    vm.send("systemctl poweroff")?;
    vm.finish(BOOT)?;
    nothing_left_behind()
}

/// A request that waits for its rate limit is ended by a reset of its unit; others go on meanwhile.
fn stalled(vm: &mut Vm) -> Outcome<()> {
    run(
        vm,
        "(dd if=$s of=/dev/null bs=4k count=6 iflag=direct; echo SLOW-$((5 * 5))) 2>/dev/null & sleep 1",
        SOON,
    )?;
    each_says(
        vm,
        &[
            ("sg_reset --device $s", &[]),
            ("sg_turs $s; dd if=$d of=/dev/null bs=4k count=64 iflag=direct", &[]),
        ],
    )?;
    vm.expect("SLOW-25", SOON)?;
    each_says(vm, &[("dmesg | tail -5", &[])])
}

fn verified_under_kills(vm: &mut Vm) -> Outcome<()> {
    vm.send(
        "fio --name=v --filename=$d --size=48M --rw=randwrite --bs=4k --ioengine=libaio --iodepth=32 --direct=1 \
         --verify=crc32c --verify_fatal=1 --output=/run/fio.log; echo FIO-$((40 + 2)) WITH $?.",
    )?;
    let mut last = None;
    for kill in 1..=KILLS {
        last = Some(kill_scsi(vm, last)?);
        std::thread::sleep(Duration::from_millis(u64::from(kill * 617 % 900)));
    }
    vm.expect("FIO-42 WITH 0.", FIO)?;
    each_says(vm, &[("grep -c 'err= 0' /run/fio.log; dmesg | grep -c 'I/O error' | grep -x 0", &["1"])])
}

/// An ISO image with `content` in a file of its own.
fn iso(rig: &Rig, name: &str, content: &[u8]) -> Outcome<PathBuf> {
    let directory = rig.path(&format!("{name}.d"));
    let made = fs::create_dir(&directory).and_then(|()| fs::write(directory.join("content"), content));
    made.map_err(|error| format!("{name}: {error}"))?;
    let cache = Cache::open().map_err(|error| error.to_string())?;
    let tools = Tools::open(&cache).map_err(|error| error.to_string())?;
    let path = rig.path(name);
    let mut command = tools.command("xorriso");
    command.args(["-as", "mkisofs", "-quiet", "-R", "-J", "-V", "CLEAVE", "-o"]).arg(&path).arg(&directory);
    let output = command.output().map_err(|error| format!("xorriso: {error}"))?;
    match output.status.success() {
        true => Ok(path),
        false => Err(format!("xorriso: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// Bytes that nobody could guess, and the same each time.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// As `cksum` of the guest says it.
fn sum(path: &Path) -> Outcome<String> {
    let output = Command::new("cksum").arg(path).output().map_err(|error| format!("cksum: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(said.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
}

fn cdrom(rig: &Rig) -> Outcome<()> {
    let (one, two) = (iso(rig, "one.iso", &content(1, 9 << 20))?, iso(rig, "two.iso", &content(2, 5 << 20))?);
    let controller = format!("control={},state={}", text(&rig.path("ctl")), text(&rig.path("state")));
    let mut vm = debian(rig, &["--cdrom", &text(&one), "--scsi-controller", &controller])?;
    let (first, second) = (sum(&rig.path("one.iso.d/content"))?, sum(&rig.path("two.iso.d/content"))?);
    each_says(
        &mut vm,
        &[
            ("lsscsi", &["cd/dvd", "CLEAVE", "VIRTUAL-DVD-ROM"]),
            ("sg_inq /dev/sr0", &["RMB=1", "cd/dvd"]),
            ("mount -o ro /dev/sr0 /mnt && cksum </mnt/content", &[&first]),
            ("cksum </dev/sr0", &[&sum(&one)?]),
        ],
    )?;
    // Mounted, it is locked in, also for a successor of the daemon.
    for round in 0..2 {
        let refused = ctl(rig, &["eject", "unit=0"]).err().ok_or("a mounted medium was taken out")?;
        says(&refused, "the guest has locked the tray")?;
        if round == 0 {
            kill_scsi(&vm, None)?;
            run(&mut vm, "echo 3 >/proc/sys/vm/drop_caches; cksum </mnt/content", SOON)?;
        }
    }
    // Asked to eject it, the guest's udev does so, mounted or not, some time in the next seconds.
    run(&mut vm, "sleep 5; udevadm settle", SOON)?;
    run(&mut vm, "umount /mnt; eject /dev/sr0", SOON)?;
    says(&ctl(rig, &["query-units"])?, "\"tray-open\": true")?;
    ctl(rig, &["change", "unit=0", &format!("path={}", text(&two))])?;
    each_says(
        &mut vm,
        &[("until mount -o ro /dev/sr0 /mnt; do sleep 1; done; cksum </mnt/content", &[&second])],
    )?;
    // What is in the drive stays there when the daemon dies.
    kill_scsi(&vm, None)?;
    each_says(&mut vm, &[("umount /mnt; sleep 1; cksum </dev/sr0", &[&sum(&two)?])])?;
    // The guest's udev locks what is put in, and takes it out itself when it is asked to.
    if let Err(refused) = ctl(rig, &["eject", "unit=0"]) {
        says(&refused, "it has been asked to eject")?;
    }
    let deadline = Instant::now() + SOON;
    while says(&ctl(rig, &["query-units"])?, "\"tray-open\": true").is_err() {
        if Instant::now() > deadline {
            return Err("the guest does not eject what it is asked to".to_owned());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    each_says(
        &mut vm,
        &[("sg_turs /dev/sr0 2>&1 | head -3; ! dd if=/dev/sr0 of=/dev/null count=1 2>/dev/null", &[])],
    )?;
    ctl(rig, &["change", "unit=0", &format!("path={}", text(&one))])?;
    each_says(
        &mut vm,
        &[(
            "until mount -o ro /dev/sr0 /mnt; do sleep 1; done; cksum </mnt/content && umount /mnt",
            &[&first],
        )],
    )?;
    vm.send("systemctl poweroff")?;
    vm.finish(BOOT)?;
    nothing_left_behind()
}

fn units(rig: &Rig) -> Outcome<()> {
    let (image, more) = (rig.blank("disk", 16 * MIB)?, rig.blank("more", 32 * MIB)?);
    let scsi = format!("disk={}", text(&image));
    let controller = format!("control={}", text(&rig.path("ctl")));
    let mut vm = debian(rig, &["--scsi", &scsi, "--scsi-controller", &controller])?;
    let size = "cat /sys/bus/scsi/devices/0:0:0:0/block/*/size";
    each_says(&mut vm, &[(size, &["32768"])])?;
    ctl(rig, &["add-disk", &format!("disk={}", text(&more)), "lun=5"])?;
    let there = "until [ -e /sys/bus/scsi/devices/0:0:0:5/block ]; do sleep 0.2; done; udevadm settle; n=/dev/$(basename /sys/bus/scsi/devices/0:0:0:5/block/*)";
    run(&mut vm, there, SOON)?;
    each_says(
        &mut vm,
        &[(
            "mke2fs -q $n && mount $n /mnt && cp /bin/bash /mnt && umount /mnt && mount $n /mnt && cmp /bin/bash /mnt/bash && umount /mnt && blockdev --getsize64 $n",
            &["33554432"],
        )],
    )?;
    fs::OpenOptions::new()
        .write(true)
        .open(&more)
        .and_then(|file| file.set_len(48 * MIB))
        .map_err(|error| format!("grow: {error}"))?;
    ctl(rig, &["resize", "unit=5"])?;
    run(&mut vm, "until [ \"$(blockdev --getsize64 $n)\" = 50331648 ]; do sleep 0.2; done", SOON)?;
    ctl(rig, &["remove", "unit=5"])?;
    run(&mut vm, "while [ -e /sys/bus/scsi/devices/0:0:0:5 ]; do sleep 0.2; done", SOON)?;
    each_says(&mut vm, &[("lsscsi | grep -c disk", &["1"])])?;
    vm.send("systemctl poweroff")?;
    vm.finish(BOOT)?;
    nothing_left_behind()
}
