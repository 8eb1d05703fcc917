//! cleave-balloon: a virtio-balloon device (virtio 1.2, 5.5) as a vhost-user daemon.

mod auto;
mod config_space;
mod control;
mod counters;
mod device;
mod held;
mod hints;
mod host;
mod pages;
mod queue;
mod roles;
mod sandbox;
mod shared;
mod state;
mod stats;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use cleave_common::cli;
use cleave_common::exit::Failure;
use cleave_common::options;
use cleave_common::size::ByteSize;
use cleave_runtime::{CommonArgs, ControlArgs, DaemonCommand, Sandbox, Signals, capabilities_json};
use tracing::warn;

use auto::{AutoConfig, Pressure};
use control::BalloonControl;
use device::{Balloon, BalloonError};
use shared::{Options, Shared};
use state::Keeper;

/// Take memory from a virtual machine and give it back, as virtio-balloon over vhost-user
#[derive(Debug, Parser)]
#[command(name = "cleave-balloon", version, after_help = EXIT_CODES, after_long_help = LONG_HELP)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Args {
    #[command(subcommand)]
    command: Option<DaemonCommand>,

    #[command(flatten)]
    common: CommonArgs,

    #[command(flatten)]
    control: ControlArgs,

    /// What the guest is to have at first; all of its memory unless given
    #[arg(long, value_name = "SIZE")]
    target: Option<ByteSize>,

    /// What the guest is left in any case, whoever asks for less
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    min: ByteSize,

    /// Ask the guest for statistics this often; 0 is never, but by the control socket
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    stats_interval: Option<Duration>,

    /// Keep the guest's available memory near a mark: free=SIZE[,min=SIZE]
    ///
    /// By the guest's statistics, which it is asked for every 2 s unless --stats-interval says otherwise. A guest that lacks
    /// memory gets it at once, one that has too much gives some of it each time. While tasks of this host wait for memory
    /// (PSI), half the mark has to do. min= is what it is left in any case.
    #[arg(long, value_name = "KEYS", value_parser = |text: &str| options::parse::<AutoConfig>(text, None))]
    auto: Option<AutoConfig>,

    /// Take what the guest reports free
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = on_or_off, action = clap::ArgAction::Set)]
    reporting: bool,

    /// Keep in this file what a successor has to know: the target above all
    #[arg(long, value_name = "PATH", conflicts_with = "state_fd")]
    state: Option<PathBuf>,

    /// The same, in a file that is open already, as this inherited descriptor
    #[arg(long, value_name = "N")]
    state_fd: Option<RawFd>,
}

const EXIT_CODES: &str = "Exit codes: 0 asked to end, or the frontend of --fd went; 1 a bug, or the sandbox stopped a \
system call; 2 command line wrong, or a file it names; 3 the host lacks something (permission); 4 ctl: the daemon is not there, or \
refuses; 135 memory that the frontend shares was cut off. SIGUSR1 says how it is. CLEAVE_LOG=debug says more.";

const LONG_HELP: &str = "\
Examples:
  A balloon that can be steered, and whose target outlives the daemon:
    cleave-balloon --socket-path /run/vm/balloon.sock --control /run/vm/balloon.ctl --state /run/vm/balloon.state
    cleave-balloon ctl /run/vm/balloon.ctl target size=512M
    cleave-balloon ctl /run/vm/balloon.ctl target size=all
    cleave-balloon ctl /run/vm/balloon.ctl status
    cleave-balloon ctl /run/vm/balloon.ctl stats
  One that leaves the guest 256 MiB of available memory, whatever it does:
    cleave-balloon --socket-path /run/vm/balloon.sock --auto free=256M

Commands of ctl:
  target size=SIZE|all       what the guest is to have
  status                     how the balloon is
  stats                      what the guest says of its memory, and how long ago; it is asked again
  set-interval seconds=N     ask the guest for statistics this often; 0 is never
  auto state=on|off          whether the automatic mode runs (--auto)
  inhibit state=on|off       give nothing back; what the guest inflates meanwhile is given back afterwards
  hint action=start|stop|done, query-hints
                             which pages the guest has no use for, for whoever copies its memory
  balloon value=BYTES, query-balloon
                             as in QMP

Exit codes:
  0    asked to end, or the frontend of --fd went
  1    a bug, or the sandbox stopped a system call
  2    the command line is wrong, or a file that it names
  3    the host lacks something (permission)
  4    ctl: the daemon is not there, or refuses
  135  memory that the frontend shares was cut off
SIGUSR1 says how it is: the balloon's size, and what was given back. CLEAVE_LOG=debug says more.";

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    match seconds {
        Some(interval) if interval.is_zero() || interval >= Duration::from_millis(100) => Ok(interval),
        _ => Err("a number of seconds is needed, from 0.1 on, or 0".to_owned()),
    }
}

fn on_or_off(text: &str) -> Result<bool, String> {
    options::switch(text).ok_or_else(|| "it is on or off".to_owned())
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(args: Args) -> Result<(), Failure> {
    if let Some(DaemonCommand::Ctl(ctl)) = args.command {
        return ctl.run(|_, _| Ok(Vec::new()));
    }
    if args.common.print_capabilities {
        let json = capabilities_json("balloon", &[]);
        return writeln!(std::io::stdout(), "{json}").map_err(Failure::host);
    }
    let (mode, max_queue_size) = (args.common.sandbox, args.common.queue_size);
    let (socket, inherited) = args.common.claim_socket_and(args.state_fd.as_slice())?;
    let signals = Signals::new().map_err(Failure::host)?;
    let state = match (&args.state, args.state_fd) {
        (Some(path), _) => Some(open_state(path)?),
        (None, Some(number)) => Some(inherited_state(number, inherited)?),
        (None, None) => None,
    };
    let pressure = if args.auto.is_some() { open_pressure() } else { Pressure::unknown() };
    let control = args.control.bind()?;
    let endpoint = socket.open()?;
    let sandbox = Sandbox {
        program: "cleave-balloon",
        mode,
        syscalls: sandbox::SYSCALLS,
        control: control.as_ref(),
        ..Sandbox::default()
    };
    let confined = sandbox.enter(&endpoint)?;
    let options = Options {
        min: args.min.bytes(),
        target: args.target.map(ByteSize::bytes),
        interval: args.stats_interval,
        auto: args.auto,
        pressure,
        keeper: Keeper::new(state),
    };
    let shared = Arc::new(Shared::new(options).map_err(BalloonError::from)?);
    let mut balloon = Balloon::new(shared.clone(), max_queue_size, args.reporting)?;
    let _control = control
        .map(|control| control.serve("cleave-balloon", Arc::new(BalloonControl(shared))))
        .transpose()?;
    cleave_runtime::run(&mut balloon, endpoint, &signals, &confined)
}

fn open_state(path: &Path) -> Result<File, Failure> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| Failure::usage(format!("--state {}: {error}", path.display())))
}

fn inherited_state(number: RawFd, mut inherited: Vec<Option<OwnedFd>>) -> Result<File, Failure> {
    let descriptor = inherited.pop().flatten();
    descriptor.map(File::from).ok_or_else(|| Failure::usage(format!("--state-fd {number}: it is not open")))
}

/// Without it the automatic mode knows only what the guest says.
fn open_pressure() -> Pressure {
    Pressure::open().unwrap_or_else(|error| {
        warn!("the host does not say how its tasks wait for memory (/proc/pressure/memory: {error})");
        Pressure::unknown()
    })
}
