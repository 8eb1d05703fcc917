//! Daemons of others, daemons that die, daemons that misbehave: each costs at most its own device.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::rig::{BOOT, Rig, SOON, appears, nothing_left_behind, processes, says};
use cleave_tests::peers::{Fault, FaultyDaemon};
use cleave_tests::vm::{Outcome, Vm};

pub const CASES: &[crate::Case] = &[
    ("daemons::a_killed_daemon_costs_only_its_device", killed),
    ("daemons::a_killed_or_hung_daemon_has_a_successor", replaced),
    ("daemons::a_killed_vmm_leaves_no_daemon", killed_vmm),
    ("daemons::a_daemon_that_comes_up_later_is_waited_for", later),
    ("daemons::qemu_storage_daemon_serves_a_disk", qemu_storage_daemon),
    ("daemons::qemu_storage_daemon_is_killed_and_has_a_successor", qemu_storage_daemon_replaced),
    ("daemons::vhost_device_rng_feeds_hwrng", rng),
    ("daemons::a_daemon_that_falls_silent_costs_only_its_device", silent),
    ("daemons::a_daemon_that_stops_in_the_handshake_is_refused", stops_in_the_handshake),
];

/// Longer than the deadline of a request, with some patience for an emulated host.
const DEADLINE: Duration = Duration::from_secs(60);

/// Demands that the guest's shell still answers; `mark` has to be new each time.
fn alive(vm: &mut Vm, mark: u32) -> Outcome<()> {
    vm.send(&format!("echo alive-$(({mark} * 2))"))?;
    vm.expect(&format!("alive-{}", mark * 2), SOON).map(|_| ())
}

fn kill(pid: u32) -> Outcome<()> {
    signal("-KILL", pid)
}

fn signal(signal: &str, pid: u32) -> Outcome<()> {
    let status = Command::new("kill").args([signal, &pid.to_string()]).status();
    status.map(|_| ()).map_err(|error| format!("kill: {error}"))
}

/// The one daemon of a machine.
fn daemon(vm: &Vm) -> Outcome<u32> {
    match processes("cleave-block", Some(vm.pid()))[..] {
        [pid] => Ok(pid),
        ref other => Err(format!("expected one daemon, found {other:?}")),
    }
}

fn killed(rig: &Rig) -> Outcome<()> {
    let (first, second) = (rig.blank("first", 1 << 20)?, rig.blank("second", 1 << 20)?);
    let guest = rig.shell().disk(&first, ",restart=never").disk(&second, ",restart=never");
    let mut vm = guest.with(["--cpus", "2"]).start()?;
    vm.expect("SHELL", BOOT)?;
    alive(&mut vm, 1)?;
    let daemons = processes("cleave-block", Some(vm.pid()));
    let [first, _] = daemons[..] else { return Err(format!("expected two daemons, found {daemons:?}")) };
    kill(first)?;
    vm.expect_error("signal 9", SOON)?;
    alive(&mut vm, 2)?;
    // One of the two disks is there, whichever daemon it was; reading the other waits for ever.
    vm.send("for d in vda vdb; do (dd if=/dev/$d of=/dev/null bs=4k count=1 iflag=direct && echo READ-$((6 * 6))) & done")?;
    vm.expect("READ-36", SOON)?;
    alive(&mut vm, 3)?;
    vm.send("poweroff -f")?;
    vm.finish(DEADLINE)?;
    nothing_left_behind()
}

fn replaced(rig: &Rig) -> Outcome<()> {
    let disk = rig.blank("disk", 1 << 20)?;
    let mut vm = rig.shell().disk(&disk, "").with(["--cpus", "2"]).start()?;
    vm.expect("SHELL", BOOT)?;
    let read = "dd if=/dev/vda of=/dev/null bs=4k count=16 iflag=direct && echo READ";
    for mark in 1..=3 {
        kill(daemon(&vm)?)?;
        vm.expect_error("disk0 is back after", SOON)?;
        vm.send(&format!("{read}-$(({mark} * 7))"))?;
        vm.expect(&format!("READ-{}", mark * 7), SOON)?;
    }
    // With work for it, one that hangs is found, ended and replaced.
    signal("-STOP", daemon(&vm)?)?;
    vm.send(&format!("({read}-$((6 * 9))) &"))?;
    vm.expect_error("disk0 is lost: the daemon did not answer", DEADLINE)?;
    vm.expect_error("disk0 is back after", SOON)?;
    alive(&mut vm, 1)?;
    signal("-USR1", vm.pid())?;
    let table = vm.expect_error("disk0 ", SOON)?;
    says(&table, "RESTARTS")?;
    vm.send("poweroff -f")?;
    vm.finish(DEADLINE)?;
    nothing_left_behind()
}

fn killed_vmm(rig: &Rig) -> Outcome<()> {
    let disk = rig.blank("disk", 1 << 20)?;
    let vm = rig.shell().disk(&disk, "").start()?;
    vm.expect("SHELL", BOOT)?;
    kill(vm.pid())?;
    vm.wait(SOON)?;
    nothing_left_behind()
}

/// A daemon started by hand at `socket`.
fn block_daemon(rig: &Rig, socket: &Path, file: &Path) -> Outcome<Vm> {
    let mut command = rig.program("cleave-block");
    command.arg("--socket-path").arg(socket).arg("--blk-file").arg(file);
    Vm::start(&mut command)
}

fn later(rig: &Rig) -> Outcome<()> {
    let (socket, disk) = (rig.path("later.sock"), rig.blank("disk", 3 << 20)?);
    let guest = rig.guest("cat /sys/block/vda/size")?;
    let device = format!("type=block,socket={},wait=30s", socket.display());
    let vm = guest.with(["--device", &device]).start()?;
    std::thread::sleep(Duration::from_secs(2));
    let mut daemon = block_daemon(rig, &socket, &disk)?;
    let exit = vm.finish(BOOT)?;
    says(&exit.screen, "\n6144")?;
    // It was started by someone else: it stays.
    if daemon.is_running() { Ok(()) } else { Err("the attached daemon ended with the machine".to_owned()) }
}

/// The same work for any disk: write, drop the cache, read.
const WRITE_AND_READ: &str = "
    dd if=/dev/urandom of=/tmp/data bs=64k count=32 2>/dev/null
    dd if=/tmp/data of=/dev/vda bs=64k 2>/dev/null; sync; echo 3 >/proc/sys/vm/drop_caches
    head -c 2097152 /dev/vda | cmp - /tmp/data && echo SAME";

fn start_qemu_storage_daemon(socket: &Path, disk: &Path) -> Outcome<Vm> {
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!("driver=file,node-name=f,filename={}", disk.display()));
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on,num-queues=2",
        socket.display()
    ));
    let daemon = Vm::start(&mut command)?;
    appears(socket)?;
    Ok(daemon)
}

fn qemu_storage_daemon(rig: &Rig) -> Outcome<()> {
    let (socket, disk) = (rig.path("qsd.sock"), rig.blank("disk", 4 << 20)?);
    let _daemon = start_qemu_storage_daemon(&socket, &disk)?;
    let guest = rig.guest(WRITE_AND_READ)?.device("block", &socket).with(["--cpus", "2"]);
    says(&guest.finish()?.screen, "SAME")
}

/// It leaves its socket's file behind when it is killed, which its successor would not replace.
fn replace_qemu_storage_daemon(daemon: Vm, socket: &Path, disk: &Path) -> Outcome<Vm> {
    kill(daemon.pid())?;
    daemon.wait(SOON)?;
    std::fs::remove_file(socket).map_err(|error| format!("remove {}: {error}", socket.display()))?;
    start_qemu_storage_daemon(socket, disk)
}

/// A daemon nobody here wrote, which keeps no record of what is in flight. Killed idle it has a successor as if nothing had
/// happened; killed with a request that it may have served or not, it leaves a device that works after its next reset.
fn qemu_storage_daemon_replaced(rig: &Rig) -> Outcome<()> {
    let (socket, disk) = (rig.path("qsd.sock"), rig.blank("disk", 4 << 20)?);
    let daemon = start_qemu_storage_daemon(&socket, &disk)?;
    let mut vm = rig.shell().device("block", &socket).with(["--cpus", "2"]).start()?;
    vm.expect("SHELL", BOOT)?;
    let read = "dd if=/dev/vda of=/dev/null bs=4k count=16 iflag=direct && echo READ";
    vm.send(&format!("{read}-$((1 * 7))."))?;
    vm.expect("READ-7.", SOON)?;
    let daemon = replace_qemu_storage_daemon(daemon, &socket, &disk)?;
    vm.expect_error("block0 is back after", SOON)?;
    vm.send(&format!("{read}-$((2 * 7))."))?;
    vm.expect("READ-14.", SOON)?;
    signal("-STOP", daemon.pid())?;
    vm.send(&format!("({read}-$((3 * 7)).) &"))?;
    alive(&mut vm, 1)?;
    let daemon = replace_qemu_storage_daemon(daemon, &socket, &disk)?;
    vm.expect_error("block0 needs a reset by the guest's driver: 1 requests were with the daemon", SOON)?;
    vm.expect_error("block0 is back after", SOON)?;
    vm.send("reboot -f")?;
    vm.expect("SHELL", BOOT)?;
    vm.send(&format!("{read}-$((4 * 7))."))?;
    vm.expect("READ-28.", SOON)?;
    signal("-USR1", vm.pid())?;
    says(&vm.expect_error("qsd.sock", SOON)?, "block0  connected")?;
    vm.send("poweroff -f")?;
    vm.finish(DEADLINE)?;
    drop(daemon);
    nothing_left_behind()
}

fn rng(rig: &Rig) -> Outcome<()> {
    let socket = rig.path("rng.sock");
    let _daemon = Vm::start(Command::new(&rig.rng_daemon).arg("--socket-path").arg(&socket))?;
    // The daemon adds a number for each of its sockets.
    let socket = rig.path("rng.sock0");
    appears(&socket)?;
    let script = "cat /sys/class/misc/hw_random/rng_current; head -c 64 /dev/hwrng | wc -c";
    let exit = rig.guest(script)?.device("rng", &socket).finish()?;
    says(&exit.screen, "virtio_rng.0")?;
    says(&exit.screen, "\r\n64\r\n")
}

fn silent(rig: &Rig) -> Outcome<()> {
    let (socket, disk) = (rig.path("silent.sock"), rig.blank("disk", 1 << 20)?);
    let daemon =
        FaultyDaemon::listen(&socket, Fault::SilentOnceRunning).map_err(|error| error.to_string())?;
    let guest = rig.shell().disk(&disk, "").device("rng", &socket).with(["--cpus", "2"]);
    let mut vm = guest.start()?;
    vm.expect("SHELL", BOOT)?;
    alive(&mut vm, 1)?;
    if daemon.answered() < 5 {
        return Err(format!("the handshake ended after {} messages", daemon.answered()));
    }
    vm.send("dd if=/dev/vda of=/dev/null bs=4k count=16 iflag=direct && echo DISK-$((4 * 4))")?;
    vm.expect("DISK-16", SOON)?;
    // The reset of the device waits for its daemon; the other vCPU's shell does not wait for the reset.
    vm.send("(cd /sys/bus/virtio/drivers/virtio_rng && echo virtio* | cut -d' ' -f1 >unbind; echo UNBOUND-$((3 * 3))) &")?;
    let begun = Instant::now();
    alive(&mut vm, 2)?;
    vm.expect("UNBOUND-9", DEADLINE)?;
    let took = begun.elapsed();
    alive(&mut vm, 3)?;
    vm.send("poweroff -f")?;
    vm.finish(DEADLINE).map_err(|error| format!("(the reset took {took:?}) {error}"))?;
    nothing_left_behind()
}

fn stops_in_the_handshake(rig: &Rig) -> Outcome<()> {
    let socket = rig.path("half.sock");
    let _daemon =
        FaultyDaemon::listen(&socket, Fault::StopsInTheHandshake).map_err(|error| error.to_string())?;
    let device = format!("type=rng,socket={},wait=1s,id=half", socket.display());
    let exit = rig.shell().with(["--device", &device]).start()?.wait(DEADLINE)?;
    exit.demand(4)?;
    says(&exit.errors, "half")?;
    nothing_left_behind()
}
