//! Makes what guests boot from, once, and says where it is.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use cleave_tests::cache::Cache;
use cleave_tests::error::Result;
use cleave_tests::guest::{self, Debian};
use cleave_tests::kernel::Kernel;

#[derive(Parser)]
#[command(name = "guest-image", version, about)]
struct Cli {
    /// What to make; the path of each is printed on a line of its own
    #[arg(required = true)]
    what: Vec<What>,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Debian's stock kernel for virtual machines, as the package has it
    Bzimage,
    /// The ELF file inside it
    Vmlinux,
    /// A busybox initramfs with the kernel's virtio drivers
    Initramfs,
    /// A raw disk with a minimal Debian
    DebianDisk,
    /// The kernel of that Debian
    DebianKernel,
    /// The initrd of that Debian
    DebianInitrd,
    /// An ISO 9660 image with a file on it
    Cdrom,
}

fn make(cache: &Cache, what: What) -> Result<PathBuf> {
    Ok(match what {
        What::Bzimage => Kernel::of_guests(cache)?.bzimage(),
        What::Vmlinux => Kernel::of_guests(cache)?.vmlinux(cache)?,
        What::Initramfs => guest::initramfs(cache)?,
        What::DebianDisk => Debian::open(cache)?.disk,
        What::DebianKernel => Debian::open(cache)?.kernel,
        What::DebianInitrd => Debian::open(cache)?.initrd,
        What::Cdrom => guest::cdrom(cache)?,
    })
}

fn main() -> ExitCode {
    let cli = match cleave_common::cli::read::<Cli>() {
        Ok(cli) => cli,
        Err(code) => return code.into(),
    };
    let made = Cache::open().and_then(|cache| {
        cli.what.into_iter().try_for_each(|what| {
            println!("{}", make(&cache, what)?.display());
            Ok(())
        })
    });
    match made {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-image: {error}");
            ExitCode::FAILURE
        }
    }
}
