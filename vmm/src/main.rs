//! The Cleave virtual machine monitor. See `docs/architecture.md` for the floors these modules are on.

mod arch;
mod attach;
mod bus;
mod check;
mod cli;
mod config;
mod control;
mod daemon;
mod kvm;
mod legacy;
mod machine;
mod memory;
mod pci;
mod plan;
mod sandbox;
mod usage;
mod vhost;
mod virtio;

use cleave_common::exit::{ExitCode, Failure};
use cleave_common::logging;

use cli::{Cli, Command, RunArgs};
use config::NetDevice;
use legacy::terminal;

fn main() -> std::process::ExitCode {
    logging::init();
    let cli = match Cli::read() {
        Ok(cli) => cli,
        Err(code) => return code.into(),
    };
    let result = match cli.command {
        Command::Run(arguments) => run(*arguments),
        Command::Console { socket } => attach::attach(&socket),
        Command::Check { json } => return check::run(json).into(),
        Command::Memory { pids, json } => usage::run(&pids, json),
    };
    match result {
        Ok(()) => ExitCode::Success.into(),
        Err(failure) => {
            if !failure.is_explained() {
                eprintln!("cleave: {failure}");
            }
            failure.code.into()
        }
    }
}

fn run(arguments: RunArgs) -> Result<(), Failure> {
    let config = arguments.into_config()?;
    if config.sandbox {
        let namespaces = config.nets.iter().any(NetDevice::is_user);
        sandbox::confine_process(terminal::restore, namespaces).map_err(Failure::host)?;
    }
    if let Some(machine) = machine::build(&config)? {
        machine.run()?;
    }
    Ok(())
}
