//! Who is asked: any number of listening sockets, a bounded number of clients, one thread.
//!
//! ```text
//!   client:  knocking --accepted, greeted--> asking --closed, endless line, reads nothing--> gone
//!                                              └─ qmp_capabilities: events from now on
//! ```
//!
//! Invariants: requests are answered one after the other, each client's in its order; nothing is kept for a client beyond
//! [`MAX_LINE`](super::MAX_LINE) bytes each way; a client that misbehaves loses its own connection only.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use tracing::debug;

use super::{Lines, Request};

/// Most clients at once; others wait until one leaves.
pub const MAX_CLIENTS: usize = 32;

/// How long nobody is accepted after descriptors were short.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// Most requests of one client in a turn: then others have theirs.
const BATCH: usize = 32;

/// Where clients knock. None of them blocks.
#[derive(Debug)]
pub enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let accepted = match self {
            Self::Unix(listener) => listener.accept().map(|(stream, _)| OwnedFd::from(stream)),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| OwnedFd::from(stream)),
        };
        match accepted {
            Ok(stream) => Ok(Some(stream)),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

#[derive(Debug)]
struct Client {
    lines: Lines,
    /// It has said what it can do, and hears events.
    negotiated: bool,
}

/// The sockets and their clients.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<Listener>,
    greeting: String,
    clients: Vec<Client>,
}

impl Server {
    pub fn new(listeners: Vec<Listener>, greeting: &Value) -> Self {
        Self { listeners, greeting: greeting.to_string(), clients: Vec::new() }
    }

    /// Waits until there is something to do, or `wake` is readable, and has `answer` answer what was asked. `true`: `wake` is
    /// readable.
    ///
    /// # Errors
    /// Waiting does not work.
    pub fn turn(
        &mut self,
        wake: Option<BorrowedFd<'_>>,
        answer: &mut dyn FnMut(Request) -> Value,
    ) -> io::Result<bool> {
        let Ready { woken, knocks, clients } = self.wait(wake)?;
        let before = std::mem::take(&mut self.clients);
        for (mut client, ready) in before.into_iter().zip(clients) {
            if !ready || client.attend(answer) {
                self.clients.push(client);
            }
        }
        for (at, _) in knocks.into_iter().enumerate().filter(|(_, knock)| *knock) {
            self.admit(at);
        }
        Ok(woken)
    }

    /// Sends `event` to every client that hears events.
    pub fn tell(&mut self, event: &Value) {
        let text = event.to_string();
        self.clients.retain_mut(|client| !client.negotiated || client.lines.send(&text).is_ok());
    }

    fn wait(&self, wake: Option<BorrowedFd<'_>>) -> io::Result<Ready> {
        let full = self.clients.len() >= MAX_CLIENTS;
        let knocks = if full { PollFlags::empty() } else { PollFlags::IN };
        let mut fds: Vec<PollFd<'_>> =
            wake.map(|wake| PollFd::from_borrowed_fd(wake, PollFlags::IN)).into_iter().collect();
        fds.extend(self.listeners.iter().map(|listener| PollFd::new(listener, knocks)));
        fds.extend(self.clients.iter().map(|client| PollFd::new(&client.lines, client.lines.interest())));
        let more = self.clients.iter().any(|client| client.lines.has_line());
        let timeout = more.then(Timespec::default);
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let woken = wake.is_some() && ready.next().unwrap_or(false);
        let knocks = ready.by_ref().take(self.listeners.len()).collect();
        let clients = ready.zip(&self.clients).map(|(ready, client)| ready || client.lines.has_line());
        Ok(Ready { woken, knocks, clients: clients.collect() })
    }

    fn admit(&mut self, listener: usize) {
        match self.listeners[listener].accept() {
            Ok(Some(stream)) => {
                let mut client = Client { lines: Lines::new(stream), negotiated: false };
                if client.lines.send(&self.greeting).is_ok() {
                    self.clients.push(client);
                }
            }
            Ok(None) => {}
            Err(error) => {
                // The next turn would find the same knock: without a descriptor for it, leave it for a while.
                debug!("cannot accept on the control socket now: {error}");
                thread::sleep(SHORTAGE_PAUSE);
            }
        }
    }
}

/// What there is to do.
struct Ready {
    woken: bool,
    /// By listener.
    knocks: Vec<bool>,
    /// By client.
    clients: Vec<bool>,
}

impl Client {
    /// Answers what has come. `false`: this client is done with.
    fn attend(&mut self, answer: &mut dyn FnMut(Request) -> Value) -> bool {
        let lines = &mut self.lines;
        let negotiated = &mut self.negotiated;
        let answered = lines.flush().and_then(|()| {
            for _ in 0..BATCH {
                let Some(line) = lines.take()? else { break };
                let reply = match Request::read(line) {
                    Ok(request) => {
                        *negotiated |= request.command == super::CAPABILITIES;
                        answer(request)
                    }
                    Err(refusal) => refusal,
                };
                lines.send(&reply.to_string())?;
            }
            Ok(())
        });
        if let Err(error) = &answered {
            debug!("a client of the control socket is dropped: {error}");
            // It may still read why.
            let last = json!({"error": {"class": "GenericError", "desc": error.to_string()}});
            let _ = lines.send(&last.to_string());
        }
        answered.is_ok() && (lines.has_line() || !lines.has_ended())
    }
}
