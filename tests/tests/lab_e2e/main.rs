//! Guests booted by `cleave`, end to end: stock kernels, real daemons, in the lab.
//!
//! The cases of a module share one lab machine: this program starts itself again there, and they run one after the
//! other. Arguments are those of any Rust test: a filter, `--list`, `--exact`, `--skip`.

mod balloon;
mod boots;
mod console;
mod control;
mod daemons;
mod debian;
mod disks;
mod faults;
mod memory;
mod network;
mod refusals;
mod rig;
mod scsi;
mod survival;
mod switch;
mod uarts;
mod user_network;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use cleave_common::size::ByteSize;
use cleave_tests::cache::Cache;
use cleave_tests::error::{Error, Result};
use cleave_tests::guest::{self, Debian};
use cleave_tests::kernel::Kernel;
use cleave_tests::lab::{Disk, Job, Lab, binaries};
use cleave_tests::passt;
use cleave_tests::peers;
use cleave_tests::vm::Outcome;
use libtest_mimic::{Arguments, Trial};

use rig::Rig;

/// Set in the copy of this program that runs in the lab.
const INSIDE: &str = "CLEAVE_E2E_INSIDE";

/// The modules above that hold cases, as filters; those that take long come first.
const GROUPS: &[&str] = &[
    "survival::",
    "balloon::",
    "debian::",
    "network::",
    "user::",
    "memory::",
    "control::",
    "scsi::",
    "console::",
    "switch::",
    "boots::",
    "daemons::",
    "faults::",
    "disks::",
    "refusals::",
    "uarts::",
];

/// Of a lab machine: the largest guest has 4 GiB.
const MEMORY: ByteSize = ByteSize(6 << 30);

type Case = (&'static str, fn(&Rig) -> Outcome<()>);

fn cases() -> Vec<Case> {
    [
        boots::CASES,
        disks::CASES,
        daemons::CASES,
        uarts::CASES,
        debian::CASES,
        faults::CASES,
        refusals::CASES,
        survival::CASES,
        network::CASES,
        memory::CASES,
        control::CASES,
        scsi::CASES,
        console::CASES,
        balloon::CASES,
        switch::CASES,
        user_network::CASES,
    ]
    .concat()
}

/// What is not done yet: it counts as skipped, and the summary names it. `--ignored` runs it.
const NOT_YET: &[&str] = &["user::passt_serves_the_device_itself"];

fn trials() -> Vec<Trial> {
    cases()
        .into_iter()
        .map(|(name, case)| {
            Trial::test(name, move || {
                attempt(case).or_else(|first| {
                    eprintln!("{name}: FAILED ONCE, trying again: {first}");
                    attempt(case).map_err(|second| format!("first: {first}\nthen: {second}"))
                })?;
                Ok(())
            })
            .with_ignored_flag(NOT_YET.contains(&name))
        })
        .collect()
}

/// A case gets a second try, said aloud. The emulated CPU under the lab's KVM now and then breaks a guest with more than
/// one vCPU, whichever VMM runs it: stock QEMU on the same KVM lost 2 boots of 5 before the lab's CPU was trimmed.
fn attempt(case: fn(&Rig) -> Outcome<()>) -> std::result::Result<(), String> {
    let rig = Rig::open().map_err(|error| error.to_string())?;
    case(&rig)
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    if std::env::var_os(INSIDE).is_some() || arguments.list {
        // Cases share disks and count processes.
        arguments.test_threads = Some(1);
        return libtest_mimic::run(&arguments, trials()).exit_code();
    }
    match in_the_lab() {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Makes what the cases need, then runs this program again in the lab.
fn in_the_lab() -> Result<i32> {
    let Some(bin) = binaries() else {
        return Err(Error::Refused(
            "cleave is not built: cargo build --release --workspace, and CLEAVE_BIN_DIR=target/.../release"
                .into(),
        ));
    };
    let cache = Cache::open()?;
    Kernel::of_guests(&cache)?.vmlinux(&cache)?;
    guest::initramfs(&cache)?;
    peers::rng_daemon(&cache)?;
    peers::qmp_client(&cache)?;
    passt::newer(&cache)?;
    let debian = Debian::open(&cache)?;
    let swap = blank_disk(&cache)?;
    let this = std::env::current_exe()
        .map_err(|source| Error::Io { what: "find this program".to_owned(), source })?;

    let lab = Lab::open(&cache)?;
    eprintln!("lab: running on {:?}: {}", lab.place(), lab.why());
    let asked: Vec<_> = std::env::args_os().skip(1).collect();
    // A machine for each group: what breaks one does not cost the others' cases.
    let runs = if asked.is_empty() {
        GROUPS.iter().map(|group| vec![OsString::from(group)]).collect()
    } else {
        vec![asked]
    };
    let next = AtomicUsize::new(0);
    let worker = || -> Result<i32> {
        let mut worst = 0;
        while let Some(arguments) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
            worst = worst
                .max(run(&lab, &job(&this, arguments.clone(), &bin, &cache, [&debian.disk, swap.path()]))?);
        }
        Ok(worst)
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once(&runs)).map(|_| scope.spawn(worker)).collect();
        let codes = workers.into_iter().map(|worker| worker.join().unwrap_or(Ok(101)));
        codes.collect::<Result<Vec<_>>>().map(|codes| codes.into_iter().max().unwrap_or(0))
    })
}

/// A lab machine has one CPU, so as many run beside each other as this machine has CPUs and memory for, up to two.
fn at_once(runs: &[Vec<OsString>]) -> usize {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = available.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
    let machines = usize::try_from((kib << 10) / MEMORY.0).unwrap_or(1);
    cpus.min(machines).min(runs.len()).clamp(1, 2)
}

fn run(lab: &Lab, job: &Job) -> Result<i32> {
    let outcome = lab.run(job, lab.directory()?).or_else(|error| {
        eprintln!("lab: THE LAB ITSELF FAILED, trying again: {error}");
        lab.run(job, lab.directory()?)
    })?;
    if outcome.code != 0 {
        eprintln!("lab: the run is kept in {}", outcome.directory.path().display());
    }
    Ok(outcome.code)
}

/// What a case uses as swap, empty.
fn blank_disk(cache: &Cache) -> Result<tempfile::NamedTempFile> {
    let made = tempfile::NamedTempFile::new_in(cache.root()).and_then(|file| {
        file.as_file().set_len(1 << 30)?;
        Ok(file)
    });
    made.map_err(|source| Error::Io { what: "make a disk for swap".to_owned(), source })
}

fn job(this: &Path, arguments: Vec<OsString>, bin: &Path, cache: &Cache, disks: [&Path; 2]) -> Job {
    let about_memory = arguments.iter().any(|word| word.to_string_lossy().starts_with("memory::"));
    let mut job = Job::new(std::iter::once(this.as_os_str().to_owned()).chain(arguments));
    job.environment = vec![
        (INSIDE.to_owned(), "1".into()),
        ("CLEAVE_BIN_DIR".to_owned(), bin.into()),
        ("CLEAVE_LAB_DIR".to_owned(), cache.root().into()),
    ];
    job.time_limit = Duration::from_secs(1500);
    job.memory = MEMORY;
    job.huge_pages = rig::HUGE_PAGES;
    job.numa_nodes = if about_memory { 2 } else { 1 };
    job.disks = disks.map(|path| Disk { path: path.to_owned(), persistent: false }).into();
    job.follow = true;
    job
}
