//! The table and the JSON document.

use serde_json::{Value, json};

use crate::args::word;
use crate::plan::{Bout, Plan, Settings, Target};
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

fn frames(turn: &Turn) -> Option<f64> {
    Some(turn.frames)
}

fn per_core(turn: &Turn) -> Option<f64> {
    turn.per_core
}

/// What came of a target, in words, and whether it was met; `None`: it was not measured.
fn verdict(target: &Target, bout: &Bout, turns: &[Turns]) -> (String, Option<bool>) {
    let find = |name: &str| bout.contenders.iter().position(|contender| contender.name == name);
    let places = find(target.who).zip(find(target.against));
    let value = places.and_then(|(who, against)| ratio(&turns[who], &turns[against], per_core));
    let due = format!("frames a second and core / {} >= {:.2}", target.against, target.limit);
    match value {
        None => (format!("not measured: {due}"), None),
        Some(value) if value >= target.limit => (format!("pass: {due}, is {value:.2}"), Some(true)),
        Some(value) => (format!("MISS: {due}, is {value:.2}"), Some(false)),
    }
}

pub fn json(plan: &Plan, results: &[Vec<Turns>]) {
    let rows: Vec<Value> =
        plan.bouts.iter().zip(results).map(|(bout, turns)| row_json(bout, turns, &plan.settings)).collect();
    let document = json!({
        "runtime_s": plan.settings.runtime,
        "rounds": plan.settings.rounds,
        "pin": plan.settings.pin,
        "rows": rows,
    });
    println!("{document:#}");
}

fn row_json(bout: &Bout, turns: &[Turns], settings: &Settings) -> Value {
    let peers: Vec<Value> = (0..turns.len()).map(|at| peer_json(bout, turns, at)).collect();
    let verdicts = bout.targets.iter().map(|target| (target, verdict(target, bout, turns)));
    let targets: Vec<Value> = verdicts
        .map(|(target, (text, met))| json!({ "who": target.who, "text": text, "met": met }))
        .collect();
    json!({
        "row": bout.row.name(), "way": word(bout.row.way), "size": bout.row.size.word(), "queues": bout.row.queues,
        "driver": word(settings.driver(&bout.row)), "peers": peers, "targets": targets,
    })
}

fn peer_json(bout: &Bout, all: &[Turns], at: usize) -> Value {
    let (name, turns) = (&bout.contenders[at].name, &all[at]);
    if let Err(error) = turns {
        return json!({ "peer": name, "error": error });
    }
    let share = |what: fn(&Turn) -> Option<f64>| if at == 0 { None } else { ratio(turns, &all[0], what) };
    json!({
        "peer": name,
        "frames_per_s": of(turns, frames),
        "gbit_per_s": of(turns, |turn| Some(turn.gbits)),
        "frames_per_s_and_core": of(turns, per_core),
        "cores": of(turns, |turn| turn.busy),
        "of_first": share(frames),
        "of_first_per_core": share(per_core),
        "kicks_per_frame": of(turns, |turn| Some(turn.kicks)),
        "calls_per_frame": of(turns, |turn| Some(turn.calls)),
    })
}

pub fn table(plan: &Plan, results: &[Vec<Turns>]) {
    let settings = &plan.settings;
    let pinned = settings.pin.map_or(String::new(), |cpu| format!("; what is measured has CPU {cpu}"));
    println!("{} rounds of {} s in turns, medians{pinned}\n", settings.rounds, settings.runtime);
    let mut counts = [0; 3];
    for (bout, turns) in plan.bouts.iter().zip(results) {
        println!("{}; driver: {}", bout.row.name(), word(settings.driver(&bout.row)));
        let first = &bout.contenders[0].name;
        println!(
            "  {:<12} {:>10} {:>8} {:>10} {:>9} {:>7} {:>9} {:>9} {:>9}",
            "",
            "kframes/s",
            "Gbit/s",
            "kfr/s/core",
            "ns/frame",
            "cores",
            "kicks/fr",
            "calls/fr",
            format!("/{first}")
        );
        for at in 0..turns.len() {
            line(bout, turns, at);
        }
        for target in &bout.targets {
            let (text, met) = verdict(target, bout, turns);
            println!("  {:<12} {text}", target.who);
            counts[met.map_or(2, |met| usize::from(!met))] += 1;
        }
        println!();
    }
    let [met, missed, open] = counts;
    if met + missed + open > 0 {
        println!("{met} targets met, {missed} missed, {open} not measured");
    }
}

/// The last column is the share of the first one's frames a second of CPU time.
fn line(bout: &Bout, all: &[Turns], at: usize) {
    let (name, turns) = (&bout.contenders[at].name, &all[at]);
    if let Err(error) = turns {
        println!("  {name:<12} failed: {error}");
        return;
    }
    let show =
        |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
    println!(
        "  {name:<12} {:>10} {:>8} {:>10} {:>9} {:>7} {:>9} {:>9} {:>9}",
        show(of(turns, frames).map(|frames| frames / 1e3), 0),
        show(of(turns, |turn| Some(turn.gbits)), 2),
        show(of(turns, per_core).map(|frames| frames / 1e3), 0),
        show(of(turns, per_core).map(|frames| 1e9 / frames), 0),
        show(of(turns, |turn| turn.busy), 2),
        show(of(turns, |turn| Some(turn.kicks)), 3),
        show(of(turns, |turn| Some(turn.calls)), 3),
        show(if at == 0 { None } else { ratio(turns, &all[0], per_core) }, 2),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_the_same_round() {
        let turns = |values: &[f64]| -> Turns {
            Ok(values.iter().map(|rate| Turn { per_core: Some(*rate), ..Turn::default() }).collect())
        };
        // The machine was slower in the second round, for both.
        let (mine, theirs) = (turns(&[90.0, 45.0, 91.0]), turns(&[100.0, 50.0, 100.0]));
        assert_eq!(ratio(&mine, &theirs, per_core), Some(0.9));
        assert_eq!(ratio(&mine, &Err("gone".into()), per_core), None);
    }
}
