//! QEMU as a frontend nobody here wrote: a stock kernel with a script in a machine that it emulates, without KVM.

use std::process::Command;
use std::time::Duration;

use crate::cache::Cache;
use crate::guest;
use crate::kernel::Kernel;
use crate::tools::Tools;
use crate::vm::Vm;

/// An emulated processor takes its time.
const BOOT: Duration = Duration::from_secs(120);

/// Starts a guest that runs `script` with two vCPUs and 512 MiB of memory that daemons can share. `device` is what QEMU is
/// told of the device under test.
///
/// # Panics
/// When the guest does not come as far as its first program.
pub fn guest(cache: &Cache, script: &str, device: &[&str]) -> Vm {
    let kernel = Kernel::of_guests(cache).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let initrd = directory.path().join("initrd");
    guest::with_script(&guest::initramfs(cache).unwrap(), script, &initrd).unwrap();
    let mut command = Command::new(Tools::open(cache).unwrap().qemu_path());
    command.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "512M"]);
    command.args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on", "-numa", "node,memdev=mem"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]);
    command.arg("-kernel").arg(kernel.bzimage()).arg("-initrd").arg(&initrd);
    command.args(["-append", "console=ttyS0 panic=-1 quiet"]).args(device);
    let vm = Vm::start(&mut command).unwrap();
    // QEMU has read its files by the time the guest runs.
    vm.expect("INIT-REACHED", BOOT).unwrap();
    vm
}
