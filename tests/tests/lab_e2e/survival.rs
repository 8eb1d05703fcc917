//! Daemons that die, hang and come back under a guest that works with its disk: it notices a pause, and nothing else.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::rig::{BOOT, Rig, SOON, nothing_left_behind, processes, says};
use cleave_tests::vm::{Outcome, Vm};

pub const CASES: &[crate::Case] = &[
    ("survival::fio_sees_nothing_of_50_kills_of_its_daemon", ours),
    ("survival::fio_sees_nothing_of_50_kills_of_a_daemon_restarted_by_hand", by_hand),
    ("survival::a_stopped_daemon_is_found_and_replaced", stopped),
    ("survival::unbind_and_bind_with_and_without_the_daemon", unbind_and_bind),
    ("survival::kexec_with_and_without_the_daemon", kexec),
    ("survival::reboot_with_and_without_the_daemon", reboot),
];

const KILLS: u32 = 50;
/// systemd's boot takes about 25 s in an emulated host that has the machine for itself.
const SYSTEMD_BOOT: Duration = Duration::from_secs(150);
/// One pass of fio over its file, written and verified, with some kills on the way.
const FIO: Duration = Duration::from_secs(240);
/// The session looks every 3 s whether its rings move; then a request has to be answered by its deadline.
const HANG: Duration = Duration::from_secs(60);

fn signal(name: &str, pid: u32) -> Outcome<()> {
    let status = Command::new("kill").args([name, &pid.to_string()]).status();
    match status.map_err(|error| format!("kill: {error}"))? {
        status if status.success() => Ok(()),
        status => Err(format!("kill {name} {pid}: {status}")),
    }
}

/// The machine's one daemon, as soon as there is one other than `not`.
fn daemon_of(vm: &Vm, not: Option<u32>, within: Duration) -> Outcome<u32> {
    let deadline = Instant::now() + within;
    loop {
        if let [pid] = processes("cleave-block", Some(vm.pid()))[..]
            && Some(pid) != not
        {
            return Ok(pid);
        }
        if Instant::now() > deadline {
            return Err(format!("no other daemon than {not:?} came up within {within:?}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Lives from nothing to 1.2 s, never in the same order relative to what the guest does.
fn life(count: u32) -> Duration {
    Duration::from_millis(u64::from(count * 617 % 1200))
}

fn debian_disk() -> Outcome<PathBuf> {
    std::env::var_os("LAB_DISK0").map(PathBuf::from).ok_or("there is no disk in $LAB_DISK0".to_owned())
}

/// A Debian whose root is the device of `words`, logged in.
fn debian(rig: &Rig, words: &[&str]) -> Outcome<Vm> {
    let mut command = rig.cleave(["run", "--kernel"]);
    command.arg(&rig.debian.kernel).arg("--initrd").arg(&rig.debian.initrd);
    command.args(["--append", "console=ttyS0 root=/dev/vda quiet", "--cpus", "2", "--memory", "512M"]);
    let mut vm = Vm::start(command.args(words))?;
    vm.expect("cleave-guest login:", SYSTEMD_BOOT)?;
    vm.send("root")?;
    vm.expect("root@cleave-guest:~#", SYSTEMD_BOOT)?;
    Ok(vm)
}

/// fio writes all of a file at random and reads it back, each block with its checksum, again and again until it is told
/// to stop; the shell is free meanwhile.
fn start_fio(vm: &mut Vm) -> Outcome<()> {
    vm.send(
        "(while [ ! -e /run/enough ]; do fio --name=v --filename=/root/data --size=16M --rw=randwrite --bs=4k \
         --ioengine=libaio --iodepth=32 --direct=1 --verify=crc32c --verify_fatal=1 --output=/run/fio.log || break; \
         echo pass >>/run/passes; done; echo FIO-$((40 + 2)) after $(wc -l </run/passes) passes; \
         dmesg | grep -i 'error' | grep -v 'errors=') & sleep 1; echo STARTED-$((4 * 4))",
    )?;
    vm.expect("STARTED-16", SOON).map(|_| ())
}

/// Demands that fio has ended because it was told to, after whole passes without an error.
fn finish_fio(mut vm: Vm) -> Outcome<()> {
    vm.send("touch /run/enough; wait; tail -3 /run/fio.log; grep -c 'err= 0' /run/fio.log; echo CHECKED-$((5 * 5))")?;
    let said = vm.expect("CHECKED-25", FIO)?;
    says(&said, "FIO-42 after ")?;
    for bad in ["after 0 passes", "I/O error", "verify:", "bad magic", "Remounting filesystem read-only"] {
        if said.contains(bad) {
            return Err(format!("fio or the kernel noticed something ({bad}):\n{said}"));
        }
    }
    says(&said, "\r\n1\r\n")?;
    vm.send("systemctl poweroff")?;
    vm.finish(SYSTEMD_BOOT)?;
    nothing_left_behind()
}

fn ours(rig: &Rig) -> Outcome<()> {
    let disk = format!("{},queues=2,cache=none", debian_disk()?.display());
    let mut vm = debian(rig, &["--disk", &disk])?;
    start_fio(&mut vm)?;
    let mut last = None;
    for count in 1..=KILLS {
        // The daemon after the next comes after a pause, when the last ones ended soon.
        let pid = daemon_of(&vm, last, HANG)?;
        std::thread::sleep(life(count));
        signal("-KILL", pid)?;
        last = Some(pid);
    }
    daemon_of(&vm, last, HANG)?;
    // The table says so.
    vm.expect_error("was killed by signal 9", SOON)?;
    signal("-USR1", vm.pid())?;
    vm.expect_error("DEVICE", SOON)?;
    let line = vm.expect_error("signal 9", SOON)?;
    let line = line.lines().last().unwrap_or_default();
    let words: Vec<&str> = line.split_whitespace().collect();
    if words.first() != Some(&"disk0") || words.get(3) != Some(&KILLS.to_string().as_str()) {
        return Err(format!("the table's line of the disk is {line:?}, after {KILLS} kills"));
    }
    finish_fio(vm)
}

/// A daemon that is not the machine's, at `socket`.
fn start_daemon(rig: &Rig, socket: &Path, file: &Path, more: &[&str]) -> Outcome<Vm> {
    let mut command = rig.program("cleave-block");
    command.arg("--socket-path").arg(socket).arg("--blk-file").arg(file).args(more);
    Vm::start(&mut command)
}

fn end(daemon: Vm) -> Outcome<()> {
    signal("-KILL", daemon.pid())?;
    daemon.wait(SOON).map(|_| ())
}

fn by_hand(rig: &Rig) -> Outcome<()> {
    let (socket, disk) = (rig.path("hand.sock"), debian_disk()?);
    let flags = ["--num-queues", "2", "--cache", "none"];
    let mut daemon = start_daemon(rig, &socket, &disk, &flags)?;
    let device = format!("type=block,socket={},wait=30s", socket.display());
    let mut vm = debian(rig, &["--device", &device])?;
    start_fio(&mut vm)?;
    for count in 1..=KILLS {
        std::thread::sleep(life(count));
        end(daemon)?;
        // Away for a while, now and then.
        std::thread::sleep(life(count) / if count % 5 == 0 { 1 } else { 20 });
        daemon = start_daemon(rig, &socket, &disk, &flags)?;
    }
    let outcome = finish_fio_of_attached(vm);
    end(daemon)?;
    outcome.and_then(|()| nothing_left_behind())
}

fn finish_fio_of_attached(vm: Vm) -> Outcome<()> {
    match finish_fio(vm) {
        // Its daemon is not the machine's, and is there still.
        Err(error) if error.starts_with("processes were left behind") => Ok(()),
        other => other,
    }
}

/// Starts a tiny guest with a shell and one disk of its own, and reads from it.
fn shell_with(rig: &Rig, words: &[&str]) -> Outcome<Vm> {
    let mut vm = rig.shell().with(words).with(["--cpus", "2"]).start()?;
    vm.expect("SHELL", BOOT)?;
    reads(&mut vm, 1)?;
    Ok(vm)
}

/// Demands that the guest can read its disk; `mark` has to be new each time.
fn reads(vm: &mut Vm, mark: u32) -> Outcome<()> {
    vm.send(&format!(
        "dd if=/dev/vda of=/dev/null bs=4k count=16 iflag=direct 2>/dev/null && echo READ-$(({mark} * 3))."
    ))?;
    vm.expect(&format!("READ-{}.", mark * 3), HANG).map(|_| ())
}

fn stopped(rig: &Rig) -> Outcome<()> {
    let disk = rig.blank("disk", 4 << 20)?;
    let mut vm = shell_with(rig, &["--disk", &disk.display().to_string()])?;
    let pid = daemon_of(&vm, None, SOON)?;
    signal("-STOP", pid)?;
    // Answered by the successor, once the deadline has passed.
    reads(&mut vm, 2)?;
    let successor = daemon_of(&vm, Some(pid), SOON)?;
    if Path::new(&format!("/proc/{pid}")).exists() {
        return Err(format!("the stopped daemon {pid} is there beside its successor {successor}"));
    }
    vm.send("poweroff -f")?;
    vm.finish(SOON)?;
    nothing_left_behind()
}

fn unbind_and_bind(rig: &Rig) -> Outcome<()> {
    let (socket, disk) = (rig.path("bind.sock"), rig.blank("disk", 4 << 20)?);
    let daemon = start_daemon(rig, &socket, &disk, &[])?;
    let device = format!("type=block,socket={},wait=30s", socket.display());
    let mut vm = shell_with(rig, &["--device", &device])?;
    vm.send("cd /sys/bus/virtio/drivers/virtio_blk; d=$(echo virtio*)")?;
    vm.send("echo $d >unbind && echo $d >bind && echo BOUND-$((2 * 2)).")?;
    vm.expect("BOUND-4.", HANG)?;
    reads(&mut vm, 2)?;
    end(daemon)?;
    vm.send("echo $d >unbind; echo UNBOUND-$((3 * 3)).")?;
    vm.expect("UNBOUND-9.", HANG)?;
    // The driver reads the partition table, and waits for the daemon with that.
    vm.send("(echo $d >bind; echo BOUND-$((4 * 4)).) & echo GOES-ON-$((5 * 5)).")?;
    vm.expect("GOES-ON-25.", SOON)?;
    let daemon = start_daemon(rig, &socket, &disk, &[])?;
    vm.expect("BOUND-16.", HANG)?;
    reads(&mut vm, 3)?;
    vm.send("poweroff -f")?;
    vm.finish(SOON)?;
    end(daemon)?;
    nothing_left_behind()
}

/// The guest of a shell starts over by the command `again`, with its daemon there and without.
fn starts_over(
    rig: &Rig,
    mut vm: Vm,
    daemon: Vm,
    (socket, disk): (&Path, &Path),
    again: &str,
) -> Outcome<()> {
    vm.send(again)?;
    vm.expect("INIT-REACHED", BOOT)?;
    vm.expect("SHELL", BOOT)?;
    reads(&mut vm, 2)?;
    end(daemon)?;
    // With a request that nobody answers.
    vm.send(&format!(
        "(dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null) & sleep 1; {again}"
    ))?;
    vm.expect("INIT-REACHED", BOOT)?;
    let daemon = start_daemon(rig, socket, disk, &[])?;
    vm.expect("SHELL", BOOT)?;
    reads(&mut vm, 3)?;
    vm.send("poweroff -f")?;
    vm.finish(SOON)?;
    end(daemon)?;
    nothing_left_behind()
}

fn reboot(rig: &Rig) -> Outcome<()> {
    let (socket, disk) = (rig.path("reboot.sock"), rig.blank("disk", 4 << 20)?);
    let daemon = start_daemon(rig, &socket, &disk, &[])?;
    let device = format!("type=block,socket={},wait=30s", socket.display());
    let vm = shell_with(rig, &["--device", &device])?;
    starts_over(rig, vm, daemon, (&socket, &disk), "reboot -f")
}

/// The new kernel finds the device as the old one left it: running. Nobody has reset it, and no firmware has run.
fn kexec(rig: &Rig) -> Outcome<()> {
    let (socket, disk) = (rig.path("kexec.sock"), rig.blank("disk", 4 << 20)?);
    let daemon = start_daemon(rig, &socket, &disk, &[])?;
    let mut vm = rig.shell_with_kexec(2)?.device("block", &socket).with(["--cpus", "2"]).start()?;
    vm.expect("SHELL", BOOT)?;
    reads(&mut vm, 1)?;
    starts_over(rig, vm, daemon, (&socket, &disk), "/kexec")
}
