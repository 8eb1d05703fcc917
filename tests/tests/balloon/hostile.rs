//! A driver that means harm, or is broken: it harms itself at most.

use cleave_tests::driver::Buffer;

use super::*;

fn works(driver: &mut BalloonDriver) {
    fill(driver, &[FIRST + 100]);
    driver.inflate(&[FIRST + 100]).unwrap();
    assert!(is_hole(driver, FIRST + 100));
    driver.deflate(&[FIRST + 100]).unwrap();
}

#[test]
fn pages_outside_of_memory_are_refused_and_the_others_given_back() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    fill(&driver, &[FIRST, FIRST + 1]);
    let hole = (driver.ram.hole() / PAGE) as u32;
    let end = ((driver.ram.high() + HALF) / PAGE) as u32;
    driver.inflate(&[u32::MAX, hole, FIRST, end, u32::MAX - 1, FIRST + 1, hole + 7]).unwrap();
    assert!(is_hole(&driver, FIRST) && is_hole(&driver, FIRST + 1));
    assert_eq!(balloon.status()["refused"], 5 * PAGE);
    // One range over the end of memory, one that wraps around.
    driver
        .report(&[(driver.ram.hole() - PAGE, 8192), (u64::MAX - 4095, 4096), (u64::MAX - 10, 4096)])
        .unwrap();
    assert!(is_hole(&driver, hole - 1));
    works(&mut driver);
    balloon.daemon.wait_for_log("outside of memory").unwrap();
}

#[test]
fn rings_are_never_given_back() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    let rings: Vec<u32> = driver
        .queues
        .iter()
        .flat_map(|queue| [queue.descriptors, queue.available, queue.used])
        .map(|addr| (addr / PAGE) as u32)
        .collect();
    for queue in [BalloonDriver::INFLATE, BalloonDriver::DEFLATE] {
        driver.submit_pages(queue, &rings).unwrap();
        driver.complete(queue).unwrap();
    }
    // The whole of low memory, rings and all that is not asked for in particular.
    let (first, last) = (rings.iter().min().unwrap(), rings.iter().max().unwrap());
    driver.report(&[(u64::from(*first) * PAGE, (last + 1 - first) * PAGE as u32)]).unwrap();
    assert!(!is_hole(&driver, rings[0]));
    assert!(balloon.status()["refused"].as_u64().unwrap() >= rings.len() as u64 * PAGE);
    works(&mut driver);
}

#[test]
fn arrays_that_are_none_are_refused() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    let hole = driver.ram.hole();
    let pfns = driver.pfns;
    for buffers in [
        vec![Buffer::to_read(hole, 4096)],
        vec![Buffer::to_read(hole - 4, 8)],
        vec![Buffer::to_read(pfns, 0)],
        vec![Buffer::to_read(pfns, 3)],
        vec![Buffer::to_write(pfns, 4096)],
        vec![Buffer::to_read(u64::MAX - 3, 4)],
    ] {
        for queue in 0..5 {
            if queue != BalloonDriver::STATISTICS {
                driver.request(queue, &buffers).unwrap();
            }
        }
        driver.submit(BalloonDriver::STATISTICS, &buffers).unwrap();
        works(&mut driver);
    }
    balloon.daemon.wait_for_log("an array of page numbers is outside of memory").unwrap();
    balloon.daemon.wait_for_log("statistics are outside of memory").unwrap();
}

#[test]
fn a_request_for_very_many_pages_is_cut_off() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    let pfns: Vec<u32> = (0..100_000).map(|at| FIRST + at % 64).collect();
    fill(&driver, &[FIRST, FIRST + 63]);
    driver.inflate(&pfns).unwrap();
    assert!(is_hole(&driver, FIRST) && is_hole(&driver, FIRST + 63));
    balloon.daemon.wait_for_log("100000 pages in one request: 65536 are looked at").unwrap();
    // The same small array over and over, gigabytes of it.
    let all: Vec<Buffer> = (0..100).map(|_| Buffer::to_read(driver.pfns, 256 << 10)).collect();
    driver.request(BalloonDriver::INFLATE, &all).unwrap();
    works(&mut driver);
}

#[test]
fn config_space_takes_only_what_a_driver_may_write() {
    let (_balloon, mut driver) = Balloon::with_driver(&[]);
    let before = driver.config().unwrap();
    for (offset, data) in
        [(0, vec![1; 4]), (8, vec![1; 4]), (4, vec![1; 2]), (4, vec![1; 8]), (5, vec![1; 4])]
    {
        assert!(driver.frontend.set_config(offset, &data).is_err(), "{offset}, {} bytes", data.len());
    }
    assert_eq!(driver.config().unwrap(), before);
    driver.frontend.set_config(4, &u32::MAX.to_le_bytes()).unwrap();
    assert_eq!(driver.config().unwrap().actual, u32::MAX);
    works(&mut driver);
}

#[test]
fn a_second_buffer_for_statistics_sends_the_first_back() {
    let (_balloon, mut driver) = Balloon::with_driver(&[]);
    let first = driver.tell_statistics(&[(4, 1)]).unwrap();
    let second = driver.tell_statistics(&[(4, 2)]).unwrap();
    assert_ne!(first, second);
    assert_eq!(driver.complete(BalloonDriver::STATISTICS).unwrap(), (first, 0));
    works(&mut driver);
}
