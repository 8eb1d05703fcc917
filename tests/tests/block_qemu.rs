//! cleave-block with programs nobody here wrote: QEMU as its frontend, a stock kernel as its driver, and QEMU's locks.
//!
//! QEMU emulates the processor, so that no KVM is needed.

mod common;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cleave_tests::cache::Cache;
use cleave_tests::driver::Daemon;
use cleave_tests::guest;
use cleave_tests::kernel::Kernel;
use cleave_tests::qemu;
use cleave_tests::tools::{Tools, qemu_command_in};
use cleave_tests::vm::Vm;
use common::{MIB, disk, pattern, start};
use rustix::process::Signal;

/// Writes to both ends of the disk from both processors, reads all back past the page cache, and says what it sees.
const SCRIPT: &str = r#"
set -e
cd /sys/block/vda
echo "SIZE $(cat size) CACHE $(cat queue/write_cache | tr ' ' -) SERIAL $(cat serial) QUEUES $(ls mq | wc -l) RO $(cat ro)"
cd /tmp
dd if=/dev/urandom of=a bs=1M count=4 2>/dev/null
dd if=/dev/urandom of=b bs=1M count=4 2>/dev/null
taskset 1 dd if=a of=/dev/vda bs=4k oflag=direct 2>/dev/null &
taskset 2 dd if=b of=/dev/vda bs=64k seek=192 oflag=direct 2>/dev/null
wait
dd if=a of=/dev/vda bs=512 count=3 seek=16385 2>/dev/null
sync
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/vda bs=1M count=4 2>/dev/null | cmp - a
dd if=/dev/vda bs=1M skip=12 count=4 2>/dev/null | cmp - b
echo "FIRST $(md5sum < a | cut -c1-32) SECOND $(md5sum < b | cut -c1-32)"
grep virtio0-req /proc/interrupts
echo VERIFIED
"#;

fn md5(bytes: &[u8]) -> String {
    use std::io::Write;
    let mut child = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("md5sum, of coreutils");
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()[..32].to_owned()
}

fn qemu(cache: &Cache, daemon: &Daemon, script: &str) -> Vm {
    qemu_with(cache, daemon, script, "")
}

/// With more options of the socket.
fn qemu_with(cache: &Cache, daemon: &Daemon, script: &str, socket_options: &str) -> Vm {
    let chardev = format!("socket,id=c0,path={}{socket_options}", daemon.socket.display());
    let device = "vhost-user-blk-pci,chardev=c0,num-queues=2";
    qemu::guest(cache, script, &["-chardev", &chardev, "-device", device])
}

#[test]
fn a_stock_kernel_in_qemu_writes_and_reads_its_disk() {
    let cache = Cache::open().unwrap();
    for mode in ["none", "writeback"] {
        let image = disk(16 * MIB);
        let mut daemon = start(
            &image,
            &["--cache", mode, "--num-queues", "2", "--serial", "cleave-serial", "--queue-size", "256"],
        );
        let vm = qemu(&cache, &daemon, SCRIPT);
        let said = vm.expect("SCRIPT-ENDED", Duration::from_secs(120)).unwrap();
        vm.finish(Duration::from_secs(60)).unwrap();
        assert!(said.contains("SIZE 32768 CACHE write-back SERIAL cleave-serial QUEUES 2 RO 0"), "{said}");
        assert!(said.contains("VERIFIED"), "{said}");
        for queue in ["virtio0-req.0", "virtio0-req.1"] {
            assert!(said.contains(queue), "{queue} has no interrupt: {said}");
        }
        assert!(daemon.is_running(), "the daemon outlives its frontend");
        daemon.signal(Signal::TERM).unwrap();
        assert_eq!(daemon.wait().unwrap().code(), Some(0));

        let on_disk = fs::read(image.path()).unwrap();
        let (first, second) = (md5(&on_disk[..4 << 20]), md5(&on_disk[12 << 20..]));
        assert!(said.contains(&format!("FIRST {first} SECOND {second}")), "{said}");
        // Three sectors in the middle, and nothing beside them.
        let middle = 16385 * 512;
        assert!(on_disk[middle..middle + 1536] == on_disk[..1536]);
        let before = pattern(0, 16 << 20);
        assert!(on_disk[4 << 20..middle] == before[4 << 20..middle]);
        assert!(on_disk[middle + 1536..12 << 20] == before[middle + 1536..12 << 20]);
    }
}

/// Writes four files' worth to the disk, past the page cache and many at once, and reads all back.
const WRITES: &str = r#"
cd /tmp
for n in 0 1 2 3; do dd if=/dev/urandom of=f$n bs=1M count=1 2>/dev/null; done
for round in 1 2 3 4 5 6 7 8; do
  echo ROUND $round
  for n in 0 1 2 3; do dd if=f$n of=/dev/vda bs=4k seek=$((n * 256)) oflag=direct conv=notrunc 2>/dev/null || echo FAILED; done &
  for n in 0 1 2 3; do
    dd if=f$n of=/dev/vda bs=16k seek=$((1024 + n * 64)) oflag=direct conv=notrunc 2>/dev/null || echo FAILED
  done
  wait
done
for n in 0 1 2 3; do
  dd if=/dev/vda bs=1M skip=$n count=1 iflag=direct 2>/dev/null | cmp - f$n && echo SAME
  dd if=/dev/vda bs=1M skip=$((16 + n)) count=1 iflag=direct 2>/dev/null | cmp - f$n && echo SAME
done
dmesg | grep -i "i/o error"
"#;

#[test]
fn qemu_survives_a_restart_of_the_daemon_under_writes() {
    let cache = Cache::open().unwrap();
    let image = disk(32 * MIB);
    let mut daemon = start(&image, &["--cache", "none", "--num-queues", "2", "--queue-size", "128"]);
    let vm = qemu_with(&cache, &daemon, WRITES, ",reconnect-ms=1000");
    for (kills, round) in [(1, 1), (2, 3), (3, 5)] {
        vm.expect(&format!("ROUND {round}"), Duration::from_secs(120)).unwrap();
        daemon.kill_and_restart().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while daemon.log().matches("requests in flight are kept").count() < 1 + kills {
            assert!(Instant::now() < deadline, "QEMU does not come back: {}", daemon.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let said = vm.expect("SCRIPT-ENDED", Duration::from_secs(240)).unwrap();
    assert_eq!(said.matches("SAME").count(), 8, "{said}");
    assert!(!said.contains("FAILED") && !said.to_lowercase().contains("i/o error"), "{said}");
    vm.finish(Duration::from_secs(60)).unwrap();
}

#[test]
fn what_is_written_down_for_qemu_works_and_comes_back() {
    let cache = Cache::open().unwrap();
    let image = disk(MIB);
    let ours = [
        (include_str!("../../README.md"), "/run/disk.sock"),
        (include_str!("../../backends/block/README.md"), "/run/vm/disk.sock"),
    ];
    for (text, socket) in ours {
        let mut daemon = start(&image, &[]);
        let directory = tempfile::tempdir().unwrap();
        let initrd = directory.path().join("initrd");
        let script = "echo READS; read go; dd if=/dev/vda bs=1M count=1 iflag=direct 2>/dev/null | md5sum";
        guest::with_script(&guest::initramfs(&cache).unwrap(), script, &initrd).unwrap();
        let mut command = Command::new(Tools::open(&cache).unwrap().qemu_path());
        let words = qemu_command_in(text);
        assert!(words.iter().any(|word| word.contains(socket)), "{words:?}");
        command.args(words.iter().map(|word| word.replace(socket, daemon.socket.to_str().unwrap())));
        command.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]);
        command.arg("-kernel").arg(Kernel::of_guests(&cache).unwrap().bzimage()).arg("-initrd").arg(&initrd);
        let mut vm = Vm::start(command.args(["-append", "console=ttyS0 panic=-1 quiet"])).unwrap();
        vm.expect("READS", Duration::from_secs(120)).unwrap();
        daemon.kill_and_restart().unwrap();
        vm.send("go").unwrap();
        vm.expect(&md5(&pattern(0, MIB as usize)), Duration::from_secs(60)).unwrap();
        vm.finish(Duration::from_secs(60)).unwrap();
    }
}

#[test]
fn a_stock_kernel_sees_a_readonly_disk() {
    let cache = Cache::open().unwrap();
    let image = disk(MIB);
    let daemon = start(&image, &["--read-only", "--num-queues", "2"]);
    let script = "echo RO $(cat /sys/block/vda/ro) $(head -c 1048576 /dev/vda | md5sum | cut -c1-32)";
    let vm = qemu(&cache, &daemon, script);
    let said = vm.expect("SCRIPT-ENDED", Duration::from_secs(60)).unwrap();
    assert!(said.contains(&format!("RO 1 {}", md5(&pattern(0, MIB as usize)))), "{said}");
    vm.finish(Duration::from_secs(60)).unwrap();
}

#[test]
fn qemu_and_cleave_see_each_others_locks() {
    let tools = Tools::open(&Cache::open().unwrap()).unwrap();
    let image = disk(MIB);
    let path = image.path().to_str().unwrap();
    let mut daemon = start(&image, &[]);
    let output = tools.command("qemu-io").args(["-f", "raw", "-c", "read 0 512", path]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("lock"), "qemu-io took no notice of our lock: {said}");
    daemon.signal(Signal::TERM).unwrap();
    daemon.wait().unwrap();

    let mut qemu = tools.command("qemu-io");
    let qemu = Vm::start(qemu.args(["-f", "raw", path])).unwrap();
    let pid = qemu.pid();
    let locked = || {
        let fds = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap().flatten();
        fds.into_iter().any(|fd| fs::read_to_string(fd.path()).is_ok_and(|info| info.contains("OFDLCK")))
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !locked() {
        assert!(Instant::now() < deadline, "qemu-io does not open the disk");
        std::thread::sleep(Duration::from_millis(5));
    }
    // Whoever reads a disk that another writes sees it torn.
    for more in [&[][..], &["--read-only"]] {
        let words = [&["--blk-file", path], more].concat();
        let failed = Daemon::start("cleave-block", &words).err().unwrap().to_string();
        assert!(failed.contains("is in use") && failed.contains(&format!("(process {pid})")), "{failed}");
    }
}

#[test]
fn readers_of_both_kinds_share_a_disk() {
    let tools = Tools::open(&Cache::open().unwrap()).unwrap();
    let image = disk(MIB);
    let path = image.path().to_str().unwrap();
    let _daemon = start(&image, &["--read-only"]);
    let read = |more: &[&str]| {
        let output = tools
            .command("qemu-io")
            .args(more)
            .args(["-f", "raw", "-c", "read 0 512", path])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert_eq!(read(&["-r"]), "");
    let refused = read(&[]);
    assert!(refused.contains("lock"), "qemu-io writes what is only to be read: {refused}");
}
