//! cleave-block is killed (SIGKILL) 50 times under verified load, and nothing is lost.

mod common;

use cleave_tests::survival::{self, Campaign, Survived};
use common::{MIB, disk, start};

fn survive(cache: &str, campaign: &Campaign) -> Survived {
    let image = disk(32 * MIB);
    let queues = campaign.queues.to_string();
    let mut daemon = start(&image, &["--cache", cache, "--num-queues", &queues]);
    let survived = survival::run(&mut daemon, campaign, |_| ()).unwrap_or_else(|error| {
        panic!("seed {}, --cache {cache}: {error}\nthe daemon said: {}", campaign.seed, daemon.log())
    });
    let at = |quantile: f64| survived.recovery.value_at_quantile(quantile) as f64 / 1e3;
    println!(
        "--cache {cache}: SIGKILL to first completion: median {:.1} ms, longest {:.1} ms",
        at(0.5),
        at(1.0)
    );
    survived
}

#[test]
fn fifty_kills_lose_nothing_past_the_page_cache() {
    let campaign = Campaign { kills: 50, seed: survival::any_seed(), ..Campaign::default() };
    let survived = survive("none", &campaign);
    assert_eq!(survived.kills, 50);
    assert!(survived.in_flight > 0, "no kill met a request in flight: the load is none");
    assert!(survived.verified > 0 && survived.blocks > 0);
}

#[test]
fn kills_lose_nothing_in_the_page_cache() {
    let campaign = Campaign { kills: 20, seed: survival::any_seed(), ..Campaign::default() };
    survive("writeback", &campaign);
}

#[test]
fn kills_tear_no_large_write() {
    let campaign = Campaign {
        kills: 20,
        queues: 1,
        depth: 16,
        block_size: 64 << 10,
        seed: survival::any_seed(),
        ..Campaign::default()
    };
    survive("none", &campaign);
}
