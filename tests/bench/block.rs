//! Measures vhost-user block daemons beside fio on the same file, in turns, without a virtual machine.
//!
//! `block-bench --file disk.raw --peers fio,qsd,cleave --rw randread --bs 4k --depth 32 --secs 3`

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use cleave_common::size::ByteSize;
use cleave_tests::cache::Cache;
use cleave_tests::driver::{BlockDriver, Daemon, DriverError, Frontend, Load, binary};
use cleave_tests::tools::Tools;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Measure vhost-user block daemons beside fio's io_uring, on one file, in turns
#[derive(Debug, Parser)]
struct Args {
    /// The file that all of them read or write; it is made if it does not exist
    #[arg(long)]
    file: PathBuf,

    /// Size of a file that is made
    #[arg(long, default_value = "1G")]
    size: ByteSize,

    /// Who is measured; the first is what the others are compared with
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Peer::Fio, Peer::Qsd, Peer::Cleave])]
    peers: Vec<Peer>,

    /// Measure whatever listens on this vhost-user socket too
    #[arg(long)]
    socket: Option<PathBuf>,

    #[arg(long, value_enum, default_value_t = Pattern::Randread)]
    rw: Pattern,

    #[arg(long, default_value = "4k")]
    bs: ByteSize,

    /// Requests in flight on each queue
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    depth: u16,

    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,

    /// How the driver learns of completions
    #[arg(long, value_enum, default_value_t = Driver::Poll)]
    driver: Driver,

    /// Run fio and the daemons on this CPU and the driver on the others. Which CPU takes the disk's interrupts makes more
    /// difference than anything else on a small machine, so that it is to be the same for all
    #[arg(long, value_name = "CPU")]
    pin: Option<usize>,

    /// Seconds each turn lasts
    #[arg(long, default_value_t = 3.0)]
    secs: f64,

    /// Turns of each; the medians are compared
    #[arg(long, default_value_t = 3)]
    rounds: usize,

    /// One JSON object a peer instead of the table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// fio with io_uring and O_DIRECT
    Fio,
    /// qemu-storage-daemon with io_uring and O_DIRECT
    Qsd,
    /// cleave-block with --cache none
    Cleave,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Driver {
    /// It looks all the time, as a busy guest does: measures the daemon
    Poll,
    /// It sleeps until it is interrupted, as an idle guest does: measures how fast this machine wakes threads, too
    Interrupt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Pattern {
    Randread,
    Randwrite,
    Read,
    Write,
}

impl Pattern {
    fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite)
    }

    fn is_write(self) -> bool {
        matches!(self, Self::Randwrite | Self::Write)
    }
}

/// One turn of one peer.
#[derive(Debug, Clone, Copy, Default)]
struct Turn {
    iops: f64,
    p50_us: f64,
    p99_us: f64,
    /// CPU microseconds a request, of the program that serves it; the load generator's are not in it.
    cpu_us: Option<f64>,
    /// Resident memory without the guest's, in KiB.
    memory_kib: Option<f64>,
    kicks: Option<f64>,
    interrupts: Option<f64>,
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("block-bench: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), DriverError> {
    prepare(args)?;
    args.pin.map_or(Ok(()), pin_driver)?;
    let mut names: Vec<String> = args.peers.iter().map(|peer| format!("{peer:?}").to_lowercase()).collect();
    names.extend(args.socket.iter().map(|socket| socket.display().to_string()));
    let mut turns = vec![Vec::new(); names.len()];
    for round in 0..args.rounds {
        for (at, name) in names.iter().enumerate() {
            eprint!("\rround {} of {}: {name:<20}", round + 1, args.rounds);
            turns[at].push(match (args.peers.get(at), &args.socket) {
                (Some(peer), _) => measure(args, *peer)?,
                (None, Some(socket)) => drive(args, Frontend::connect(socket)?, None)?,
                (None, None) => Turn::default(),
            });
        }
    }
    eprintln!("\r{:<40}", "");
    report(args, &names, &turns);
    Ok(())
}

/// Written out, not sparse: reading a hole is no reading.
fn prepare(args: &Args) -> Result<(), DriverError> {
    if args.file.exists() {
        return Ok(());
    }
    let mut dd = Command::new("dd");
    dd.arg("if=/dev/urandom").arg(format!("of={}", args.file.display()));
    dd.args(["bs=1M", "conv=fsync", "status=none"]).arg(format!("count={}", args.size.bytes() >> 20));
    run_program(&mut dd).map(|_| ())
}

fn measure(args: &Args, peer: Peer) -> Result<Turn, DriverError> {
    let file = args.file.display().to_string();
    let queues = args.queues.to_string();
    match peer {
        Peer::Fio => fio(args),
        Peer::Cleave => {
            binary("cleave-block")?;
            let flags = ["--blk-file", &file, "--cache", "none", "--num-queues", &queues];
            let daemon = Daemon::start("cleave-block", &flags)?;
            pin_daemon(args, &daemon)?;
            drive(args, Frontend::over(daemon.connect()?), Some(&daemon))
        }
        Peer::Qsd => {
            let program = tools()?.bin().join("qemu-storage-daemon");
            let daemon = Daemon::start_other(&program, |socket| qsd_arguments(&file, socket, &queues))?;
            pin_daemon(args, &daemon)?;
            drive(args, Frontend::over(daemon.connect()?), Some(&daemon))
        }
    }
}

/// Keeps this process, and so the driver's threads, off the CPU of what is measured.
fn pin_driver(cpu: usize) -> Result<(), DriverError> {
    let mut others = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
    others.unset(cpu);
    sched_setaffinity(None, &others)
        .map_err(|errno| DriverError::Daemon(format!("--pin {cpu} leaves no CPU for the driver: {errno}")))
}

fn pin_daemon(args: &Args, daemon: &Daemon) -> Result<(), DriverError> {
    let Some(cpu) = args.pin else { return Ok(()) };
    let mut one = CpuSet::new();
    one.set(cpu);
    for thread in daemon.threads()? {
        sched_setaffinity(Some(thread), &one)
            .map_err(|errno| DriverError::Daemon(format!("cannot pin the daemon to CPU {cpu}: {errno}")))?;
    }
    Ok(())
}

/// The peers come from Debian's packages, whatever this machine has of its own.
fn tools() -> Result<Tools, DriverError> {
    Cache::open()
        .and_then(|cache| Tools::open(&cache))
        .map_err(|error| DriverError::Daemon(error.to_string()))
}

fn qsd_arguments(file: &str, socket: &Path, queues: &str) -> Vec<String> {
    let escaped = file.replace(',', ",,");
    vec![
        "--blockdev".into(),
        format!("driver=file,node-name=f,filename={escaped},aio=io_uring,cache.direct=on"),
        "--export".into(),
        format!(
            "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
            socket.display()
        ),
    ]
}

fn drive(args: &Args, frontend: Frontend, daemon: Option<&Daemon>) -> Result<Turn, DriverError> {
    let load = Load {
        random: args.rw.is_random(),
        write: args.rw.is_write(),
        block_size: args.bs.bytes() as u32,
        depth: args.depth,
        duration: Duration::from_secs_f64(args.secs),
        poll: args.driver == Driver::Poll,
    };
    let memory = (64 << 20) + 2 * args.bs.bytes() * u64::from(args.depth) * u64::from(args.queues);
    let mut driver =
        BlockDriver::with_memory(frontend, u64::MAX, args.queues, 256, memory.next_multiple_of(2 << 20))?;
    let before = daemon.map(Daemon::cpu_time).transpose()?;
    let report = driver.run_load(load)?;
    let after = daemon.map(Daemon::cpu_time).transpose()?;
    let requests = report.requests as f64;
    let cpu = before.zip(after).map(|(before, after)| (after - before).as_secs_f64() * 1e6 / requests);
    Ok(Turn {
        iops: report.iops(),
        p50_us: report.latencies.percentile(50.0).as_secs_f64() * 1e6,
        p99_us: report.latencies.percentile(99.0).as_secs_f64() * 1e6,
        cpu_us: cpu,
        memory_kib: daemon.map(Daemon::memory).transpose()?.map(|bytes| bytes as f64 / 1024.0),
        kicks: Some(report.kicks as f64 / requests),
        interrupts: Some(report.interrupts as f64 / requests),
    })
}

fn fio(args: &Args) -> Result<Turn, DriverError> {
    let mut fio = tools()?.command("fio");
    fio.args(["--name=bench", "--ioengine=io_uring", "--direct=1", "--time_based", "--group_reporting"]);
    fio.args(["--thread", "--norandommap", "--output-format=json"]);
    fio.arg(format!("--filename={}", args.file.display()));
    fio.arg(format!("--rw={}", format!("{:?}", args.rw).to_lowercase()));
    fio.arg(format!("--bs={}", args.bs.bytes())).arg(format!("--iodepth={}", args.depth));
    fio.arg(format!("--numjobs={}", args.queues)).arg(format!("--runtime={}", args.secs.ceil()));
    if let Some(cpu) = args.pin {
        fio.arg(format!("--cpus_allowed={cpu}"));
    }
    let output = run_program(&mut fio)?;
    let bad = || DriverError::Daemon("fio's answer is no JSON as it is known".into());
    let json: serde_json::Value = serde_json::from_slice(&output).map_err(|_| bad())?;
    let side = &json["jobs"][0][if args.rw.is_write() { "write" } else { "read" }];
    let number = |value: &serde_json::Value| value.as_f64().ok_or_else(bad);
    let percentile = |name: &str| number(&side["clat_ns"]["percentile"][name]).map(|ns| ns / 1e3);
    Ok(Turn {
        iops: number(&side["iops"])?,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
        ..Turn::default()
    })
}

fn run_program(command: &mut Command) -> Result<Vec<u8>, DriverError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output =
        command.output().map_err(|error| DriverError::Daemon(format!("cannot start {name}: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(DriverError::Daemon(format!("{name} failed ({}): {}", output.status, said.trim())));
    }
    Ok(output.stdout)
}

fn median(turns: &[Turn], of: impl Fn(&Turn) -> f64) -> f64 {
    let mut values: Vec<f64> = turns.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn report(args: &Args, names: &[String], turns: &[Vec<Turn>]) {
    let first = turns.first().map_or(0.0, |turns| median(turns, |turn| turn.iops));
    if !args.json {
        println!(
            "{:?} {} depth {} queues {} driver {:?}, {} rounds of {} s on {}",
            args.rw,
            args.bs,
            args.depth,
            args.queues,
            args.driver,
            args.rounds,
            args.secs,
            args.file.display()
        );
        println!(
            "{:<12} {:>9} {:>6} {:>9} {:>9} {:>8} {:>8} {:>8} {:>8}",
            "", "IOPS", "ratio", "p50 us", "p99 us", "cpu us", "kicks", "calls", "mem KiB"
        );
    }
    for (name, turns) in names.iter().zip(turns) {
        let iops = median(turns, |turn| turn.iops);
        let optional = |of: fn(&Turn) -> Option<f64>| {
            turns[0]
                .iops
                .is_finite()
                .then(|| median(turns, |turn| of(turn).unwrap_or(f64::NAN)))
                .filter(|v| !v.is_nan())
        };
        let ratio = iops / first;
        let (p50, p99) = (median(turns, |turn| turn.p50_us), median(turns, |turn| turn.p99_us));
        let cpu = optional(|turn| turn.cpu_us);
        let (kicks, calls) = (optional(|turn| turn.kicks), optional(|turn| turn.interrupts));
        let memory = optional(|turn| turn.memory_kib);
        if args.json {
            println!(
                "{}",
                serde_json::json!({
                    "peer": name, "iops": iops, "ratio": ratio, "p50_us": p50, "p99_us": p99, "cpu_us": cpu,
                    "kicks_per_request": kicks, "calls_per_request": calls, "memory_kib": memory,
                })
            );
            continue;
        }
        let show =
            |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
        println!(
            "{name:<12} {iops:>9.0} {ratio:>6.2} {p50:>9.1} {p99:>9.1} {:>8} {:>8} {:>8} {:>8}",
            show(cpu, 2),
            show(kicks, 3),
            show(calls, 3),
            show(memory, 0)
        );
    }
}
