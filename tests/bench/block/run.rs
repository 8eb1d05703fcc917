//! Turns: one of each contender after the other, so that what the machine does meanwhile is the same for all.

use indicatif::{ProgressBar, ProgressStyle};

use crate::Result;
use crate::args::Measure;
use crate::contender::pin_driver;
use crate::plan::{Bout, Plan, plan};
use crate::report;

/// One turn of one contender.
#[derive(Debug, Clone, Copy, Default)]
pub struct Turn {
    pub iops: f64,
    /// p50, p90, p99 and p99.9.
    pub percentiles_us: [f64; 4],
    /// CPU microseconds a request: of the daemon's process, the kernel's work for it in its own threads included; of fio,
    /// which makes the load as well, its threads.
    pub cpu_us: Option<f64>,
    /// Resident memory without the guest's, in KiB.
    pub memory_kib: Option<f64>,
    pub kicks: Option<f64>,
    pub interrupts: Option<f64>,
    pub verified: u64,
}

/// All turns of a contender in one bout, or why there are not all of them.
pub type Turns = std::result::Result<Vec<Turn>, String>;

/// Measures what the command line asks for. `false`: someone failed.
///
/// # Errors
/// Nothing could be measured.
pub fn run(args: &Measure) -> Result<bool> {
    let plan = plan(args)?;
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
        // Who comes first has the caches as the last one left them: not always the same one.
        let count = all.len();
        for at in (0..count).map(|at| (at + usize::from(round)) % count) {
            let contender = &bout.contenders[at];
            progress.set_message(format!("{} {}: {}", bout.place, bout.row.name(), contender.name));
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
