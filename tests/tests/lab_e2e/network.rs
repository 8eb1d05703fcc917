//! Guests on a network: cleave-net between a Debian and the host's bridge, and what is killed meanwhile.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::rig::{BOOT, Rig, SOON, nothing_left_behind, processes, says};
use cleave_tests::cache::Cache;
use cleave_tests::tools::Tools;
use cleave_tests::vm::{Outcome, Vm};

pub const CASES: &[crate::Case] = &[
    ("network::tcp_goes_on_while_the_daemon_is_killed_10_times", tcp),
    ("network::a_debian_gets_its_address_a_file_and_all_its_queues", whole),
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

/// A program of the lab's own network, ended with this.
struct Server(Child);

impl Server {
    fn start(name: &str, words: &[&str]) -> Outcome<Self> {
        let tools = Cache::open().and_then(|cache| Tools::open(&cache)).map_err(|error| error.to_string())?;
        let mut command = tools.command(name);
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null());
        command.spawn().map(Self).map_err(|error| format!("{name}: {error}"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Answers each request with the same file, until the machine is over.
fn serve_http(listener: TcpListener, content: Vec<u8>) {
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", content.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&content));
        }
    });
}

/// Types a command, and gives what it said until it ended well.
fn ask(vm: &mut Vm, command: &str, within: Duration) -> Outcome<String> {
    vm.send(&format!("{{ {command}; }} && echo DONE-$((6 * 7)) || echo FAILED-$((6 * 7))"))?;
    let said = vm.expect("-42", within)?;
    if said.ends_with("DONE-42") { Ok(said) } else { Err(format!("{command} failed:\n{said}")) }
}

/// Four vCPUs, four pairs of queues, and an address from dnsmasq.
fn whole(rig: &Rig) -> Outcome<()> {
    let _bridge = Bridge::make()?;
    let _dhcp = Server::start(
        "dnsmasq",
        &[
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--port=0",
            "--interface=br0",
            "--bind-interfaces",
            "--dhcp-range=10.78.0.50,10.78.0.60,1h",
            "--dhcp-leasefile=/run/dnsmasq.leases",
            "--pid-file=/run/dnsmasq.pid",
            "--user=root",
        ],
    )?;
    let failed = |error: io::Error| format!("listen: {error}");
    let listener = TcpListener::bind((HOST, 0)).map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    serve_http(listener, content()[..4 << 20].to_vec());
    let _iperf = Server::start("iperf3", &["--server", "--bind", HOST])?;
    let disk = std::env::var_os("LAB_DISK0").map(PathBuf::from).ok_or("there is no disk in $LAB_DISK0")?;
    let mut command = rig.cleave(["run", "--kernel"]);
    command.arg(&rig.debian.kernel).arg("--initrd").arg(&rig.debian.initrd);
    command.args(["--append", "console=ttyS0 root=/dev/vda quiet cleave.net=dhcp"]);
    command.args(["--cpus", "4", "--memory", "768M", "--disk", &disk.display().to_string()]);
    command.args(["--net", "tap=tap0,bridge=br0,queues=4"]);
    let mut vm = Vm::start(&mut command)?;
    vm.expect("cleave-guest login:", SYSTEMD_BOOT)?;
    vm.send("root")?;
    vm.expect("root@cleave-guest:~#", SYSTEMD_BOOT)?;
    ask(&mut vm, "n=$(ls /sys/bus/virtio/drivers/virtio_net/virtio*/net)", SOON)?;
    let said = ask(&mut vm, "systemctl is-active cleave-network; ip -4 -o address show $n", SOON)?;
    says(&said, "inet 10.78.0.5")?;
    let sum = format!("curl -sSf http://{HOST}:{port}/file | sha256sum");
    says(&ask(&mut vm, &sum, TRANSFER)?, &sha256(&content()[..4 << 20])?)?;
    offloads_are_on(&ask(&mut vm, "ethtool -k $n", SOON)?)?;
    for pairs in [4, 2] {
        ask(&mut vm, &format!("ethtool -L $n combined {pairs} || [ $? = 80 ]"), SOON)?;
        traffic(&mut vm, pairs)?;
    }
    vm.send("systemctl poweroff")?;
    vm.finish(SYSTEMD_BOOT)?;
    nothing_left_behind()
}

fn offloads_are_on(said: &str) -> Outcome<()> {
    for words in [
        "rx-checksumming: on",
        "tx-checksumming: on",
        "scatter-gather: on",
        "tcp-segmentation-offload: on",
        "tx-tcp-segmentation: on",
        "tx-tcp6-segmentation: on",
    ] {
        says(said, words)?;
    }
    Ok(())
}

/// Interrupts of each queue so far, by the queue's name.
fn interrupts(vm: &mut Vm) -> Outcome<Vec<(String, u64)>> {
    let said = ask(vm, "grep -E 'virtio[0-9]+-(in|out)put' /proc/interrupts", SOON)?;
    let counts = said.lines().filter_map(|line| {
        // The shell's own control sequence is before the first line.
        let mut words = line.split_whitespace().skip_while(|word| !word.ends_with(':'));
        words.next()?;
        let name = line.split_whitespace().last()?.to_owned();
        Some((name, words.map_while(|word| word.parse::<u64>().ok()).sum()))
    });
    Ok(counts.collect())
}

/// How long an interval of iperf3's was: `[SUM]   4.37-4.52   sec ...`.
fn seconds(line: &str) -> f64 {
    let interval = line.split_whitespace().find_map(|word| word.split_once('-'));
    let ends = interval.and_then(|(from, to)| Some((from.parse::<f64>().ok()?, to.parse::<f64>().ok()?)));
    ends.map_or(0.0, |(from, to)| to - from)
}

/// iperf3 with eight streams in both directions and a flood of pings: nothing stalls, and the queues that are to be in use are.
fn traffic(vm: &mut Vm, pairs: usize) -> Outcome<()> {
    let before = interrupts(vm)?;
    for reverse in ["", "--reverse"] {
        let command = format!("iperf3 --client {HOST} --time 6 --parallel 8 --format m {reverse} | grep SUM");
        let said = ask(vm, &command, TRANSFER)?;
        let rates: Vec<&str> = said.lines().filter(|line| line.contains("bits/sec")).collect();
        // Where eight streams share one emulated CPU, an interval may be over before anybody had a turn.
        let stalls = rates.iter().filter(|line| line.contains(" 0.00 Mbits/sec") && seconds(line) > 2.0);
        if !rates.last().is_some_and(|line| line.contains("receiver")) || stalls.count() > 0 {
            return Err(format!("iperf3 {reverse} stalled:\n{said}"));
        }
        let last = rates.last().unwrap_or(&"").trim();
        eprintln!("{pairs} pairs of queues, iperf3 {reverse}: {last}");
    }
    let said = ask(vm, &format!("ping -f -q -c 2000 {HOST}"), TRANSFER)?;
    says(&said, "2000 packets transmitted, 2000 received, 0% packet loss")?;
    let after = interrupts(vm)?;
    let used = before
        .iter()
        .zip(&after)
        .filter(|((name, before), (_, after))| name.contains("input") && after > before);
    let used: Vec<&str> = used.map(|((name, _), _)| name.as_str()).collect();
    // The tap device puts flows into queues by their hash: of four, one may stay empty.
    if used.len() > pairs || used.len() <= pairs / 2 {
        return Err(format!("{pairs} pairs of queues are to be in use, but these are: {used:?} ({after:?})"));
    }
    Ok(())
}

fn sha256(bytes: &[u8]) -> Outcome<String> {
    let failed = |error: io::Error| format!("sha256sum: {error}");
    let mut child =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(bytes).map_err(failed)?;
    }
    let output = child.wait_with_output().map_err(failed)?;
    Ok(String::from_utf8_lossy(&output.stdout).split(' ').next().unwrap_or_default().to_owned())
}

fn refused(rig: &Rig) -> Outcome<()> {
    let vm = rig.shell().with(["--net", "tap=tap0,bridge=br9"]).start()?;
    let exit = vm.wait(BOOT)?;
    exit.demand(2)?;
    says(&exit.errors, "cleave-net: there is no bridge br9")?;
    nothing_left_behind()
}
