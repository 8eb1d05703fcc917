//! The daemons that are ours, from their start to the end of the machine.
//!
//! ```text
//!   Alive ──ended──> Due ──its time has come──> Starting ──> Alive
//!     │               ^ └──── it cannot be started ─┘ │
//!     └── ended, and not to be started again ─────────┴──> GivenUp
//! ```
//!
//! Invariants: there is at most one daemon a device, and its successor is started only once it has ended as a process: by
//! then no thread of it runs, so nothing but the disk itself is still at work for it (see `vhost::lost`). The machine
//! thread starts the first ones, before there is a guest that could wait for it; the others are started by a thread of
//! their device's, for a program may be on a file system that does not answer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use cleave_common::exit::Failure;

use super::event::{Event, EventSender, SlotIndex};
use crate::config::Restart;
use crate::daemon::{self, Daemon, DaemonError, DaemonExit, Decision, Restarts, Spawner};
use crate::plan::DaemonSpec;
use crate::vhost::Successor;

enum State {
    Alive {
        daemon: Daemon,
        since: Instant,
        /// SIGKILL is on its way.
        killed: bool,
    },
    Due(Instant),
    /// Since then.
    Starting(Instant),
    GivenUp,
}

struct Served {
    slot: SlotIndex,
    spec: DaemonSpec,
    /// What its daemons leave each other.
    kept: Option<Arc<OwnedFd>>,
    restarts: Restarts,
    state: State,
    /// Once a daemon of its was to be started again.
    spawner: Option<Spawner>,
}

/// A daemon that ended, and what becomes of its device.
pub struct Ended {
    pub slot: SlotIndex,
    pub exit: DaemonExit,
    pub decision: Decision,
}

/// A daemon that was started in place of one that ended.
pub struct Started {
    pub slot: SlotIndex,
    pub pid: u32,
    pub successor: Successor,
}

/// A successor that could not be started.
pub struct Stillborn {
    pub slot: SlotIndex,
    pub error: DaemonError,
    pub decision: Decision,
}

#[derive(Default)]
pub struct Supervisor(Vec<Served>);

impl Supervisor {
    /// Starts a daemon that is to live as long as the machine.
    pub fn start(&mut self, slot: SlotIndex, spec: &DaemonSpec) -> Result<(u32, UnixStream), DaemonError> {
        daemon::check(spec)?;
        let kept = daemon::state_file(spec)?.map(Arc::new);
        let (daemon, socket) = daemon::spawn(spec, kept.as_deref())?;
        let pid = daemon.pid();
        let state = State::Alive { daemon, since: Instant::now(), killed: false };
        let restarts = Restarts::new(spec.restart, spec.restart_limit);
        self.0.push(Served { slot, spec: spec.clone(), kept, restarts, state, spawner: None });
        Ok((pid, socket))
    }

    /// Readable when a daemon has ended.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().filter_map(|served| match &served.state {
            State::Alive { daemon, .. } => Some(daemon.as_fd()),
            State::Due(_) | State::Starting(_) | State::GivenUp => None,
        })
    }

    /// When the next one is to be started.
    pub fn next_due(&self) -> Option<Instant> {
        let due = |served: &Served| match served.state {
            State::Due(at) => Some(at),
            State::Alive { .. } | State::Starting(_) | State::GivenUp => None,
        };
        self.0.iter().filter_map(due).min()
    }

    /// SIGKILL for the daemon of a device that is lost: it must not wake up later and write to memory that is no longer
    /// its buffers. `serial` says which one is meant: by the time a session tells of one, its successor may be there.
    pub fn force(&mut self, slot: SlotIndex, serial: u32) {
        let is_meant = |served: &&mut Served| served.slot == slot && served.restarts.count() == serial;
        for served in self.0.iter_mut().filter(is_meant) {
            if let State::Alive { daemon, killed, .. } = &mut served.state {
                daemon.force();
                *killed = true;
            }
        }
    }

    /// Ends the daemon of `slot`, which is started again as one that crashed.
    ///
    /// # Errors
    /// It would not be, or it is on its way already.
    pub fn restart(&mut self, slot: SlotIndex) -> Result<(), &'static str> {
        let served =
            self.0.iter_mut().find(|served| served.slot == slot).ok_or("it has no daemon of ours")?;
        if served.spec.restart == Restart::Never {
            return Err("its daemon is not started again (restart=never)");
        }
        match &mut served.state {
            State::Alive { daemon, killed, .. } => {
                daemon.force();
                *killed = true;
                Ok(())
            }
            State::Due(_) | State::Starting(_) => Err("its daemon is being started again already"),
            State::GivenUp => Err("its daemon is not started again (restart-limit= is reached)"),
        }
    }

    /// Whether one that was killed is still there, and may still write to guest memory.
    pub fn is_killing(&self) -> bool {
        self.0.iter().any(|served| matches!(served.state, State::Alive { killed: true, .. }))
    }

    /// The daemons that have ended since.
    pub fn reap(&mut self) -> Vec<Ended> {
        self.0.iter_mut().filter_map(Served::reap).collect()
    }

    /// Has those started whose time has come; [`Supervisor::spawned`] is to hear what comes of it. Those for which there is
    /// no thread to do it.
    pub fn start_due(&mut self, events: &EventSender) -> Vec<Stillborn> {
        self.0.iter_mut().filter_map(|served| served.start_if_due(events)).collect()
    }

    /// What came of an [`Event::Spawned`].
    pub fn spawned(
        &mut self,
        slot: SlotIndex,
        result: Result<Box<(Daemon, UnixStream)>, DaemonError>,
    ) -> Option<Result<Started, Stillborn>> {
        self.0.iter_mut().find(|served| served.slot == slot)?.spawned(result)
    }

    /// Why the machine cannot start: a daemon of ours that ended by itself has said why, and its exit code says whose
    /// fault it was.
    pub fn blame(self, slot: SlotIndex, error: impl std::error::Error + Send + Sync + 'static) -> Failure {
        for served in self.0 {
            match served.state {
                State::Alive { daemon, .. } if served.slot == slot => return daemon.failure(error),
                _ => {}
            }
        }
        Failure::device(error)
    }

    pub fn into_daemons(self) -> Vec<Daemon> {
        let daemon = |served: Served| match served.state {
            State::Alive { daemon, .. } => Some(daemon),
            State::Due(_) | State::Starting(_) | State::GivenUp => None,
        };
        self.0.into_iter().filter_map(daemon).collect()
    }
}

impl Served {
    fn reap(&mut self) -> Option<Ended> {
        let State::Alive { daemon, since, killed } = &mut self.state else { return None };
        let exit = daemon.exit()?;
        // One that was to be killed may have left of itself just before, as if all were well: it was given up all the same.
        let status = (!*killed).then_some(exit.status);
        let decision = self.restarts.after(status, since.elapsed());
        self.decide(decision);
        Some(Ended { slot: self.slot, exit, decision })
    }

    fn start_if_due(&mut self, events: &EventSender) -> Option<Stillborn> {
        let State::Due(at) = self.state else { return None };
        let now = Instant::now();
        if now < at {
            return None;
        }
        self.state = State::Starting(now);
        match self.spawner(events) {
            Ok(spawner) => {
                spawner.spawn(self.spec.clone(), self.kept.clone());
                None
            }
            Err(source) => {
                let (program, device) = (self.spec.program.clone(), self.spec.device.clone());
                Some(self.stillborn(DaemonError::Prepare { program, device, source }, now))
            }
        }
    }

    fn spawner(&mut self, events: &EventSender) -> io::Result<Spawner> {
        if let Some(spawner) = &self.spawner {
            return Ok(spawner.clone());
        }
        let (slot, events) = (self.slot, events.clone());
        let report = move |result: Result<_, _>| {
            events.send(Event::Spawned { slot, result: result.map(Box::new) });
        };
        let spawner = Spawner::start(&self.spec.device, report)?;
        Ok(self.spawner.insert(spawner).clone())
    }

    fn spawned(
        &mut self,
        result: Result<Box<(Daemon, UnixStream)>, DaemonError>,
    ) -> Option<Result<Started, Stillborn>> {
        let State::Starting(since) = self.state else { return None };
        Some(match result {
            Ok(started) => {
                let (daemon, socket) = *started;
                let pid = daemon.pid();
                self.state = State::Alive { daemon, since: Instant::now(), killed: false };
                self.restarts.started();
                let successor = Successor { socket, serial: self.restarts.count() };
                Ok(Started { slot: self.slot, pid, successor })
            }
            Err(error) => Err(self.stillborn(error, since)),
        })
    }

    fn stillborn(&mut self, error: DaemonError, since: Instant) -> Stillborn {
        let decision = self.restarts.failed(since.elapsed());
        self.decide(decision);
        Stillborn { slot: self.slot, error, decision }
    }

    fn decide(&mut self, decision: Decision) {
        self.state = match decision {
            Decision::Restart(pause) => State::Due(Instant::now() + pause),
            Decision::GiveUp(_) => State::GivenUp,
        };
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::super::event::EventQueue;
    use super::*;
    use crate::plan::Terminal;

    const SLOT: SlotIndex = SlotIndex(3);

    /// A shell that plays the daemon until it is killed.
    fn supervised(restart: Restart, restart_limit: Option<u32>) -> Supervisor {
        let args = vec!["-c".into(), "read x <&3".into()];
        let (program, device) = ("sh".to_owned(), "disk0".to_owned());
        let spec = DaemonSpec {
            program,
            device,
            args,
            restart,
            restart_limit,
            io_timeout: None,
            terminal: Terminal::None,
            keeps_state: false,
            needs: None,
        };
        let mut supervisor = Supervisor::default();
        let (_pid, socket) = supervisor.start(SLOT, &spec).unwrap();
        // Its end is its end, and not that of its socket.
        std::mem::forget(socket);
        supervisor
    }

    fn ended(supervisor: &mut Supervisor) -> Ended {
        let mut fds: Vec<_> =
            supervisor.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        poll(&mut fds, None).unwrap();
        let mut ended = supervisor.reap();
        assert_eq!(ended.len(), 1);
        ended.remove(0)
    }

    /// What comes of the start that is due next.
    fn started(supervisor: &mut Supervisor, queue: &EventQueue) -> Result<Started, Stillborn> {
        while supervisor.next_due().is_some() {
            assert!(supervisor.start_due(&queue.sender()).is_empty());
        }
        poll(&mut [PollFd::new(queue.wake(), PollFlags::IN)], None).unwrap();
        let Some(Event::Spawned { slot, result }) = queue.take().pop() else { panic!("something else") };
        supervisor.spawned(slot, result).unwrap()
    }

    #[test]
    fn a_daemon_that_is_killed_has_a_successor_at_once_and_only_the_one_that_is_meant_is_killed() {
        let mut supervisor = supervised(Restart::Always, Some(1));
        let queue = EventQueue::new().unwrap();
        assert!(supervisor.reap().is_empty() && supervisor.start_due(&queue.sender()).is_empty());
        supervisor.force(SLOT, 0);
        assert!(supervisor.is_killing());
        let first = ended(&mut supervisor);
        assert_eq!((first.slot, first.decision), (SLOT, Decision::Restart(std::time::Duration::ZERO)));
        assert!(!supervisor.is_killing() && supervisor.next_due().is_some());
        let Ok(Started { slot: SLOT, pid, successor }) = started(&mut supervisor, &queue) else {
            panic!("nothing started")
        };
        assert_eq!((successor.serial, supervisor.next_due()), (1, None));
        // The session tells of the first one only now.
        supervisor.force(SLOT, 0);
        supervisor.force(SlotIndex(0), 1);
        assert!(!supervisor.is_killing(), "process {pid} is another");
        supervisor.force(SLOT, 1);
        let second = ended(&mut supervisor);
        assert!(matches!(second.decision, Decision::GiveUp(why) if why.to_string() == "restart-limit=1"));
        assert!(supervisor.start_due(&queue.sender()).is_empty() && queue.take().is_empty());
        assert!(supervisor.into_daemons().is_empty());
    }

    #[test]
    fn one_that_cannot_be_started_again_is_tried_again_later() {
        let mut supervisor = supervised(Restart::OnFailure, Some(2));
        let queue = EventQueue::new().unwrap();
        supervisor.0[0].spec.program = "cleave-nothing".into();
        supervisor.force(SLOT, 0);
        ended(&mut supervisor);
        let Err(stillborn) = started(&mut supervisor, &queue) else { panic!("it started") };
        assert!(stillborn.error.to_string().starts_with("cleave-nothing is neither"));
        assert!(matches!(stillborn.decision, Decision::Restart(pause) if !pause.is_zero()));
        assert!(supervisor.next_due().is_some());
        let Err(stillborn) = started(&mut supervisor, &queue) else { panic!("it started") };
        assert!(matches!(stillborn.decision, Decision::GiveUp(why) if why.to_string() == "restart-limit=2"));
        assert!(supervisor.next_due().is_none());
    }
}
