//! A whole Debian with systemd, its root on a disk in another process.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::rig::{Rig, SOON, nothing_left_behind, says};
use cleave_tests::vm::{Outcome, Vm};

pub const CASES: &[crate::Case] = &[
    ("debian::reaches_its_login_and_shuts_down", login),
    ("debian::checks_its_devices_after_a_reboot", reboot),
    ("debian::shuts_down_at_sigterm_as_by_its_power_button", power_button),
];

/// systemd's boot takes about 25 s in an emulated host that has a CPU of the machine for itself.
const BOOT: Duration = Duration::from_secs(300);

fn start(rig: &Rig, append: &str) -> Outcome<Vm> {
    let disk = std::env::var_os("LAB_DISK0").map(PathBuf::from).ok_or("there is no disk in $LAB_DISK0")?;
    let mut command = rig.cleave(["run", "--kernel"]);
    command.arg(&rig.debian.kernel).arg("--initrd").arg(&rig.debian.initrd);
    command.args(["--append", &format!("console=ttyS0 root=/dev/vda quiet {append}")]);
    command.args(["--cpus", "2", "--memory", "512M"]);
    command.args(["--disk", &format!("{},queues=2", disk.display())]);
    Vm::start(&mut command)
}

fn log_in(vm: &mut Vm) -> Outcome<()> {
    vm.expect("cleave-guest login:", BOOT)?;
    vm.send("root")?;
    vm.expect("root@cleave-guest:~#", BOOT)?;
    Ok(())
}

fn login(rig: &Rig) -> Outcome<()> {
    let mut vm = start(rig, "")?;
    log_in(&mut vm)?;
    vm.send("findmnt -no SOURCE,FSTYPE / ; nproc; systemctl is-system-running --wait")?;
    vm.expect("/dev/vda ext4", SOON)?;
    vm.expect("\r\n2\r\n", SOON)?;
    vm.expect("running", BOOT)?;
    vm.send("echo 3 >/proc/sys/vm/drop_caches; for c in 0 1; do taskset -c $c find /usr -type f | taskset -c $c head -300 | taskset -c $c xargs cat >/dev/null; done; grep -c . /proc/interrupts; awk '/req/ { print $NF, $2 + $3 }' /proc/interrupts; echo END-$((1 + 1))")?;
    let said = vm.expect("END-2", BOOT)?;
    for queue in ["req.0", "req.1"] {
        let used = said.lines().any(|line| {
            let mut words = line.split_whitespace();
            words.next().is_some_and(|name| name.ends_with(queue))
                && words.next().is_some_and(|count| count.parse::<u64>().is_ok_and(|count| count > 0))
        });
        if !used {
            return Err(format!("the vector of {queue} is not in use:\n{said}"));
        }
    }
    vm.send("systemctl poweroff")?;
    vm.finish(BOOT)?;
    nothing_left_behind()
}

fn reboot(rig: &Rig) -> Outcome<()> {
    let vm = start(rig, "systemd.show_status=0 cleave.check=reboot cleave.cpus=2 cleave.memory=512")?;
    vm.expect("cleave-check: rebooting", BOOT)?;
    vm.expect("cleave-check: came back from the reboot", BOOT)?;
    let exit = vm.finish(BOOT)?;
    says(&exit.screen, "cleave-check: passed")
}

fn power_button(rig: &Rig) -> Outcome<()> {
    let mut vm = start(rig, "")?;
    log_in(&mut vm)?;
    let status = Command::new("kill").args(["-TERM", &vm.pid().to_string()]).status();
    status.map_err(|error| format!("kill: {error}"))?;
    vm.finish(BOOT)?;
    nothing_left_behind()
}
