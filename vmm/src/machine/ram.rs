//! The machine's memory, as the configuration asks for it. Taking all of it from the host may take minutes: whoever waits
//! is told how far it is, and may end it.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use cleave_common::exit::Failure;
use cleave_common::logging;

use super::signals::{Request, Signals};
use crate::config::{self, MemoryConfig};
use crate::memory::{self, GuestRam, MemoryError, Progress, RamOptions, RamRegion};

/// Who waits longer than this is told what for.
const PATIENCE_OF_PEOPLE: Duration = Duration::from_secs(1);
/// How often, on a terminal, where a line replaces the one before it.
const ON_TERMINAL: Duration = Duration::from_millis(500);
/// How often in a journal.
const IN_JOURNAL: Duration = Duration::from_secs(10);
/// How often it is looked whether somebody asks to stop.
const LOOK: Duration = Duration::from_millis(100);

/// Makes the memory, and takes it if it is asked for. `None` if somebody asked to stop meanwhile.
pub fn take(
    config: &MemoryConfig,
    regions: &[RamRegion],
    signals: &mut Signals,
) -> Result<Option<GuestRam>, Failure> {
    if config.thp == Some(config::Thp::Never) {
        memory::forbid_huge_pages();
    }
    let refused = |error: MemoryError| match error.is_usage() {
        true => Failure::usage(error),
        false => Failure::host(error),
    };
    let ram = GuestRam::new(&options(config), regions).map_err(refused)?;
    let mut teller = Teller::new(std::io::stderr().is_terminal());
    let mut look_at = Instant::now() + LOOK;
    let mut watch = |progress: Progress| {
        let now = Instant::now();
        if now < look_at {
            return ControlFlow::Continue(());
        }
        look_at = now + LOOK;
        teller.tell(progress, now);
        match signals.take().iter().any(|request| matches!(request, Request::Terminate | Request::Quit)) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let taken = ram.prefault(&mut watch);
    teller.finish();
    match taken.map_err(Failure::host)? {
        ControlFlow::Continue(()) => Ok(Some(ram)),
        ControlFlow::Break(()) => Ok(None),
    }
}

fn options(config: &MemoryConfig) -> RamOptions {
    RamOptions {
        backing: match config.backing() {
            config::Backing::Memfd => memory::Backing::Memfd,
            config::Backing::Hugetlbfs => memory::Backing::Hugetlbfs,
        },
        page_size: config.page_size.map(|size| size.bytes()),
        mem_path: config.mem_path.clone(),
        thp: config.thp.map(|thp| match thp {
            config::Thp::Always => memory::Thp::Always,
            config::Thp::Never => memory::Thp::Never,
            config::Thp::Advise => memory::Thp::Advise,
        }),
        prefault: config.prefault,
        prefault_threads: config.prefault_threads.map(usize::from),
        host_nodes: config.host_node.as_ref().map_or_else(Vec::new, |nodes| nodes.nodes().to_vec()),
        dump: config.dump,
    }
}

/// Says how far it is, on standard error.
struct Teller {
    terminal: bool,
    begun: Instant,
    next: Instant,
    /// A line on the terminal waits to be replaced.
    open: bool,
}

impl Teller {
    fn new(terminal: bool) -> Self {
        let begun = Instant::now();
        Self { terminal, begun, next: begun + PATIENCE_OF_PEOPLE, open: false }
    }

    fn tell(&mut self, progress: Progress, now: Instant) {
        if now < self.next {
            return;
        }
        let line = line(progress, now.saturating_duration_since(self.begun));
        if self.terminal {
            eprint!("\r{line}\x1b[K");
            self.open = true;
            self.next = now + ON_TERMINAL;
        } else {
            logging::print(&line);
            self.next = now + IN_JOURNAL;
        }
    }

    /// The line is of no use to anybody once memory is there.
    fn finish(&self) {
        if self.open {
            eprint!("\r\x1b[K");
        }
    }
}

fn line(progress: Progress, elapsed: Duration) -> String {
    let Progress { done, total } = progress;
    let percent = u128::from(done) * 100 / u128::from(total.max(1));
    let left = elapsed.as_secs_f64() * (total - done.min(total)) as f64 / done.max(1) as f64;
    format!(
        "cleave: taking guest memory from the host: {} of {} MiB ({percent}%), about {} s left",
        done >> 20,
        total >> 20,
        left.ceil()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_far_it_is_and_how_long_it_takes() {
        let progress = Progress { done: 1 << 30, total: 4 << 30 };
        assert_eq!(
            line(progress, Duration::from_secs(2)),
            "cleave: taking guest memory from the host: 1024 of 4096 MiB (25%), about 6 s left"
        );
        assert!(line(Progress { done: 0, total: 0 }, Duration::ZERO).contains("(0%), about 0 s left"));
    }

    #[test]
    fn nothing_is_said_in_the_first_second_and_then_not_all_the_time() {
        let mut teller = Teller::new(false);
        let progress = Progress { done: 1, total: 4 };
        let begun = teller.begun;
        teller.tell(progress, begun + Duration::from_millis(900));
        assert_eq!(teller.next, begun + PATIENCE_OF_PEOPLE);
        teller.tell(progress, begun + Duration::from_secs(2));
        assert_eq!(teller.next, begun + Duration::from_secs(2) + IN_JOURNAL);
    }
}
