//! The control thread: listens, reads, asks the machine, writes.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use cleave_common::control::{Listener, Request, Server};
use cleave_common::socket::{ListenError, SocketFile, listen};
use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;

use super::answer::Notice;
use super::qmp::{self, Asks};
use super::{Asked, ask};

/// Why nobody can listen.
#[derive(Debug, thiserror::Error)]
#[error("--qmp {address}: {source}")]
pub struct ControlSocketError {
    address: String,
    source: ListenError,
}

/// A socket on which nobody is served yet.
#[derive(Debug)]
pub struct ControlSocket {
    listener: Listener,
    file: Option<SocketFile>,
}

impl ControlSocket {
    /// # Errors
    /// The path is taken, or cannot be one.
    pub fn unix(path: &Path) -> Result<Self, ControlSocketError> {
        let address = format!("unix:{}", path.display());
        let (listener, file) = listen(path).map_err(|source| ControlSocketError { address, source })?;
        Ok(Self { listener: Listener::Unix(listener), file: Some(file) })
    }

    /// # Errors
    /// The port is taken, or not for this user.
    pub fn tcp(address: std::net::SocketAddr) -> Result<Self, ControlSocketError> {
        let listener = TcpListener::bind(address).and_then(|listener| {
            // A client that gives up between poll and accept must not make accept wait for the next one.
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        let listener = listener.map_err(|source| ControlSocketError {
            address: format!("tcp:{address}"),
            source: source.into(),
        })?;
        Ok(Self { listener: Listener::Tcp(listener), file: None })
    }
}

/// What reaches the control thread from the machine's.
enum Word {
    Notice(Notice),
    End,
}

/// The control thread as the machine sees it. Dropping it ends the thread, once it has told its clients what it was given.
#[derive(Debug)]
pub struct Control {
    words: Sender<Word>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    _files: Vec<SocketFile>,
}

impl Control {
    /// Serves `sockets`. `prepare` is called first on the new thread; `send` brings commands to the machine.
    ///
    /// # Errors
    /// There is no thread or descriptor to be had.
    pub fn start(
        sockets: Vec<ControlSocket>,
        prepare: impl FnOnce() + Send + 'static,
        send: impl Fn(Asked) + Send + 'static,
    ) -> io::Result<Self> {
        let (files, listeners): (Vec<_>, Vec<_>) =
            sockets.into_iter().map(|socket| (socket.file, socket.listener)).unzip();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (words, heard) = channel();
        let server = Server::new(listeners, &qmp::greeting());
        let bell = Arc::clone(&wake);
        let thread = Builder::new().name("control".to_owned()).stack_size(256 << 10).spawn(move || {
            prepare();
            if let Err(error) = serve(server, &bell, &heard, &send) {
                tracing::error!("the control sockets are closed: {error}");
            }
        })?;
        Ok(Self { words, wake, thread: Some(thread), _files: files.into_iter().flatten().collect() })
    }

    /// Tells every client. Never waits.
    pub fn notify(&self, notice: Notice) {
        self.say(Word::Notice(notice));
    }

    fn say(&self, word: Word) {
        // A thread that has ended has said why.
        if self.words.send(word).is_ok() {
            // The only failure is a full counter, and then it wakes anyway.
            let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.say(Word::End);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control thread panicked");
        }
    }
}

fn serve(mut server: Server, wake: &OwnedFd, heard: &Receiver<Word>, send: &dyn Fn(Asked)) -> io::Result<()> {
    loop {
        if !server.turn(Some(wake.as_fd()), &mut |request| answer(&request, send))? {
            continue;
        }
        // First quiet, then empty: a word that comes between the two wakes us again.
        let _ = rustix::io::read(wake, &mut [0; 8]);
        for word in heard.try_iter() {
            match word {
                Word::Notice(notice) => server.tell(&qmp::event(&notice)),
                Word::End => return Ok(()),
            }
        }
    }
}

fn answer(request: &Request, send: &dyn Fn(Asked)) -> Value {
    let outcome = qmp::read(request).and_then(|asks| match asks {
        Asks::Known(value) => Ok(value),
        Asks::Machine(command) => ask(command, send).map(|answer| answer.to_json()),
    });
    request.id().answer(outcome)
}
