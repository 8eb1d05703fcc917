//! The target, from the control socket to the driver's config space; statistics; hints; the automatic mode.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use cleave_common::vhost_user::{Channel, FrontendRequest as Request};
use cleave_tests::driver::Buffer;
use serde_json::json;

use super::*;

const PAGES_A_MIB: u32 = (MIB / PAGE) as u32;

fn told(driver: &mut BalloonDriver) -> Channel {
    let (ours, theirs) = UnixStream::pair().unwrap();
    driver.frontend.tell(Request::SetBackendReqFd, &(), &[theirs.as_fd()]).unwrap();
    Channel::new(ours)
}

fn is_told(channel: &mut Channel) {
    // CONFIG_CHANGE_MSG.
    let message = channel.recv(Some(Instant::now() + SOON)).unwrap().unwrap();
    assert_eq!(message.request, 2);
}

#[test]
fn a_target_reaches_the_driver_within_milliseconds_and_its_balloon_the_administrator() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    let mut channel = told(&mut driver);
    assert_eq!(driver.config().unwrap().num_pages, 0);
    let begun = Instant::now();
    let answer = balloon.ask("target", json!({"size": "96M"})).unwrap();
    assert_eq!(answer, json!({"size": 96 * MIB, "actual": 128 * MIB}));
    is_told(&mut channel);
    eprintln!("told after {:?}", begun.elapsed());
    assert_eq!(driver.config().unwrap().num_pages, 32 * PAGES_A_MIB);
    driver.frontend.set_config(4, &(8 * PAGES_A_MIB).to_le_bytes()).unwrap();
    let status = balloon.status();
    let of = |key: &str| status[key].as_u64().unwrap() / MIB;
    assert_eq!((of("memory"), of("target"), of("actual"), of("balloon")), (128, 96, 120, 8));
    assert_eq!(balloon.ask("query-balloon", json!({})).unwrap(), json!({"actual": 120 * MIB}));
    balloon.ask("balloon", json!({"value": 112 * MIB})).unwrap();
    is_told(&mut channel);
    assert_eq!(driver.config().unwrap().num_pages, 16 * PAGES_A_MIB);
    balloon.ask("target", json!({"size": "all"})).unwrap();
    is_told(&mut channel);
    assert_eq!(driver.config().unwrap().num_pages, 0);
}

#[test]
fn a_target_out_of_range_is_clamped_and_said() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    let answer = balloon.ask("target", json!({"size": "1M"})).unwrap();
    assert_eq!(answer["size"], 16 * MIB);
    assert_eq!(answer["because"], "1 MiB is too little to live with: it is left 16 MiB (--min)");
    assert_eq!(driver.config().unwrap().num_pages, 112 * PAGES_A_MIB);
    let answer = balloon.ask("target", json!({"size": "1T"})).unwrap();
    assert_eq!(answer["size"], 128 * MIB);
    assert!(answer["because"].as_str().unwrap().contains("more than all of its memory"), "{answer}");
    assert_eq!(driver.config().unwrap().num_pages, 0);
    for (arguments, reason) in [
        (json!({"size": "lots"}), "'lots' is no size"),
        (json!({}), "missing field `size`"),
        (json!({"size": "1M", "sise": 1}), "unknown field `sise`"),
    ] {
        let error = balloon.ask("target", arguments).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn a_target_without_a_driver_is_for_the_next_one() {
    let balloon = Balloon::start(&[]);
    let answer = balloon.ask("target", json!({"size": "100M"})).unwrap();
    assert!(answer["note"].as_str().unwrap().contains("no driver"), "{answer}");
    let error = balloon.ask("stats", json!({})).unwrap_err();
    assert!(error.contains("no driver"), "{error}");
    let mut driver = BalloonDriver::connect(&balloon.daemon.socket, HALF).unwrap();
    assert_eq!(driver.config().unwrap().num_pages, 28 * PAGES_A_MIB);
    // Another guest, larger: what was said counts for it, too.
    drop(driver);
    let mut driver = BalloonDriver::connect(&balloon.daemon.socket, 2 * HALF).unwrap();
    assert_eq!(driver.config().unwrap().num_pages, 156 * PAGES_A_MIB);
    driver.frontend.set_config(4, &1u32.to_le_bytes()).unwrap();
    driver.frontend.tell(Request::ResetDevice, &(), &[]).unwrap();
    assert_eq!(driver.config().unwrap().actual, 0);
}

#[test]
fn statistics_come_when_asked_for_and_at_intervals() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    let head = driver.tell_statistics(&[(4, 5 * MIB), (6, 9 * MIB), (77, 1)]).unwrap();
    let mut answer = Err(String::new());
    wait_until("statistics", || {
        answer = balloon.ask("stats", json!({}));
        answer.is_ok()
    });
    assert_eq!(answer.unwrap()["guest"], json!({"free": 5 * MIB, "available": 9 * MIB}));
    // It was asked by this, and has its buffer back.
    assert_eq!(driver.complete(BalloonDriver::STATISTICS).unwrap(), (head, 0));
    driver.tell_statistics(&[(4, 6 * MIB)]).unwrap();
    balloon.ask("set-interval", json!({"seconds": 0.1})).unwrap();
    for free in 7..10 {
        driver.complete(BalloonDriver::STATISTICS).unwrap();
        driver.tell_statistics(&[(4, free * MIB)]).unwrap();
        wait_until("new statistics", || {
            balloon.ask("stats", json!({})).unwrap()["guest"]["free"] == free * MIB
        });
    }
    let error = balloon.ask("set-interval", json!({"seconds": 0.001})).unwrap_err();
    assert!(error.contains("every 0.1 seconds at most"), "{error}");
}

#[test]
fn hints_are_gathered_and_nothing_is_given_back() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    fill(&driver, &[FIRST]);
    balloon.ask("hint", json!({"action": "start"})).unwrap();
    let number = driver.config().unwrap().hint_cmd_id;
    assert!(number >= 2);
    let say = |driver: &mut BalloonDriver, number: u32| {
        let at = driver.statistics;
        driver.ram.write(at, &number.to_le_bytes()).unwrap();
        driver.request(BalloonDriver::HINTING, &[Buffer::to_read(at, 4)]).unwrap();
    };
    say(&mut driver, number);
    let addr = u64::from(FIRST) * PAGE;
    for at in [addr + 4 * MIB, addr] {
        driver.request(BalloonDriver::HINTING, &[Buffer::to_write(at, 4 << 20)]).unwrap();
    }
    say(&mut driver, 0);
    assert_eq!(driver.config().unwrap().hint_cmd_id, 0);
    let hints = balloon.ask("query-hints", json!({})).unwrap();
    assert_eq!(hints["stage"], "complete");
    assert_eq!(hints["runs"], json!([{"start": addr, "size": 8 * MIB}]));
    assert!(keeps_its_content(&driver, FIRST));
    balloon.ask("hint", json!({"action": "done"})).unwrap();
    assert_eq!(driver.config().unwrap().hint_cmd_id, 1);
}

#[test]
fn the_automatic_mode_follows_what_the_guest_says() {
    let (balloon, mut driver) =
        Balloon::with_driver(&["--auto", "free=16M,min=32M", "--stats-interval", "0.1"]);
    let next = |driver: &mut BalloonDriver, available: u64| {
        driver.tell_statistics(&[(6, available * MIB)]).unwrap();
        driver.complete(BalloonDriver::STATISTICS).unwrap();
        driver.config().unwrap().num_pages / PAGES_A_MIB
    };
    // A step is an eighth of its memory.
    assert_eq!(next(&mut driver, 100), 16);
    driver.frontend.set_config(4, &(16 * PAGES_A_MIB).to_le_bytes()).unwrap();
    assert_eq!(next(&mut driver, 84), 32);
    driver.frontend.set_config(4, &(96 * PAGES_A_MIB).to_le_bytes()).unwrap();
    assert_eq!(next(&mut driver, 100), 96, "no less than min=");
    assert_eq!(next(&mut driver, 4), 84, "what it lacks, it gets at once");
    balloon.ask("target", json!({"size": "100M"})).unwrap();
    assert_eq!(balloon.status()["auto"], false);
    assert_eq!(next(&mut driver, 100), 28, "whoever sets a target has the say");
    balloon.ask("auto", json!({"state": "on"})).unwrap();
    assert_eq!(next(&mut driver, 4), 84);
    let plain = Balloon::start(&[]);
    assert!(plain.ask("auto", json!({"state": "on"})).unwrap_err().contains("--auto free=SIZE"));
}
