//! The Cleave virtual machine monitor. See `docs/architecture.md` for the floors these modules are on.

mod arch;
mod bus;
mod check;
mod cli;
mod config;
mod daemon;
mod kvm;
mod legacy;
mod machine;
mod memory;
mod pci;
mod plan;
mod vhost;
mod virtio;

use clap::Parser;
use cleave_common::exit::{ExitCode, Failure};
use cleave_common::logging;

use cli::{Cli, Command, RunArgs};

fn main() -> std::process::ExitCode {
    logging::init();
    let result = match Cli::parse().command {
        Command::Run(arguments) => run(*arguments),
        Command::Check { json } => return check::run(json).into(),
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
    if let Some(machine) = machine::build(&config)? {
        machine.run()?;
    }
    Ok(())
}
