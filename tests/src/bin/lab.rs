//! Runs a command on a machine with a real KVM: this one, or an emulated one where it has none.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use cleave_common::size::ByteSize;
use cleave_tests::cache::Cache;
use cleave_tests::error::Result;
use cleave_tests::lab::{Disk, Job, Lab, Place};

/// Exit codes of this program's own, as of timeout(1) and env(1): out of the way of what jobs use.
const TROUBLE: u8 = 125;

#[derive(Parser)]
#[command(name = "lab", version, about, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: What,
}

const AFTER_HELP: &str = "\
The job sees this machine's files at their own paths; what it writes is gone afterwards, except in $LAB.
Where this machine's KVM runs stock guests the job runs here directly, and its writes stay.

Environment: CLEAVE_LAB=host|l1 decides where jobs run, CLEAVE_LAB_DIR is where artefacts are kept
(target/lab), CLEAVE_BIN_DIR where cleave is, CLEAVE_DEBIAN_MIRROR where packages come from.

Exit code: the job's; 125 when the lab failed.";

#[derive(Subcommand)]
enum What {
    /// Run a command, show its output and end with its exit code
    Run(Wants),
    /// Run a command on this terminal (a shell when none is given)
    Shell(Wants),
    /// Make everything that runs need
    Prepare,
    /// Say where jobs run, and why
    Where,
}

#[derive(Args)]
struct Wants {
    /// CPUs of the emulated machine; with more than one, guests with several vCPUs break now and then
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Memory of the emulated machine
    #[arg(long, value_name = "SIZE", default_value = "3G")]
    memory: ByteSize,
    /// 2 MiB pages set aside for guests
    #[arg(long, value_name = "N", default_value_t = 0)]
    hugepages: u32,
    /// Count instructions instead of time: CPU times that repeat within a percent
    #[arg(long)]
    icount: bool,
    /// Seconds until the job is stopped (run only)
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// A raw image that the job finds as $LAB_DISK0, $LAB_DISK1...; its writes are dropped
    #[arg(long, value_name = "PATH")]
    disk: Vec<PathBuf>,
    /// As --disk, but writes stay in the file; numbered after the others
    #[arg(long, value_name = "PATH")]
    persistent_disk: Vec<PathBuf>,
    /// Keep the run's directory
    #[arg(long)]
    keep: bool,
    /// The command and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl Wants {
    fn job(&self) -> Result<Job> {
        let shell = || vec![OsString::from("/bin/bash"), OsString::from("-i")];
        let mut job = Job::new(if self.command.is_empty() { shell() } else { self.command.clone() });
        job.directory = std::env::current_dir().ok();
        job.time_limit = Duration::from_secs(self.timeout);
        job.cpus = self.cpus;
        job.memory = self.memory;
        job.huge_pages = self.hugepages;
        job.instruction_clock = self.icount;
        job.follow = true;
        let disks = self.disk.iter().map(|path| (path, false));
        for (path, persistent) in disks.chain(self.persistent_disk.iter().map(|path| (path, true))) {
            let disk = Disk { path: path.clone(), persistent };
            disk.check()?;
            job.disks.push(disk);
        }
        Ok(job)
    }
}

fn main() -> ExitCode {
    let cli = match cleave_common::cli::read::<Cli>() {
        Ok(cli) => cli,
        Err(cleave_common::exit::ExitCode::Success) => return ExitCode::SUCCESS,
        Err(_) => return ExitCode::from(TROUBLE),
    };
    match run(&cli.command) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(TROUBLE)),
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::from(TROUBLE)
        }
    }
}

fn run(what: &What) -> Result<i32> {
    let cache = Cache::open()?;
    let lab = Lab::open(&cache)?;
    match what {
        What::Run(wants) => {
            let outcome = lab.run(&wants.job()?, lab.directory()?)?;
            let mut directory = outcome.directory;
            if wants.keep {
                directory.keep();
            }
            if wants.keep || outcome.code != 0 {
                eprintln!(
                    "lab: exit code {}; the run is kept in {}",
                    outcome.code,
                    directory.path().display()
                );
            }
            Ok(outcome.code)
        }
        What::Shell(wants) => lab.interact(&wants.job()?, lab.directory()?),
        What::Prepare => {
            let outcome = lab.run(&Job::new(["/bin/true"]), lab.directory()?)?;
            Ok(outcome.code)
        }
        What::Where => {
            let place = match lab.place() {
                Place::Host => "host",
                Place::L1 => "l1",
            };
            println!("{place} ({})", lab.why());
            Ok(0)
        }
    }
}
