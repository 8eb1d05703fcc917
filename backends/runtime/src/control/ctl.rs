//! `cleave-NAME ctl SOCKET COMMAND key=value...`: a person's way to a control socket.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use cleave_common::control::{Client, ClientError};
use cleave_common::exit::{ExitCode, Failure};
use serde_json::{Map, Value};

use super::{ControlSocket, ControlSocketError};

/// The flag of a daemon that has a control socket; flatten it beside [`crate::CommonArgs`].
#[derive(Debug, Args)]
#[group(skip)]
pub struct ControlArgs {
    /// Take commands on this unix socket: 'ctl' sends them, and so do programs that speak QMP. Who may write to it may steer
    /// the device
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

impl ControlArgs {
    /// # Errors
    /// The path is taken, or cannot be one.
    pub fn bind(&self) -> Result<Option<ControlSocket>, ControlSocketError> {
        self.control.as_deref().map(ControlSocket::bind).transpose()
    }
}

/// What a program of a daemon does instead of serving: its `Option<DaemonCommand>` is a subcommand, with
/// `args_conflicts_with_subcommands` and `subcommand_negates_reqs`.
#[derive(Debug, Subcommand)]
pub enum DaemonCommand {
    Ctl(CtlArgs),
}

/// Ask a running daemon something by its control socket
#[derive(Debug, Args)]
pub struct CtlArgs {
    /// The socket that the daemon was given by --control
    #[arg(value_name = "SOCKET")]
    pub socket: PathBuf,

    /// What to do; query-commands lists what there is
    #[arg(value_name = "COMMAND")]
    pub command: String,

    /// The command's arguments; a value is a number, true, false, JSON, or else text
    #[arg(value_name = "KEY=VALUE", value_parser = argument)]
    pub arguments: Vec<(String, Value)>,
}

fn argument(text: &str) -> Result<(String, Value), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value_of(value))),
        _ => Err("an argument is of the form KEY=VALUE".to_owned()),
    }
}

/// What a person means by `text`: JSON where it is some, else the text itself.
fn value_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}

impl CtlArgs {
    /// Sends the command and prints what comes back. `open` gives the descriptors that go along: it may open files which
    /// the arguments name, as this user, and take out of them what was for it.
    ///
    /// # Errors
    /// The daemon is not there, or refuses.
    pub fn run(
        self,
        open: impl FnOnce(&str, &mut Map<String, Value>) -> Result<Vec<OwnedFd>, Failure>,
    ) -> Result<(), Failure> {
        let mut arguments = Map::new();
        for (key, value) in self.arguments {
            if arguments.contains_key(&key) {
                return Err(Failure::usage(format!("'{key}' is given twice")));
            }
            arguments.insert(key, value);
        }
        let fds = open(&self.command, &mut arguments)?;
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let answer = Client::connect(&self.socket)
            .and_then(|mut client| client.call(&self.command, &arguments, &fds))
            .map_err(failure)?;
        print(&answer)
    }
}

fn failure(error: ClientError) -> Failure {
    match error {
        ClientError::UnknownCommand(_) => Failure::usage(error),
        _ => Failure::new(ExitCode::Device, error),
    }
}

/// Text as it is, nothing for nothing, and else JSON for people.
fn print(answer: &Value) -> Result<(), Failure> {
    let text = match answer {
        Value::Object(fields) if fields.is_empty() => return Ok(()),
        Value::String(text) => text.clone(),
        other => format!("{other:#}"),
    };
    writeln!(std::io::stdout(), "{text}").map_err(Failure::host)
}
