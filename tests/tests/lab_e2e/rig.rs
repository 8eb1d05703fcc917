//! What the cases work with: where things are, and a tiny guest to boot.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cleave_tests::cache::Cache;
use cleave_tests::cpio::Archive;
use cleave_tests::error::Result;
use cleave_tests::guest::{self, Debian};
use cleave_tests::kernel::Kernel;
use cleave_tests::lab::binaries;
use cleave_tests::peers;
use cleave_tests::vm::{Exit, Outcome, Vm};

/// A boot takes 4 to 9 s in an emulated host that has the machine for itself.
pub const BOOT: Duration = Duration::from_secs(120);
/// For things that happen at once in a guest that is up.
pub const SOON: Duration = Duration::from_secs(90);
/// Huge pages of 2 MiB that the lab's machine sets aside: a guest of 512 MiB and some.
pub const HUGE_PAGES: u32 = 272;

pub struct Rig {
    bin: PathBuf,
    pub vmlinux: PathBuf,
    pub bzimage: PathBuf,
    pub initramfs: PathBuf,
    pub rng_daemon: PathBuf,
    pub debian: Debian,
    directory: tempfile::TempDir,
}

impl Rig {
    pub fn open() -> Result<Self> {
        let cache = Cache::open()?;
        let kernel = Kernel::of_guests(&cache)?;
        let directory = tempfile::tempdir().map_err(|source| cleave_tests::error::Error::Io {
            what: "create a directory".to_owned(),
            source,
        })?;
        Ok(Self {
            bin: binaries().unwrap_or_default(),
            vmlinux: kernel.vmlinux(&cache)?,
            bzimage: kernel.bzimage(),
            initramfs: guest::initramfs(&cache)?,
            rng_daemon: peers::rng_daemon(&cache)?,
            debian: Debian::open(&cache)?,
            directory,
        })
    }

    /// A path in this case's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write(&self, name: &str, content: &[u8]) -> Outcome<PathBuf> {
        let path = self.path(name);
        fs::write(&path, content).map_err(|error| format!("write {name}: {error}"))?;
        Ok(path)
    }

    /// A sparse file, for a disk.
    pub fn blank(&self, name: &str, bytes: u64) -> Outcome<PathBuf> {
        let path = self.path(name);
        let made = fs::File::create(&path).and_then(|file| file.set_len(bytes));
        made.map(|()| path).map_err(|error| format!("create {name}: {error}"))
    }

    /// One of our programs.
    pub fn daemon(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    pub fn program(&self, name: &str) -> Command {
        Command::new(self.daemon(name))
    }

    pub fn cleave<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.program("cleave");
        command.args(words);
        command
    }

    /// The tiny guest with a script that runs at boot; it powers off afterwards.
    pub fn guest(&self, script: &str) -> Outcome<Guest<'_>> {
        let initrd = self.path("initrd");
        guest::with_script(&self.initramfs, script, &initrd).map_err(|error| error.to_string())?;
        Ok(Guest {
            rig: self,
            kernel: self.vmlinux.clone(),
            initrd,
            words: Vec::new(),
            append: String::new(),
        })
    }

    /// The tiny guest with a shell on its console, and with what it takes to replace its kernel by the same one: `/kexec`
    /// does that, `times` times one after the other.
    pub fn shell_with_kexec(&self, times: u32) -> Outcome<Guest<'_>> {
        let read = |path: &Path| fs::read(path).map_err(|error| format!("read {}: {error}", path.display()));
        let (base, kernel) = (read(&self.initramfs)?, read(&self.bzimage)?);
        let program = read(&self.bin.join("guest-kexec"))?;
        let mut initrd = base.clone();
        for _ in 0..times {
            let mut archive = Archive::default();
            archive.file("vmlinuz", &kernel);
            archive.file("initrd", &initrd);
            archive.file("guest-kexec", &program);
            archive
                .file("kexec", b"#!/bin/sh\nexec /guest-kexec /vmlinuz /initrd \"$(cat /proc/cmdline)\"\n");
            initrd = [base.clone(), archive.finish()].concat();
        }
        let path = self.write("initrd", &initrd)?;
        Ok(Guest { initrd: path, ..self.shell() })
    }

    /// The tiny guest with a shell on its console.
    pub fn shell(&self) -> Guest<'_> {
        Guest {
            rig: self,
            kernel: self.vmlinux.clone(),
            initrd: self.initramfs.clone(),
            words: Vec::new(),
            append: String::new(),
        }
    }
}

/// A guest to be started.
pub struct Guest<'a> {
    rig: &'a Rig,
    kernel: PathBuf,
    initrd: PathBuf,
    words: Vec<OsString>,
    append: String,
}

impl Guest<'_> {
    pub fn kernel(mut self, kernel: &Path) -> Self {
        self.kernel = kernel.to_owned();
        self
    }

    /// More words for `cleave run`.
    pub fn with<S: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.words.extend(words.into_iter().map(|word| word.as_ref().to_owned()));
        self
    }

    pub fn disk(self, path: &Path, options: &str) -> Self {
        self.with(["--disk", &format!("{}{options}", path.display())])
    }

    pub fn device(self, kind: &str, socket: &Path) -> Self {
        self.with(["--device", &format!("type={kind},socket={}", socket.display())])
    }

    pub fn command(&self) -> Command {
        let mut command = self.rig.cleave(["run", "--kernel"]);
        command.arg(&self.kernel).arg("--initrd").arg(&self.initrd);
        command.args(["--append", &format!("console=ttyS0 quiet panic=-1 {}", self.append)]);
        command.args(&self.words);
        command
    }

    pub fn start(self) -> Outcome<Vm> {
        Vm::start(&mut self.command())
    }

    /// Boots, runs the script, powers off; demands exit code 0 of script and cleave.
    pub fn finish(self) -> Outcome<Exit> {
        let vm = self.start()?;
        vm.expect("INIT-REACHED", BOOT)?;
        let exit = vm.finish(BOOT)?;
        says(&exit.screen, "SCRIPT-ENDED 0")?;
        Ok(exit)
    }
}

/// Demands words in a text, and shows it when they are missing.
pub fn says(text: &str, words: &str) -> Outcome<()> {
    if text.contains(words) {
        return Ok(());
    }
    Err(format!("expected {words:?} in:\n{text}"))
}

/// The processes called `name` that descend from `parent`; those of anyone when `parent` is none.
pub fn processes(name: &str, parent: Option<u32>) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
            let Some((start, rest)) = stat.rsplit_once(')') else { return false };
            let command = start.split_once('(').map_or("", |(_, command)| command);
            let mut fields = rest.split_whitespace();
            let alive = fields.next().is_some_and(|state| state != "Z");
            let of = fields.next().and_then(|field| field.parse::<u32>().ok());
            command == name && alive && parent.is_none_or(|parent| of == Some(parent))
        })
        .collect()
}

/// Demands that no daemon and no VMM is left, with a little patience.
pub fn nothing_left_behind() -> Outcome<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let ours = ["cleave", "cleave-block", "cleave-net", "cleave-scsi", "cleave-serial", "cleave-balloon"];
        let passts = ["passt-keeper", "passt", "passt.avx2"];
        let left: Vec<u32> = ours.iter().chain(&passts).flat_map(|name| processes(name, None)).collect();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("processes were left behind: {left:?}"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until `path` is there: a daemon's socket.
pub fn appears(path: &Path) -> Outcome<()> {
    let deadline = Instant::now() + SOON;
    while !path.exists() {
        if Instant::now() > deadline {
            return Err(format!("{} did not appear", path.display()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
