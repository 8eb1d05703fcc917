//! The initramfs of the lab's machine: a static busybox, the modules that reach the root over 9p, kvm-amd.

use std::fs;
use std::path::PathBuf;

use crate::cache::{self, Cache};
use crate::cpio::Archive;
use crate::error::{Context, Result};
use crate::kernel::Kernel;
use crate::tools::Tools;

const INIT: &str = include_str!("initrd.sh");
const STAGE2: &str = include_str!("stage2.sh");
const MODULES: [&str; 7] =
    ["virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_blk", "virtio_console", "kvm_amd"];

pub(super) fn make(cache: &Cache, tools: &Tools, kernel: &Kernel) -> Result<PathBuf> {
    let key = cache::key(&[INIT, STAGE2, &MODULES.join(" "), &kernel.version]);
    let place = cache.entry("initrd-lab", &key, |place| {
        let mut archive = Archive::default();
        for directory in ["bin", "dev", "proc", "sys", "modules", "lower", "layer", "new"] {
            archive.directory(directory);
        }
        archive.copy("bin/busybox", &tools.busybox())?;
        archive.file("init", INIT.as_bytes());
        archive.file("stage2", STAGE2.as_bytes());
        let mut order = String::new();
        for (name, content) in kernel.insertion_order(&MODULES)? {
            // Guests of guests may have their own KVM.
            let options = if name == "kvm_amd.ko" { " nested=1" } else { "" };
            order += &format!("{name}{options}\n");
            archive.file(&format!("modules/{name}"), &content);
        }
        archive.file("modules/order", order.as_bytes());
        fs::write(place.join("initrd"), archive.finish()).context(|| "write the lab's initrd")
    })?;
    Ok(place.join("initrd"))
}
