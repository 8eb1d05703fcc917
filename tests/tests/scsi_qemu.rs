//! cleave-scsi with programs nobody here wrote: QEMU as its frontend, a stock kernel and SeaBIOS as its drivers.
//!
//! QEMU emulates the processor, so that no KVM is needed.

mod common;

use std::process::Command;
use std::time::Duration;

use cleave_tests::cache::Cache;
use cleave_tests::driver::Daemon;
use cleave_tests::qemu;
use cleave_tests::tools::Tools;
use cleave_tests::vm::Vm;
use common::{MIB, disk, pattern};

const BOOT: Duration = Duration::from_secs(120);

/// Waits for both units, compares what is read with what is there, and writes a little.
const SCRIPT: &str = r#"
until [ -e /dev/sda ] && [ -e /dev/sr0 ]; do sleep 0.2; done
cd /sys/block/sda
echo "DISK $(cat size) $(cat device/vendor device/model | tr -s ' \n' _) CD $(cat ../sr0/size) $(cat ../sr0/device/type)"
echo "CD $(md5sum </dev/sr0 | cut -c1-32)"
dd if=/dev/sda bs=64k count=8 2>/dev/null | dd of=/dev/sda bs=4k seek=512 oflag=direct conv=notrunc 2>/dev/null
sync
echo VERIFIED
"#;

fn start(args: &[&str]) -> Daemon {
    Daemon::start("cleave-scsi", args).unwrap()
}

fn md5(bytes: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let output = Command::new("md5sum").arg(file.path()).output().expect("md5sum, of coreutils");
    String::from_utf8(output.stdout).unwrap()[..32].to_owned()
}

#[test]
fn a_stock_kernel_in_qemu_has_a_disk_and_a_cdrom() {
    let cache = Cache::open().unwrap();
    let (image, iso) = (disk(8 * MIB), disk(2 * MIB));
    let units = [format!("disk={}", image.path().display()), format!("{},lun=1", iso.path().display())];
    let daemon = start(&["--lun", &units[0], "--cdrom", &units[1], "--num-queues", "2"]);
    let chardev = format!("socket,id=c0,path={}", daemon.socket.display());
    let device = "vhost-user-scsi-pci,chardev=c0,num_queues=2";
    let vm = qemu::guest(&cache, SCRIPT, &["-chardev", &chardev, "-device", device]);
    let said = vm.expect("SCRIPT-ENDED", BOOT).unwrap();
    vm.finish(BOOT).unwrap();
    assert!(said.contains("DISK 16384 CLEAVE_VIRTUAL-DISK_ CD 4096 5"), "{said}");
    let cd = md5(&pattern(0, 2 * MIB as usize));
    assert!(said.contains(&format!("CD {cd}")) && said.contains("VERIFIED"), "{said}");
    let on_disk = std::fs::read(image.path()).unwrap();
    assert!(on_disk[2 << 20..][..512 << 10] == on_disk[..512 << 10]);
}

/// A boot sector that reads the sector behind it with the firmware's disk functions and shows it on the serial port.
fn boot_disk(words: &str) -> tempfile::NamedTempFile {
    let mut code = vec![
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, 0x8e, 0xc0, // mov ds, ax; mov es, ax
        0xbb, 0x00, 0x7e, // mov bx, 0x7e00
        0xb8, 0x01, 0x02, // mov ax, 0x0201: read one sector
        0xb9, 0x02, 0x00, // mov cx, 2: cylinder 0, sector 2
        0xb6, 0x00, // mov dh, 0; dl is the drive that was booted from
        0xcd, 0x13, // int 0x13
        0x72, 0x16, // jc end
        0xbe, 0x00, 0x7e, // mov si, 0x7e00
        0xba, 0xfd, 0x03, // next: mov dx, 0x3fd
        0xec, // wait: in al, dx
        0xa8, 0x20, // test al, 0x20
        0x74, 0xfb, // jz wait
        0xac, // lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x05, // jz end
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xee, // out dx, al
        0xeb, 0xee, // jmp next
        0xf4, // end: hlt
        0xeb, 0xfd, // jmp end
    ];
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code.extend(words.as_bytes());
    code.resize(MIB as usize, 0);
    let file = disk(MIB);
    std::fs::write(file.path(), &code).unwrap();
    file
}

#[test]
fn seabios_boots_from_a_unit() {
    let cache = Cache::open().unwrap();
    let words = "BOOTED-FROM-A-UNIT";
    let image = boot_disk(words);
    let daemon = start(&["--lun", &format!("disk={}", image.path().display())]);
    let mut command = Command::new(Tools::open(&cache).unwrap().qemu_path());
    command.args([
        "-M",
        "q35",
        "-accel",
        "tcg",
        "-m",
        "256M",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
    ]);
    command.args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on", "-numa", "node,memdev=mem"]);
    command
        .args(["-serial", "stdio", "-chardev"])
        .arg(format!("socket,id=c0,path={}", daemon.socket.display()));
    command.args(["-device", "vhost-user-scsi-pci,chardev=c0,bootindex=1"]);
    let vm = Vm::start(&mut command).unwrap();
    vm.expect(words, BOOT).unwrap();
}
