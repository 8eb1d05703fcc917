//! cleave-net with programs nobody here wrote: QEMU as its frontend, a stock kernel as its driver.
//!
//! QEMU emulates the processor, so that no KVM is needed. It answers the control queue itself.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use cleave_tests::cache::Cache;
use cleave_tests::driver::Daemon;
use cleave_tests::guest;
use cleave_tests::kernel::Kernel;
use cleave_tests::network::{self, ip};
use cleave_tests::qemu;
use cleave_tests::tools::{Tools, qemu_command_in};
use cleave_tests::vm::Vm;

const HOST: &str = "10.79.0.1:9000";
const SIZE: usize = 64 << 20;
const BOOT: Duration = Duration::from_secs(120);
const TRANSFER: Duration = Duration::from_secs(240);

/// Fetches what the host has, and gives it back.
const SCRIPT: &str = r#"
set -e
ifconfig eth0 10.79.0.2 up
ping -c 3 10.79.0.1
echo "MTU $(cat /sys/class/net/eth0/mtu) PAIRS $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)"
echo BEGUN
nc 10.79.0.1 9000 </dev/null >/tmp/content
echo "GOT $(stat -c %s /tmp/content)"
nc 10.79.0.1 9000 </tmp/content
echo RETURNED
"#;

fn content() -> Vec<u8> {
    (0..SIZE / 8).flat_map(|n| (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

/// Gives the content to the first who connects, and takes it back from the second.
fn serve(listener: &TcpListener) -> io::Result<bool> {
    let content = content();
    listener.accept()?.0.write_all(&content)?;
    let mut back = Vec::new();
    listener.accept()?.0.read_to_end(&mut back)?;
    Ok(back == content)
}

fn qemu(cache: &Cache, daemon: &Daemon) -> Vm {
    let chardev = format!("socket,id=c0,path={},reconnect-ms=100", daemon.socket.display());
    let device = "virtio-net-pci,netdev=n0,mq=on,vectors=6,mac=52:54:00:00:00:01";
    let netdev = "vhost-user,id=n0,chardev=c0,queues=2";
    qemu::guest(cache, SCRIPT, &["-chardev", &chardev, "-netdev", netdev, "-device", device])
}

#[test]
fn a_stock_kernel_in_qemu_keeps_its_connections_while_the_daemon_is_killed() {
    if network::enter().is_none() {
        return;
    }
    let cache = Cache::open().unwrap();
    let mut daemon = Daemon::start("cleave-net", &["--tap", "tap0", "--queues", "2"]).unwrap();
    ip("address add 10.79.0.1/24 dev tap0");
    let listener = TcpListener::bind(HOST).unwrap();
    let server = thread::spawn(move || serve(&listener));
    let vm = qemu(&cache, &daemon);
    let said = vm.expect("BEGUN", BOOT).unwrap();
    assert!(said.contains("3 packets received") && said.contains("MTU 1500 PAIRS 2"), "{said}");
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(300));
        daemon.kill_and_restart().unwrap();
        let connected = |log: &str| log.matches("queue 0 runs").count();
        let (before, deadline) = (connected(&daemon.log()), Instant::now() + BOOT);
        while connected(&daemon.log()) == before {
            assert!(Instant::now() < deadline, "QEMU does not come back: {}", daemon.log());
            thread::sleep(Duration::from_millis(5));
        }
    }
    let said = vm.expect("RETURNED", TRANSFER).unwrap();
    assert!(said.contains(&format!("GOT {SIZE}")), "{said}");
    assert!(server.join().unwrap().unwrap(), "what came back is not what was sent");
    vm.expect("SCRIPT-ENDED 0", BOOT).unwrap();
    vm.finish(BOOT).unwrap();
    assert!(daemon.is_running(), "the daemon outlives its frontend");
}

#[test]
fn what_is_written_down_for_qemu_works_and_comes_back() {
    const SOCKET: &str = "/run/vm/net.sock";
    if network::enter().is_none() {
        return;
    }
    let cache = Cache::open().unwrap();
    let mut daemon = Daemon::start("cleave-net", &["--tap", "tap0"]).unwrap();
    ip("address add 10.79.0.1/24 dev tap0");
    let directory = tempfile::tempdir().unwrap();
    let initrd = directory.path().join("initrd");
    // While there is no daemon QEMU takes the guest's link down, and frames are lost.
    let script = "ifconfig eth0 10.79.0.2 up; ping -c 1 10.79.0.1; echo READY; read go; \
                  until ping -c 1 -W 1 10.79.0.1; do sleep 1; done";
    guest::with_script(&guest::initramfs(&cache).unwrap(), script, &initrd).unwrap();
    let words = qemu_command_in(include_str!("../../backends/net/README.md"));
    assert!(words.iter().any(|word| word.contains(SOCKET)), "{words:?}");
    let mut command = Command::new(Tools::open(&cache).unwrap().qemu_path());
    command.args(words.iter().map(|word| word.replace(SOCKET, daemon.socket.to_str().unwrap())));
    command.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]);
    command.arg("-kernel").arg(Kernel::of_guests(&cache).unwrap().bzimage()).arg("-initrd").arg(&initrd);
    let mut vm = Vm::start(command.args(["-append", "console=ttyS0 panic=-1 quiet"])).unwrap();
    vm.expect("1 packets received", BOOT).unwrap();
    vm.expect("READY", BOOT).unwrap();
    daemon.kill_and_restart().unwrap();
    vm.send("go").unwrap();
    vm.expect("1 packets received", BOOT).unwrap();
    vm.finish(BOOT).unwrap();
}
