//! Debian's kernels, taken out of their packages: image, ELF vmlinux and modules.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cache::{self, Cache};
use crate::debian::Apt;
use crate::error::{Context, Error, Result, run};

/// Offsets in a bzImage (Linux, Documentation/arch/x86/boot.rst).
const SETUP_SECTS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;

/// One kernel, unpacked.
#[derive(Debug, Clone)]
pub struct Kernel {
    root: PathBuf,
    pub version: String,
}

impl Kernel {
    /// The kernel of the lab's own machine: the newest 6.12, of the flavour that has 9p and kvm-amd.
    pub fn of_the_lab(cache: &Cache) -> Result<Self> {
        Self::fetch(cache, "kernel-lab", "linux-image-6.12[.][0-9]+[+][a-z0-9]+-amd64")
    }

    /// The stock kernel that guests boot: Debian 12's own, in the flavour made for virtual machines.
    pub fn of_guests(cache: &Cache) -> Result<Self> {
        Self::fetch(cache, "kernel-guest", "linux-image-6.1.0-[0-9]+-cloud-amd64")
    }

    fn fetch(cache: &Cache, name: &str, pattern: &str) -> Result<Self> {
        let root = cache.entry(name, &cache::key(&[pattern, "2"]), |place| {
            let apt = Apt::open(cache)?;
            let package = apt.newest(pattern)?;
            let version = package.trim_start_matches("linux-image-");
            eprintln!("lab: fetching {package}");
            apt.unpack(&package, place)?;
            run(Command::new("/sbin/depmod").arg("-b").arg(place).arg(version), "kmod")?;
            fs::write(place.join("version"), version).context(|| "write the kernel's version")
        })?;
        let version = fs::read_to_string(root.join("version")).context(|| "read the kernel's version")?;
        Ok(Self { root, version })
    }

    /// The compressed image with the boot protocol's header.
    pub fn bzimage(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.version))
    }

    /// The uncompressed ELF file inside the image; it has a PVH note.
    pub fn vmlinux(&self, cache: &Cache) -> Result<PathBuf> {
        let place = cache.entry("vmlinux", &cache::key(&[&self.version, "1"]), |place| {
            fs::write(place.join("vmlinux"), extract_vmlinux(&self.bzimage())?).context(|| "write vmlinux")
        })?;
        Ok(place.join("vmlinux"))
    }

    /// The directory that `modprobe` looks for as `/lib/modules/VERSION`.
    pub fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.version)
    }

    /// The files of the modules `names` and of all they need, uncompressed, in the order to insert them.
    /// A name built into the kernel brings nothing; one that the kernel does not have is an error.
    pub fn insertion_order(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut seen = HashSet::new();
        let mut files = Vec::new();
        let depends = self.table("modules.dep")?;
        let builtin = self.table("modules.builtin")?;
        for name in names {
            let Some(line) = depends.lines().find(|line| module_name(line) == *name) else {
                if builtin.lines().any(|line| module_name(line) == *name) {
                    continue;
                }
                return Err(Error::Malformed {
                    path: self.modules(),
                    why: format!("this kernel has no module {name}"),
                });
            };
            let (module, needs) = line.split_once(':').unwrap_or((line, ""));
            // modules.dep lists what to insert last first.
            for file in needs.split_whitespace().rev().chain([module]) {
                if seen.insert(file.to_owned()) {
                    let path = self.modules().join(file);
                    files.push((format!("{}.ko", module_name(file)), decompressed(&path)?));
                }
            }
        }
        Ok(files)
    }

    fn table(&self, name: &str) -> Result<String> {
        let path = self.modules().join(name);
        fs::read_to_string(&path).context(|| format!("read {}", path.display()))
    }
}

/// `kernel/fs/9p/9p.ko.xz: ...` names the module `9p`; file names may have dashes where the kernel has
/// underscores.
fn module_name(line: &str) -> String {
    let path = line.split(':').next().unwrap_or(line);
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn decompressed(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).context(|| format!("read {}", path.display()))?;
    if bytes.starts_with(b"\x7fELF") {
        return Ok(bytes);
    }
    decompress(&bytes, path)
}

/// Takes the ELF file out of a bzImage, from where its header says that it is.
fn extract_vmlinux(image: &Path) -> Result<Vec<u8>> {
    let malformed = |why: &str| Error::Malformed { path: image.to_owned(), why: why.to_owned() };
    let bytes = fs::read(image).context(|| format!("read {}", image.display()))?;
    let word = |at: usize| -> Option<usize> {
        Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize)
    };
    let header = || -> Option<&[u8]> {
        let start = (usize::from(*bytes.get(SETUP_SECTS)?) + 1) * SECTOR + word(PAYLOAD_OFFSET)?;
        bytes.get(start..start + word(PAYLOAD_LENGTH)?)
    };
    let payload = header().ok_or_else(|| malformed("this is no bzImage"))?;
    let vmlinux = decompress(payload, image)?;
    if !vmlinux.starts_with(b"\x7fELF") {
        return Err(malformed("its payload is no ELF file"));
    }
    Ok(vmlinux)
}

fn decompress(bytes: &[u8], of: &Path) -> Result<Vec<u8>> {
    const METHODS: [(&[u8], &str, &[&str], &str); 3] = [
        (b"\xfd7zXZ\0", "xz", &["-dc", "--single-stream"], "xz-utils"),
        (b"\x28\xb5\x2f\xfd", "zstd", &["-dcq"], "zstd"),
        (b"\x1f\x8b", "gzip", &["-dcq"], "gzip"),
    ];
    let (_, program, arguments, package) =
        METHODS.into_iter().find(|(magic, ..)| bytes.starts_with(magic)).ok_or_else(|| Error::Malformed {
            path: of.to_owned(),
            why: format!("compressed in an unknown way: begins {:02x?}", &bytes[..bytes.len().min(4)]),
        })?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|_| Error::NotInstalled { program: program.to_owned(), package })?;
    let mut input = child.stdin.take();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The kernel appends its size to the stream: the program may stop reading before that.
            let _ = input.as_mut().map(|input| input.write_all(bytes));
            drop(input);
        });
        child.wait_with_output()
    })
    .map(|output| output.stdout)
    .context(|| format!("run {program}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_named_as_the_kernel_names_them() {
        assert_eq!(
            module_name("kernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/virt/lib/irqbypass.ko.xz"),
            "kvm_amd"
        );
        assert_eq!(module_name("kernel/fs/9p/9p.ko:"), "9p");
    }

    #[test]
    fn a_file_that_is_no_bzimage_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"#!/bin/sh\n").unwrap();
        let error = extract_vmlinux(file.path()).unwrap_err().to_string();
        assert!(error.contains("no bzImage"), "{error}");
    }
}
