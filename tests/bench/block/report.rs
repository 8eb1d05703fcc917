//! The table and the JSON document.

use serde_json::{Value, json};

use crate::args::word;
use crate::plan::{Bout, Measured, Plan, Settings, Target, paths};
use crate::run::{Turn, Turns};

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The median of what turns say.
fn of(turns: &Turns, what: impl Fn(&Turn) -> Option<f64>) -> Option<f64> {
    median(turns.as_ref().ok()?.iter().filter_map(what).collect())
}

/// The median of the ratios of turns in the same round, which saw the same machine.
fn ratio(turns: &Turns, other: &Turns, what: impl Fn(&Turn) -> Option<f64>) -> Option<f64> {
    let pairs = turns.as_ref().ok()?.iter().zip(other.as_ref().ok()?);
    median(pairs.filter_map(|(mine, theirs)| Some(what(mine)? / what(theirs)?)).collect())
}

fn iops(turn: &Turn) -> Option<f64> {
    Some(turn.iops)
}

fn cpu(turn: &Turn) -> Option<f64> {
    turn.cpu_us
}

/// What came of one target.
struct Verdict {
    text: String,
    met: Option<bool>,
}

fn verdict(target: &Target, bout: &Bout, turns: &[Turns]) -> Verdict {
    let find = |name: &str| bout.contenders.iter().position(|contender| contender.name == name);
    let value = find(target.who).zip(find(target.against)).and_then(|(who, against)| match target.measure {
        Measured::Iops => ratio(&turns[who], &turns[against], iops),
        Measured::CpuPerRequest => ratio(&turns[who], &turns[against], cpu),
    });
    let (what, relation) = match target.measure {
        Measured::Iops => ("IOPS", ">="),
        Measured::CpuPerRequest => ("CPU", "<="),
    };
    let due = format!("{what} / {} {relation} {:.2}", target.against, target.limit);
    let Some(value) = value else { return Verdict { text: format!("not measured: {due}"), met: None } };
    let met = match target.measure {
        Measured::Iops => value >= target.limit,
        Measured::CpuPerRequest => value <= target.limit,
    };
    let word = if met { "pass" } else { "MISS" };
    Verdict { text: format!("{word}: {due}, is {value:.2}"), met: Some(met) }
}

/// The share of another contender's IOPS, if that one takes part and is not this one.
fn share(bout: &Bout, turns: &[Turns], at: usize, of: &str) -> Option<f64> {
    let other = bout.contenders.iter().position(|contender| contender.name == of)?;
    if other == at { None } else { ratio(&turns[at], &turns[other], iops) }
}

pub fn json(plan: &Plan, results: &[Vec<Turns>]) {
    let rows: Vec<Value> =
        plan.bouts.iter().zip(results).map(|(bout, turns)| row_json(bout, turns, &plan.settings)).collect();
    let document = json!({
        "runtime_s": plan.settings.runtime,
        "rounds": plan.settings.rounds,
        "driver_threads": plan.settings.driver_threads,
        "pin": plan.settings.pin,
        "verify": plan.settings.verify,
        "files": paths(plan),
        "rows": rows,
    });
    println!("{document:#}");
}

fn row_json(bout: &Bout, turns: &[Turns], settings: &Settings) -> Value {
    let peers: Vec<Value> = (0..turns.len()).map(|at| peer_json(bout, turns, at)).collect();
    let targets: Vec<Value> = bout
        .targets
        .iter()
        .map(|target| {
            let verdict = verdict(target, bout, turns);
            json!({ "who": target.who, "text": verdict.text, "met": verdict.met })
        })
        .collect();
    json!({
        "place": bout.place, "row": bout.row.name(), "read_percent": bout.row.read_percent,
        "block_size": bout.row.block_size, "depth": bout.row.depth, "queues": bout.row.queues,
        "driver": word(settings.driver(&bout.row)),
        "peers": peers, "targets": targets,
    })
}

fn peer_json(bout: &Bout, all: &[Turns], at: usize) -> Value {
    let (name, turns) = (&bout.contenders[at].name, &all[at]);
    if let Err(error) = turns {
        return json!({ "peer": name, "error": error });
    }
    let percentile = |index: usize| of(turns, move |turn| Some(turn.percentiles_us[index]));
    json!({
        "peer": name,
        "iops": of(turns, iops),
        "of_fio": share(bout, all, at, "fio"),
        "of_qsd": share(bout, all, at, "qsd"),
        "p50_us": percentile(0), "p90_us": percentile(1), "p99_us": percentile(2), "p99_9_us": percentile(3),
        "cpu_us_per_request": of(turns, cpu),
        "kicks_per_request": of(turns, |turn| turn.kicks),
        "calls_per_request": of(turns, |turn| turn.interrupts),
        "memory_kib": of(turns, |turn| turn.memory_kib),
        "verified_reads": turns.iter().flatten().map(|turn| turn.verified).sum::<u64>(),
    })
}

pub fn table(plan: &Plan, results: &[Vec<Turns>]) {
    let settings = &plan.settings;
    let pinned = settings.pin.map_or(String::new(), |cpu| format!(", served by CPU {cpu}"));
    println!(
        "{} rounds of {} s in turns, medians; a driver that polls has {} thread(s){pinned}\n",
        settings.rounds, settings.runtime, settings.driver_threads,
    );
    let (mut met, mut missed, mut open) = (0, 0, 0);
    for (bout, turns) in plan.bouts.iter().zip(results) {
        let driver = word(settings.driver(&bout.row));
        println!("{}, {}; driver: {driver}", bout.place, bout.row.name());
        println!(
            "  {:<12} {:>9} {:>8} {:>6} {:>6} {:>8} {:>8} {:>8} {:>8} {:>7} {:>7}",
            "",
            "IOPS",
            "MiB/s",
            "/fio",
            "/qsd",
            "p50 us",
            "p90 us",
            "p99 us",
            "p99.9 us",
            "cpu us",
            "mem KiB"
        );
        for at in 0..turns.len() {
            line(bout, turns, at);
        }
        for target in &bout.targets {
            let verdict = verdict(target, bout, turns);
            println!("  {:<12} {}", target.who, verdict.text);
            match verdict.met {
                Some(true) => met += 1,
                Some(false) => missed += 1,
                None => open += 1,
            }
        }
        println!();
    }
    if met + missed + open > 0 {
        println!("{met} targets met, {missed} missed, {open} not measured");
    }
}

fn line(bout: &Bout, all: &[Turns], at: usize) {
    let (name, turns) = (&bout.contenders[at].name, &all[at]);
    if let Err(error) = turns {
        println!("  {name:<12} failed: {error}");
        return;
    }
    let show =
        |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
    let percentile = |index: usize| show(of(turns, move |turn| Some(turn.percentiles_us[index])), 1);
    let rate = of(turns, iops).map(|iops| iops * bout.row.block_size as f64 / f64::from(1 << 20));
    println!(
        "  {name:<12} {:>9} {:>8} {:>6} {:>6} {:>8} {:>8} {:>8} {:>8} {:>7} {:>7}",
        show(of(turns, iops), 0),
        show(rate, 0),
        show(share(bout, all, at, "fio"), 2),
        show(share(bout, all, at, "qsd"), 2),
        percentile(0),
        percentile(1),
        percentile(2),
        percentile(3),
        show(of(turns, cpu), 2),
        show(of(turns, |turn| turn.memory_kib), 0),
    );
    let verified: u64 = turns.iter().flatten().map(|turn| turn.verified).sum();
    if verified > 0 {
        println!("  {:<12} {verified} reads of known content, all right", "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_the_same_round() {
        let turns = |values: &[f64]| -> Turns {
            Ok(values.iter().map(|iops| Turn { iops: *iops, ..Turn::default() }).collect())
        };
        // The machine was slower in the second round, for both.
        let (mine, theirs) = (turns(&[90.0, 45.0, 91.0]), turns(&[100.0, 50.0, 100.0]));
        assert_eq!(ratio(&mine, &theirs, iops), Some(0.9));
        assert_eq!(ratio(&mine, &Err("gone".into()), iops), None);
        assert_eq!(median(vec![3.0, f64::NAN, 1.0, 2.0]), Some(2.0));
    }
}
