//! Debian's kernels, taken out of their packages: image, ELF vmlinux and modules.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::cache::{self, Cache};
use crate::debian::Apt;
use crate::error::{Context, Error, Result, run};
use crate::tools::Tools;

/// Offsets in a bzImage (Linux, Documentation/arch/x86/boot.rst).
const SETUP_SECTS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;

/// One kernel, unpacked.
#[derive(Debug, Clone)]
pub struct Kernel {
    root: PathBuf,
    tools: Tools,
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
            run(Tools::open(cache)?.command("depmod").arg("-b").arg(place).arg(version), "kmod")?;
            fs::write(place.join("version"), version).context(|| "write the kernel's version")
        })?;
        let version = fs::read_to_string(root.join("version")).context(|| "read the kernel's version")?;
        Ok(Self { root, tools: Tools::open(cache)?, version })
    }

    /// The compressed image with the boot protocol's header.
    pub fn bzimage(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.version))
    }

    /// The uncompressed ELF file inside the image; it has a PVH note.
    pub fn vmlinux(&self, cache: &Cache) -> Result<PathBuf> {
        let place = cache.entry("vmlinux", &cache::key(&[&self.version, "1"]), |place| {
            fs::write(place.join("vmlinux"), extract_vmlinux(&self.tools, &self.bzimage())?)
                .context(|| "write vmlinux")
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
                    files.push((format!("{}.ko", module_name(file)), decompressed(&self.tools, &path)?));
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

fn decompressed(tools: &Tools, path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).context(|| format!("read {}", path.display()))?;
    if bytes.starts_with(b"\x7fELF") {
        return Ok(bytes);
    }
    decompress(tools, &bytes, path)
}

/// Takes the ELF file out of a bzImage, from where its header says that it is.
fn extract_vmlinux(tools: &Tools, image: &Path) -> Result<Vec<u8>> {
    let malformed = |why: &str| Error::Malformed { path: image.to_owned(), why: why.to_owned() };
    let bytes = fs::read(image).context(|| format!("read {}", image.display()))?;
    let payload = payload(&bytes).ok_or_else(|| malformed("this is no bzImage"))?;
    let vmlinux = decompress(tools, payload, image)?;
    if !vmlinux.starts_with(b"\x7fELF") {
        return Err(malformed("its payload is no ELF file"));
    }
    Ok(vmlinux)
}

/// The compressed kernel in a bzImage.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    let start = (usize::from(*image.get(SETUP_SECTS)?) + 1) * SECTOR + word(PAYLOAD_OFFSET)?;
    image.get(start..start + word(PAYLOAD_LENGTH)?)
}

fn decompress(tools: &Tools, bytes: &[u8], of: &Path) -> Result<Vec<u8>> {
    const METHODS: [(&[u8], &str, &[&str]); 3] = [
        (b"\xfd7zXZ\0", "xz", &["-dc", "--single-stream"]),
        (b"\x28\xb5\x2f\xfd", "zstd", &["-dcq"]),
        (b"\x02\x21\x4c\x18", "lz4", &["-dcq"]),
    ];
    let (_, program, arguments) =
        METHODS.into_iter().find(|(magic, ..)| bytes.starts_with(magic)).ok_or_else(|| Error::Malformed {
            path: of.to_owned(),
            why: format!("compressed in an unknown way: begins {:02x?}", &bytes[..bytes.len().min(4)]),
        })?;
    let mut child = tools
        .command(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context(|| format!("start {program}"))?;
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
    fn a_file_that_is_no_bzimage_has_no_payload() {
        assert_eq!(payload(b"#!/bin/sh\n"), None);
        let mut image = vec![0; 4096];
        image[SETUP_SECTS] = 3;
        image[PAYLOAD_OFFSET..][..4].copy_from_slice(&16u32.to_le_bytes());
        image[PAYLOAD_LENGTH..][..4].copy_from_slice(&32u32.to_le_bytes());
        assert_eq!(payload(&image).map(<[u8]>::len), Some(32));
        image[PAYLOAD_LENGTH..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(payload(&image), None);
    }
}
