//! Turns: one of each contender after the other, so that what the machine does meanwhile is the same for all.

use indicatif::{ProgressBar, ProgressStyle};

use crate::args::Measure;
use crate::contender::pin_driver;
use crate::frame::{Frame, RECEIVER, SENDER};
use crate::guest::Passed;
use crate::plan::{Bout, Plan, Row, plan};
use crate::{Result, report, tap};

/// One turn of one contender.
#[derive(Debug, Clone, Copy, Default)]
pub struct Turn {
    /// A second.
    pub frames: f64,
    pub gbits: f64,
    /// Frames a second of CPU time.
    pub per_core: Option<f64>,
    /// Of one CPU.
    pub busy: Option<f64>,
    /// A frame.
    pub kicks: f64,
    pub calls: f64,
}

impl Turn {
    /// `cpu`: seconds of it.
    pub fn new(passed: &Passed, row: &Row, cpu: Option<f64>) -> Self {
        let frames = passed.tally.frames as f64;
        let len = Frame::new(row.size, RECEIVER, SENDER).bytes.len() as f64;
        // What was counted where frames come out; what was sent, otherwise.
        let bytes =
            if passed.tally.bytes > passed.tally.frames { passed.tally.bytes as f64 } else { frames * len };
        Self {
            frames: frames / passed.seconds,
            gbits: bytes * 8e-9 / passed.seconds,
            per_core: cpu.filter(|cpu| *cpu > 0.0).map(|cpu| frames / cpu),
            busy: cpu.map(|cpu| cpu / passed.seconds),
            kicks: passed.kicks as f64 / frames,
            calls: passed.calls as f64 / frames,
        }
    }
}

/// All turns of a contender in one bout, or why there are not all of them.
pub type Turns = std::result::Result<Vec<Turn>, String>;

/// Measures what the command line asks for. `false`: someone failed.
///
/// # Errors
/// Nothing could be measured.
pub fn run(args: &Measure) -> Result<bool> {
    let plan = plan(args)?;
    let needs_tap = |bout: &Bout| bout.contenders.iter().any(|contender| contender.needs_tap(&bout.row));
    if plan.bouts.iter().any(needs_tap) {
        tap::enter()?;
    }
    plan.settings.pin.map_or(Ok(()), pin_driver)?;
    let progress = progress(&plan);
    let results: Vec<Vec<Turns>> = plan.bouts.iter().map(|bout| measure(bout, &plan, &progress)).collect();
    progress.finish_and_clear();
    if args.json {
        report::json(&plan, &results)
    } else {
        report::table(&plan, &results)
    }
    Ok(results.iter().flatten().all(Turns::is_ok))
}

fn progress(plan: &Plan) -> ProgressBar {
    let turns: usize = plan.bouts.iter().map(|bout| bout.contenders.len()).sum();
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} turns, {eta} left: {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(turns as u64 * u64::from(plan.settings.rounds)).with_style(style)
}

/// A contender that fails is left out of the rounds that follow; the others go on.
fn measure(bout: &Bout, plan: &Plan, progress: &ProgressBar) -> Vec<Turns> {
    let mut all: Vec<Turns> = bout.contenders.iter().map(|_| Ok(Vec::new())).collect();
    for round in 0..plan.settings.rounds {
        // Not always the same one comes first.
        let count = all.len();
        for at in (0..count).map(|at| (at + usize::from(round)) % count) {
            let contender = &bout.contenders[at];
            progress.set_message(format!("{}: {}", bout.row.name(), contender.name));
            if let Ok(turns) = &mut all[at] {
                match contender.turn(&bout.row, &plan.settings) {
                    Ok(turn) => turns.push(turn),
                    Err(error) => all[at] = Err(error.to_string()),
                }
            }
            progress.inc(1);
        }
    }
    all
}
