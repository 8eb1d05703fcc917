//! Inflate, deflate, reporting, poison: what becomes a hole and what does not.

use cleave_tests::driver::{Frontend, GuestRam};

use super::*;

#[test]
fn what_is_inflated_is_a_hole_and_what_is_beside_it_is_not() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    // In no order, one twice, some side by side, and some above the hole between the regions.
    let high = (driver.ram.high() / PAGE) as u32;
    let pfns = [FIRST + 5, FIRST + 1, FIRST + 2, FIRST + 5, FIRST + 3, high, high + 9];
    let beside = [FIRST, FIRST + 4, FIRST + 6, high + 1, high + 8, high + 10];
    fill(&driver, &pfns);
    fill(&driver, &beside);
    // The array and the rings are in memory from now on.
    driver.deflate(&[FIRST]).unwrap();
    driver.inflate(&[]).unwrap();
    let before = driver.ram.allocated().unwrap();
    driver.inflate(&pfns).unwrap();
    for pfn in pfns {
        assert!(is_hole(&driver, pfn), "page {pfn:#x}");
    }
    for pfn in beside {
        assert!(keeps_its_content(&driver, pfn), "page {pfn:#x}");
    }
    assert_eq!(before - driver.ram.allocated().unwrap(), 6 * PAGE);
    assert_eq!(balloon.status()["given-back-by-inflation"], 6 * PAGE);
    // It is the guest's again, and empty.
    driver.deflate(&pfns).unwrap();
    assert_eq!(driver.ram.read_byte(u64::from(FIRST + 5) * PAGE).unwrap(), 0);
    fill(&driver, &[FIRST + 5]);
    assert!(keeps_its_content(&driver, FIRST + 5));
}

#[test]
fn all_of_a_large_balloon_is_given_back() {
    let (_balloon, mut driver) = Balloon::with_driver(&[]);
    let pfns: Vec<u32> = (FIRST..FIRST + 8192).collect();
    fill(&driver, &pfns);
    driver.inflate(&[]).unwrap();
    driver.deflate(&pfns[..256]).unwrap();
    let before = driver.ram.allocated().unwrap();
    // As Linux does it, and every other page first.
    let (even, odd): (Vec<u32>, Vec<u32>) = pfns.iter().partition(|pfn| **pfn % 2 == 0);
    for part in even.chunks(256).chain(odd.chunks(256)) {
        driver.inflate(part).unwrap();
    }
    assert_eq!(before - driver.ram.allocated().unwrap(), 32 * MIB);
}

#[test]
fn what_is_reported_free_is_given_back() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    let pfns: Vec<u32> = (FIRST..FIRST + 1024).collect();
    fill(&driver, &pfns);
    let addr = |page: u32| u64::from(page) * PAGE;
    driver.report(&[(addr(FIRST), 2 << 20), (addr(FIRST + 600), 4096)]).unwrap();
    assert!(is_hole(&driver, FIRST) && is_hole(&driver, FIRST + 511) && is_hole(&driver, FIRST + 600));
    assert!(keeps_its_content(&driver, FIRST + 512) && keeps_its_content(&driver, FIRST + 601));
    // What is no whole page stays.
    driver.report(&[(addr(FIRST + 700) + 1, 8192), (addr(FIRST + 800), 100)]).unwrap();
    assert!(keeps_its_content(&driver, FIRST + 700) && is_hole(&driver, FIRST + 701));
    assert!(keeps_its_content(&driver, FIRST + 702) && keeps_its_content(&driver, FIRST + 800));
    assert_eq!(balloon.status()["given-back-by-reporting"], 2 * MIB + 2 * PAGE);
}

#[test]
fn pages_that_are_to_keep_what_they_are_filled_with_are_not_given_back_by_reporting() {
    let (_balloon, mut driver) = Balloon::with_driver(&[]);
    fill(&driver, &[FIRST, FIRST + 1]);
    driver.frontend.set_config(12, &0xaaaa_aaaa_u32.to_le_bytes()).unwrap();
    driver.report(&[(u64::from(FIRST) * PAGE, PAGE as u32)]).unwrap();
    assert!(keeps_its_content(&driver, FIRST));
    // The content of a page in the balloon is nobody's.
    driver.inflate(&[FIRST]).unwrap();
    assert!(is_hole(&driver, FIRST));
    driver.frontend.set_config(12, &0u32.to_le_bytes()).unwrap();
    driver.report(&[(u64::from(FIRST + 1) * PAGE, PAGE as u32)]).unwrap();
    assert!(is_hole(&driver, FIRST + 1));
}

/// Linux, before 2024, has reporting in queue 3 when there is no hinting; the specification has it in queue 4.
#[test]
fn a_driver_that_leaves_out_queues_is_understood() {
    for reporting in [3, 4] {
        let balloon = Balloon::start(&[]);
        let frontend = Frontend::connect(&balloon.daemon.socket).unwrap();
        let features = feature::STATS_VQ | feature::PAGE_POISON | feature::REPORTING;
        let ram = GuestRam::new(HALF).unwrap();
        let mut driver = BalloonDriver::prepare(frontend, ram, features).unwrap();
        for index in [0, 1, 2, reporting] {
            driver.start_queue(index).unwrap();
        }
        fill(&driver, &[FIRST]);
        let free = cleave_tests::driver::Buffer::to_write(u64::from(FIRST) * PAGE, PAGE as u32);
        driver.request(reporting, &[free]).unwrap();
        assert!(is_hole(&driver, FIRST), "queue {reporting}");
    }
}

#[test]
fn nothing_is_given_back_while_inhibited_and_all_of_it_afterwards() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    let pfns: Vec<u32> = (FIRST..FIRST + 700).collect();
    fill(&driver, &pfns);
    balloon.ask("inhibit", serde_json::json!({"state": "on"})).unwrap();
    driver.inflate(&pfns[..600]).unwrap();
    driver.report(&[(u64::from(FIRST + 600) * PAGE, 100 * PAGE as u32)]).unwrap();
    assert!(pfns.iter().all(|pfn| keeps_its_content(&driver, *pfn)));
    assert_eq!(balloon.status()["not-given-back"], 600 * PAGE);
    driver.deflate(&pfns[10..20]).unwrap();
    let answer = balloon.ask("inhibit", serde_json::json!({"state": "off"})).unwrap();
    assert_eq!(answer["given-back"], 590 * PAGE);
    for (at, pfn) in pfns.iter().enumerate() {
        let given = at < 10 || (20..600).contains(&at);
        assert_eq!(is_hole(&driver, *pfn), given, "page {at}");
    }
    assert_eq!(balloon.status()["not-given-back"], 0);
    driver.inflate(&pfns[600..]).unwrap();
    assert!(is_hole(&driver, FIRST + 699));
}
