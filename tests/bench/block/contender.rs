//! Who is measured, and one turn of each.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cleave_tests::driver::{BlockDriver, Daemon, Frontend, Process, Report, ScsiDriver, binary, lun};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::args::{Format, Peer, word};
use crate::plan::{Row, Settings};
use crate::run::Turn;
use crate::scratch::{Image, tools};
use crate::{BenchError, Result, fio};

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// How long an image may be locked.
const LOCKED: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
pub struct Contender {
    pub name: String,
    pub kind: Kind,
}

#[derive(Debug, Clone)]
pub enum Kind {
    Fio(Image),
    Qsd(Image),
    Cleave {
        image: Image,
        more: Vec<String>,
    },
    /// cleave-scsi.
    Scsi(Image),
    Socket(PathBuf),
}

impl Contender {
    pub fn of(peer: Peer, image: &Image, poll_us: u32) -> Self {
        let image = image.clone();
        let kind = match peer {
            Peer::Fio => Kind::Fio(image),
            Peer::Qsd => Kind::Qsd(image),
            Peer::Cleave => Kind::Cleave { image, more: Vec::new() },
            Peer::CleaveScsi => Kind::Scsi(image),
            Peer::CleavePoll => Kind::Cleave { image, more: vec!["--poll-us".into(), poll_us.to_string()] },
        };
        Self { name: word(peer), kind }
    }

    pub fn path(&self) -> Option<PathBuf> {
        match &self.kind {
            Kind::Fio(image) | Kind::Qsd(image) | Kind::Scsi(image) | Kind::Cleave { image, .. } => {
                Some(image.path.clone())
            }
            Kind::Socket(_) => None,
        }
    }

    /// Measures it once.
    ///
    /// # Errors
    /// It could not be started, or failed a request.
    pub fn turn(&self, row: &Row, settings: &Settings) -> Result<Turn> {
        match &self.kind {
            Kind::Fio(image) => fio::turn(image, row, settings),
            Kind::Socket(path) => {
                let stream = UnixStream::connect(path).map_err(BenchError::io(format!(
                    "--socket {}: does a vhost-user daemon listen there?",
                    path.display()
                )))?;
                // The process that listens; none if it is in another container.
                let process =
                    rustix::net::sockopt::socket_peercred(&stream).ok().map(|peer| Process(peer.pid));
                drive(Frontend::over(stream), process, row, settings)
            }
            Kind::Scsi(image) => {
                let daemon = self.start(row.queues)?;
                pin(daemon.process(), settings.pin)?;
                drive_scsi(&daemon, image, row, settings)
            }
            Kind::Qsd(_) | Kind::Cleave { .. } => {
                let daemon = self.start(row.queues)?;
                pin(daemon.process(), settings.pin)?;
                drive(Frontend::over(daemon.connect()?), Some(daemon.process()), row, settings)
            }
        }
    }

    /// Starts its daemon. The kernel may still hold the last one's lock on the image for requests that it is ending.
    ///
    /// # Errors
    /// It has none, or the daemon does not come up: with what it said.
    pub fn start(&self, queues: u16) -> Result<Daemon> {
        let deadline = Instant::now() + LOCKED;
        loop {
            match self.try_start(queues) {
                Err(error) if error.to_string().contains("lock") && Instant::now() < deadline => {
                    std::thread::sleep(LOCKED / 100);
                }
                outcome => return outcome,
            }
        }
    }

    fn try_start(&self, queues: u16) -> Result<Daemon> {
        match &self.kind {
            Kind::Cleave { image, more } => cleave(image, queues, more),
            Kind::Qsd(image) => {
                let program = tools()?.bin().join("qemu-storage-daemon");
                Ok(Daemon::start_other(&program, |socket| qsd_arguments(image, socket, queues))?)
            }
            Kind::Scsi(image) => cleave_scsi(image, queues),
            Kind::Fio(_) | Kind::Socket(_) => {
                Err(BenchError::Usage(format!("{} is no daemon that can be started", self.name)))
            }
        }
    }
}

/// cleave-block on `image`.
pub fn cleave(image: &Image, queues: u16, more: &[String]) -> Result<Daemon> {
    binary("cleave-block")?;
    let (file, queues, format) = (image.path.display().to_string(), queues.to_string(), word(image.format));
    let mut flags = vec!["--blk-file", &file, "--num-queues", &queues];
    if image.format != Format::Raw {
        flags.extend(["--format", &format]);
    }
    if !more.iter().any(|word| word == "--cache") {
        flags.extend(["--cache", if image.direct { "none" } else { "writeback" }]);
    }
    flags.extend(more.iter().map(String::as_str));
    Ok(Daemon::start("cleave-block", &flags)?)
}

/// cleave-scsi with `image` as its unit 0.
fn cleave_scsi(image: &Image, queues: u16) -> Result<Daemon> {
    binary("cleave-scsi")?;
    let (file, queues) = (image.path.display().to_string().replace(',', ",,"), queues.to_string());
    let cache = if image.direct { "none" } else { "writeback" };
    let unit = format!("disk={file},lun=0,cache={cache},format={}", word(image.format));
    Ok(Daemon::start("cleave-scsi", &["--lun", &unit, "--num-queues", &queues])?)
}

fn qsd_arguments(image: &Image, socket: &Path, queues: u16) -> Vec<String> {
    let file = image.path.display().to_string().replace(',', ",,");
    let direct = if image.direct { "on" } else { "off" };
    let mut arguments = vec![
        "--blockdev".into(),
        format!("driver=file,node-name=file,filename={file},aio=io_uring,cache.direct={direct}"),
    ];
    if image.format == Format::Qcow2 {
        arguments.push("--blockdev".into());
        arguments.push("driver=qcow2,node-name=disk,file=file".into());
    }
    let node = if image.format == Format::Qcow2 { "disk" } else { "file" };
    arguments.push("--export".into());
    arguments.push(format!(
        "type=vhost-user-blk,id=e,node-name={node},addr.type=unix,addr.path={},writable=on,num-queues={queues}",
        socket.display()
    ));
    arguments
}

fn drive(frontend: Frontend, process: Option<Process>, row: &Row, settings: &Settings) -> Result<Turn> {
    let mut driver = BlockDriver::with_memory(frontend, u64::MAX, row.queues, QUEUE_SIZE, memory_for(row))?;
    if u64::from(row.queues) > driver.negotiated.num_queues {
        return Err(BenchError::Usage(format!(
            "the daemon has {} queues, and --queues is {}",
            driver.negotiated.num_queues, row.queues
        )));
    }
    measure(process, || Ok(driver.run_load(&row.load(settings))?))
}

fn drive_scsi(daemon: &Daemon, image: &Image, row: &Row, settings: &Settings) -> Result<Turn> {
    let frontend = Frontend::over(daemon.connect()?);
    let mut driver = ScsiDriver::start(frontend, row.queues, QUEUE_SIZE, memory_for(row))?;
    let unit = lun(0, 0);
    // Past the unit attention of a new driver.
    let blocks = driver.capacity(unit)?;
    if blocks == 0 {
        return Err(BenchError::Usage(format!("cleave-scsi finds nothing in {}", image.path.display())));
    }
    measure(Some(daemon.process()), || Ok(driver.run_load(&row.load(settings), unit, blocks)?))
}

/// Bytes of each half of the guest's memory.
fn memory_for(row: &Row) -> u64 {
    let memory = (64 << 20) + 2 * row.block_size * u64::from(row.depth) * u64::from(row.queues);
    memory.next_multiple_of(2 << 20)
}

fn measure(process: Option<Process>, run: impl FnOnce() -> Result<Report>) -> Result<Turn> {
    let cpu_time = |process: Option<Process>| process.and_then(|process| process.cpu_time().ok());
    let before = cpu_time(process);
    let report = run()?;
    let after = cpu_time(process);
    let requests = report.requests.max(1) as f64;
    Ok(Turn {
        iops: report.iops(),
        percentiles_us: [50.0, 90.0, 99.0, 99.9]
            .map(|percent| report.percentile(percent).as_secs_f64() * 1e6),
        cpu_us: before.zip(after).map(|(before, after)| (after - before).as_secs_f64() * 1e6 / requests),
        memory_kib: process.and_then(|process| process.memory().ok()).map(|bytes| bytes as f64 / 1024.0),
        kicks: Some(report.kicks as f64 / requests),
        interrupts: Some(report.interrupts as f64 / requests),
        verified: report.verified,
    })
}

/// Keeps this process, and so the driver's threads, off the CPU of what is measured.
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
        pinned.map_err(|errno| BenchError::Usage(format!("cannot pin the daemon to CPU {cpu}: {errno}")))?;
    }
    Ok(())
}
