//! Connecting: every daemon is started or waited for at the same time, before there is a guest.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use cleave_common::exit::Failure;
use cleave_common::logging;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::event::{Event, EventQueue, SlotIndex};
use super::health::{DeviceState, HealthTable, span};
use super::signals::{Request, Signals};
use super::supervise::Supervisor;
use crate::plan::{Backend, SlotPlan};
use crate::sandbox;
use crate::vhost::{self, Endpoint, Negotiated, Patience, Target};

/// Who waits longer than this is told what for.
const PATIENCE_OF_PEOPLE: Duration = Duration::from_secs(1);

/// Refuses what no waiting will make a daemon's socket.
pub fn check_sockets(slots: &[SlotPlan]) -> Result<(), Failure> {
    let is_wrong = |slot: &&SlotPlan| match &slot.backend {
        Backend::Attach { socket, .. } => vhost::is_no_socket(socket),
        Backend::Spawn(_) => false,
    };
    match slots.iter().find(is_wrong) {
        Some(SlotPlan { name, backend: Backend::Attach { socket, .. }, .. }) => Err(Failure::usage(format!(
            "device {name}: {} is not a socket: name the one that the daemon listens on",
            socket.display()
        ))),
        _ => Ok(()),
    }
}

/// Starts the daemons that are ours, in the order of their slots.
pub fn start_daemons(
    slots: &[SlotPlan],
    health: &mut HealthTable,
) -> Result<(Supervisor, Vec<Target>), Failure> {
    let mut supervisor = Supervisor::default();
    let mut targets = Vec::new();
    for (at, slot) in slots.iter().enumerate() {
        let mut patience = Patience::default();
        let endpoint = match &slot.backend {
            Backend::Spawn(spec) => {
                patience.io = spec.io_timeout;
                let (pid, socket) = supervisor.start(SlotIndex(at), spec).map_err(Failure::device)?;
                health.device(SlotIndex(at)).pid = Some(pid);
                Endpoint::Socket(socket)
            }
            Backend::Attach { socket, wait } => Endpoint::Path { path: socket.clone(), wait: *wait },
        };
        let device = slot.name.clone();
        targets.push(Target { device, endpoint, queues: slot.queues, patience });
    }
    Ok((supervisor, targets))
}

/// The sessions in the order of `targets`, which are those of `slots`, or `None` if somebody asked to stop meanwhile. The
/// first daemon that cannot be had ends it: a machine with a part missing from the start is not the one that was asked
/// for.
pub fn connect_all(
    targets: Vec<Target>,
    slots: &[SlotPlan],
    supervisor: &mut Supervisor,
    health: &mut HealthTable,
    queue: &EventQueue,
    signals: &mut Signals,
) -> Result<Option<Vec<Negotiated>>, Failure> {
    let mut sessions: Vec<Option<Negotiated>> = targets.iter().map(|_| None).collect();
    for (slot, target) in targets.into_iter().enumerate() {
        let events = queue.sender();
        let name = format!("connect-{}", target.device);
        let connect = move || {
            sandbox::confine_thread(sandbox::Thread::Session);
            let result = vhost::connect(target).map(Box::new);
            events.send(Event::Connected { slot: SlotIndex(slot), result });
        };
        thread::Builder::new().name(name).spawn(connect).map_err(Failure::host)?;
    }
    let mut told_at = Some(Instant::now() + PATIENCE_OF_PEOPLE);
    while sessions.iter().any(Option::is_none) {
        wait(queue, signals, told_at);
        for request in signals.take() {
            match request {
                Request::Terminate | Request::Quit => return Ok(None),
                Request::Report => logging::print(&health.to_string()),
            }
        }
        for event in queue.take() {
            let Event::Connected { slot, result } = event else { continue };
            match result {
                Ok(session) => {
                    health.device(slot).enter(DeviceState::Connected);
                    sessions[slot.0] = Some(*session);
                }
                Err(error) => return Err(std::mem::take(supervisor).blame(slot, error)),
            }
        }
        if told_at.take_if(|at| Instant::now() >= *at).is_some() {
            let missing = slots.iter().zip(&sessions).filter(|(_, session)| session.is_none());
            missing.for_each(|(slot, _)| say_that_it_is_waited_for(slot));
        }
    }
    Ok(Some(sessions.into_iter().flatten().collect()))
}

fn say_that_it_is_waited_for(slot: &SlotPlan) {
    let name = &slot.name;
    match &slot.backend {
        Backend::Spawn(spec) => {
            let limit = span(Patience::default().first_answer);
            tracing::warn!(
                "device {name}: waiting for {}, which does not answer yet, up to {limit}",
                spec.program
            );
        }
        Backend::Attach { socket, wait } => {
            tracing::warn!(
                "device {name}: waiting for a daemon on {}, up to {}",
                socket.display(),
                span(*wait)
            );
        }
    }
}

fn wait(queue: &EventQueue, signals: &Signals, until: Option<Instant>) {
    let mut fds: Vec<_> = [queue.wake().as_fd()]
        .into_iter()
        .chain(signals.fds())
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .collect();
    let left = until.map(|at| at.saturating_duration_since(Instant::now()));
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    // A signal or a failure only means one look too many.
    let _ = poll(&mut fds, timeout.as_ref());
}
