//! Programs from Debian's packages that run on any machine beside the system's own: they are unpacked with
//! everything they need, down to the C library and its loader.
//!
//! Debian 12's own QEMU 7.2 loses one boot in ten when it emulates two CPUs in two threads; the one from the
//! backports does not.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{self, Cache};
use crate::debian::Apt;
use crate::error::{Context, Result};

const PACKAGES: [&str; 14] = [
    "qemu-system-x86",
    "qemu-utils",
    "fio",
    "busybox-static",
    "kmod",
    "lz4",
    "xz-utils",
    "zstd",
    "iperf3",
    "tcpdump",
    "dnsmasq-base",
    "openssh-client",
    "socat",
    "xorriso",
];
/// What gets a starter under `bin/`, and the path of the program in its package.
const PROGRAMS: [(&str, &str); 16] = [
    ("qemu-system-x86_64", "usr/bin/qemu-system-x86_64"),
    ("qemu-storage-daemon", "usr/bin/qemu-storage-daemon"),
    ("qemu-img", "usr/bin/qemu-img"),
    ("qemu-io", "usr/bin/qemu-io"),
    ("fio", "usr/bin/fio"),
    ("depmod", "bin/kmod"),
    ("modprobe", "bin/kmod"),
    ("lz4", "usr/bin/lz4"),
    ("xz", "usr/bin/xz"),
    ("zstd", "usr/bin/zstd"),
    ("iperf3", "usr/bin/iperf3"),
    ("tcpdump", "usr/bin/tcpdump"),
    ("dnsmasq", "usr/sbin/dnsmasq"),
    ("ssh", "usr/bin/ssh"),
    ("socat", "usr/bin/socat"),
    ("xorriso", "usr/bin/xorriso"),
];
const LOADER: &str = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";

/// QEMU, qemu-storage-daemon, fio, a static busybox, and what unpacks kernels.
#[derive(Debug, Clone)]
pub struct Tools {
    root: PathBuf,
}

impl Tools {
    pub fn open(cache: &Cache) -> Result<Self> {
        let key = cache::key(&[&PACKAGES.join(" "), STARTER, "2"]);
        let place = cache.entry("tools", &key, |place| {
            let apt = Apt::open(cache)?;
            eprintln!("lab: fetching QEMU, fio, busybox, iperf3 and others with their libraries (40 MB)");
            apt.unpack_with_dependencies(&PACKAGES, &place.join("root"))?;
            fs::create_dir(place.join("bin")).context(|| "create bin")?;
            PROGRAMS.iter().try_for_each(|(name, program)| write_starter(place, name, program))
        })?;
        Ok(Self { root: place })
    }

    /// The directory to put first in PATH: a starter for each program.
    pub fn bin(&self) -> PathBuf {
        self.root.join("bin")
    }

    pub fn busybox(&self) -> PathBuf {
        self.root.join("root/bin/busybox")
    }

    /// One of the programs that have a starter.
    pub fn command(&self, name: &str) -> Command {
        Command::new(self.bin().join(name))
    }

    /// `$CLEAVE_LAB_QEMU`, or the one of the packages.
    pub fn qemu_path(&self) -> OsString {
        std::env::var_os("CLEAVE_LAB_QEMU").unwrap_or_else(|| self.bin().join("qemu-system-x86_64").into())
    }
}

/// The loader is named outright, because the program asks for the system's; it finds its place from `$0`, so
/// that the cache can be moved. QEMU looks for its own modules and firmware beside its executable, which is
/// now the loader, and has to be told. fio's library for Ceph has a directory of its own.
const STARTER: &str = r#"#!/bin/sh
root=${0%/*}/../root
libraries=$root/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu/ceph
export QEMU_MODULE_DIR=$root/usr/lib/x86_64-linux-gnu/qemu
exec "$root/@LOADER@" --inhibit-cache --library-path "$libraries" --argv0 @NAME@ "$root/@PROGRAM@" @ARGUMENTS@ "$@"
"#;

fn write_starter(place: &Path, name: &str, program: &str) -> Result<()> {
    let firmware = if name.starts_with("qemu-system") {
        r#"-L "$root/usr/share/qemu" -L "$root/usr/share/seabios""#
    } else {
        ""
    };
    let text = STARTER
        .replace("@LOADER@", LOADER)
        .replace("@NAME@", name)
        .replace("@PROGRAM@", program)
        .replace("@ARGUMENTS@", firmware);
    let path = place.join("bin").join(name);
    fs::write(&path, text).context(|| format!("write {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
        .context(|| format!("make {} executable", path.display()))
}

/// The words of the command for QEMU in a text of ours, which ends with dots for what everybody has of their own.
///
/// # Panics
/// There is none.
pub fn qemu_command_in(text: &str) -> Vec<String> {
    let start = text.find("qemu-system-x86_64 ").expect("a command for QEMU");
    let (command, _) = text[start..].split_once(" ...").expect("its end");
    command.split_whitespace().skip(1).filter(|word| *word != "\\").map(str::to_owned).collect()
}
