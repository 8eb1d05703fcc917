//! `block-bench kill`: cleave-block is killed again and again under verified load.

use std::time::Duration;

use cleave_tests::survival::{self, Campaign, Survived};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::args::{Kill, word};
use crate::contender::cleave;
use crate::{Result, scratch};

/// What a daemon that is started anew is to take, at most, from SIGKILL to the first completion.
const TARGET: Duration = Duration::from_millis(50);

/// Runs it; it ends with an error as soon as something is lost.
///
/// # Errors
/// Something was lost, damaged or done twice.
pub fn run(args: &Kill) -> Result<bool> {
    let made = scratch::prepare(&args.disk, true)?;
    let mut more = vec!["--cache".to_owned(), word(args.cache)];
    more.extend(args.daemon.iter().cloned());
    let mut daemon = cleave(&made.image, args.queues, &more)?;
    let campaign = Campaign {
        kills: args.kills,
        queues: args.queues,
        depth: args.depth,
        block_size: args.bs.bytes() as u32,
        seed: args.seed.unwrap_or_else(survival::any_seed),
        ..Campaign::default()
    };
    eprintln!("seed {}", campaign.seed);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} kills, {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let progress = ProgressBar::new(args.kills.into()).with_style(style);
    let survived = survival::run(&mut daemon, &campaign, |_| progress.inc(1))?;
    progress.finish_and_clear();
    let title = format!("{}, --cache {}", scratch::describe(&made.image), word(args.cache));
    if args.json {
        as_json(&title, &campaign, &survived)
    } else {
        as_text(&title, &campaign, &survived)
    }
    Ok(true)
}

fn as_text(title: &str, campaign: &Campaign, survived: &Survived) {
    println!("{title}, {} queues x qd{}", campaign.queues, campaign.depth);
    println!("  {} kills in {:.1} s", survived.kills, survived.elapsed.as_secs_f64());
    println!(
        "  {} requests, {} of them in flight at a kill: none lost, none twice, no error",
        survived.requests, survived.in_flight
    );
    println!(
        "  {} reads under load and {} blocks at the end: all as written last",
        survived.verified, survived.blocks
    );
    let at = |quantile: f64| survived.recovery.value_at_quantile(quantile) as f64 / 1e3;
    println!(
        "  SIGKILL to first completion: median {:.1} ms, p99 {:.1} ms, longest {:.1} ms ({} is due)",
        at(0.5),
        at(0.99),
        at(1.0),
        format_args!("{} ms", TARGET.as_millis())
    );
    println!("  the longest request took {:.1} ms", survived.longest.as_secs_f64() * 1e3);
}

fn as_json(title: &str, campaign: &Campaign, survived: &Survived) {
    let at = |quantile: f64| survived.recovery.value_at_quantile(quantile) as f64 / 1e3;
    let document = json!({
        "subject": title, "seed": campaign.seed, "queues": campaign.queues, "depth": campaign.depth,
        "kills": survived.kills, "seconds": survived.elapsed.as_secs_f64(), "requests": survived.requests,
        "in_flight_at_kills": survived.in_flight, "verified_reads": survived.verified,
        "blocks_verified_at_end": survived.blocks,
        "recovery_ms": { "samples": survived.recovery.len(), "p50": at(0.5), "p99": at(0.99), "max": at(1.0) },
        "longest_request_ms": survived.longest.as_secs_f64() * 1e3,
    });
    println!("{document:#}");
}
