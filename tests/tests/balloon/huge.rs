//! Guest memory in huge pages: whole ones are given back, and parts of one wait for the rest. Where the host has no huge
//! pages to try it with, the tests say so and are over.

use std::fs;

use cleave_tests::driver::{Frontend, GuestRam};

use super::*;

const HUGE: u64 = 2 * MIB;

/// Pages of the smaller kind in a huge one.
const PARTS: u32 = (HUGE / PAGE) as u32;

fn with_huge_pages() -> Option<(Balloon, BalloonDriver)> {
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u64 = free.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    if free < 2 * HALF / HUGE {
        eprintln!("skipped: {free} huge pages are free, and {} are needed", 2 * HALF / HUGE);
        return None;
    }
    let balloon = Balloon::start(&[]);
    let ram = GuestRam::in_huge_pages(HALF).unwrap();
    let frontend = Frontend::connect(&balloon.daemon.socket).unwrap();
    Some((balloon, BalloonDriver::start(frontend, ram, u64::MAX).unwrap()))
}

#[test]
fn a_huge_page_goes_back_when_all_of_it_is_in_the_balloon() {
    let Some((balloon, mut driver)) = with_huge_pages() else { return };
    let pfns: Vec<u32> = (FIRST..FIRST + 2 * PARTS).collect();
    fill(&driver, &pfns);
    let before = driver.ram.allocated().unwrap();
    let (last, others) = pfns.split_last().unwrap();
    others.rchunks(256).for_each(|part| driver.inflate(part).unwrap());
    assert_eq!(before - driver.ram.allocated().unwrap(), HUGE);
    assert_eq!(balloon.status()["not-given-back"], HUGE - PAGE);
    assert_eq!(balloon.status()["host-page"], HUGE);
    // What is left of the other one is not touched.
    assert!(keeps_its_content(&driver, *last));
    assert!(pfns[PARTS as usize..].iter().all(|pfn| keeps_its_content(&driver, *pfn)));
    driver.deflate(&others[PARTS as usize..][..1]).unwrap();
    driver.inflate(&[*last]).unwrap();
    assert_eq!(before - driver.ram.allocated().unwrap(), HUGE, "a page of it is the guest's");
    driver.inflate(&others[PARTS as usize..][..1]).unwrap();
    assert_eq!(before - driver.ram.allocated().unwrap(), 2 * HUGE);
    // Taken back in part, it is the guest's again; with that part it goes once more.
    driver.deflate(&pfns[..3]).unwrap();
    fill(&driver, &pfns[..3]);
    assert_eq!(before - driver.ram.allocated().unwrap(), HUGE);
    driver.inflate(&pfns[..3]).unwrap();
    assert_eq!(before - driver.ram.allocated().unwrap(), 2 * HUGE);
}

#[test]
fn only_whole_huge_pages_that_are_reported_go_back() {
    let Some((_balloon, mut driver)) = with_huge_pages() else { return };
    let pfns: Vec<u32> = (FIRST..FIRST + 3 * PARTS).collect();
    fill(&driver, &pfns);
    let before = driver.ram.allocated().unwrap();
    let at = u64::from(FIRST) * PAGE;
    driver.report(&[(at, (HUGE - PAGE) as u32), (at + HUGE - PAGE, (HUGE + 2 * PAGE) as u32)]).unwrap();
    assert_eq!(before - driver.ram.allocated().unwrap(), HUGE);
    let whole = (PARTS as usize)..(2 * PARTS as usize);
    for (at, pfn) in pfns.iter().enumerate().filter(|(at, _)| !whole.contains(at)) {
        assert!(keeps_its_content(&driver, *pfn), "page {at}");
    }
}
