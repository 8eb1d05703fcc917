//! Kernels, vCPUs, memory; shutdown and reboot.

use crate::rig::{BOOT, Rig, SOON, nothing_left_behind, processes, says};
use cleave_tests::vm::Outcome;

pub const CASES: &[crate::Case] = &[
    ("boots::vmlinux_starts_and_its_poweroff_ends_cleave_with_0", vmlinux),
    ("boots::bzimage_starts", bzimage),
    ("boots::one_vcpu", one_vcpu),
    ("boots::two_vcpus", two_vcpus),
    ("boots::four_vcpus", four_vcpus),
    ("boots::eight_vcpus", eight_vcpus),
    ("boots::every_thread_is_confined_unless_told_otherwise", confined),
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

fn eight_vcpus(rig: &Rig) -> Outcome<()> {
    vcpus(rig, 8)
}

/// The name of each thread of a process, with the number of its seccomp filters.
fn filters(pid: u32) -> Outcome<Vec<(String, u32)>> {
    let fail = |error: std::io::Error| format!("the threads of {pid}: {error}");
    let field = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(|value| value.trim().to_owned()).ok_or(format!("no {name} in\n{status}"))
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).map_err(fail)? {
        let status = std::fs::read_to_string(entry.map_err(fail)?.path().join("status")).map_err(fail)?;
        let count =
            field(&status, "Seccomp_filters:")?.parse().map_err(|error| format!("{error}\n{status}"))?;
        found.push((field(&status, "Name:")?, count));
    }
    // KVM's own worker is a thread of whoever made the machine.
    found.retain(|(name, _)| !name.starts_with("kvm-"));
    found.sort();
    Ok(found)
}

fn confined(rig: &Rig) -> Outcome<()> {
    let disk = rig.blank("disk", 1 << 20)?;
    for (words, main, others) in [(&[][..], 1, 2), (&["--sandbox", "off"], 0, 0)] {
        let guest = rig.guest("dd if=/dev/vda of=/dev/null; echo READY; read -r line")?.disk(&disk, "");
        let mut vm = guest.with(words).start()?;
        vm.expect("READY", BOOT)?;
        let found = filters(vm.pid())?;
        let expected = [("cleave", main), ("disk0", others), ("vcpu0", others)];
        if found != expected.map(|(name, count)| (name.to_owned(), count)) {
            return Err(format!("the filters of each thread: {found:?}, not {expected:?}"));
        }
        vm.send("go on")?;
        vm.finish(SOON)?;
    }
    Ok(())
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
