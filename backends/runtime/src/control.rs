//! A daemon's control socket: who may reach it may steer the device, while it is served and while it is not.
//!
//! ```text
//!   ControlSocket::bind --(Sandbox::enter)--> ControlSocket::serve --> answering, on a thread of its own, to the process's end
//! ```
//!
//! The protocol is [`cleave_common::control`]'s. Commands of all clients are carried out one after the other, on this
//! thread: a device's [`Control`] shares with the queues' threads what it has to. A client that sends no request, or reads
//! no answer, loses its own connection only.

mod ctl;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use cleave_common::control::{
    CAPABILITIES, ControlError, Listener, Request, Server, greeting, nothing, value_of,
};
use cleave_common::exit::{ExitCode, Failure};
use cleave_common::sandbox::{drop_memory_lock, name_thread};
use cleave_common::socket::{ListenError, SocketFile, listen};
use serde_json::Value;
use tracing::warn;

pub use ctl::{ControlArgs, CtlArgs, DaemonCommand};

/// What every daemon answers itself.
const OWN_COMMANDS: [&str; 2] = [CAPABILITIES, "query-commands"];

/// What a device can be asked. Called from the control socket's thread, one command at a time; no call waits for a guest.
pub trait Control: Send + Sync {
    /// The names of the commands.
    fn commands(&self) -> &'static [&'static str];

    /// Carries out `request`, whose command is one of [`Control::commands`].
    ///
    /// # Errors
    /// It cannot be: nothing has changed then.
    fn execute(&self, request: Request) -> Result<Value, ControlError>;
}

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
#[error("--control {}: {source}", path.display())]
pub struct ControlSocketError {
    path: PathBuf,
    source: ListenError,
}

impl From<ControlSocketError> for Failure {
    fn from(error: ControlSocketError) -> Self {
        let code = match &error.source {
            ListenError::Io(_) | ListenError::InUse => ExitCode::Host,
            ListenError::NotASocket | ListenError::OtherKind | ListenError::TooLong(_) => ExitCode::Usage,
        };
        Self::new(code, error)
    }
}

/// A control socket on which nobody is served yet.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    file: SocketFile,
}

impl ControlSocket {
    /// Listens on `path`. Call it before the process is confined.
    ///
    /// # Errors
    /// The path is taken, or cannot be one.
    pub fn bind(path: &Path) -> Result<Self, ControlSocketError> {
        let (listener, file) =
            listen(path).map_err(|source| ControlSocketError { path: path.to_owned(), source })?;
        Ok(Self { listener, file })
    }

    pub(crate) fn file(&self) -> &Path {
        self.file.path()
    }

    /// Answers on a thread of its own. Call it when the process is confined, and before [`crate::run`]. The socket's file is
    /// removed when what this gives is dropped.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn serve(self, program: &'static str, control: Arc<dyn Control>) -> Result<ControlServer, Failure> {
        const STACK: usize = 256 << 10;
        let greeting = greeting(program, env!("CARGO_PKG_VERSION"));
        let server = Server::new(vec![Listener::Unix(self.listener)], &greeting);
        thread::Builder::new()
            .name("control".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                name_thread("control");
                let Err(error) = drop_memory_lock().and_then(|()| serve(server, &*control));
                warn!("the control socket is closed: {error}");
            })
            .map_err(Failure::host)?;
        Ok(ControlServer { _file: self.file })
    }
}

/// A control socket that is served until the process ends.
#[derive(Debug)]
pub struct ControlServer {
    _file: SocketFile,
}

fn serve(mut server: Server, control: &dyn Control) -> io::Result<std::convert::Infallible> {
    loop {
        server.turn(None, &mut |request| answer(control, request))?;
    }
}

fn answer(control: &dyn Control, request: Request) -> Value {
    let id = request.id();
    let known = control.commands();
    let outcome = match request.command.as_str() {
        CAPABILITIES => Ok(nothing()),
        "query-commands" => value_of(&names(known)),
        command if known.contains(&command) => control.execute(request),
        command => {
            let all: Vec<&'static str> = known.iter().copied().chain(OWN_COMMANDS).collect();
            Err(ControlError::unknown_command(command, &all))
        }
    };
    id.answer(outcome)
}

/// As QMP has it: an object a command.
fn names(known: &[&'static str]) -> Vec<Value> {
    known.iter().chain(&OWN_COMMANDS).map(|name| serde_json::json!({"name": name})).collect()
}

#[cfg(test)]
mod tests;
