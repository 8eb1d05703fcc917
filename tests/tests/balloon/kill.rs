//! cleave-balloon is killed (SIGKILL) at any moment: its successor knows the target, and does what was not done.

use serde_json::json;

use super::*;

const KILLS: u32 = 30;

#[test]
fn thirty_kills_lose_no_request_and_change_no_page_of_the_guests() {
    let (mut balloon, mut driver) = Balloon::with_driver(&[]);
    let region = driver.track_inflight().unwrap();
    let kept: Vec<u32> = (FIRST..FIRST + 4096).step_by(2).collect();
    let given: Vec<u32> = (FIRST + 1..FIRST + 4096).step_by(2).collect();
    fill(&driver, &kept);
    for kill in 0..KILLS {
        fill(&driver, &given);
        // Not waited for: it dies before, in the middle, or behind.
        driver.submit_pages(BalloonDriver::INFLATE, &given).unwrap();
        std::thread::sleep(Duration::from_micros(u64::from(kill) * 211 % 3000));
        balloon.daemon.kill_and_restart().unwrap();
        driver.resume(&balloon.daemon.socket, Some(&region)).unwrap();
        driver.complete(BalloonDriver::INFLATE).unwrap();
        assert!(given.iter().all(|pfn| is_hole(&driver, *pfn)), "kill {kill}");
        assert!(kept.iter().all(|pfn| keeps_its_content(&driver, *pfn)), "kill {kill}");
        driver.deflate(&given).unwrap();
    }
    driver.frontend.stop_queue(0).unwrap();
    assert!(region.marked(0).unwrap().is_empty() && region.marked(1).unwrap().is_empty());
}

#[test]
fn a_successor_says_what_its_predecessor_said_from_its_first_word_on() {
    let (mut balloon, mut driver) = Balloon::with_driver(&["--target", "120M"]);
    let region = driver.track_inflight().unwrap();
    let statistics = driver.tell_statistics(&[(4, 6 * MIB)]).unwrap();
    balloon.ask("target", json!({"size": "100M"})).unwrap();
    balloon.ask("inhibit", json!({"state": "on"})).unwrap();
    let said = driver.config().unwrap();
    for _ in 0..3 {
        balloon.daemon.kill_and_restart().unwrap();
        // Before it is told anything: a frontend reads config space first.
        let mut first = cleave_tests::driver::Frontend::connect(&balloon.daemon.socket).unwrap();
        first.negotiate(u64::MAX).unwrap();
        assert_eq!(first.config(0, 4).unwrap(), said.num_pages.to_le_bytes());
        drop(first);
        driver.resume(&balloon.daemon.socket, Some(&region)).unwrap();
        assert_eq!(driver.config().unwrap().num_pages, said.num_pages);
        assert_eq!(balloon.status()["inhibited"], true);
    }
    // The buffer for statistics was with the dead ones, and goes back when somebody asks.
    wait_until("statistics", || {
        balloon.ask("stats", json!({})).is_ok_and(|it| it["guest"]["free"] == 6 * MIB)
    });
    assert_eq!(driver.complete(BalloonDriver::STATISTICS).unwrap(), (statistics, 0));
}
