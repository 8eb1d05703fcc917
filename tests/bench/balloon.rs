//! How fast a guest's memory goes to the host and back: cleave-balloon beside QEMU's virtio-balloon, in turns, in one lab
//! machine.
//!
//! Both machines have one vCPU, 2 GiB and the tiny guest. First its free memory is written once, so that the host has it in
//! use. Then the balloon takes 1 GiB and gives it back, several times: the time is from the command to the driver's last
//! word, the CPU time that of all processes of the machine. Then the guest frees 1.5 GiB, and free page reporting alone
//! brings it to the host. Reporting is off while the balloon moves, so that it has nothing to do with that.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use cleave_common::control::Client;
use cleave_common::size::ByteSize;
use cleave_tests::cache::Cache;
use cleave_tests::driver::Process;
use cleave_tests::error::{Context, Error, Result};
use cleave_tests::guest;
use cleave_tests::kernel::Kernel;
use cleave_tests::lab::{Job, Lab, binaries};
use cleave_tests::vm::Vm;
use rustix::process::Pid;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 2048 * MIB;
/// What the guest has when the balloon is full.
const SMALL: u64 = 1024 * MIB;
const FREED: u64 = 1536 * MIB;
const LIMIT: Duration = Duration::from_secs(300);

#[derive(Parser)]
#[command(name = "balloon-bench", about = "Measures a balloon: cleave-balloon beside QEMU's in the same run")]
struct Cli {
    /// How often each balloon takes and gives, after once that is not measured
    #[arg(long, default_value_t = 3, value_name = "N")]
    runs: usize,
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
            eprintln!("balloon-bench: {error}");
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
    let mut job = Job::new([this.as_os_str()]);
    job.command.extend(["--inside".into(), "--runs".into(), cli.runs.to_string().into()]);
    job.environment =
        vec![("CLEAVE_BIN_DIR".to_owned(), bin.into()), ("CLEAVE_LAB_DIR".to_owned(), cache.root().into())];
    // Guests have one vCPU here; the other CPU is for the daemon and the VMM's other threads.
    job.cpus = 2;
    job.memory = ByteSize(6 << 30);
    job.time_limit = Duration::from_secs(1500);
    job.follow = true;
    let outcome = lab.run(&job, lab.directory()?)?;
    if outcome.code != 0 {
        let kept = outcome.directory.path().display();
        return Err(Error::Refused(format!("the measurement failed; the run is kept in {kept}")));
    }
    Ok(())
}

struct Files {
    kernel: PathBuf,
    initrd: PathBuf,
    bin: PathBuf,
    directory: tempfile::TempDir,
}

impl Files {
    fn gather() -> Result<Self> {
        let cache = Cache::open()?;
        Ok(Self {
            kernel: Kernel::of_guests(&cache)?.vmlinux(&cache)?,
            initrd: guest::initramfs(&cache)?,
            bin: binaries().unwrap_or_default(),
            directory: tempfile::tempdir().context(|| "create a directory")?,
        })
    }

    fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }
}

const APPEND: &str = "console=ttyS0 quiet panic=-1";

fn cleave(files: &Files, reporting: bool) -> Command {
    let mut command = Command::new(files.bin.join("cleave"));
    command.args(["run", "--memory", "2G", "--append", APPEND, "--kernel"]);
    command.arg(&files.kernel).arg("--initrd").arg(&files.initrd);
    let reporting = if reporting { "on" } else { "off" };
    command.args(["--balloon", &format!("control={},reporting={reporting}", files.control().display())]);
    command
}

fn qemu(files: &Files, reporting: bool) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-M",
        "q35",
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-m",
        "2G",
        "-nodefaults",
        "-no-user-config",
    ]);
    command.args(["-display", "none", "-no-reboot", "-serial", "stdio", "-append", APPEND, "-kernel"]);
    command.arg(&files.kernel).arg("-initrd").arg(&files.initrd);
    let reporting = if reporting { "on" } else { "off" };
    command.args(["-device", &format!("virtio-balloon-pci,free-page-reporting={reporting}"), "-qmp"]);
    command.arg(format!("unix:{},server=on,wait=off", files.control().display()));
    command
}

/// A name, how it is started, and how much guest memory the host has in use.
type Candidate = (&'static str, fn(&Files, bool) -> Command, fn(u32) -> Result<u64>);

/// Of the file that guest memory is.
fn file_in_use(pid: u32) -> Result<u64> {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).context(|| "list files")?;
    let is_memory = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:cleave-ram"))
    };
    let memory = files.flatten().map(|entry| entry.path()).find(is_memory);
    let memory = memory.ok_or_else(|| Error::Refused("the VMM has no memory file".to_owned()))?;
    Ok(fs::metadata(memory).context(|| "look at guest memory")?.blocks() * 512)
}

/// Of the process whose own memory the guest's is.
fn resident(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/statm");
    let text = fs::read_to_string(&path).context(|| format!("read {path}"))?;
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    Ok(pages * 4096)
}

struct Machine {
    vm: Vm,
    control: Client,
    mark: u32,
}

impl Machine {
    fn start(files: &Files, command: &mut Command) -> Result<Self> {
        let vm = Vm::start(command).map_err(Error::Refused)?;
        vm.expect("SHELL", LIMIT).map_err(Error::Refused)?;
        let control = connect(&files.control())?;
        let mut machine = Self { vm, control, mark: 0 };
        machine.ask("qmp_capabilities", &json!({}))?;
        machine.shell("mount -o remount,size=95% /tmp")?;
        Ok(machine)
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let arguments = arguments.as_object().cloned().unwrap_or_default();
        let answer = self.control.call(command, &arguments, &[]);
        answer.map_err(|error| Error::Refused(format!("{command}: {error}")))
    }

    /// Runs a line in the guest.
    fn shell(&mut self, line: &str) -> Result<()> {
        self.mark += 1;
        let line = format!("{line}; echo END-$(({} + 1000)).", self.mark);
        self.vm.send(&line).map_err(Error::Refused)?;
        self.vm.expect(&format!("END-{}.", self.mark + 1000), LIMIT).map(drop).map_err(Error::Refused)
    }

    /// Writes so much of the guest's memory once, into a file.
    fn fill(&mut self, bytes: u64) -> Result<()> {
        self.shell(&format!("dd if=/dev/zero of=/tmp/fill bs=1M count={}", bytes / MIB))
    }

    /// What the guest has once the balloon is where it is to be, and what that took: time, and time on a CPU.
    fn reach(&mut self, size: u64) -> Result<(f64, f64)> {
        let (begun, cpu) = (Instant::now(), self.cpu()?);
        self.ask("balloon", &json!({"value": size}))?;
        loop {
            let actual = self.ask("query-balloon", &json!({}))?["actual"].as_u64().unwrap_or(0);
            if actual == size {
                return Ok((begun.elapsed().as_secs_f64(), self.cpu()? - cpu));
            }
            if begun.elapsed() > LIMIT {
                return Err(Error::Refused(format!("the balloon does not get to {size}: {actual}")));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn cpu(&self) -> Result<f64> {
        let of = |pid: u32| {
            let pid = Pid::from_raw(pid as i32).unwrap_or(Pid::INIT);
            Process(pid).cpu_time().map_err(|error| Error::Refused(error.to_string()))
        };
        family(self.vm.pid()).into_iter().try_fold(0.0, |sum, pid| Ok(sum + of(pid)?.as_secs_f64()))
    }
}

/// The socket is there before the guest is, but for a moment.
fn connect(path: &Path) -> Result<Client> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match Client::connect(path) {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() > deadline => return Err(Error::Refused(error.to_string())),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// A process and its children.
fn family(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> = children
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
        .collect();
    std::iter::once(pid).chain(children).collect()
}

fn inside(cli: &Cli) -> Result<()> {
    let files = Files::gather()?;
    let candidates: [Candidate; 2] = [("cleave", cleave, file_in_use), ("QEMU q35", qemu, resident)];
    let mut medians = Vec::new();
    for (name, command, in_use) in candidates {
        let mut machine = Machine::start(&files, &mut command(&files, false))?;
        machine.fill(FREED)?;
        machine.shell("rm /tmp/fill")?;
        let (mut inflate, mut deflate) = (Vec::new(), Vec::new());
        for run in 0..=cli.runs {
            let before = in_use(machine.vm.pid())?;
            let down = machine.reach(SMALL)?;
            let after = in_use(machine.vm.pid())?;
            let up = machine.reach(MEMORY)?;
            if run == 0 {
                println!("{name:9} of {} MiB in use, 1 GiB of balloon leaves {}", before / MIB, after / MIB);
                continue;
            }
            inflate.push(down);
            deflate.push(up);
            machine.fill(FREED)?;
            machine.shell("rm /tmp/fill")?;
        }
        for (what, samples) in [("inflate", &inflate), ("deflate", &deflate)] {
            let (wall, cpu) = median(samples);
            println!("{name:9} {what} 1 GiB: {wall:.2} s, {cpu:.2} s of CPU");
            medians.push((wall, cpu));
        }
        drop(machine);
        report(&files, name, command, in_use)?;
    }
    if let [inflate, deflate, their_inflate, their_deflate] = medians[..] {
        for (what, ours, theirs) in [("inflate", inflate, their_inflate), ("deflate", deflate, their_deflate)]
        {
            println!("ratio     {what}: time {:.2}, CPU {:.2}", ours.0 / theirs.0, ours.1 / theirs.1);
        }
    }
    Ok(())
}

fn median(samples: &[(f64, f64)]) -> (f64, f64) {
    let middle = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let (walls, cpus) = samples.iter().copied().unzip();
    (middle(walls), middle(cpus))
}

/// What the host has back of what the guest frees, as time goes by.
fn report(
    files: &Files,
    name: &str,
    command: fn(&Files, bool) -> Command,
    in_use: fn(u32) -> Result<u64>,
) -> Result<()> {
    let mut machine = Machine::start(files, &mut command(files, true))?;
    machine.fill(FREED)?;
    let used = in_use(machine.vm.pid())?;
    machine.shell("rm /tmp/fill")?;
    let begun = Instant::now();
    let mut marks = [25, 50, 75, 95].into_iter().peekable();
    let mut said = String::new();
    while let Some(percent) = marks.peek() {
        let back = used.saturating_sub(in_use(machine.vm.pid())?);
        if back >= FREED / 100 * percent {
            said += &format!(", {percent}% after {:.1} s", begun.elapsed().as_secs_f64());
            marks.next();
        } else if begun.elapsed() > LIMIT {
            said += &format!(", then no more than {}%", back * 100 / FREED);
            break;
        } else {
            thread::sleep(Duration::from_millis(10));
        }
    }
    println!("{name:9} 1.5 GiB freed, back by reporting{said}");
    Ok(())
}
