//! Input that is wrong: one line that says what to do, the right exit code, no process left behind.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::rig::{Rig, SOON, nothing_left_behind, says};
use cleave_tests::peers::{Fault, FaultyDaemon};
use cleave_tests::vm::{Outcome, Vm};

pub const CASES: &[crate::Case] = &[
    ("refusals::unknown_option_names_the_nearest", unknown_option),
    ("refusals::missing_kernel", missing_kernel),
    ("refusals::unreadable_kernel", unreadable_kernel),
    ("refusals::kernel_that_is_none_names_its_first_bytes", no_kernel),
    ("refusals::missing_initrd", missing_initrd),
    ("refusals::initrd_that_may_not_be_read", unreadable_initrd),
    ("refusals::missing_disk", missing_disk),
    ("refusals::disk_that_may_not_be_read", unreadable_disk),
    ("refusals::disk_of_odd_size", odd_disk),
    ("refusals::disk_in_use_names_its_holder", locked_disk),
    ("refusals::memory_larger_than_the_host", too_much_memory),
    ("refusals::too_few_huge_pages", too_few_huge_pages),
    ("refusals::no_dev_kvm", no_kvm),
    ("refusals::no_permission_for_dev_kvm", no_permission),
    ("refusals::no_daemon_at_the_socket", no_daemon),
    ("refusals::socket_path_that_is_a_file", no_socket),
    ("refusals::daemon_without_version_1", no_version_1),
    ("refusals::daemon_that_answers_garbage", garbage),
    ("refusals::daemon_that_answers_nothing", nothing),
    ("refusals::daemon_that_hangs_up", hangs_up),
];

const USAGE: i32 = 2;
const HOST: i32 = 3;
const DEVICE: i32 = 4;
/// A daemon gets its deadline before it is given up.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs a command that has to be refused, with `words` in its one line, beside one that says what is waited for.
fn refused(mut command: Command, code: i32, words: &[&str]) -> Outcome<()> {
    let exit = Vm::start(&mut command)?.wait(DEADLINE)?;
    exit.demand(code)?;
    words.iter().try_for_each(|words| says(&exit.errors, words))?;
    let lines = exit.errors.lines().filter(|line| !line.contains(": waiting for a daemon on ")).count();
    if lines != 1 {
        return Err(format!("expected one line, got {lines}:\n{}", exit.errors));
    }
    if !exit.screen.is_empty() {
        return Err(format!("something was said on standard output:\n{}", exit.screen));
    }
    nothing_left_behind()
}

fn unknown_option(rig: &Rig) -> Outcome<()> {
    let exit = Vm::start(&mut rig.cleave(["run", "--memroy", "512M"]))?.wait(SOON)?;
    exit.demand(USAGE)?;
    says(&exit.errors, "--memory")
}

fn missing_kernel(rig: &Rig) -> Outcome<()> {
    refused(rig.shell().kernel(Path::new("/nonexistent/vmlinuz")).command(), USAGE, &["/nonexistent/vmlinuz"])
}

/// A directory opens for nobody, root or not.
fn unreadable_kernel(rig: &Rig) -> Outcome<()> {
    refused(rig.shell().kernel(Path::new("/etc")).command(), USAGE, &["/etc"])
}

fn no_kernel(rig: &Rig) -> Outcome<()> {
    let file = rig.write("script", format!("#!/bin/sh\n{}", "# no kernel\n".repeat(200)).as_bytes())?;
    refused(rig.shell().kernel(&file).command(), USAGE, &["23 21 2f 62"])
}

fn missing_initrd(rig: &Rig) -> Outcome<()> {
    let mut command = rig.cleave(["run", "--initrd", "/nonexistent/initrd", "--kernel"]);
    command.arg(&rig.vmlinux);
    refused(command, USAGE, &["/nonexistent/initrd"])
}

/// The same without root's privilege to read everything: /dev/kvm stays its own.
fn without_override(inner: &Command) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]);
    command.arg(inner.get_program()).args(inner.get_args());
    command
}

fn forbidden(rig: &Rig, name: &str) -> Outcome<std::path::PathBuf> {
    let path = rig.blank(name, 1 << 20)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000))
        .map_err(|error| error.to_string())?;
    Ok(path)
}

fn unreadable_initrd(rig: &Rig) -> Outcome<()> {
    let initrd = forbidden(rig, "forbidden")?;
    let mut command = rig.cleave(["run", "--initrd"]);
    command.arg(&initrd).arg("--kernel").arg(&rig.vmlinux);
    refused(
        without_override(&command),
        USAGE,
        &["--initrd", &initrd.display().to_string(), "Permission denied"],
    )
}

fn unreadable_disk(rig: &Rig) -> Outcome<()> {
    let disk = forbidden(rig, "forbidden")?;
    let command = without_override(&rig.shell().disk(&disk, "").command());
    refused(command, HOST, &[&disk.display().to_string(), "Permission denied"])
}

fn missing_disk(rig: &Rig) -> Outcome<()> {
    refused(rig.shell().disk(Path::new("/nonexistent/disk"), "").command(), USAGE, &["/nonexistent/disk"])
}

fn odd_disk(rig: &Rig) -> Outcome<()> {
    let disk = rig.write("disk", &[0; 1000])?;
    refused(rig.shell().disk(&disk, "").command(), USAGE, &["512"])
}

fn locked_disk(rig: &Rig) -> Outcome<()> {
    let disk = rig.blank("disk", 1 << 20)?;
    let socket = rig.path("holder.sock");
    let mut holder = rig.program("cleave-block");
    let holder = Vm::start(holder.arg("--socket-path").arg(&socket).arg("--blk-file").arg(&disk))?;
    crate::rig::appears(&socket)?;
    let exit = rig.shell().disk(&disk, "").start()?.wait(DEADLINE)?;
    exit.demand(HOST)?;
    says(&exit.errors, &holder.pid().to_string())?;
    drop(holder);
    nothing_left_behind()
}

fn too_much_memory(rig: &Rig) -> Outcome<()> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").map_err(|error| error.to_string())?;
    let kib: u64 = meminfo.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).ok_or("no MemTotal")?;
    let twice = format!("{}M", kib / 512);
    refused(rig.shell().with(["--memory", &twice]).command(), HOST, &["memory"])
}

fn too_few_huge_pages(rig: &Rig) -> Outcome<()> {
    let words = ["--memory", "size=2G,backing=hugetlbfs,page-size=2M"];
    refused(rig.shell().with(words).command(), HOST, &["1024", "nr_hugepages"])
}

/// cleave in a mount namespace whose /dev has no kvm.
fn no_kvm(rig: &Rig) -> Outcome<()> {
    let inner = rig.shell().command();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount -t tmpfs none /dev && exec \"$@\"", "sh"]);
    command.arg(inner.get_program()).args(inner.get_args());
    refused(command, HOST, &["/dev/kvm"])
}

fn no_permission(rig: &Rig) -> Outcome<()> {
    let inner = rig.shell().command();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.arg(inner.get_program()).args(inner.get_args());
    refused(command, HOST, &["/dev/kvm", "permission"])
}

fn no_daemon(rig: &Rig) -> Outcome<()> {
    let device = format!("type=rng,socket={},wait=1s", rig.path("none.sock").display());
    refused(rig.shell().with(["--device", &device]).command(), DEVICE, &["none.sock"])
}

fn no_socket(rig: &Rig) -> Outcome<()> {
    let file = rig.write("file", b"no socket")?;
    let device = format!("type=rng,socket={},wait=1s", file.display());
    refused(rig.shell().with(["--device", &device]).command(), USAGE, &[&file.display().to_string()])
}

fn faulty(rig: &Rig, fault: Fault, words: &[&str]) -> Outcome<()> {
    let socket = rig.path("faulty.sock");
    let _daemon = FaultyDaemon::listen(&socket, fault).map_err(|error| error.to_string())?;
    let device = format!("type=rng,socket={},wait=1s,id=faulty-rng", socket.display());
    refused(rig.shell().with(["--device", &device]).command(), DEVICE, words)
}

fn no_version_1(rig: &Rig) -> Outcome<()> {
    faulty(rig, Fault::NoVersion1, &["faulty-rng", "VERSION_1"])
}

fn garbage(rig: &Rig) -> Outcome<()> {
    faulty(rig, Fault::Garbage, &["faulty-rng"])
}

fn nothing(rig: &Rig) -> Outcome<()> {
    faulty(rig, Fault::NeverAnswers, &["faulty-rng"])
}

fn hangs_up(rig: &Rig) -> Outcome<()> {
    faulty(rig, Fault::HangsUp, &["faulty-rng"])
}
