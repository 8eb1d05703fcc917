//! What is measured: rows, who takes part in each, and what is to be reached.

use rustix::thread::sched_getaffinity;

use crate::args::{Driver, Measure, Peer, Size, Way, word};
use crate::contender::Contender;
use crate::{BenchError, Result};

/// One load.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub way: Way,
    pub size: Size,
    pub queues: u16,
}

impl Row {
    pub fn name(&self) -> String {
        let queues =
            if self.queues > 1 { format!(", {} pairs of queues", self.queues) } else { String::new() };
        format!("{} {}{queues}", word(self.way), self.size.word())
    }
}

/// What is the same for all rows.
#[derive(Debug, Clone)]
pub struct Settings {
    pub runtime: f64,
    pub rounds: u16,
    pub driver: Option<Driver>,
    pub cpus: Vec<usize>,
    pub pin: Option<usize>,
    pub poll_us: u32,
}

impl Settings {
    fn new(args: &Measure) -> Self {
        let allowed = sched_getaffinity(None);
        let cpus: Vec<usize> = allowed.map_or(vec![0], |set| {
            (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
        });
        // One CPU is everybody's.
        let last = cpus.last().copied().filter(|_| cpus.len() > 1);
        Self {
            runtime: args.runtime,
            rounds: args.rounds,
            driver: args.driver,
            pin: args.pin.or(last),
            poll_us: args.poll_us,
            cpus,
        }
    }

    /// How the driver of `row` learns of what is used. Beside a source of frames there is a CPU for it from three on.
    pub fn driver(&self, row: &Row) -> Driver {
        let needed = if row.way == Way::Receive { 3 } else { 2 };
        self.driver.unwrap_or(if self.cpus.len() >= needed { Driver::Poll } else { Driver::Interrupt })
    }
}

/// A share of another one's frames a second of CPU time in the same row.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub who: &'static str,
    pub against: &'static str,
    pub limit: f64,
}

/// A row by some in turns.
#[derive(Debug, Clone)]
pub struct Bout {
    pub row: Row,
    pub contenders: Vec<Contender>,
    pub targets: Vec<Target>,
}

pub struct Plan {
    pub settings: Settings,
    pub bouts: Vec<Bout>,
}

const ALL_WAYS: [Way; 3] = [Way::Send, Way::Receive, Way::Forward];

pub fn plan(args: &Measure) -> Result<Plan> {
    let is_preset = args.preset.is_some();
    let ways = match (&args.way[..], args.socket.len()) {
        _ if is_preset => ALL_WAYS.to_vec(),
        ([], 0) if args.peers.iter().any(|peer| matches!(peer, Peer::Switch | Peer::SwitchPoll)) => {
            vec![Way::Forward]
        }
        ([], 0) => vec![Way::Send, Way::Receive],
        ([], 1) => vec![Way::Send],
        ([], 2) => vec![Way::Forward],
        (given, 0..=2) => given.to_vec(),
        _ => return Err(BenchError::Usage("--socket is given once, or twice: in and out".to_owned())),
    };
    let mut bouts = Vec::new();
    for way in ways {
        for size in &args.size {
            let row = Row { way, size: *size, queues: args.queues };
            let contenders = line_up(&row, args, is_preset);
            if contenders.is_empty() {
                let (row, peers) = (
                    row.name(),
                    "plain and cleave have a tap device, switch two guests, --socket one or two",
                );
                return Err(BenchError::Usage(format!("nobody is left to measure '{row}': {peers}")));
            }
            let targets = if is_preset { targets(way) } else { Vec::new() };
            bouts.push(Bout { row, contenders, targets });
        }
    }
    Ok(Plan { settings: Settings::new(args), bouts })
}

fn line_up(row: &Row, args: &Measure, is_preset: bool) -> Vec<Contender> {
    let mut peers = args.peers.clone();
    if is_preset {
        peers = match row.way {
            Way::Forward => vec![Peer::Testpmd, Peer::Switch, Peer::SwitchPoll],
            _ => vec![Peer::Plain, Peer::Cleave, Peer::CleavePoll, Peer::Testpmd],
        };
    } else if peers.is_empty() && args.socket.is_empty() {
        peers = match row.way {
            Way::Forward => vec![Peer::Testpmd, Peer::Switch],
            _ => vec![Peer::Plain, Peer::Cleave],
        };
    }
    let socket = (!args.socket.is_empty()).then(|| Contender::at(&args.socket));
    let all = peers.into_iter().map(Contender::of).chain(socket);
    all.filter(|contender| contender.is_able(row)).collect()
}

/// The targets of the issue that asked for this program.
fn targets(way: Way) -> Vec<Target> {
    match way {
        Way::Forward => vec![
            Target { who: "switch", against: "testpmd", limit: 0.5 },
            Target { who: "switch-poll", against: "testpmd", limit: 0.8 },
        ],
        _ => vec![Target { who: "cleave", against: "plain", limit: 0.9 }],
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Args;

    fn rows(words: &str) -> Result<Vec<(String, Vec<String>)>> {
        let args =
            Args::try_parse_from(std::iter::once("net-bench").chain(words.split_whitespace())).unwrap();
        let names = |bout: &Bout| bout.contenders.iter().map(|contender| contender.name.clone()).collect();
        Ok(plan(&args.measure)?.bouts.iter().map(|bout| (bout.row.name(), names(bout))).collect())
    }

    #[test]
    fn everybody_is_where_they_can_be() {
        let all = rows("").unwrap();
        assert_eq!(all.len(), 6);
        assert!(all.iter().all(|(_, names)| names[..] == ["plain", "cleave"]));
        assert_eq!(
            rows("--socket /a/x --socket /a/y --peers testpmd,plain --size 64").unwrap(),
            [("forward 64".to_owned(), vec!["testpmd".to_owned(), "x".to_owned()])]
        );
        assert_eq!(
            rows("--socket /a/x --size 1500 --queues 2").unwrap()[0].0,
            "send 1500, 2 pairs of queues"
        );
        assert!(rows("--way forward --peers plain").is_err());
        assert!(rows("--socket a --socket b --socket c").is_err());
        assert_eq!(rows("--preset issue").unwrap().len(), 9);
    }
}
