//! Serves several devices of one process, each at a socket of its own, on a thread of its own.
//!
//! ```text
//!   threads start, each waits --the sandbox is closed--> serving --End to all--> all have ended --> end
//!                                                          `--one cannot serve--> End to all
//! ```
//!
//! Invariants: no session waits for another one's frontend; what an administrator asks goes to every device, and each
//! answers for itself; a device is dropped on its own thread.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use cleave_common::exit::Failure;
use cleave_common::sandbox::{drop_memory_lock, name_thread};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use tracing::{Span, error_span};

use crate::device::Device;
use crate::sandbox::Confined;
use crate::server::{Administrator, close_sandbox, serve_endpoint};
use crate::signals::{Asked, Orders, Signals};
use crate::socket::Endpoint;

/// A session's thread holds a message or two.
const STACK: usize = 512 << 10;

/// One of several devices.
pub struct Member {
    /// What it is called in messages to a person.
    pub name: String,
    pub device: Box<dyn Device + Send>,
    pub endpoint: Endpoint,
}

impl Member {
    /// What is said of the device called `name` bears its name.
    pub fn span(name: &str) -> Span {
        error_span!("device", message = name)
    }
}

/// What an administrator asks, on its way to one device's thread.
#[derive(Debug)]
struct Relay {
    /// Counts what is in `asked`.
    event: OwnedFd,
    asked: Mutex<VecDeque<Asked>>,
}

impl Relay {
    fn new() -> std::io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
        Ok(Self { event: eventfd(0, flags)?, asked: Mutex::default() })
    }

    fn pass_on(&self, asked: Asked) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push_back(asked);
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

impl AsFd for Relay {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Orders for Relay {
    fn take(&self) -> Option<Asked> {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// The thread of one device.
struct Server {
    relay: Arc<Relay>,
    /// Lets it begin.
    begin: Sender<()>,
    thread: JoinHandle<()>,
}

/// What all servers tell the main thread.
struct Ends {
    /// Readable when one has ended.
    event: Arc<OwnedFd>,
    outcomes: Receiver<Result<(), Failure>>,
}

/// Serves `members` until a signal asks to end. SIGUSR1 has each say how it is, and then `report` about what they have in
/// common, a line each.
///
/// # Errors
/// As [`crate::run`]; the first member that cannot be served ends all.
pub fn run_all(
    members: Vec<Member>,
    signals: &Signals,
    confined: &Confined,
    report: &dyn Fn() -> String,
) -> Result<(), Failure> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let event = Arc::new(event.map_err(|errno| Failure::host(std::io::Error::from(errno)))?);
    let (sender, outcomes) = mpsc::channel();
    let ends = Ends { event: event.clone(), outcomes };
    let spawned: std::io::Result<Vec<Server>> = members
        .into_iter()
        .map(|member| spawn(member, confined.program, event.clone(), sender.clone()))
        .collect();
    let servers = spawned.map_err(Failure::host)?;
    close_sandbox(confined)?;
    // One that has ended meanwhile has said why.
    for server in &servers {
        let _ = server.begin.send(());
    }
    let administrator = Administrator { orders: signals, program: confined.program, device: None };
    let outcome = relay_until_end(&servers, &administrator, &ends, report);
    for server in servers {
        server.relay.pass_on(Asked::End);
        let _ = server.thread.join();
    }
    outcome
}

fn spawn(
    member: Member,
    program: &'static str,
    event: Arc<OwnedFd>,
    outcomes: Sender<Result<(), Failure>>,
) -> std::io::Result<Server> {
    let Member { name, mut device, endpoint } = member;
    let relay = Arc::new(Relay::new()?);
    let (begin, may_begin) = mpsc::channel();
    let (ready, is_ready) = mpsc::channel();
    let orders = relay.clone();
    let thread = thread::Builder::new().name(name.clone()).stack_size(STACK).spawn(move || {
        name_thread("session");
        let _named = Member::span(&name).entered();
        let serve = || -> Result<(), Failure> {
            let _ = ready.send(drop_memory_lock());
            // Nobody lets it begin: the others could not be started.
            let Ok(()) = may_begin.recv() else { return Ok(()) };
            let administrator = Administrator { orders: &*orders, program, device: Some(&name) };
            serve_endpoint(&mut *device, endpoint, &administrator)
        };
        let outcome = serve();
        drop(device);
        let _ = outcomes.send(outcome);
        let _ = rustix::io::write(&*event, &1u64.to_ne_bytes());
    })?;
    // Starting a thread takes system calls that serving does not.
    is_ready.recv().map_err(std::io::Error::other)??;
    Ok(Server { relay, begin, thread })
}

/// Passes on what an administrator asks, until that is to end, or a server has ended by itself.
fn relay_until_end(
    servers: &[Server],
    administrator: &Administrator<'_>,
    ends: &Ends,
    report: &dyn Fn() -> String,
) -> Result<(), Failure> {
    loop {
        if let Ok(outcome) = ends.outcomes.try_recv() {
            return outcome;
        }
        let mut fds = [
            PollFd::from_borrowed_fd(administrator.orders.as_fd(), PollFlags::IN),
            PollFd::new(&*ends.event, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Failure::host(std::io::Error::from(errno))),
        }
        let Some(asked) = administrator.orders.take() else { continue };
        if asked == Asked::End {
            return Ok(());
        }
        servers.iter().for_each(|server| server.relay.pass_on(asked));
        if asked == Asked::Report {
            report().lines().for_each(|line| administrator.tell(line));
        }
    }
}
