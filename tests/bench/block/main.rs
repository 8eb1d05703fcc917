//! What a vhost-user block daemon can do, and how well, without a virtual machine: `block-bench --help`.
//!
//! ```text
//!   Args --> Plan (rows, and who is measured in each) --> Turn, Turn, ... in turns --> Table or JSON
//! ```

mod args;
mod conformance;
mod contender;
mod fio;
mod kill;
mod plan;
mod report;
mod run;
mod scratch;

use std::process::ExitCode;

use cleave_tests::driver::DriverError;
use cleave_tests::interruption;

use args::{Args, Command};

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error("{0}")]
    Usage(String),
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error("{name} failed ({status}): {said}")]
    Program { name: String, status: std::process::ExitStatus, said: String },
    #[error("cannot start {name}: {source}")]
    Start { name: String, source: std::io::Error },
    #[error("the tools of Debian's packages (fio, qemu-storage-daemon): {0}")]
    Tools(#[from] cleave_tests::error::Error),
}

impl BenchError {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

type Result<T> = std::result::Result<T, BenchError>;

fn main() -> ExitCode {
    let args = match cleave_common::cli::read::<Args>() {
        Ok(args) => args,
        Err(code) => return code.into(),
    };
    if let Err(error) = interruption::tidy_up() {
        eprintln!("block-bench: an interruption will leave files behind: {error}");
    }
    let outcome = match &args.command {
        Some(Command::Conformance(args)) => conformance::run(args),
        Some(Command::Kill(args)) => kill::run(args),
        None => run::run(&args.measure),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(BenchError::Usage(what)) => {
            eprintln!("block-bench: {what}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("block-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
