//! Connecting: every daemon is started or waited for at the same time, before there is a guest.

use std::os::fd::AsFd;
use std::thread;

use cleave_common::exit::Failure;
use rustix::event::{PollFd, PollFlags, poll};

use super::event::{Event, EventQueue, SlotIndex};
use super::signals::Signals;
use crate::daemon::{self, Daemon};
use crate::plan::{Backend, SlotPlan};
use crate::sandbox;
use crate::vhost::{self, DEFAULT_DEADLINE, Endpoint, Negotiated, Target};

/// Starts the daemons that are ours, in the order of their slots.
pub fn start_daemons(slots: &[SlotPlan]) -> Result<(Vec<Daemon>, Vec<Target>), Failure> {
    let mut daemons = Vec::new();
    let mut targets = Vec::new();
    for slot in slots {
        let endpoint = match &slot.backend {
            Backend::Spawn(spec) => {
                let (daemon, socket) = daemon::spawn(spec).map_err(Failure::device)?;
                daemons.push(daemon);
                Endpoint::Socket(socket)
            }
            Backend::Attach { socket, wait } => Endpoint::Path { path: socket.clone(), wait: *wait },
        };
        let device = slot.name.clone();
        targets.push(Target { device, endpoint, queues: slot.queues, deadline: DEFAULT_DEADLINE });
    }
    Ok((daemons, targets))
}

/// The sessions in the order of `targets`, or `None` if somebody asked to stop meanwhile. The first daemon that
/// cannot be had ends it: a machine with a part missing from the start is not the one that was asked for.
pub fn connect_all(
    targets: Vec<Target>,
    daemons: &mut Vec<Daemon>,
    queue: &EventQueue,
    signals: &mut Signals,
) -> Result<Option<Vec<Negotiated>>, Failure> {
    let mut sessions: Vec<Option<Negotiated>> = targets.iter().map(|_| None).collect();
    for (slot, target) in targets.into_iter().enumerate() {
        let events = queue.sender();
        let name = format!("connect-{}", target.device);
        let connect = move || {
            sandbox::confine_thread(sandbox::Thread::Session);
            let result = vhost::connect(target);
            events.send(Event::Connected { slot: SlotIndex(slot), result });
        };
        thread::Builder::new().name(name).spawn(connect).map_err(Failure::host)?;
    }
    while sessions.iter().any(Option::is_none) {
        wait(queue, signals);
        if !signals.take().is_empty() {
            return Ok(None);
        }
        for event in queue.take() {
            let Event::Connected { slot, result } = event else { continue };
            match result {
                Ok(session) => sessions[slot.0] = Some(session),
                Err(error) => return Err(blame(daemons, error)),
            }
        }
    }
    Ok(Some(sessions.into_iter().flatten().collect()))
}

fn wait(queue: &EventQueue, signals: &Signals) {
    let mut fds: Vec<_> = [queue.wake().as_fd()]
        .into_iter()
        .chain(signals.fds())
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .collect();
    // A signal or a failure only means one look too many.
    let _ = poll(&mut fds, None);
}

/// A daemon of ours that ended by itself has said why, and its exit code says whose fault it was.
fn blame(daemons: &mut Vec<Daemon>, error: vhost::ConnectError) -> Failure {
    match daemons.iter().position(|daemon| daemon.device() == error.device) {
        Some(ours) => daemons.swap_remove(ours).failure(error),
        None => Failure::device(error),
    }
}
