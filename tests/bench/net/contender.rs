//! Who is measured, and one turn of each.

use std::path::{Path, PathBuf};

use cleave_tests::cache::Cache;
use cleave_tests::dpdk::Dpdk;
use cleave_tests::driver::{Daemon, Process, binary};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::args::{Peer, Way, word};
use crate::frame::{Frame, RECEIVER, SENDER};
use crate::guest::{Course, Guest, Passed};
use crate::plan::{Row, Settings};
use crate::run::Turn;
use crate::tap::{self, Source};
use crate::{BenchError, Result};

#[derive(Debug, Clone)]
pub struct Contender {
    pub name: String,
    pub kind: Kind,
}

#[derive(Debug, Clone)]
pub enum Kind {
    Peer(Peer),
    /// Where frames go in, and where they come out if that is another one.
    Sockets(Vec<PathBuf>),
}

impl Contender {
    pub fn of(peer: Peer) -> Self {
        Self { name: word(peer), kind: Kind::Peer(peer) }
    }

    pub fn at(sockets: &[PathBuf]) -> Self {
        let name = sockets.first().and_then(|path| path.file_name());
        let name = name.map_or("socket".into(), |name| name.to_string_lossy().into_owned());
        Self { name, kind: Kind::Sockets(sockets.to_vec()) }
    }

    /// Whether it can take part in `row`.
    pub fn is_able(&self, row: &Row) -> bool {
        let forwards = row.way == Way::Forward;
        match &self.kind {
            // One program with one queue.
            Kind::Peer(Peer::Plain) => !forwards && row.queues == 1,
            Kind::Peer(Peer::Cleave | Peer::CleavePoll) => !forwards,
            Kind::Peer(Peer::Switch | Peer::SwitchPoll) => forwards,
            Kind::Peer(Peer::Testpmd) => true,
            Kind::Sockets(sockets) => forwards == (sockets.len() == 2),
        }
    }

    pub fn needs_tap(&self, row: &Row) -> bool {
        row.way != Way::Forward
            && matches!(self.kind, Kind::Peer(Peer::Plain | Peer::Cleave | Peer::CleavePoll))
    }

    /// Measures it once.
    ///
    /// # Errors
    /// It could not be started, or no frame passed.
    pub fn turn(&self, row: &Row, settings: &Settings) -> Result<Turn> {
        let poll = settings.poll_us.to_string();
        match &self.kind {
            Kind::Peer(Peer::Plain) => {
                let pin = |process| pin(process, settings.pin);
                let (passed, cpu) = tap::measure(row.way, row.size, settings.runtime, pin)?;
                Ok(Turn::new(&passed, row, Some(cpu)))
            }
            Kind::Peer(Peer::Cleave) => self.on_tap(row, settings, &[]),
            Kind::Peer(Peer::CleavePoll) => self.on_tap(row, settings, &["--poll-us", &poll]),
            Kind::Peer(Peer::Switch) => self.switch(row, settings, &[]),
            Kind::Peer(Peer::SwitchPoll) => self.switch(row, settings, &["--poll-us", &poll]),
            Kind::Peer(Peer::Testpmd) => {
                let daemon = start_testpmd(row, settings)?;
                let second = second_socket(&daemon.socket);
                drive(&daemon.socket, Some(&second), row, settings)
            }
            Kind::Sockets(sockets) => match &sockets[..] {
                [first, second] => drive(first, Some(second), row, settings),
                [first, ..] => drive(first, None, row, settings),
                [] => Err(BenchError::Usage("there is no socket".to_owned())),
            },
        }
    }

    fn on_tap(&self, row: &Row, settings: &Settings, more: &[&str]) -> Result<Turn> {
        let queues = row.queues.to_string();
        binary("cleave-net")?;
        let words = [&["--tap", tap::NAME, "--queues", &queues][..], more].concat();
        let daemon = Daemon::start("cleave-net", &words)?;
        pin(daemon.process(), settings.pin)?;
        let frame = Frame::new(row.size, RECEIVER, SENDER);
        let guest = Guest::connect(&daemon.socket, row.queues, row.size, &frame)?;
        let source = if row.way == Way::Receive { Some(Source::start(row.size)?) } else { None };
        let (from, to) = if row.way == Way::Receive { (None, Some(&guest)) } else { (Some(&guest), None) };
        let turn = course(from, to, &[daemon.process()], row, settings);
        drop(source);
        turn
    }

    fn switch(&self, row: &Row, settings: &Settings, more: &[&str]) -> Result<Turn> {
        let program = binary("cleave-net")?;
        let queues = row.queues.to_string();
        let daemon = Daemon::start_other(&program, |socket| {
            let ports = [second_socket(socket), socket.to_owned()];
            let mut words: Vec<String> =
                ports.iter().flat_map(|port| ["--port".to_owned(), port.display().to_string()]).collect();
            words.extend(["--queues", &queues].iter().chain(more).map(|word| (*word).to_owned()));
            words
        })?;
        pin(daemon.process(), settings.pin)?;
        let second = second_socket(&daemon.socket);
        drive(&daemon.socket, Some(&second), row, settings)
    }
}

/// Beside the one that a daemon is waited for at.
fn second_socket(first: &Path) -> PathBuf {
    first.with_file_name("second")
}

/// testpmd makes frames, drops them, or forwards them between two ports.
fn start_testpmd(row: &Row, settings: &Settings) -> Result<Daemon> {
    let (program, mut words) = Dpdk::open(&Cache::open()?)?.testpmd();
    // Frames are moved on the second one; the first one only waits.
    let other = settings.cpus.iter().find(|cpu| Some(**cpu) != settings.pin).copied().unwrap_or(0);
    let cores = format!("0@{other},1@{}", settings.pin.unwrap_or(other));
    let prefix = format!("net-bench-{}", std::process::id());
    let (mode, ports) = match row.way {
        Way::Send => ("rxonly", 1),
        Way::Receive => ("txonly", 1),
        Way::Forward => ("io", 2),
    };
    Ok(Daemon::start_other(&program, |socket| {
        words.extend(["--lcores", &cores, "--file-prefix", &prefix].map(str::to_owned));
        // The one that is waited for last.
        let sockets = [second_socket(socket), socket.to_owned()];
        for (port, socket) in sockets[2 - ports..].iter().enumerate() {
            words.push("--vdev".to_owned());
            words.push(format!("net_vhost{port},iface={},queues={},tso=1", socket.display(), row.queues));
        }
        words.push("--".to_owned());
        let queues = row.queues.to_string();
        words.extend(["--rxq", &queues, "--txq", &queues, "--nb-cores=1"].map(str::to_owned));
        words.push(format!("--forward-mode={mode}"));
        if let (Way::Receive, Some(len)) = (row.way, row.size.bytes()) {
            words.push(format!("--txpkts={len}"));
        }
        words.extend(["--auto-start", "--no-lsc-interrupt", "--total-num-mbufs=32768"].map(str::to_owned));
        // Else it ends with its standard input.
        words.push("--stats-period=3600".to_owned());
        words
    })?)
}

/// Measures what is between two sockets, or behind one.
fn drive(first: &Path, second: Option<&Path>, row: &Row, settings: &Settings) -> Result<Turn> {
    let guest = |socket: &Path, to, from| {
        Guest::connect(socket, row.queues, row.size, &Frame::new(row.size, to, from))
    };
    let from = guest(first, RECEIVER, SENDER)?;
    let to = match (row.way, second) {
        (Way::Forward, Some(second)) => Some(guest(second, SENDER, RECEIVER)?),
        _ => None,
    };
    let mut processes: Vec<Process> = from.process.into_iter().collect();
    // One process may have both.
    let more =
        to.as_ref().and_then(|to| to.process).filter(|more| !processes.iter().any(|one| one.0 == more.0));
    processes.extend(more);
    match row.way {
        Way::Forward => course(Some(&from), to.as_ref(), &processes, row, settings),
        Way::Send => course(Some(&from), None, &processes, row, settings),
        Way::Receive => course(None, Some(&from), &processes, row, settings),
    }
}

fn course(
    from: Option<&Guest>,
    to: Option<&Guest>,
    processes: &[Process],
    row: &Row,
    settings: &Settings,
) -> Result<Turn> {
    let mut course = Course::new(from, to, settings.driver(row))?;
    let mut cpu = Vec::new();
    let passed: Passed = course.measure(settings.runtime, || {
        let times: Option<Vec<f64>> =
            processes.iter().map(|process| process.cpu_time().ok().map(|time| time.as_secs_f64())).collect();
        cpu.push(times.filter(|times| !times.is_empty()).map(|times| times.iter().sum::<f64>()));
    })?;
    let used =
        cpu.first().copied().flatten().zip(cpu.last().copied().flatten()).map(|(first, last)| last - first);
    Ok(Turn::new(&passed, row, used))
}

/// Keeps this process, with the driver and the source of frames, off the CPU of what is measured.
///
/// # Errors
/// There is no other CPU.
pub fn pin_driver(cpu: usize) -> Result<()> {
    let mut others = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
    others.unset(cpu);
    sched_setaffinity(None, &others)
        .map_err(|errno| BenchError::Usage(format!("--pin {cpu} leaves no CPU for the driver: {errno}")))
}

fn pin(process: Process, cpu: Option<usize>) -> Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut one = CpuSet::new();
    one.set(cpu);
    for thread in process.threads()? {
        let pinned = sched_setaffinity(Some(thread), &one);
        pinned.map_err(|errno| {
            BenchError::Usage(format!("cannot pin what is measured to CPU {cpu}: {errno}"))
        })?;
    }
    Ok(())
}
