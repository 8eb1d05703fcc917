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

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use cleave_common::control::{ControlError, Lines, Request, greeting, nothing, value_of};
use cleave_common::exit::Failure;
use cleave_common::sandbox::{drop_memory_lock, name_thread};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use tracing::{debug, warn};

use crate::socket::{Listener, SocketError};
pub use ctl::{ControlArgs, CtlArgs, DaemonCommand};

/// Most clients at once; others wait until one leaves.
const MAX_CLIENTS: usize = 16;

/// How long nobody is accepted after descriptors were short.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// Most requests of one client in a turn: then others have theirs.
const BATCH: usize = 32;

/// What every daemon answers itself.
const OWN_COMMANDS: [&str; 2] = ["qmp_capabilities", "query-commands"];

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

/// A control socket on which nobody is served yet.
#[derive(Debug)]
pub struct ControlSocket(Listener);

impl ControlSocket {
    /// Listens on `path`. Call it before the process is confined.
    ///
    /// # Errors
    /// The path is taken, or cannot be one.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        Listener::bind(path).map(Self)
    }

    pub(crate) fn file(&self) -> Option<&Path> {
        self.0.file_path()
    }

    /// Answers on a thread of its own. Call it when the process is confined, and before [`crate::run`]. The socket's file is
    /// removed when what this gives is dropped.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn serve(self, program: &'static str, control: Arc<dyn Control>) -> Result<ControlServer, Failure> {
        const STACK: usize = 256 << 10;
        let listener = Arc::new(self.0);
        let server = Server { listener: listener.clone(), program, control, clients: VecDeque::new() };
        thread::Builder::new()
            .name("control".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                name_thread("control");
                match drop_memory_lock().and_then(|()| server.run()) {
                    Ok(()) => {}
                    Err(error) => warn!("the control socket is closed: {error}"),
                }
            })
            .map_err(Failure::host)?;
        Ok(ControlServer { listener })
    }
}

/// A control socket that is served until the process ends.
#[derive(Debug)]
pub struct ControlServer {
    listener: Arc<Listener>,
}

impl Drop for ControlServer {
    /// The thread keeps the listener: what is dropped with it would be dropped never.
    fn drop(&mut self) {
        self.listener.remove_file();
    }
}

struct Server {
    listener: Arc<Listener>,
    program: &'static str,
    control: Arc<dyn Control>,
    clients: VecDeque<Lines>,
}

impl Server {
    fn run(mut self) -> io::Result<()> {
        loop {
            let (knock, ready) = self.wait()?;
            let before = std::mem::take(&mut self.clients);
            for (mut client, ready) in before.into_iter().zip(ready) {
                if !ready || self.attend(&mut client) {
                    self.clients.push_back(client);
                }
            }
            if knock {
                self.admit()?;
            }
        }
    }

    /// Whether somebody knocks, and for each client whether there is something to do.
    fn wait(&self) -> io::Result<(bool, Vec<bool>)> {
        let full = self.clients.len() >= MAX_CLIENTS;
        let knocks = if full { PollFlags::empty() } else { PollFlags::IN };
        let listener: BorrowedFd<'_> = self.listener.as_fd();
        let mut fds = vec![PollFd::from_borrowed_fd(listener, knocks)];
        fds.extend(self.clients.iter().map(|client| PollFd::new(client, client.interest())));
        let waiting = self.clients.iter().any(Lines::has_line);
        let timeout = waiting.then(Timespec::default);
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let knock = ready.next().unwrap_or(false);
        let ready = ready.zip(&self.clients).map(|(ready, client)| ready || client.has_line());
        Ok((knock, ready.collect()))
    }

    fn admit(&mut self) -> io::Result<()> {
        let stream: UnixStream = match self.listener.accept() {
            Ok(Some(stream)) => stream,
            Ok(None) => return Ok(()),
            Err(error) => {
                // The next turn would find the same knock: without a descriptor for it, leave it for a while.
                debug!("cannot accept on the control socket now: {error}");
                thread::sleep(SHORTAGE_PAUSE);
                return Ok(());
            }
        };
        let mut client = Lines::new(stream);
        if client.send(&greeting(self.program, env!("CARGO_PKG_VERSION")).to_string()).is_ok() {
            self.clients.push_back(client);
        }
        Ok(())
    }

    /// Answers what has come. `false`: this client is done with.
    fn attend(&self, client: &mut Lines) -> bool {
        let answered = client.flush().and_then(|()| {
            for _ in 0..BATCH {
                let Some(line) = client.take()? else { break };
                let answer = match Request::read(line) {
                    Ok(request) => self.answer(request),
                    Err(refusal) => refusal,
                };
                client.send(&answer.to_string())?;
            }
            Ok(())
        });
        if let Err(error) = &answered {
            debug!("a client of the control socket is dropped: {error}");
            // It may still read why.
            let _ = client.send(&refusal(&error.to_string()));
        }
        answered.is_ok() && (client.has_line() || !client.has_ended())
    }

    fn answer(&self, request: Request) -> Value {
        let id = request.id();
        let known = self.control.commands();
        let outcome = match request.command.as_str() {
            "qmp_capabilities" => Ok(nothing()),
            "query-commands" => value_of(&names(known)),
            command if known.contains(&command) => self.control.execute(request),
            command => {
                let all: Vec<&'static str> = known.iter().copied().chain(OWN_COMMANDS).collect();
                Err(ControlError::unknown_command(command, &all))
            }
        };
        id.answer(outcome)
    }
}

fn refusal(desc: &str) -> String {
    serde_json::json!({"error": {"class": "GenericError", "desc": desc}}).to_string()
}

/// As QMP has it: an object a command.
fn names(known: &[&'static str]) -> Vec<Value> {
    known.iter().chain(&OWN_COMMANDS).map(|name| serde_json::json!({"name": name})).collect()
}

#[cfg(test)]
mod tests;
