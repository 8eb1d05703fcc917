//! Guests on a switch: they reach one another, or the world alone, and go on when the switch is killed.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::network::run;
use crate::rig::{BOOT, Rig, SOON, appears, nothing_left_behind, processes, says};
use cleave_tests::cache::Cache;
use cleave_tests::tools::Tools;
use cleave_tests::vm::{Outcome, Vm};

pub const CASES: &[crate::Case] = &[
    ("switch::a_debian_gets_its_address_and_a_file_from_another_guest_while_the_switch_is_killed", fetch),
    ("switch::isolated_guests_get_their_addresses_from_the_uplink_and_reach_the_host_alone", isolated),
];

const SERVER: &str = "10.79.0.1";
const HOST: &str = "10.79.1.1";
const KILLS: u32 = 5;
/// systemd's boot takes about 25 s in an emulated host that has the machine for itself.
const SYSTEMD_BOOT: Duration = Duration::from_secs(150);
/// A transfer in an emulated host.
const TRANSFER: Duration = Duration::from_secs(300);

/// A switch that somebody runs beside the machines, and whoever sees to it that it is there.
struct Switch<'r> {
    rig: &'r Rig,
    directory: PathBuf,
    args: &'static [&'static str],
    process: Option<Vm>,
}

impl<'r> Switch<'r> {
    fn start(rig: &'r Rig, args: &'static [&'static str]) -> Outcome<Self> {
        let mut switch = Self { rig, directory: rig.path("switch"), args, process: None };
        switch.again()?;
        Ok(switch)
    }

    /// Starts it, or another one after it was killed.
    fn again(&mut self) -> Outcome<()> {
        let mut command = self.rig.program("cleave-net");
        command.arg("--switch").arg(&self.directory).args(["--ports", "2"]).args(self.args);
        self.process = Some(Vm::start(&mut command)?);
        appears(&self.port(1))
    }

    fn kill_and_restart(&mut self) -> Outcome<()> {
        // Dropping it kills it.
        drop(self.process.take());
        self.again()
    }

    fn port(&self, number: u32) -> PathBuf {
        self.directory.join(format!("port{number}"))
    }

    /// Ends it in order.
    fn finish(mut self) -> Outcome<()> {
        let process = self.process.take().ok_or("there is no switch")?;
        run(&format!("kill -TERM {}", process.pid()))?;
        process.finish(SOON)?;
        match self.port(0).exists() {
            true => Err("the switch left a socket behind".to_owned()),
            false => Ok(()),
        }
    }
}

/// A tiny guest with a shell, on a port of the switch.
fn tiny(rig: &Rig, socket: &Path) -> Outcome<Vm> {
    let net = format!("socket={}", socket.display());
    let vm = rig.shell().with(["--cpus", "1", "--memory", "512M", "--net", &net]).start()?;
    vm.expect("SHELL", BOOT)?;
    Ok(vm)
}

/// The word behind the last `mark`. A line may start with what tells a terminal of the shell's.
fn word(said: &str, mark: &str) -> Outcome<String> {
    let word = said.rsplit_once(mark).and_then(|(_, rest)| rest.split_whitespace().next());
    word.map(str::to_owned).ok_or_else(|| format!("nothing is behind {mark:?} in:\n{said}"))
}

fn fetch(rig: &Rig) -> Outcome<()> {
    let mut switch = Switch::start(rig, &[])?;
    let mut server = tiny(rig, &switch.port(0))?;
    server.send(&format!("ifconfig eth0 {SERVER} netmask 255.255.255.0 up; mkdir /tmp/www"))?;
    server.send("printf 'start 10.79.0.10\\nend 10.79.0.20\\ninterface eth0\\noption subnet 255.255.255.0\\n' >/tmp/dhcp; touch /tmp/leases; echo lease_file /tmp/leases >>/tmp/dhcp")?;
    server.send("udhcpd /tmp/dhcp; httpd -h /tmp/www; dd if=/dev/urandom of=/tmp/www/file bs=1M count=64")?;
    server.send("set $(md5sum /tmp/www/file); echo HAS-$((2 * 3)) $1 END-$((4 * 4)).")?;
    let sum = word(&server.expect("END-16.", TRANSFER)?, "HAS-6")?;

    let disk = std::env::var_os("LAB_DISK0").map(PathBuf::from).ok_or("there is no disk in $LAB_DISK0")?;
    let mut command = rig.cleave(["run", "--kernel"]);
    command.arg(&rig.debian.kernel).arg("--initrd").arg(&rig.debian.initrd);
    command.args(["--append", "console=ttyS0 root=/dev/vda quiet cleave.net=dhcp"]);
    command.args(["--cpus", "2", "--memory", "512M", "--disk", &disk.display().to_string()]);
    command.args(["--net", &format!("socket={}", switch.port(1).display())]);
    let mut debian = Vm::start(&mut command)?;
    debian.expect("cleave-guest login:", SYSTEMD_BOOT)?;
    debian.send("root")?;
    debian.expect("root@cleave-guest:~#", SYSTEMD_BOOT)?;
    debian.send("n=$(ls /sys/bus/virtio/drivers/virtio_net/virtio*/net); ip -4 -o addr show $n; ethtool -k $n; echo LOOKED-$((8 * 8)).")?;
    let said = debian.expect("LOOKED-64.", SOON)?;
    for words in ["10.79.0.1", "rx-checksumming: on", "tx-checksumming: on", "tcp-segmentation-offload: on"] {
        says(&said, words)?;
    }

    let begun = Instant::now();
    debian.send(&format!(
        "set $(curl -s --max-time 280 http://{SERVER}/file | md5sum); echo GOT-$((6 * 7)) $1 END-$((4 * 4))."
    ))?;
    for kill in 1..=KILLS {
        thread::sleep(Duration::from_millis(u64::from(kill * 617 % 1200)));
        switch.kill_and_restart()?;
    }
    let got = word(&debian.expect("END-16.", TRANSFER)?, "GOT-42")?;
    if got != sum {
        return Err(format!("what came has the sum {got}, what was sent {sum}"));
    }
    eprintln!("64 MiB from guest to guest in {:?}, {KILLS} kills", begun.elapsed());
    // Without being killed.
    let begun = Instant::now();
    debian.send(&format!(
        "set $(curl -s --max-time 280 http://{SERVER}/file | md5sum); echo GOT-$((7 * 7)) $1 END-$((4 * 4))."
    ))?;
    let got = word(&debian.expect("END-16.", TRANSFER)?, "GOT-49")?;
    if got != sum {
        return Err(format!("what came has the sum {got}, what was sent {sum}"));
    }
    eprintln!("64 MiB from guest to guest in {:?}", begun.elapsed());
    debian.send(&format!("ping -c 3 -i 0.2 -W 5 {SERVER}"))?;
    debian.expect("3 packets transmitted, 3 received", SOON)?;
    // One guest's end is not the other's.
    drop(server);
    debian.send("systemctl poweroff")?;
    debian.finish(SYSTEMD_BOOT)?;
    switch.finish()?;
    nothing_left_behind()
}

/// What leaves addresses to be had behind the uplink.
struct Dhcp(std::process::Child);

impl Dhcp {
    fn start() -> Outcome<Self> {
        let cache = Cache::open().map_err(|error| error.to_string())?;
        let tools = Tools::open(&cache).map_err(|error| error.to_string())?;
        let child = tools
            .command("dnsmasq")
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--interface=tap0"])
            .args(["--bind-interfaces", "--user=root", "--leasefile-ro", "--pid-file=", "--no-ping"])
            .arg("--dhcp-range=10.79.1.10,10.79.1.50,255.255.255.0,1h")
            .spawn()
            .map_err(|error| format!("dnsmasq: {error}"))?;
        Ok(Self(child))
    }
}

impl Drop for Dhcp {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Has a tiny guest ask for its address.
fn lease(vm: &mut Vm) -> Outcome<String> {
    vm.send("printf '#!/bin/sh\\n[ \"$1\" != bound ] || ifconfig $interface $ip netmask $subnet\\n' >/tmp/got; chmod +x /tmp/got; ifconfig eth0 up")?;
    vm.send("udhcpc -i eth0 -n -q -t 10 -s /tmp/got; set $(ip -4 -o addr show eth0); echo HAS-$((2 * 3)) ${4%/*} END-$((4 * 4)).")?;
    let address = word(&vm.expect("END-16.", SOON)?, "HAS-6")?;
    match address.starts_with("10.79.1.") {
        true => Ok(address),
        false => Err(format!("{address} is no address of the uplink's")),
    }
}

/// Whether `address` answers.
fn answers(vm: &mut Vm, address: &str, count: u32) -> Outcome<bool> {
    vm.send(&format!("ping -c {count} -W 2 {address}; echo PINGED-$((3 * 3))."))?;
    let said = vm.expect("PINGED-9.", SOON)?;
    Ok(said.contains(&format!("{count} packets received")))
}

fn isolated(rig: &Rig) -> Outcome<()> {
    // Where it is built in, there is nothing to load.
    let _ = run("modprobe tun");
    let mut switch = Switch::start(rig, &["--tap", "tap0", "--isolate"])?;
    run(&format!("ip address add {HOST}/24 dev tap0"))?;
    let dhcp = Dhcp::start()?;
    let (mut a, mut b) = (tiny(rig, &switch.port(0))?, tiny(rig, &switch.port(1))?);
    let (of_a, of_b) = (lease(&mut a)?, lease(&mut b)?);
    if of_a == of_b {
        return Err(format!("both have the address {of_a}"));
    }
    for kills in 0..2 {
        for (vm, name, other) in [(&mut a, "a", &of_b), (&mut b, "b", &of_a)] {
            if !answers(vm, HOST, 3)? {
                return Err(format!("{name} does not reach the host, after {kills} kills"));
            }
            if answers(vm, other, 2)? {
                return Err(format!("{name} reaches the other guest, after {kills} kills"));
            }
        }
        if kills == 0 {
            switch.kill_and_restart()?;
        }
    }
    drop(dhcp);
    for vm in [&mut a, &mut b] {
        vm.send("poweroff -f")?;
    }
    a.finish(SOON)?;
    b.finish(SOON)?;
    switch.finish()?;
    if run("ip link show tap0").is_ok() {
        return Err("the tap device was left behind".to_owned());
    }
    match processes("cleave-net", None)[..] {
        [] => nothing_left_behind(),
        _ => Err("a switch was left behind".to_owned()),
    }
}
