//! Serves one frontend at a time, for as long as there are any.
//!
//! ```text
//!   listening --accept--> in session --close, or a message that is none--> listening ...   --SIGTERM--> end
//!   connected (--fd) ---> in session --close--> end
//! ```
//!
//! Invariants: the device outlives sessions; whatever a frontend sends ends at most its own session; a second frontend is
//! refused while one is served. It is refused only after a moment: often it is the first one's successor, and the first
//! one's end is seen late (a process that it just forked has its descriptors until it executes something else).

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use cleave_common::exit::Failure;
use cleave_common::vhost_user::{Channel, ChannelError, Received};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{info, warn};

use crate::device::Device;
use crate::footprint;
use crate::session::Session;
use crate::signals::Termination;
use crate::socket::{Endpoint, Listener};

/// How long a second frontend waits for the first one's end.
const SUCCESSOR_GRACE: Duration = Duration::from_millis(300);

/// What a turn of the loop found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Terminate,
    Frontend,
    Knock,
    GraceOver,
}

/// How a session ended.
enum End {
    Terminate,
    /// The frontend is gone; another one may be waiting already.
    Frontend(Option<UnixStream>),
}

/// Serves `device` at `endpoint` until `termination` or, on an inherited connection, until its frontend goes.
///
/// # Errors
/// The host failed us: waiting or accepting does not work.
pub fn run(device: &mut dyn Device, endpoint: Endpoint, termination: &Termination) -> Result<(), Failure> {
    footprint::drop_startup_code();
    match endpoint {
        Endpoint::Connected(stream) => serve(device, stream, None, termination).map(|_| ()),
        Endpoint::Listening(listener) => serve_all(device, &listener, termination),
    }
}

fn serve_all(device: &mut dyn Device, listener: &Listener, termination: &Termination) -> Result<(), Failure> {
    let mut next = None;
    loop {
        let stream = match next.take() {
            Some(stream) => Some(stream),
            None if wait(termination, None, Some(listener), None)? == Event::Terminate => return Ok(()),
            None => listener.accept().map_err(Failure::host)?,
        };
        let Some(stream) = stream else { continue };
        match serve(device, stream, Some(listener), termination)? {
            End::Terminate => return Ok(()),
            End::Frontend(successor) => next = successor,
        }
    }
}

/// One session.
fn serve(
    device: &mut dyn Device,
    stream: UnixStream,
    listener: Option<&Listener>,
    termination: &Termination,
) -> Result<End, Failure> {
    info!("a frontend connected");
    let mut channel = Channel::new(stream);
    let mut session = Session::new(device);
    let mut second: Option<(UnixStream, Instant)> = None;
    loop {
        // While one waits, others stay in the backlog.
        let knocking = listener.filter(|_| second.is_none());
        match wait(termination, Some(&channel), knocking, second.as_ref().map(|(_, until)| *until))? {
            Event::Terminate => return Ok(End::Terminate),
            Event::Knock => {
                let accepted = knocking.map_or(Ok(None), Listener::accept).map_err(Failure::host)?;
                second = accepted.map(|stream| (stream, Instant::now() + SUCCESSOR_GRACE));
            }
            Event::GraceOver => {
                warn!("refused a second frontend: one is connected already");
                second = None;
            }
            Event::Frontend if !handle_one(&mut session, &mut channel) => break,
            Event::Frontend => {}
        }
    }
    Ok(End::Frontend(second.map(|(stream, _)| stream)))
}

/// Takes one message, if a whole one is there. `false`: the session is over.
fn handle_one(session: &mut Session<'_>, channel: &mut Channel) -> bool {
    let handled = match channel.try_recv() {
        Ok(Received::WouldBlock) => Ok(()),
        Ok(Received::Message(message)) => session.handle(channel, message),
        Ok(Received::Eof) | Err(ChannelError::Disconnected) => {
            info!("the frontend disconnected");
            return false;
        }
        Err(error) => Err(error.into()),
    };
    if let Err(error) = &handled {
        warn!("closing the connection: {error}");
    }
    handled.is_ok()
}

/// Waits for the most urgent event.
fn wait(
    termination: &Termination,
    channel: Option<&Channel>,
    listener: Option<&Listener>,
    deadline: Option<Instant>,
) -> Result<Event, Failure> {
    let sources: [Option<(BorrowedFd<'_>, Event)>; 3] = [
        Some((termination.as_fd(), Event::Terminate)),
        channel.map(|channel| (channel.as_fd(), Event::Frontend)),
        listener.map(|listener| (listener.as_fd(), Event::Knock)),
    ];
    loop {
        let mut fds: Vec<PollFd<'_>> =
            sources.iter().flatten().map(|(fd, _)| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(Event::GraceOver),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(Failure::host(std::io::Error::from(errno))),
        }
        let ready = fds.iter().zip(sources.iter().flatten()).find(|(fd, _)| !fd.revents().is_empty());
        if let Some((_, (_, event))) = ready {
            return Ok(*event);
        }
    }
}
