//! cleave-scsi with programs nobody here wrote: QEMU as its frontend, SeaBIOS as its driver.
//!
//! QEMU emulates the processor, so that no KVM is needed.

mod common;

use std::process::Command;
use std::time::Duration;

use cleave_tests::cache::Cache;
use cleave_tests::driver::Daemon;
use cleave_tests::tools::Tools;
use cleave_tests::vm::Vm;
use common::{MIB, disk};

const BOOT: Duration = Duration::from_secs(120);

fn start(args: &[&str]) -> Daemon {
    Daemon::start("cleave-scsi", args).unwrap()
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
        0x74, 0x06, // jz end
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xee, // out dx, al
        0xeb, 0xed, // jmp next
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
