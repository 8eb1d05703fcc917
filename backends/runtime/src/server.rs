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
use cleave_common::logging;
use cleave_common::vhost_user::{Channel, ChannelError, Received};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::{debug, info, warn};

use crate::device::Device;
use crate::sandbox::{Confined, report_lost_memory};
use crate::session::{Session, reload};
use crate::signals::{Asked, Orders, Signals};
use crate::socket::{Endpoint, Listener};

/// How long a second frontend waits for the first one's end.
const SUCCESSOR_GRACE: Duration = Duration::from_millis(300);

/// How long nobody is accepted after descriptors were short.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(300);

/// How long a device that has changed is left alone: a guest can have its device change all the time.
const CHANGE_PAUSE: Duration = Duration::from_millis(20);

/// What a turn of the loop found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Signal,
    Frontend,
    Knock,
    /// The device may have changed.
    Change,
    /// The deadline has passed.
    Deadline,
}

/// How a session ended.
enum End {
    Terminate,
    /// The frontend is gone; another one may be waiting already.
    Frontend(Option<UnixStream>),
}

/// Whoever sends signals, and reads standard error.
pub(crate) struct Administrator<'a> {
    pub(crate) orders: &'a dyn Orders,
    /// Who speaks: the program's name, and of one of several devices which one it is.
    pub(crate) program: &'static str,
    pub(crate) device: Option<&'a str>,
}

impl Administrator<'_> {
    /// On one line that names this process: there are often several, with one standard error.
    pub(crate) fn tell(&self, report: &str) {
        let device = self.device.map(|device| format!("{device}: ")).unwrap_or_default();
        logging::print(&format!("{}[{}]: {device}{report}", self.program, std::process::id()));
    }
}

/// Serves `device` at `endpoint` until a signal asks it to end or, on an inherited connection, until its frontend goes.
///
/// # Errors
/// The host failed us: waiting, accepting or confining does not work.
pub fn run(
    device: &mut dyn Device,
    endpoint: Endpoint,
    signals: &Signals,
    confined: &Confined,
) -> Result<(), Failure> {
    close_sandbox(confined)?;
    serve_endpoint(
        device,
        endpoint,
        &Administrator { orders: signals, program: confined.program, device: None },
    )
}

/// What comes between starting and serving, once all threads are there.
pub(crate) fn close_sandbox(confined: &Confined) -> Result<(), Failure> {
    raise_descriptor_limit();
    report_lost_memory().map_err(Failure::host)?;
    confined.filter_syscalls()?;
    if let Some(text) = &confined.text {
        text.drop_startup_code();
    }
    Ok(())
}

/// As [`run`], in a process that is confined.
pub(crate) fn serve_endpoint(
    device: &mut dyn Device,
    endpoint: Endpoint,
    administrator: &Administrator<'_>,
) -> Result<(), Failure> {
    match endpoint {
        Endpoint::Connected(stream) => serve(device, stream, None, administrator).map(|_| ()),
        Endpoint::Listening(listener) => serve_all(device, &listener, administrator),
    }
}

/// A frontend may send a descriptor for each region of its memory, and two or three for each ring.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(errno) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        debug!("the limit of open files stays as it is: {errno}");
    }
}

fn serve_all(
    device: &mut dyn Device,
    listener: &Listener,
    administrator: &Administrator<'_>,
) -> Result<(), Failure> {
    let mut successor = None;
    loop {
        let next = match successor.take() {
            Some(stream) => Some(stream),
            None => next_frontend(device, listener, administrator)?,
        };
        let Some(stream) = next else { return Ok(()) };
        match serve(device, stream, Some(listener), administrator)? {
            End::Terminate => return Ok(()),
            End::Frontend(stream) => successor = stream,
        }
    }
}

/// Waits for a frontend. `None`: the daemon is to end.
fn next_frontend(
    device: &mut dyn Device,
    listener: &Listener,
    administrator: &Administrator<'_>,
) -> Result<Option<UnixStream>, Failure> {
    let mut pause = None;
    loop {
        let knocking = Some(listener).filter(|_| pause.is_none());
        match wait(administrator.orders, device.change_fd(), None, knocking, pause)? {
            Event::Signal => match administrator.orders.take() {
                Some(Asked::End) => return Ok(None),
                Some(Asked::Reload) => {
                    reload(device);
                }
                Some(Asked::Report) => {
                    administrator.tell(&format!("no frontend is connected; {}", device.report()));
                }
                None => {}
            },
            Event::Knock => match accept(listener)? {
                Knock::Frontend(stream) => return Ok(Some(stream)),
                Knock::Nobody => {}
                Knock::Shortage => pause = Some(Instant::now() + SHORTAGE_PAUSE),
            },
            Event::Change => {
                device.take_change();
            }
            Event::Deadline => pause = None,
            Event::Frontend => {}
        }
    }
}

/// What came of a knock.
enum Knock {
    Frontend(UnixStream),
    /// It went away again.
    Nobody,
    /// It stays in the backlog: there is no descriptor, or no memory, for it now.
    Shortage,
}

fn accept(listener: &Listener) -> Result<Knock, Failure> {
    match listener.accept() {
        Ok(accepted) => Ok(accepted.map_or(Knock::Nobody, Knock::Frontend)),
        Err(error) if is_shortage(&error) => {
            warn!("cannot accept a frontend now: {error}");
            Ok(Knock::Shortage)
        }
        Err(error) => Err(Failure::host(error)),
    }
}

fn is_shortage(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

/// One session.
fn serve(
    device: &mut dyn Device,
    stream: UnixStream,
    listener: Option<&Listener>,
    administrator: &Administrator<'_>,
) -> Result<End, Failure> {
    info!("a frontend connected");
    let mut channel = Channel::new(stream);
    let mut session = Session::new(device);
    // The stream of a second frontend, unless there was no descriptor for it.
    let mut second: Option<(Option<UnixStream>, Instant)> = None;
    // Until when changes of the device wait.
    let mut unchanging: Option<Instant> = None;
    loop {
        // While one waits, others stay in the backlog.
        let knocking = listener.filter(|_| second.is_none());
        let change = session.change_fd().filter(|_| unchanging.is_none());
        let deadline = second.as_ref().map(|(_, until)| *until).into_iter().chain(unchanging).min();
        match wait(administrator.orders, change, Some(&channel), knocking, deadline)? {
            Event::Signal => match administrator.orders.take() {
                Some(Asked::End) => return Ok(End::Terminate),
                Some(Asked::Reload) => session.reload(),
                Some(Asked::Report) => administrator.tell(&session.report()),
                None => {}
            },
            Event::Change => {
                session.take_change();
                unchanging = Some(Instant::now() + CHANGE_PAUSE);
            }
            Event::Knock => {
                let Some(listener) = knocking else { continue };
                second = match accept(listener)? {
                    Knock::Frontend(stream) => Some((Some(stream), Instant::now() + SUCCESSOR_GRACE)),
                    Knock::Nobody => None,
                    Knock::Shortage => Some((None, Instant::now() + SHORTAGE_PAUSE)),
                };
            }
            Event::Deadline => {
                let now = Instant::now();
                unchanging = unchanging.filter(|until| *until > now);
                if let Some((Some(_), _)) = second.take_if(|(_, until)| *until <= now) {
                    warn!("refused a second frontend: one is connected already");
                }
            }
            Event::Frontend if !handle_one(&mut session, &mut channel) => break,
            Event::Frontend => {}
        }
    }
    Ok(End::Frontend(second.and_then(|(stream, _)| stream)))
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

/// Waits for the most urgent event. A frontend that talks does not put off the deadline, nor does a device that changes; one
/// that hung up goes before it, for its successor's sake.
fn wait(
    orders: &dyn Orders,
    change: Option<BorrowedFd<'_>>,
    channel: Option<&Channel>,
    listener: Option<&Listener>,
    deadline: Option<Instant>,
) -> Result<Event, Failure> {
    let sources: [Option<(BorrowedFd<'_>, Event)>; 4] = [
        Some((orders.as_fd(), Event::Signal)),
        channel.map(|channel| (channel.as_fd(), Event::Frontend)),
        listener.map(|listener| (listener.as_fd(), Event::Knock)),
        // The last one: a guest can make it readable faster than it is emptied.
        change.map(|fd| (fd, Event::Change)),
    ];
    loop {
        let mut fds: Vec<PollFd<'_>> =
            sources.iter().flatten().map(|(fd, _)| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(Event::Deadline),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(Failure::host(std::io::Error::from(errno))),
        }
        let ready = fds.iter().zip(sources.iter().flatten()).find(|(fd, _)| !fd.revents().is_empty());
        let Some((fd, (_, event))) = ready else { continue };
        let hung_up = fd.revents().contains(PollFlags::HUP);
        let over = deadline.is_some_and(|deadline| deadline <= Instant::now());
        let can_wait = matches!(event, Event::Frontend | Event::Change) && !hung_up;
        return Ok(if over && can_wait { Event::Deadline } else { *event });
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn a_device_that_always_changes_delays_nothing_else() {
        let signals = Signals::new().unwrap();
        let changes = eventfd(1, EventfdFlags::NONBLOCK).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours);
        let next = |deadline| wait(&signals, Some(changes.as_fd()), Some(&channel), None, deadline).unwrap();
        assert_eq!(next(None), Event::Change);
        assert_eq!(next(Some(Instant::now())), Event::Deadline);
        rustix::io::write(&theirs, &[0]).unwrap();
        assert_eq!(next(None), Event::Frontend);
        assert_eq!(next(Some(Instant::now())), Event::Deadline);
        drop(theirs);
        assert_eq!(next(Some(Instant::now())), Event::Frontend, "it hung up");
    }
}
