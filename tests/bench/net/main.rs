//! What a vhost-user network daemon can do, without a virtual machine: `net-bench --help`.
//!
//! ```text
//!   Args --> Plan (rows, and who is measured in each) --> Turn, Turn, ... in turns --> Table or JSON
//!
//!   send:     Guest --socket--> daemon --> tap device, where nobody listens
//!   receive:  Source --> tap device --> daemon --socket--> Guest
//!   forward:  Guest --socket--> daemon --socket--> Guest
//! ```

mod args;
mod contender;
mod frame;
mod guest;
mod lane;
mod plan;
mod report;
mod run;
mod tap;

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
    #[error("{0}")]
    Stalled(String),
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error("DPDK's packages: {0}")]
    Packages(#[from] cleave_tests::error::Error),
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
    let outcome = match &args.command {
        Some(Command::Plain(args)) => tap::plain(args).map(|()| true),
        None => {
            if let Err(error) = interruption::tidy_up() {
                eprintln!("net-bench: an interruption will leave files behind: {error}");
            }
            run::run(&args.measure)
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(BenchError::Usage(what)) => {
            eprintln!("net-bench: {what}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("net-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
