//! How long the stock kernel takes to its first program, and what the VMM costs: cleave beside QEMU's q35, in
//! turns, in one lab machine.
//!
//! Wall time, KVM exits, memory and threads come from a run in real time; CPU seconds from a run that counts
//! instructions, where they repeat within a percent. Both machines have one vCPU, 256 MiB and a virtio disk; for
//! cleave, starting the disk's daemon and its handshake are part of the time, and its CPU time of the cost.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::Parser;
use cleave_common::size::ByteSize;
use cleave_tests::cache::Cache;
use cleave_tests::error::{Context, Error, Result};
use cleave_tests::guest;
use cleave_tests::kernel::Kernel;
use cleave_tests::lab::{Job, Lab, binaries};
use cleave_tests::vm::Vm;

const GUEST_MIB: u64 = 256;
const LIMIT: Duration = Duration::from_secs(120);

#[derive(Parser)]
#[command(
    name = "boot-bench",
    about = "Measures boots of the stock kernel: cleave beside QEMU's q35 in the same run"
)]
struct Cli {
    /// Measured boots of each VMM in real time, after one that is not measured
    #[arg(long, default_value_t = 5, value_name = "N")]
    runs: usize,
    /// Boot the bzImage instead of the vmlinux
    #[arg(long)]
    bzimage: bool,
    /// Only the run in real time
    #[arg(long)]
    no_icount: bool,
    /// The copy of this program that runs in the lab
    #[arg(long, hide = true)]
    inside: bool,
}

fn main() -> ExitCode {
    let cli = match cleave_common::cli::read::<Cli>() {
        Ok(cli) => cli,
        Err(code) => return code.into(),
    };
    let result = if cli.inside { inside(&cli) } else { outside(&cli) };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("boot-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn outside(cli: &Cli) -> Result<()> {
    let bin = binaries().ok_or_else(|| {
        Error::Refused("cleave is not built: cargo build --release --workspace comes first".to_owned())
    })?;
    let cache = Cache::open()?;
    Kernel::of_guests(&cache)?.vmlinux(&cache)?;
    guest::initramfs(&cache)?;
    let lab = Lab::open(&cache)?;
    println!("running on {:?}: {}", lab.place(), lab.why());
    let this = std::env::current_exe().context(|| "find this program")?;
    for instruction_clock in [false, true] {
        if instruction_clock && cli.no_icount {
            continue;
        }
        let runs = if instruction_clock { 1 } else { cli.runs };
        let mut job = Job::new([this.as_os_str()]);
        // Guests have one vCPU here; the other CPU is for the daemon and the VMM's other threads. Where instructions are
        // counted all run in turns anyway.
        job.cpus = if instruction_clock { 1 } else { 2 };
        job.command.extend(["--inside".into(), "--runs".into(), runs.to_string().into()]);
        if cli.bzimage {
            job.command.push("--bzimage".into());
        }
        job.environment = vec![
            ("CLEAVE_BIN_DIR".to_owned(), bin.clone().into()),
            ("CLEAVE_LAB_DIR".to_owned(), cache.root().into()),
        ];
        job.instruction_clock = instruction_clock;
        job.memory = ByteSize(3 << 30);
        job.time_limit = Duration::from_secs(900);
        job.follow = true;
        println!("\n{}:", if instruction_clock { "counting instructions" } else { "in real time" });
        let outcome = lab.run(&job, lab.directory()?)?;
        if outcome.code != 0 {
            let kept = outcome.directory.path().display();
            return Err(Error::Refused(format!("the measurement failed; the run is kept in {kept}")));
        }
    }
    Ok(())
}

/// The files of a measurement, in memory: reading them over 9p would be part of the time.
struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn gather(cli: &Cli) -> Result<Self> {
        let cache = Cache::open()?;
        let kernel = Kernel::of_guests(&cache)?;
        let image = if cli.bzimage { kernel.bzimage() } else { kernel.vmlinux(&cache)? };
        let base = if Path::new("/run/lab").exists() { "/run" } else { "/dev/shm" };
        let directory = tempfile::tempdir_in(base).context(|| format!("create a directory in {base}"))?;
        let files = Self { directory };
        let bin = binaries().unwrap_or_default();
        for (from, name) in [
            (image, "kernel"),
            (guest::initramfs(&cache)?, "initrd"),
            (bin.join("cleave"), "cleave"),
            (bin.join("cleave-block"), "cleave-block"),
        ] {
            fs::copy(&from, files.path(name)).context(|| format!("copy {}", from.display()))?;
        }
        let disk = fs::File::create(files.path("disk")).and_then(|disk| disk.set_len(64 << 20));
        disk.context(|| "create a disk")?;
        Ok(files)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

const APPEND: &str = "console=ttyS0 quiet panic=-1 cleave.stop=init";

fn cleave(files: &Files) -> Command {
    let mut command = Command::new(files.path("cleave"));
    command.args(["run", "--memory", &format!("{GUEST_MIB}M"), "--append", APPEND, "--kernel"]);
    command.arg(files.path("kernel")).arg("--initrd").arg(files.path("initrd"));
    command.arg("--disk").arg(files.path("disk"));
    command
}

fn qemu(files: &Files) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", &format!("{GUEST_MIB}M")]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    command.args(["-append", APPEND, "-kernel"]).arg(files.path("kernel"));
    command.arg("-initrd").arg(files.path("initrd"));
    command.args(["-device", "virtio-blk-pci,drive=d", "-drive"]);
    command.arg(format!("if=none,id=d,format=raw,file={}", files.path("disk").display()));
    command
}

/// A name and how it is started.
type Candidate = (&'static str, fn(&Files) -> Command);

/// What one boot took, at the moment when the guest's first program spoke.
struct Sample {
    wall: Duration,
    processes: Vec<Process>,
    exits: u64,
}

/// One process of a VMM.
struct Process {
    name: String,
    cpu: Duration,
    /// Without the guest's memory.
    pss_kib: u64,
    threads: Vec<String>,
}

fn inside(cli: &Cli) -> Result<()> {
    let files = Files::gather(cli)?;
    let candidates: [Candidate; 2] = [("cleave", cleave), ("QEMU q35", qemu)];
    for (_, command) in candidates {
        boot(&mut command(&files))?;
    }
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..cli.runs {
        for (index, (_, command)) in candidates.iter().enumerate() {
            samples[index].push(boot(&mut command(&files))?);
        }
    }
    let figures: Vec<Figures> = samples.iter().map(|samples| Figures::of(samples)).collect();
    for ((name, _), (figures, samples)) in candidates.iter().zip(figures.iter().zip(&samples)) {
        println!(
            "{name:9} wall {:.2} s (fastest {:.2}), CPU {:.2} s, KVM exits {}",
            figures.wall, figures.fastest, figures.cpu, figures.exits
        );
        for process in samples.last().map(|sample| &sample.processes[..]).unwrap_or_default() {
            println!(
                "          {}: PSS {:.2} MiB beyond the guest's memory, threads {}",
                process.name,
                process.pss_kib as f64 / 1024.0,
                process.threads.join(" ")
            );
        }
    }
    let [ours, theirs] = &figures[..] else { return Ok(()) };
    println!(
        "ratio     wall {:.2}, CPU {:.2}, exits {:.2}",
        ours.wall / theirs.wall,
        ours.cpu / theirs.cpu,
        ours.exits as f64 / theirs.exits as f64
    );
    Ok(())
}

/// The medians of some boots.
struct Figures {
    wall: f64,
    fastest: f64,
    cpu: f64,
    exits: u64,
}

impl Figures {
    fn of(samples: &[Sample]) -> Self {
        let mut walls: Vec<f64> = samples.iter().map(|sample| sample.wall.as_secs_f64()).collect();
        let mut exits: Vec<u64> = samples.iter().map(|sample| sample.exits).collect();
        let mut cpus: Vec<f64> = samples
            .iter()
            .map(|sample| sample.processes.iter().map(|process| process.cpu.as_secs_f64()).sum())
            .collect();
        walls.sort_by(f64::total_cmp);
        cpus.sort_by(f64::total_cmp);
        exits.sort_unstable();
        let middle = samples.len() / 2;
        Self { wall: walls[middle], fastest: walls[0], cpu: cpus[middle], exits: exits[middle] }
    }
}

fn boot(command: &mut Command) -> Result<Sample> {
    let begun = Instant::now();
    let vm = Vm::start(command).map_err(Error::Refused)?;
    vm.expect("INIT-REACHED", LIMIT).map_err(Error::Refused)?;
    let wall = begun.elapsed();
    let exits = kvm_exits(vm.pid())?;
    let processes = family(vm.pid()).into_iter().map(look_at).collect::<Result<_>>()?;
    Ok(Sample { wall, processes, exits })
}

/// A process and its children, the process first.
fn family(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> = children
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
        .collect();
    std::iter::once(pid).chain(children).collect()
}

fn look_at(pid: u32) -> Result<Process> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        fs::read_to_string(&path).context(|| format!("read {path}"))
    };
    let mut threads = Vec::new();
    let mut cpu = Duration::ZERO;
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).context(|| format!("list the threads of {pid}"))?;
    for task in tasks.flatten() {
        let of_task = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        threads.push(of_task("comm").trim().to_owned());
        // Nanoseconds on a CPU, guest time included.
        let ran = of_task("schedstat").split(' ').next().and_then(|time| time.parse().ok()).unwrap_or(0);
        cpu += Duration::from_nanos(ran);
    }
    threads.sort();
    Ok(Process { name: read("comm")?.trim().to_owned(), cpu, pss_kib: pss(&read("smaps")?), threads })
}

/// KiB of proportional memory in all mappings but the guest's, which is the one that is about as large as it.
fn pss(smaps: &str) -> u64 {
    let mut total = 0;
    let mut guest = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let bounds = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16));
            guest = matches!(bounds, (Ok(start), Ok(end)) if end - start >= GUEST_MIB * 1024 * 1024 * 2 / 5);
        } else if first == "Pss:" && !guest {
            total += words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    total
}

/// Exits of all vCPUs of the machines of one process so far.
fn kvm_exits(pid: u32) -> Result<u64> {
    let root = "/sys/kernel/debug/kvm";
    let machines = fs::read_dir(root).context(|| format!("list {root}: is debugfs mounted?"))?;
    let mut exits = 0;
    for machine in machines.flatten() {
        if machine.file_name().to_string_lossy().starts_with(&format!("{pid}-")) {
            let path = machine.path().join("exits");
            let text = fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
            exits += text.trim().parse::<u64>().unwrap_or(0);
        }
    }
    Ok(exits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_not_counted() {
        let smaps = "7f0000000000-7f0010000000 rw-s 00000000 00:01 5 /memfd:guest\nSize: 262144 kB\nPss: 90000 kB\n\
                     7f0020000000-7f0020004000 rw-p 00000000 00:00 0\nPss: 12 kB\nPss_Dirty: 8 kB\n";
        assert_eq!(pss(smaps), 12);
    }
}
