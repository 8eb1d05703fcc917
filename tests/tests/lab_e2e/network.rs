//! Guests on a network: cleave-net between a Debian and the host's bridge, and what is killed meanwhile.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::rig::{BOOT, Rig, SOON, nothing_left_behind, processes, says};
use cleave_tests::vm::{Outcome, Vm};

pub const CASES: &[crate::Case] = &[
    ("network::tcp_goes_on_while_the_daemon_is_killed_10_times", tcp),
    ("network::a_tap_device_that_cannot_be_had_is_the_daemons_word", refused),
];

const KILLS: u32 = 10;
const HOST: &str = "10.78.0.1";
const GUEST: &str = "10.78.0.2";
/// Bytes of each transfer.
const SIZE: usize = 64 << 20;
/// systemd's boot takes about 25 s in an emulated host that has the machine for itself.
const SYSTEMD_BOOT: Duration = Duration::from_secs(150);
/// A transfer in an emulated host.
const TRANSFER: Duration = Duration::from_secs(300);

pub fn run(words: &str) -> Outcome<()> {
    let mut split = words.split_whitespace();
    let program = split.next().unwrap_or_default();
    let output = Command::new(program).args(split).output().map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{words}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// A bridge of the host's with its address, for as long as this is there.
struct Bridge;

impl Bridge {
    fn make() -> Outcome<Self> {
        // Where these are built in, there is nothing to load.
        let _ = run("modprobe -a tun bridge");
        let _ = run("ip link del br0");
        run("ip link add br0 type bridge")?;
        run(&format!("ip address add {HOST}/24 dev br0"))?;
        run("ip link set br0 up")?;
        Ok(Self)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = run("ip link del br0");
    }
}

/// Bytes that nobody could guess, and the same each time.
fn content() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(SIZE);
    while bytes.len() < SIZE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

/// Gives what it is asked for at the first connection, and takes it back at the second.
fn serve(listener: &TcpListener) -> io::Result<bool> {
    let content = content();
    let (mut stream, _) = listener.accept()?;
    stream.write_all(&content)?;
    drop(stream);
    let (stream, _) = listener.accept()?;
    let mut back = Vec::with_capacity(SIZE);
    TcpStream::take(stream, 2 * SIZE as u64).read_to_end(&mut back)?;
    Ok(back == content)
}

fn tcp(rig: &Rig) -> Outcome<()> {
    let _bridge = Bridge::make()?;
    let listener = TcpListener::bind((HOST, 9000)).map_err(|error| format!("listen: {error}"))?;
    let server = thread::spawn(move || serve(&listener));
    let disk = std::env::var_os("LAB_DISK0").map(PathBuf::from).ok_or("there is no disk in $LAB_DISK0")?;
    let mut command = rig.cleave(["run", "--kernel"]);
    command.arg(&rig.debian.kernel).arg("--initrd").arg(&rig.debian.initrd);
    command.args(["--append", &format!("console=ttyS0 root=/dev/vda quiet cleave.net={GUEST}/24,{HOST}")]);
    command.args(["--cpus", "2", "--memory", "512M", "--disk", &disk.display().to_string()]);
    command.args(["--net", "tap=tap0,bridge=br0,queues=2,mac=52:54:00:12:34:56"]);
    let mut vm = Vm::start(&mut command)?;
    vm.expect("cleave-guest login:", SYSTEMD_BOOT)?;
    vm.send("root")?;
    vm.expect("root@cleave-guest:~#", SYSTEMD_BOOT)?;
    looks_right(&mut vm)?;

    // A transfer each way; the shell has no other work. What comes is kept in memory, so that the disk is no bottleneck.
    let begun = Instant::now();
    vm.send(&format!(
        "cat </dev/tcp/{HOST}/9000 >/dev/shm/content; echo GOT-$((6 * 7)) $(stat -c %s /dev/shm/content)"
    ))?;
    let last = kill(&vm, KILLS / 2, None)?;
    let said = vm.expect("GOT-42 ", TRANSFER).and_then(|_| vm.expect("\r\n", SOON))?;
    says(&said, &SIZE.to_string())?;
    let there = begun.elapsed();
    vm.send(&format!("cat /dev/shm/content >/dev/tcp/{HOST}/9000; echo SENT-$((7 * 7))."))?;
    kill(&vm, KILLS - KILLS / 2, last)?;
    vm.expect("SENT-49.", TRANSFER)?;
    let same = server.join().map_err(|_| "the server failed".to_owned())?;
    if !same.map_err(|error| format!("the server: {error}"))? {
        return Err("what came back is not what was sent".to_owned());
    }
    eprintln!("64 MiB to the guest in {there:?}, back in {:?}, {KILLS} kills", begun.elapsed() - there);
    vm.send(&format!("ping -c 3 -i 0.2 -W 5 {HOST}"))?;
    vm.expect("3 packets transmitted, 3 received", SOON)?;
    link_follows(&mut vm)?;
    vm.send("systemctl poweroff")?;
    vm.finish(SYSTEMD_BOOT)?;
    if run("ip link show tap0").is_ok() {
        return Err("the tap device was left behind".to_owned());
    }
    nothing_left_behind()
}

/// The guest's interface is what was asked for, and somebody answers.
fn looks_right(vm: &mut Vm) -> Outcome<()> {
    vm.send("n=$(ls /sys/bus/virtio/drivers/virtio_net/virtio*/net); ip -o link show $n; ethtool -l $n; ethtool -k $n")?;
    vm.send(&format!("ping -c 3 -i 0.2 -W 5 {HOST}; echo LOOKED-$((8 * 8))."))?;
    let said = vm.expect("LOOKED-64.", SOON)?;
    for words in [
        "link/ether 52:54:00:12:34:56",
        "mtu 1500",
        "state UP",
        "rx-checksumming: on",
        "tx-checksumming: on",
        "tcp-segmentation-offload: on",
        "3 packets transmitted, 3 received",
    ] {
        says(&said, words)?;
    }
    let combined =
        said.lines().filter(|line| line.starts_with("Combined:") && line.trim_end().ends_with('2'));
    match combined.count() {
        2 => Ok(()),
        other => Err(format!("two pairs of queues are to be there and in use ({other}):\n{said}")),
    }
}

/// The guest's link is up or down as the tap device is.
fn link_follows(vm: &mut Vm) -> Outcome<()> {
    for (word, carrier, mark) in [("down", 0, 81), ("up", 1, 100)] {
        run(&format!("ip link set tap0 {word}"))?;
        vm.send(&format!(
            "until [ \"$(cat /sys/class/net/$n/carrier)\" = {carrier} ]; do sleep 0.1; done; echo LINK-$(({mark} + 1))."
        ))?;
        vm.expect(&format!("LINK-{}.", mark + 1), SOON)?;
    }
    Ok(())
}

/// Ends the machine's network daemon `count` times, each time another one.
fn kill(vm: &Vm, count: u32, mut last: Option<u32>) -> Outcome<Option<u32>> {
    for kill in 1..=count {
        let pid = daemon_of(vm, last)?;
        thread::sleep(Duration::from_millis(u64::from(kill * 617 % 1200)));
        run(&format!("kill -KILL {pid}"))?;
        last = Some(pid);
    }
    Ok(last)
}

fn daemon_of(vm: &Vm, not: Option<u32>) -> Outcome<u32> {
    let deadline = Instant::now() + SOON;
    loop {
        match processes("cleave-net", Some(vm.pid()))[..] {
            [pid] if Some(pid) != not => return Ok(pid),
            _ if Instant::now() > deadline => return Err("no network daemon came up".to_owned()),
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn refused(rig: &Rig) -> Outcome<()> {
    let vm = rig.shell().with(["--net", "tap=tap0,bridge=br9"]).start()?;
    let exit = vm.wait(BOOT)?;
    exit.demand(2)?;
    says(&exit.errors, "cleave-net: there is no bridge br9")?;
    nothing_left_behind()
}
