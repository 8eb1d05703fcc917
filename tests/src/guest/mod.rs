//! Guests to boot: the stock kernel with a tiny busybox initramfs, and a minimal Debian with systemd on a disk
//! of its own.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{self, Cache};
use crate::cpio::Archive;
use crate::debian::Apt;
use crate::error::{Context, Result, run};
use crate::kernel::Kernel;
use crate::tools::Tools;

const INIT: &str = include_str!("init.sh");
/// Virtio drivers that the stock kernel has as modules.
const MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "virtio_scsi",
    "virtio_rng",
];

const DEBIAN: &str = include_str!("debian.sh");
const CHECK: &str = include_str!("cleave-check.sh");
const UNIT: &str = include_str!("cleave-check.service");

/// The tiny guest's initramfs. What it does is at the head of `init.sh`.
pub fn initramfs(cache: &Cache) -> Result<PathBuf> {
    let kernel = Kernel::of_guests(cache)?;
    let key = cache::key(&[INIT, &MODULES.join(" "), &kernel.version]);
    let place = cache.entry("initramfs", &key, |place| {
        let mut archive = Archive::default();
        for directory in ["bin", "dev", "proc", "sys", "tmp", "modules"] {
            archive.directory(directory);
        }
        archive.copy("bin/busybox", &Tools::open(cache)?.busybox())?;
        archive.symlink("bin/sh", "busybox");
        archive.file("init", INIT.as_bytes());
        let mut order = String::new();
        for (name, content) in kernel.insertion_order(&MODULES)? {
            order += &format!("{name}\n");
            archive.file(&format!("modules/{name}"), &content);
        }
        archive.file("modules/order", order.as_bytes());
        fs::write(place.join("initramfs"), archive.finish()).context(|| "write the guest's initramfs")
    })?;
    Ok(place.join("initramfs"))
}

/// Writes to `into` the initramfs `base` with a shell script that the guest runs before it powers off.
/// What the script prints is on the guest's console, ended by a line `SCRIPT-ENDED code`.
pub fn with_script(base: &Path, script: &str, into: &Path) -> Result<()> {
    let mut archive = Archive::default();
    archive.file("script", script.as_bytes());
    fs::copy(base, into).context(|| format!("copy {} to {}", base.display(), into.display()))?;
    let joined =
        File::options().append(true).open(into).and_then(|mut file| file.write_all(&archive.finish()));
    joined.context(|| format!("add a script to {}", into.display()))
}

/// A CD-ROM's image, with one file.
pub fn cdrom(cache: &Cache) -> Result<PathBuf> {
    const WORDS: &str = "A CD-ROM from a daemon of its own.\n";
    let place = cache.entry("cdrom", &cache::key(&[WORDS, "1"]), |place| {
        let files = tempfile::tempdir().context(|| "create a directory")?;
        fs::write(files.path().join("readme.txt"), WORDS).context(|| "write what is on the CD-ROM")?;
        let mut command = Tools::open(cache)?.command("xorriso");
        command.args(["-as", "mkisofs", "-quiet", "-r", "-V", "CLEAVE", "-o"]).arg(place.join("cdrom.iso"));
        run(command.arg(files.path()), "xorriso").map(|_| ())
    })?;
    Ok(place.join("cdrom.iso"))
}

/// A minimal Debian 12: systemd, its own kernel and initrd, login on the console as root without a password.
/// With `cleave.check=1` on the kernel command line it checks its machine, reports and powers off.
#[derive(Debug, Clone)]
pub struct Debian {
    /// A raw image of 2 GiB, sparse; the root file system is all of it. To be copied before it is written.
    pub disk: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

impl Debian {
    pub fn open(cache: &Cache) -> Result<Self> {
        let place = cache.entry("debian", &cache::key(&[DEBIAN, CHECK, UNIT]), |place| {
            let apt = Apt::open(cache)?;
            eprintln!("lab: making a Debian guest from packages (about a minute)");
            let inputs = tempfile::tempdir().context(|| "create a directory")?;
            let file = |name: &str, text: &str| {
                let path = inputs.path().join(name);
                fs::write(&path, text).context(|| format!("write {}", path.display())).map(|()| path)
            };
            let script = file("debian.sh", DEBIAN)?;
            let sources = file("sources.list", &apt.stable_sources()?)?;
            let mut command = as_root("sh");
            command.arg(script).arg(place).arg(sources);
            command.arg(file("cleave-check", CHECK)?).arg(file("cleave-check.service", UNIT)?);
            run(&mut command, "mmdebstrap e2fsprogs")?;
            own(place)
        })?;
        Ok(Self { disk: place.join("disk.raw"), kernel: place.join("vmlinuz"), initrd: place.join("initrd") })
    }
}

fn as_root(program: &str) -> Command {
    if rustix::process::getuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// Gives what root made to the person who asked for it.
fn own(place: &Path) -> Result<()> {
    if rustix::process::getuid().is_root() {
        return Ok(());
    }
    let person = format!("{}:{}", rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    run(Command::new("sudo").args(["chown", "-R", &person]).arg(place), "sudo").map(|_| ())
}
