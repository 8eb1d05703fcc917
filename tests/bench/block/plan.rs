//! What is measured: rows, who takes part in each, and what is to be reached.

use std::path::PathBuf;
use std::time::Duration;

use cleave_tests::driver::{Extent, Load};

use crate::args::{Driver, Format, Measure, Pattern, Peer, word};
use crate::contender::{Contender, Kind};
use crate::scratch::{self, Image, Prepared};
use crate::{BenchError, Result};

/// One load.
#[derive(Debug, Clone)]
pub struct Row {
    pub rw: Pattern,
    pub read_percent: u8,
    pub block_size: u64,
    pub depth: u16,
    pub queues: u16,
}

impl Default for Row {
    fn default() -> Self {
        Self { rw: Pattern::Randread, read_percent: 100, block_size: 4096, depth: 1, queues: 1 }
    }
}

impl Row {
    fn new(rw: Pattern, block_size: u64, depth: u16, queues: u16, rwmixread: u8) -> Self {
        let read_percent = match rw {
            Pattern::Randread | Pattern::Read => 100,
            Pattern::Randwrite | Pattern::Write => 0,
            Pattern::Randrw => rwmixread,
        };
        Self { rw, read_percent, block_size, depth, queues }
    }

    pub fn name(&self) -> String {
        let size = match self.block_size {
            size if size.is_multiple_of(1024) => format!("{}k", size >> 10),
            size => size.to_string(),
        };
        let mix = if self.rw == Pattern::Randrw { format!(" {}%", self.read_percent) } else { String::new() };
        let queues = if self.queues > 1 { format!("{} queues x ", self.queues) } else { String::new() };
        format!("{}{mix} {size} {queues}qd{}", word(self.rw), self.depth)
    }

    pub fn load(&self, settings: &Settings) -> Load {
        Load {
            random: self.rw.is_random(),
            write_percent: 100 - self.read_percent,
            block_size: self.block_size as u32,
            depth: self.depth,
            extent: Extent::Time(Duration::from_secs_f64(settings.runtime)),
            poll: settings.driver(self) == Driver::Poll,
            threads: settings.driver_threads,
            verify: settings.verify,
        }
    }
}

/// What is the same for all rows.
#[derive(Debug, Clone)]
pub struct Settings {
    pub runtime: f64,
    pub rounds: u16,
    pub driver: Option<Driver>,
    pub cpus: usize,
    pub driver_threads: usize,
    pub verify: bool,
    pub pin: Option<usize>,
}

impl Settings {
    fn new(args: &Measure) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            runtime: args.runtime,
            rounds: args.rounds,
            driver: args.driver,
            cpus,
            driver_threads: args.driver_threads.map_or((cpus / 2).max(1), usize::from),
            verify: args.verify,
            pin: args.pin,
        }
    }

    /// How the driver of `row` learns of completions.
    pub fn driver(&self, row: &Row) -> Driver {
        let has_a_cpu = self.cpus > usize::from(row.queues);
        self.driver.unwrap_or(if has_a_cpu { Driver::Poll } else { Driver::Interrupt })
    }
}

/// What a row is to reach, as a share of another contender's IOPS or CPU time in the same row.
#[derive(Debug, Clone)]
pub struct Target {
    pub who: &'static str,
    pub measure: Measured,
    pub against: &'static str,
    pub limit: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measured {
    /// At least that share.
    Iops,
    /// At most that share.
    CpuPerRequest,
}

/// A row on one image, by some in turns.
#[derive(Debug, Clone)]
pub struct Bout {
    pub place: String,
    pub row: Row,
    pub contenders: Vec<Contender>,
    pub targets: Vec<Target>,
}

pub struct Plan {
    pub settings: Settings,
    pub bouts: Vec<Bout>,
    /// Directories to be removed.
    _made: Vec<tempfile::TempDir>,
    _prepared: Option<Prepared>,
}

/// Of a hundred requests of randrw, so many are reads.
const READS_OF_A_MIX: u8 = 70;

/// What the peer cleave-poll is given.
const POLL_US: u32 = 50;

pub fn plan(args: &Measure) -> Result<Plan> {
    nothing_is_ignored(args)?;
    let settings = Settings::new(args);
    let (bouts, made, prepared) = match args.preset {
        Some(_) => issue(args).map(|(bouts, made)| (bouts, made, None))?,
        None => one_row(args).map(|(bout, prepared)| (vec![bout], Vec::new(), prepared))?,
    };
    Ok(Plan { settings, bouts, _made: made, _prepared: prepared })
}

/// Options that would make no difference are refused: whoever gives one expects it to.
fn nothing_is_ignored(args: &Measure) -> Result<()> {
    let polls_a_daemon = args.preset.is_some() || args.peers.contains(&Peer::CleavePoll);
    let ignored = [
        (args.rwmixread.is_some() && args.rw != Pattern::Randrw, "--rwmixread", "--rw randrw"),
        (args.poll_us.is_some() && !polls_a_daemon, "--poll-us", "the peer cleave-poll"),
        (
            args.driver_threads.is_some() && args.driver == Some(Driver::Interrupt),
            "--driver-threads",
            "a driver that polls",
        ),
    ];
    match ignored.into_iter().find(|(ignored, ..)| *ignored) {
        Some((_, option, needs)) => Err(BenchError::Usage(format!("{option} is only for {needs}"))),
        None => Ok(()),
    }
}

fn one_row(args: &Measure) -> Result<(Bout, Option<Prepared>)> {
    let mix = args.rwmixread.unwrap_or(READS_OF_A_MIX);
    let row = Row::new(args.rw, args.bs.bytes(), args.depth, args.queues, mix);
    if args.socket.is_some() && args.rw.writes() && !args.disk.overwrite {
        return Err(BenchError::Usage(
            "this writes to the disk behind --socket: say --overwrite if nothing on it is needed".into(),
        ));
    }
    let mut contenders = Vec::new();
    let mut place = String::new();
    let is_socket_only = args.socket.is_some() && args.disk.file.is_none() && args.disk.scratch.is_none();
    let prepared = if is_socket_only { None } else { Some(scratch::prepare(&args.disk, args.rw.writes())?) };
    if let Some(Prepared { image, .. }) = &prepared {
        place = scratch::describe(image);
        let able = args.peers.iter().filter(|peer| {
            // fio knows no image formats and no stamps.
            **peer != Peer::Fio || (image.format == Format::Raw && !args.verify)
        });
        let poll_us = args.poll_us.unwrap_or(POLL_US);
        contenders.extend(able.map(|peer| Contender::of(*peer, image, poll_us)));
        if contenders.len() < args.peers.len() {
            eprintln!("fio is left out: it takes raw files, and no --verify");
        }
    }
    if let Some(socket) = &args.socket {
        let name = socket.file_name().map_or("socket".into(), |name| name.to_string_lossy().into_owned());
        contenders.push(Contender { name, kind: Kind::Socket(socket.clone()) });
        place = if place.is_empty() { socket.display().to_string() } else { place };
    }
    if contenders.is_empty() {
        return Err(BenchError::Usage(
            "nobody is left to measure: fio takes raw files, and no --verify".into(),
        ));
    }
    Ok((Bout { place, row, contenders, targets: Vec::new() }, prepared))
}

const KINDS: [(Pattern, u64, u16, u16); 6] = [
    (Pattern::Randread, 4096, 1, 1),
    (Pattern::Randread, 4096, 32, 1),
    (Pattern::Randwrite, 4096, 32, 1),
    (Pattern::Read, 128 << 10, 8, 1),
    (Pattern::Write, 128 << 10, 8, 1),
    (Pattern::Randread, 4096, 32, 4),
];

/// All rows of the project's table: raw on a disk and in memory, qcow2 on the disk.
fn issue(args: &Measure) -> Result<(Vec<Bout>, Vec<tempfile::TempDir>)> {
    let disk = scratch::scratch_directory(&args.disk)?;
    let (mut bouts, mut made) = (Vec::new(), Vec::new());
    for (place, parent) in [("disk", &disk), ("memory", &args.tmpfs)] {
        let wanted: Vec<Bout> =
            empty_bouts(place).into_iter().filter(|bout| is_wanted(bout, &args.only)).collect();
        if wanted.is_empty() {
            continue;
        }
        let directory = scratch::directory_in(parent)?;
        eprintln!("making {} in {}", args.disk.size, directory.path().display());
        let raw = scratch::make_raw(directory.path(), args.disk.size.bytes())?;
        let needs_qcow2 = wanted.iter().any(|bout| bout.place.ends_with("qcow2"));
        let qcow2 = if needs_qcow2 { Some(scratch::make_qcow2(&raw)?) } else { None };
        for mut bout in wanted {
            let image = if bout.place.ends_with("qcow2") { qcow2.as_ref().unwrap_or(&raw) } else { &raw };
            bout.contenders = line_up(&bout, image, &raw, args.poll_us.unwrap_or(POLL_US));
            bouts.push(bout);
        }
        made.push(directory);
    }
    if bouts.is_empty() {
        return Err(BenchError::Usage(format!("no row has {:?} in its name", args.only.join(", "))));
    }
    Ok((bouts, made))
}

fn is_wanted(bout: &Bout, only: &[String]) -> bool {
    let name = format!("{} {}", bout.place, bout.row.name());
    only.is_empty() || only.iter().any(|text| name.contains(text.as_str()))
}

fn empty_bouts(place: &str) -> Vec<Bout> {
    let formats: &[&str] = if place == "disk" { &["raw", "qcow2"] } else { &["raw"] };
    let rows = KINDS.map(|(rw, bs, depth, queues)| Row::new(rw, bs, depth, queues, READS_OF_A_MIX));
    formats
        .iter()
        .flat_map(|format| rows.iter().map(move |row| (format!("{place} {format}"), row.clone())))
        .map(|(place, row)| {
            let targets = targets(&place, &row);
            Bout { place, row, contenders: Vec::new(), targets }
        })
        .collect()
}

/// fio measures the raw file in any case.
fn line_up(bout: &Bout, image: &Image, raw: &Image, poll_us: u32) -> Vec<Contender> {
    let mut contenders = vec![
        Contender::of(Peer::Fio, raw, 0),
        Contender::of(Peer::Qsd, image, 0),
        Contender::of(Peer::Cleave, image, 0),
    ];
    if image.format == Format::Qcow2 {
        contenders.push(Contender { name: "cleave-raw".into(), ..Contender::of(Peer::Cleave, raw, 0) });
    }
    if bout.place == "memory raw" && bout.row.depth == 1 {
        contenders.push(Contender::of(Peer::CleavePoll, image, poll_us));
    }
    contenders
}

/// The targets of the issue that asked for this program.
fn targets(place: &str, row: &Row) -> Vec<Target> {
    let iops = |who, against, limit| Target { who, measure: Measured::Iops, against, limit };
    let in_memory = place.starts_with("memory");
    // Equal is enough where the disk itself is the limit; turns differ by some percent then.
    let beside_qsd = if in_memory { 1.0 } else { 0.97 };
    let mut targets = vec![
        iops("cleave", "qsd", beside_qsd),
        Target { who: "cleave", measure: Measured::CpuPerRequest, against: "qsd", limit: 1.0 },
    ];
    let is_deep_read = row.rw == Pattern::Randread && row.depth == 32;
    if place == "disk raw" && is_deep_read && row.queues == 1 {
        targets.push(iops("cleave", "fio", 0.95));
    }
    if place == "disk qcow2" && is_deep_read && row.queues == 1 {
        targets.push(iops("cleave", "cleave-raw", 0.8));
    }
    if in_memory && row.depth == 32 {
        targets.push(iops("cleave", "fio", 0.8));
    }
    if in_memory && row.depth == 1 {
        targets.push(iops("cleave-poll", "fio", 0.5));
    }
    targets
}

/// The places of files that a plan names, for its report.
pub fn paths(plan: &Plan) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        plan.bouts.iter().flat_map(|bout| &bout.contenders).filter_map(Contender::path).collect();
    paths.sort();
    paths.dedup();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_issue_is_there_with_its_targets() {
        let row = |rw, depth, queues| Row::new(rw, 4096, depth, queues, 70);
        let limits = |place: &str, row: &Row| -> Vec<(&str, f64)> {
            targets(place, row).iter().map(|target| (target.against, target.limit)).collect()
        };
        let deep = row(Pattern::Randread, 32, 1);
        assert!(limits("disk raw", &deep).contains(&("fio", 0.95)));
        assert!(limits("disk qcow2", &deep).contains(&("cleave-raw", 0.8)));
        assert!(limits("memory raw", &row(Pattern::Randread, 32, 4)).contains(&("fio", 0.8)));
        assert!(limits("memory raw", &row(Pattern::Randread, 1, 1)).contains(&("fio", 0.5)));
        assert_eq!(limits("disk raw", &row(Pattern::Randread, 1, 1)).len(), 2);
    }

    #[test]
    fn names_say_what_a_row_is() {
        assert_eq!(Row::new(Pattern::Randrw, 4096, 32, 4, 70).name(), "randrw 70% 4k 4 queues x qd32");
        assert_eq!(Row::new(Pattern::Read, 128 << 10, 8, 1, 70).name(), "read 128k qd8");
    }
}
