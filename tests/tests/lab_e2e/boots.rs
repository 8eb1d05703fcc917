//! Kernels, vCPUs, memory; shutdown and reboot.

use crate::rig::{BOOT, Rig, SOON, nothing_left_behind, processes, says};
use cleave_tests::vm::Outcome;

pub const CASES: &[crate::Case] = &[
    ("boots::vmlinux_starts_and_its_poweroff_ends_cleave_with_0", vmlinux),
    ("boots::bzimage_starts", bzimage),
    ("boots::one_vcpu", one_vcpu),
    ("boots::two_vcpus", two_vcpus),
    ("boots::four_vcpus", four_vcpus),
    ("boots::memory_below_the_hole", memory_below_the_hole),
    ("boots::memory_above_the_hole", memory_above_the_hole),
    ("boots::memory_of_huge_pages", memory_of_huge_pages),
    ("boots::reboot_is_in_place_and_keeps_the_daemon", reboot),
    ("boots::a_config_file_says_the_same_as_flags", config_file),
];

fn vmlinux(rig: &Rig) -> Outcome<()> {
    rig.guest("true")?.finish()?;
    nothing_left_behind()
}

fn bzimage(rig: &Rig) -> Outcome<()> {
    rig.guest("true")?.kernel(&rig.bzimage).finish().map(|_| ())
}

fn vcpus(rig: &Rig, count: u32) -> Outcome<()> {
    // Each vCPU has to run something and to take interrupts of its own timer.
    let script =
        "for cpu in $(seq 0 $(($(nproc) - 1))); do taskset -c $cpu sh -c 'sleep 0.1; echo ran'; done";
    let exit = rig.guest(script)?.with(["--cpus", &count.to_string()]).finish()?;
    let ran = exit.screen.lines().filter(|line| line.trim() == "ran").count();
    if ran == count as usize { Ok(()) } else { Err(format!("{ran} of {count} vCPUs ran\n{}", exit.screen)) }
}

fn one_vcpu(rig: &Rig) -> Outcome<()> {
    vcpus(rig, 1)
}

fn two_vcpus(rig: &Rig) -> Outcome<()> {
    vcpus(rig, 2)
}

fn four_vcpus(rig: &Rig) -> Outcome<()> {
    vcpus(rig, 4)
}

const MEMORY: &str = "grep MemTotal /proc/meminfo; grep 'System RAM' /proc/iomem";

fn memory_below_the_hole(rig: &Rig) -> Outcome<()> {
    let exit = rig.guest(MEMORY)?.with(["--memory", "512M"]).finish()?;
    says(&exit.screen, "-1fffffff : System RAM")?;
    if exit.screen.contains("100000000-") {
        return Err(format!("there is memory at 4 GiB\n{}", exit.screen));
    }
    Ok(())
}

/// 4 GiB: 3 below the hole and 1 from 4 GiB on.
fn memory_above_the_hole(rig: &Rig) -> Outcome<()> {
    let exit = rig.guest(MEMORY)?.with(["--memory", "4G"]).finish()?;
    says(&exit.screen, "-bfffffff : System RAM")?;
    says(&exit.screen, "100000000-13fffffff : System RAM")
}

fn memory_of_huge_pages(rig: &Rig) -> Outcome<()> {
    let disk = rig.blank("disk", 1 << 20)?;
    let guest = rig.guest("dd if=/dev/vda of=/dev/null bs=64k")?.disk(&disk, "");
    guest.with(["--memory", "size=512M,backing=hugetlbfs,page-size=2M"]).finish().map(|_| ())
}

fn reboot(rig: &Rig) -> Outcome<()> {
    let disk = rig.blank("disk", 1 << 20)?;
    let script = "
        if [ \"$(head -c 6 /dev/vda)\" = second ]; then echo SECOND-BOOT; read -r line; exit; fi
        printf second | dd of=/dev/vda conv=notrunc 2>/dev/null; sync
        echo FIRST-BOOT; read -r line; reboot -f; sleep 100";
    let mut vm = rig.guest(script)?.disk(&disk, "").with(["--cpus", "2"]).start()?;
    vm.expect("FIRST-BOOT", BOOT)?;
    let before = processes("cleave-block", Some(vm.pid()));
    vm.send("go on")?;
    vm.expect("SECOND-BOOT", BOOT)?;
    let after = processes("cleave-block", Some(vm.pid()));
    if before.len() != 1 || before != after {
        return Err(format!("the daemon did not stay: processes {before:?}, after the reboot {after:?}"));
    }
    vm.send("go on")?;
    vm.finish(SOON)?;
    nothing_left_behind()
}

fn config_file(rig: &Rig) -> Outcome<()> {
    let guest = rig.guest("nproc; cat /proc/cmdline; ls /sys/block")?;
    let disk = rig.blank("disk", 1 << 20)?;
    let text = format!(
        "kernel = {:?}\ninitrd = {:?}\nappend = 'console=ttyS0 quiet from.file'\ncpus = 2\nmemory = '256M'\n\
         [[disk]]\npath = {disk:?}\nreadonly = true\n",
        rig.vmlinux,
        rig.path("initrd"),
    );
    drop(guest);
    let file = rig.write("vm.toml", text.as_bytes())?;
    let mut command = rig.cleave(["run", "--config"]);
    let vm = cleave_tests::vm::Vm::start(command.arg(file).args(["--cpus", "1"]))?;
    let exit = vm.finish(BOOT)?;
    says(&exit.screen, "from.file")?;
    says(&exit.screen, "vda")?;
    says(&exit.screen, "\r\n1\r\n")
}
