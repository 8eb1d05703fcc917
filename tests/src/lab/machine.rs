//! The process that carries a job: QEMU with an L1, or a shell on this machine.

use std::fs::{self, File};
use std::io::IsTerminal;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Disk, Job, RunDirectory};
use crate::error::{Context, Error, Result, run};
use crate::kernel::Kernel;
use crate::tools::Tools;

/// Everything QEMU emulates but three features. With them, 5 of 12 guests that made system calls on two CPUs of a
/// loaded machine hung, crashed or took L1 with them, under QEMU's own VMM as under ours.
const CPU: &str = "max,+svm,+npt,-la57,-vgif,-pku";

/// Boots L1 with the job on its share.
pub(super) fn in_l1(
    tools: &Tools,
    kernel: &Kernel,
    initrd: &Path,
    job: &Job,
    directory: &RunDirectory,
    interactive: bool,
) -> Result<Child> {
    write_settings(kernel, directory, interactive)?;
    let mut command = dying_with_us();
    command.arg(tools.qemu_path());
    command.args(["-M", "q35", "-cpu", CPU, "-nodefaults", "-display", "none", "-no-reboot"]);
    command.args(["-m", &format!("{}M", job.memory.bytes() >> 20)]);
    for node in (0..job.numa_nodes).filter(|_| job.numa_nodes > 1) {
        let size = (job.memory.bytes() >> 20) / u64::from(job.numa_nodes);
        let cpus = if node == 0 { format!(",cpus=0-{}", job.cpus - 1) } else { String::new() };
        command.args(["-object", &format!("memory-backend-ram,id=node{node},size={size}M")]);
        command.args(["-numa", &format!("node,nodeid={node},memdev=node{node}{cpus}")]);
    }
    if job.instruction_clock {
        command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]);
    } else {
        command.args(["-accel", "tcg,thread=multi", "-smp", &job.cpus.to_string()]);
    }
    command.arg("-kernel").arg(kernel.bzimage()).arg("-initrd").arg(initrd);
    let mut line = String::from("console=ttyS0 quiet panic=-1 tsc=reliable");
    if job.huge_pages > 0 {
        line += &format!(" hugepages={}", job.huge_pages);
    }
    command.args(["-append", &line]);
    let shared = "security_model=none,multidevs=remap";
    command.args(["-fsdev", &format!("local,id=root,path=/,readonly=on,{shared}")]);
    command.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    command.args(["-fsdev", &format!("local,id=share,path={},{shared}", escaped(&directory.share()))]);
    command.args(["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]);
    command.args(["-chardev", &format!("file,id=console,path={}", escaped(&directory.console()))]);
    command.args(["-serial", "chardev:console"]);
    for (index, disk) in job.disks.iter().enumerate() {
        let snapshot = if disk.persistent { "off" } else { "on" };
        let path = escaped(&disk.path);
        command.arg("-drive");
        command.arg(format!("if=none,id=d{index},file={path},format=raw,snapshot={snapshot},cache=unsafe"));
        command.args(["-device", &format!("virtio-blk-pci,drive=d{index}")]);
    }
    if interactive {
        // No mux: QEMU has no escape key of its own and Ctrl-A goes through. No signals: Ctrl-C goes through.
        command.args(["-chardev", "stdio,id=terminal,mux=off,signal=off", "-serial", "chardev:terminal"]);
    } else {
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let path = directory.machine_log();
        command.stderr(File::create(&path).context(|| format!("create {}", path.display()))?);
    }
    // Snapshots of disks go beside the run, not to a /tmp that may be small.
    command.env("TMPDIR", directory.path());
    command.spawn().context(|| "start QEMU")
}

/// Runs the job here, its output where the L1 would leave it.
pub(super) fn on_host(directory: &RunDirectory, interactive: bool) -> Result<Child> {
    let share = directory.share();
    let mut command = dying_with_us();
    command.args(["/bin/sh", "-c", r#""$1/job"; echo $? >"$1/code""#, "sh"]).arg(&share);
    if !interactive {
        let output = |name: &str| File::create(share.join(name)).context(|| format!("create {name}"));
        command.stdin(Stdio::null()).stdout(output("stdout")?).stderr(output("stderr")?).process_group(0);
    }
    command.spawn().context(|| "start the job")
}

/// What the job gets for its disks on this machine: the files, or copies that may be written.
pub(super) fn copies_of(disks: &[Disk], directory: &RunDirectory) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for (index, disk) in disks.iter().enumerate() {
        if disk.persistent {
            paths.push(disk.path.clone());
            continue;
        }
        let copy = directory.path().join(format!("disk{index}"));
        let mut command = Command::new("cp");
        run(command.args(["--sparse=always", "--reflink=auto"]).arg(&disk.path).arg(&copy), "coreutils")?;
        paths.push(copy);
    }
    Ok(paths)
}

/// The name that L1 gives to its disk number `index`.
pub(super) fn device_name(index: usize) -> PathBuf {
    let letter = char::from(b'a' + u8::try_from(index).unwrap_or(25).min(25));
    PathBuf::from(format!("/dev/vd{letter}"))
}

/// Ends the job with everything it started.
pub(super) fn stop(child: &mut Child) {
    if let Ok(Some(group)) = i32::try_from(child.id()).map(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let _ = child.wait();
}

/// A command that is killed when this process dies, however it dies.
fn dying_with_us() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    command
}

/// What stage 2 of L1 reads.
fn write_settings(kernel: &Kernel, directory: &RunDirectory, interactive: bool) -> Result<()> {
    let size = (std::io::stdout().is_terminal())
        .then(|| rustix::termios::tcgetwinsize(std::io::stdout()).ok())
        .flatten();
    // A terminal that does not know its size says 0.
    let known = size.filter(|size| size.ws_row > 0 && size.ws_col > 0);
    let (rows, columns) = known.map_or((24, 80), |size| (size.ws_row, size.ws_col));
    let modules = kernel.modules();
    let modules = super::quoted(modules.as_os_str());
    let text = format!(
        "LAB_MODULES={modules}\nLAB_INTERACTIVE={}\nLAB_ROWS={rows}\nLAB_COLUMNS={columns}\n",
        u8::from(interactive)
    );
    let path = directory.share().join("settings");
    fs::write(&path, text).context(|| format!("write {}", path.display()))
}

/// A path as a value in one of QEMU's option lists, where a comma ends a value.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

impl Disk {
    /// Checks that there is a file, before a machine boots for nothing.
    pub fn check(&self) -> Result<()> {
        match fs::metadata(&self.path) {
            Ok(_) => Ok(()),
            Err(source) => Err(Error::Io { what: format!("use {} as a disk", self.path.display()), source }),
        }
    }
}
