//! cleave-serial: a virtio-console device (virtio 1.2, 5.3) with many ports as a vhost-user daemon.

mod admin;
mod device;
mod history;
mod iovecs;
mod kept;
mod line;
mod ports;
mod sandbox;
mod terminal;
mod worker;

use std::io::Write;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use cleave_common::cli;
use cleave_common::exit::Failure;
use cleave_common::port::{self, MAX_PORTS, Place, PortConfig, PortError, PortSpec};
use cleave_runtime::{CommonArgs, ControlArgs, DaemonCommand, Sandbox, Signals, capabilities_json};

use admin::Admin;
use device::Console;
use ports::SizeOrder;
use worker::{AddError, Worker};

/// Ports that there is room for unless --max-ports= says how many, if there are not more.
const USUAL_PORTS: u32 = 8;

/// Give a virtual machine a console and other serial ports, as virtio-console over vhost-user
#[derive(Debug, Parser)]
#[command(name = "cleave-serial", version, after_help = EXIT_CODES, after_long_help = LONG_HELP)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    #[command(flatten)]
    control: ControlArgs,

    /// Add a port: [console,][name=NAME,]WHERE[,history=SIZE][,on-full=wait|drop], where WHERE is one of stdio,
    /// pty[,link=PATH], unix=PATH[,connect], tcp=ADDRESS:PORT, file=PATH, pipe=PATH, log=SIZE, fd=N
    ///
    /// A console is hvc0 (hvc1, ...) in a Linux guest, a port with a name /dev/virtio-ports/NAME.
    #[arg(long, value_name = "KEYS", value_parser = port::parse, required_unless_present = "print_capabilities")]
    port: Vec<PortConfig>,

    /// Ports that there is room for, up to 31: others can be added later. 8 unless given, or as many as --port says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PORTS)))]
    max_ports: Option<u32>,

    /// Tell a console's size as columns and rows (spec), or as rows and columns, as Linux took it before 6.15 (linux)
    #[arg(long, value_enum, value_name = "spec|linux", default_value_t, hide_possible_values = true)]
    size_order: SizeOrder,

    #[command(subcommand)]
    command: Option<DaemonCommand>,
}

const EXIT_CODES: &str = "Exit codes: 0 asked to end, or the frontend of --fd went; 1 a bug, or the sandbox stopped a \
system call; 2 command line wrong, or a file it names; 3 the host lacks something; 4 (ctl) the daemon is not there, or \
refuses; 135 memory that the frontend shares was cut off. SIGUSR1 says how it is. CLEAVE_LOG=debug says more.";

const LONG_HELP: &str = "\
Examples:
  A console on a pseudo-terminal, and the channel of QEMU's guest agent:
    cleave-serial --socket-path /run/vm/console.sock --port console,pty,link=/run/vm/console \\
        --port name=org.qemu.guest_agent.0,unix=/run/vm/agent.sock
  A console for several people at once, who see what was printed before they came:
    cleave-serial --socket-path /run/vm/console.sock --port console,unix=/run/vm/tty.sock,history=64K
  A port more, while it runs (--control /run/vm/control.sock):
    cleave-serial ctl /run/vm/control.sock port-add port=name=spice,,unix=/run/vm/spice.sock

A port with a name has one client at a time, which gets each byte once; while nobody reads, the guest's writer waits. A
console has up to 16 clients; the guest's writer does not wait for them (Linux's would stop a CPU), but what is not read in
time is missing, and said so: on-full=wait has it wait all the same.

Exit codes:
  0    asked to end, or the frontend of --fd went
  1    a bug, or the sandbox stopped a system call
  2    the command line is wrong, or a file that it names
  3    the host lacks something
  4    (ctl) the daemon is not there, or refuses
  135  memory that the frontend shares was cut off
SIGUSR1 says how it is: whether a frontend is connected, who has which port open, and what was moved.
CLEAVE_LOG=debug says more.";

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(args: Args) -> Result<(), Failure> {
    if let Some(DaemonCommand::Ctl(ctl)) = args.command {
        return ctl.run(admin::open_for);
    }
    if args.common.print_capabilities {
        let json = capabilities_json("console", &[]);
        return writeln!(std::io::stdout(), "{json}").map_err(Failure::host);
    }
    let (mode, max_queue_size) = (args.common.sandbox, args.common.queue_size);
    let specs = validate(args.port)?;
    let inherited: Vec<RawFd> = specs.iter().filter_map(inherited_fd).collect();
    let (socket, given) = args.common.claim_socket_and(&inherited)?;
    let signals = Signals::new().map_err(Failure::host)?;
    let max_ports = args.max_ports.unwrap_or_else(|| USUAL_PORTS.max(specs.len() as u32).min(MAX_PORTS));
    let (mut worker, handle) = Worker::new(max_ports, args.size_order).map_err(Failure::host)?;
    let connects = specs.iter().any(|spec| matches!(spec.place, Place::UnixConnect(_)));
    let files = add_ports(&mut worker, specs, given)?;
    let control = args.control.bind()?;
    let syscalls =
        if connects || control.is_some() { sandbox::SYSCALLS_TO_CONNECT } else { sandbox::SYSCALLS };
    let endpoint = socket.open()?;
    let sandbox = Sandbox {
        program: "cleave-serial",
        mode,
        syscalls,
        ioctls: sandbox::IOCTLS,
        control: control.as_ref(),
        removes: &files,
    };
    let confined = sandbox.enter(&endpoint)?;
    let lines = handle.clone();
    worker.spawn().map_err(Failure::host)?;
    let admin = Arc::new(Admin(handle.clone()));
    let _control = control.map(|control| control.serve("cleave-serial", admin)).transpose()?;
    let served = cleave_runtime::run(
        &mut Console::new(handle, max_ports, max_queue_size),
        endpoint,
        &signals,
        &confined,
    );
    // Their files are removed, and the terminal is given back.
    lines.ask(Worker::close);
    served
}

fn validate(ports: Vec<PortConfig>) -> Result<Vec<PortSpec>, Failure> {
    let refused = |error: PortError| Failure::usage(format!("--port: {error}"));
    ports.into_iter().map(|port| port.validate().map_err(refused)).collect()
}

fn inherited_fd(spec: &PortSpec) -> Option<RawFd> {
    match spec.place {
        Place::Inherited(number) => Some(number),
        _ => None,
    }
}

/// Opens all ports, and says which files are to be removed in the end.
fn add_ports(
    worker: &mut Worker,
    specs: Vec<PortSpec>,
    given: Vec<Option<OwnedFd>>,
) -> Result<Vec<PathBuf>, Failure> {
    let mut given = given.into_iter();
    let mut files = Vec::new();
    for spec in specs {
        let inherited = inherited_fd(&spec).and_then(|_| given.next().flatten());
        let opened = line::open(&spec.place, inherited)?;
        let id = worker.add(spec, opened).map_err(|error| match error {
            AddError::NoPlace(_) => Failure::usage(format!("--port: {error}")),
            AddError::Line(_) => Failure::host(error),
        })?;
        files.extend(worker.line(id).and_then(|line| line.file()).map(PathBuf::from));
    }
    Ok(files)
}
