//! `block-bench conformance`: the list of checks with what came of each.

use cleave_tests::conformance::{Check, Subject, Verdict, checks};
use cleave_tests::driver::Daemon;
use serde_json::json;

use crate::args::{Conformance, Peer};
use crate::contender::{Contender, cleave};
use crate::scratch::{self, Prepared};
use crate::{BenchError, Result};

/// Enough for checks that need more than one.
const QUEUES: u16 = 2;

/// Runs the checks. `false`: one failed.
///
/// # Errors
/// There is nothing to check.
pub fn run(args: &Conformance) -> Result<bool> {
    let asked = |check: &Check| {
        args.only.is_empty() || args.only.iter().any(|text| check.name.contains(text.as_str()))
    };
    let chosen: Vec<Check> = checks().into_iter().filter(asked).collect();
    if chosen.is_empty() {
        let names: Vec<&str> = checks().iter().map(|check| check.name).collect();
        return Err(BenchError::Usage(format!("no check is called that; there are {}", names.join(", "))));
    }
    if let Some(socket) = &args.socket {
        let subject = Subject { socket: socket.clone(), may_write: args.disk.overwrite };
        let title = socket.display().to_string();
        return Ok(report(&title, &chosen, &subject, args.json));
    }
    let made = scratch::prepare(&args.disk, true)?;
    let (daemon, title) = start(args, &made)?;
    let subject = Subject { socket: daemon.socket.clone(), may_write: true };
    let mut good = report(&title, &chosen, &subject, args.json);
    drop(daemon);
    if args.peer != Peer::Qsd {
        let read_only = ["--read-only".to_owned()];
        let daemon = cleave(&made.image, QUEUES, &read_only)?;
        let subject = Subject { socket: daemon.socket.clone(), may_write: true };
        good &= report(&format!("{title}, read-only"), &chosen, &subject, args.json);
    }
    Ok(good)
}

fn start(args: &Conformance, made: &Prepared) -> Result<(Daemon, String)> {
    if args.peer == Peer::Fio {
        return Err(BenchError::Usage("fio is no daemon: --peer takes qsd, cleave or cleave-poll".into()));
    }
    let contender = Contender::of(args.peer, &made.image, 50);
    let daemon = contender.start(QUEUES)?;
    Ok((daemon, format!("{} on {}", contender.name, scratch::describe(&made.image))))
}

fn report(title: &str, checks: &[Check], subject: &Subject, as_json: bool) -> bool {
    if !as_json {
        println!("{title}");
    }
    let (mut passed, mut failed, mut not_applicable) = (0, 0, 0);
    let mut list = Vec::new();
    for check in checks {
        let verdict = check.run(subject);
        let (word, why) = match &verdict {
            Verdict::Pass => ("pass", ""),
            Verdict::Fail(why) => ("FAIL", why.as_str()),
            Verdict::NotApplicable(why) => ("n/a", why.as_str()),
        };
        match verdict {
            Verdict::Pass => passed += 1,
            Verdict::Fail(_) => failed += 1,
            Verdict::NotApplicable(_) => not_applicable += 1,
        }
        list.push(json!({ "check": check.name, "demand": check.demand, "verdict": word.to_lowercase(), "why": why }));
        if !as_json {
            let why = match word {
                "n/a" => format!(" (needs {why})"),
                "FAIL" => format!(": {why}"),
                _ => String::new(),
            };
            println!("  {word:<5} {:<18} {}{why}", check.name, check.demand);
        }
    }
    if as_json {
        let summary = json!({ "subject": title, "checks": list, "failed": failed });
        println!("{summary:#}");
    } else {
        println!("{passed} passed, {failed} failed, {not_applicable} not applicable\n");
    }
    failed == 0
}
