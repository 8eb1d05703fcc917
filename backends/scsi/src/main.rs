//! cleave-scsi: a SCSI host adapter with disks and CD-ROM drives (virtio 1.2, 5.6) as a vhost-user daemon.

mod address;
mod bus;
mod config;
mod config_space;
mod control_queue;
mod controller;
mod ctl;
mod device;
mod event_queue;
mod events;
mod gate;
mod orders;
mod queue;
mod request;
mod sandbox;
mod state_file;
mod units;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use cleave_common::cli;
use cleave_common::cpus::CpuList;
use cleave_common::exit::Failure;
use cleave_runtime::{CommonArgs, ControlArgs, DaemonCommand, Sandbox, Signals, capabilities_json, cpus};
use cleave_scsi::Nexus;
use cleave_storage::Nudges;

use bus::{Bus, Slot};
use config::{CdromConfig, KindConfig, LunConfig, PlaceError, UnitConfig};
use controller::{Controller, INITIATOR, Predecessor};
use device::{Scsi, ScsiError};
use state_file::{Saved, StateFile};
use units::Opener;

/// Serve disks and CD-ROM drives to a virtual machine, as virtio-scsi over vhost-user
#[derive(Debug, Parser)]
#[command(name = "cleave-scsi", version, after_help = EXIT_CODES, after_long_help = LONG_HELP)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Args {
    #[command(subcommand)]
    command: Option<DaemonCommand>,

    #[command(flatten)]
    common: CommonArgs,

    #[command(flatten)]
    control: ControlArgs,

    /// Add a disk: disk=PATH[,lun=N][,target=N][,format=raw|qcow2][,readonly=on][,cache=none|writeback|writethrough]
    /// [,serial=TEXT][,product=TEXT][,wwn=NUMBER][,on-full=error|pause][,throttle.KEY=N...]
    ///
    /// lun= is the first that is free unless given, target= is 0. The keys of throttle. are those of 'cleave-block
    /// --throttle'. A comma in a value is written twice.
    #[arg(long, value_name = "KEYS", value_parser = config::lun)]
    lun: Vec<LunConfig>,

    /// Add a CD-ROM drive: PATH|none[,lun=N][,target=N][,serial=TEXT][,wwn=NUMBER]
    ///
    /// PATH is an ISO image; with none the drive is empty at first.
    #[arg(long, value_name = "PATH|KEYS", value_parser = config::cdrom)]
    cdrom: Vec<CdromConfig>,

    /// Request queues, each served by a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=62))]
    num_queues: u16,

    /// Keep in this file what a restart of this daemon has to know: reservations, media and units that were changed
    #[arg(long, value_name = "PATH")]
    state: Option<PathBuf>,

    /// The initiator's world wide name (NAA), by which persistent reservations know it; the same for every machine unless
    /// given
    #[arg(long, value_name = "NUMBER", value_parser = initiator)]
    initiator: Option<u64>,

    /// Let a queue's thread look for work this many microseconds before it sleeps, while that pays: quicker answers for
    /// CPU time
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    poll_us: u32,

    /// Run the queues' threads on these CPUs, in turn: 2,3 or 0-3
    #[arg(long, value_name = "LIST")]
    cpus: Option<CpuList>,
}

const EXIT_CODES: &str = "Exit codes: 0 asked to end, or the frontend of --fd went; 1 a bug, or the sandbox stopped a \
system call; 2 command line or an image wrong; 3 the host lacks something (permission, lock, io_uring); 4 'ctl': the daemon is \
not there, or refuses; 135 memory that the frontend shares was cut off. SIGHUP looks at the disks' sizes again, SIGUSR1 says \
how it is. CLEAVE_LOG=debug says more.";

const LONG_HELP: &str = "\
Examples:
  A disk and a CD-ROM drive, steered by a control socket:
    cleave-scsi --socket-path /run/vm/scsi.sock --lun disk=debian.raw --cdrom debian.iso,lun=1 \\
        --control /run/vm/scsi.ctl --state /var/lib/vm/scsi.state
    cleave-scsi ctl /run/vm/scsi.ctl query-units
    cleave-scsi ctl /run/vm/scsi.ctl eject unit=1
    cleave-scsi ctl /run/vm/scsi.ctl change unit=1 path=other.iso
    cleave-scsi ctl /run/vm/scsi.ctl add-disk disk=data.raw lun=5
    cleave-scsi ctl /run/vm/scsi.ctl remove unit=5
    cleave-scsi ctl /run/vm/scsi.ctl resize unit=0

A unit is named LUN, or TARGET:LUN. 'ctl' opens the files itself, as its own user, and hands them to the daemon, which
could not. force=true takes a medium out that the guest has locked in.

Exit codes:
  0    asked to end, or the frontend of --fd went
  1    a bug, or the sandbox stopped a system call
  2    the command line is wrong, or an image that it names
  3    the host lacks something (permission, a lock, io_uring)
  4    'ctl': the daemon is not there, or refuses
  135  memory that the frontend shares was cut off
SIGHUP looks at the disks' sizes again. SIGUSR1 says how it is: what is in flight, and what was served.
CLEAVE_LOG=debug says more.";

fn initiator(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").ok_or("write it as 0x3000000000000001")?;
    u64::from_str_radix(digits, 16).map_err(|error| error.to_string())
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(args: Args) -> Result<(), Failure> {
    if let Some(DaemonCommand::Ctl(ctl)) = args.command {
        return ctl.run(ctl::open);
    }
    if args.common.print_capabilities {
        let json = capabilities_json("scsi", &[]);
        return writeln!(std::io::stdout(), "{json}").map_err(Failure::host);
    }
    let (mode, max_queue_size) = (args.common.sandbox, args.common.queue_size);
    let units = units_of(args.lun, args.cdrom, args.control.control.is_some()).map_err(Failure::usage)?;
    let socket = args.common.claim_socket()?;
    let signals = Signals::new().map_err(Failure::host)?;
    args.cpus.as_ref().map_or(Ok(()), cpus::check).map_err(ScsiError::from)?;
    let (state, saved) = match &args.state {
        Some(path) => StateFile::open(path).map_err(Failure::usage)?,
        None => (StateFile::default(), None),
    };
    let nudges = Arc::new(Nudges::new(args.num_queues).map_err(Failure::host)?);
    let (bus, predecessor) = open_units(&units, saved, &nudges)?;
    let control = args.control.bind()?;
    let endpoint = socket.open()?;
    let sandbox = Sandbox {
        program: "cleave-scsi",
        mode,
        syscalls: sandbox::SYSCALLS,
        ioctls: sandbox::IOCTLS,
        removes: &[],
        control: control.as_ref(),
    };
    let confined = sandbox.enter(&endpoint)?;
    let nexus = args.initiator.map_or(INITIATOR, Nexus);
    let serving = (args.num_queues, Duration::from_micros(args.poll_us.into()));
    let controller =
        Controller::new(bus, predecessor, state, nexus, nudges, serving).map_err(Failure::host)?;
    let controller = Arc::new(controller);
    let mut scsi = Scsi::new(controller.clone(), args.num_queues, max_queue_size, args.cpus)?;
    let control =
        control.map(|socket| socket.serve("cleave-scsi", Arc::new(ctl::Ctl(controller)))).transpose()?;
    let served = cleave_runtime::run(&mut scsi, endpoint, &signals, &confined);
    drop(control);
    served
}

fn units_of(
    disks: Vec<LunConfig>,
    cdroms: Vec<CdromConfig>,
    may_come: bool,
) -> Result<Vec<UnitConfig>, PlaceError> {
    let kinds: Vec<KindConfig> = disks
        .into_iter()
        .map(|disk| KindConfig::Disk(Box::new(disk)))
        .chain(cdroms.into_iter().map(KindConfig::Cdrom))
        .collect();
    if kinds.is_empty() && !may_come {
        return Err(PlaceError::Nothing);
    }
    config::place(kinds)
}

/// The units as they are asked for, and as a predecessor has left them.
fn open_units(
    units: &[UnitConfig],
    saved: Option<Saved>,
    nudges: &Arc<Nudges>,
) -> Result<(Bus, Option<Predecessor>), Failure> {
    let mut opener = Opener::default();
    let mut asked_for = Bus::default();
    for config in units {
        open_unit(config, &mut opener, &mut asked_for, nudges)?;
    }
    let Some(saved) = saved else { return Ok((asked_for, None)) };
    let mut left = Bus::default();
    for config in saved.configs(units) {
        let mut config = config;
        let address = config.address;
        if let Err(failure) = open_unit(&config, &mut opener, &mut left, nudges) {
            tracing::warn!("unit {address} is not as it was left: {failure}");
            // A drive without its medium is better than none.
            let KindConfig::Cdrom(cdrom) = &mut config.kind else { continue };
            cdrom.path = None;
            open_unit(&config, &mut opener, &mut left, nudges)?;
        }
        if saved.was_added(address) {
            left.mark_hot(address);
        }
    }
    Ok((asked_for, Some(Predecessor { bus: left, saved })))
}

fn open_unit(
    config: &UnitConfig,
    opener: &mut Opener,
    bus: &mut Bus,
    nudges: &Arc<Nudges>,
) -> Result<(), Failure> {
    let image = match &config.kind {
        KindConfig::Disk(disk) => Some(opener.disk(disk).map_err(units::UnitError::from)?),
        KindConfig::Cdrom(cdrom) => {
            let opened = cdrom.path.as_deref().map(|path| opener.cdrom(path)).transpose();
            opened.map_err(units::UnitError::from)?
        }
    };
    let unit = units::make(config, image.as_deref())?;
    bus.add(Slot::new(config.clone(), image, nudges), unit);
    Ok(())
}
