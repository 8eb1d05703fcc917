//! What programs and people can tell a machine and ask it, and what it tells them by itself. The machine that executes it
//! is not known here: it gets [`Asked`] and gives [`Answer`]s and [`Notice`]s.
//!
//! ```text
//!   client ──line──> control thread ──Asked──> machine thread
//!          <─line───                <─Answer──
//!          <─event──                <─Notice── (whenever something happens)
//! ```
//!
//! Invariants: the machine thread never waits for a client; a client that does not read is dropped; a command is either
//! carried out whole or refused with its reason.

mod answer;
mod qmp;
mod schema;
mod server;
#[cfg(test)]
mod tests;

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use cleave_common::control::ControlError;

pub use answer::{Answer, Cpu, DeviceInfo, Notice, RunState};
pub use server::{Control, ControlSocket};

/// How long the machine may take to carry out a command: a reset may wait for a daemon that is being killed.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a machine can be told and asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    QueryStatus,
    QueryName,
    QueryCpus,
    QueryDevices,
    /// The vCPUs pause.
    Stop,
    /// And go on.
    Continue,
    /// The power button is pressed.
    PowerDown,
    Reset,
    /// The machine ends now, whatever its guest does.
    Quit,
    /// A daemon that is ours is killed and started again.
    RestartDevice {
        name: String,
    },
}

/// A command on its way to the machine. Whoever holds it answers it; dropped, it is answered that the machine ends.
#[derive(Debug)]
pub struct Asked {
    pub command: Command,
    reply: SyncSender<Result<Answer, ControlError>>,
}

impl Asked {
    fn new(command: Command) -> (Self, Receiver<Result<Answer, ControlError>>) {
        let (reply, answers) = sync_channel(1);
        (Self { command, reply }, answers)
    }

    pub fn answer(self, outcome: Result<Answer, ControlError>) {
        // Nobody waits any more: the client has its refusal.
        let _ = self.reply.send(outcome);
    }
}

/// Sends `command` by `send` and waits for its answer.
fn ask(command: Command, send: &dyn Fn(Asked)) -> Result<Answer, ControlError> {
    use std::sync::mpsc::RecvTimeoutError;
    let (asked, answers) = Asked::new(command);
    send(asked);
    answers.recv_timeout(PATIENCE).unwrap_or_else(|error| {
        Err(ControlError::new(match error {
            RecvTimeoutError::Disconnected => "the machine is ending".to_owned(),
            RecvTimeoutError::Timeout => {
                format!("the machine has not done it within {}s", PATIENCE.as_secs())
            }
        }))
    })
}
