//! Serves one frontend at a time, for as long as there are any.
//!
//! ```text
//!   listening --accept--> in session --close, or a message that is none--> listening ...   --SIGTERM--> end
//!   connected (--fd) ---> in session --close--> end
//! ```
//!
//! Invariants: the device outlives sessions; whatever a frontend sends ends at most its own session; while one frontend
//! is served another is refused at once, so that it need not guess.

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use cleave_common::exit::Failure;
use cleave_common::vhost_user::{Channel, ChannelError, Received};
use rustix::event::{PollFd, PollFlags, poll};
use tracing::{debug, info, warn};

use crate::device::Device;
use crate::footprint;
use crate::session::Session;
use crate::signals::Termination;
use crate::socket::{Endpoint, Listener};

/// What a turn of the loop found.
enum Event {
    Terminate,
    Frontend,
    Knock,
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
    while !matches!(wait(termination, None, Some(listener))?, Event::Terminate) {
        if let Some(stream) = listener.accept().map_err(Failure::host)?
            && serve(device, stream, Some(listener), termination)?.is_break()
        {
            break;
        }
    }
    Ok(())
}

/// One session. `Break`: the process was asked to end.
fn serve(
    device: &mut dyn Device,
    stream: UnixStream,
    listener: Option<&Listener>,
    termination: &Termination,
) -> Result<ControlFlow<()>, Failure> {
    info!("a frontend connected");
    let mut channel = Channel::new(stream);
    let mut session = Session::new(device);
    loop {
        match wait(termination, Some(&channel), listener)? {
            Event::Terminate => return Ok(ControlFlow::Break(())),
            Event::Frontend => {}
            Event::Knock => {
                refuse_second(listener)?;
                continue;
            }
        }
        let handled = match channel.try_recv() {
            Ok(Received::WouldBlock) => continue,
            Ok(Received::Eof) | Err(ChannelError::Disconnected) => {
                info!("the frontend disconnected");
                break;
            }
            Ok(Received::Message(message)) => session.handle(&mut channel, message),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = handled {
            warn!("closing the connection: {error}");
            break;
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn refuse_second(listener: Option<&Listener>) -> Result<(), Failure> {
    if let Some(listener) = listener
        && listener.accept().map_err(Failure::host)?.is_some()
    {
        warn!("refused a second frontend: one is connected already");
    }
    Ok(())
}

/// Waits for the most urgent event. The frontend in session goes before one that knocks: it may be the same one, back
/// after it closed.
fn wait(
    termination: &Termination,
    channel: Option<&Channel>,
    listener: Option<&Listener>,
) -> Result<Event, Failure> {
    loop {
        let mut fds = vec![PollFd::new(termination, PollFlags::IN)];
        let sources =
            [channel.map(|c| (c.as_fd(), Event::Frontend)), listener.map(|l| (l.as_fd(), Event::Knock))];
        let sources: Vec<_> = sources.into_iter().flatten().collect();
        fds.extend(sources.iter().map(|(fd, _)| PollFd::from_borrowed_fd(*fd, PollFlags::IN)));
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(Failure::host(std::io::Error::from(errno))),
            Ok(_) => {}
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] {
            debug!("asked to end");
            return Ok(Event::Terminate);
        }
        if let Some((_, (_, event))) = ready[1..].iter().zip(sources).find(|(ready, _)| **ready) {
            return Ok(event);
        }
    }
}
