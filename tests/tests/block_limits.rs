//! Rate limits, polling, and where queue threads run.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use cleave_tests::driver::{BlockDriver, Buffer, Extent, IoStatus, Load, RequestKind};
use common::{MIB, disk, pattern, start};
use rustix::thread::{CpuSet, sched_getaffinity};

/// Submits `count` requests of `len` bytes on `queue` and kicks.
fn submit(driver: &mut BlockDriver, queue: usize, kind: RequestKind, count: u64, len: u32) -> Vec<u16> {
    let heads = (0..count).map(|n| {
        let at = driver.ram.allocate(len.into(), 4096);
        let buffer = Buffer { addr: at, len, device_writes: kind == RequestKind::In };
        driver.submit(queue, kind, n * u64::from(len / 512), &[buffer]).unwrap().unwrap()
    });
    let heads = heads.collect();
    driver.kick(queue).unwrap();
    heads
}

/// Takes `count` completions of `queue`, all well.
fn complete(driver: &mut BlockDriver, queue: usize, count: u64) {
    for _ in 0..count {
        let (head, _) = driver.completion(queue).unwrap();
        assert_eq!(driver.status(queue, head).unwrap(), IoStatus::Ok);
    }
}

#[test]
fn requests_are_held_to_the_rate_in_their_order() {
    let image = disk(MIB);
    let daemon = start(&image, &["--throttle", "iops-write=50,iops-read=100000"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let start = Instant::now();
    let writes = submit(&mut driver, 0, RequestKind::Out, 30, 512);
    // Reads overtake what is held; the thread is not blocked.
    let read = submit_read(&mut driver);
    let mut order = Vec::new();
    while order.len() < 31 {
        let (head, _) = driver.completion(0).unwrap();
        assert_eq!(driver.status(0, head).unwrap(), IoStatus::Ok);
        order.push(head);
    }
    // Five and one go at once: of 30, 24 wait 20 ms each.
    assert!(start.elapsed() >= Duration::from_millis(480), "{:?}", start.elapsed());
    let at = order.iter().position(|head| *head == read).unwrap();
    assert!(at < 30, "the read waited for all writes");
    order.remove(at);
    assert_eq!(order, writes);
}

fn submit_read(driver: &mut BlockDriver) -> u16 {
    let at = driver.data;
    let head = driver.submit(0, RequestKind::In, 0, &[Buffer::to_write(at, 512)]).unwrap().unwrap();
    driver.kick(0).unwrap();
    head
}

#[test]
fn all_queues_share_the_limits_and_each_gets_its_part() {
    let image = disk(4 * MIB);
    let daemon = start(&image, &["--num-queues", "3", "--throttle", "bps-total=1M,bps-total-max=1M"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 3).unwrap();
    let start = Instant::now();
    // 1 MiB goes at once, and 1 MiB within a second after it.
    for queue in 0..3 {
        submit(&mut driver, queue, RequestKind::In, 11, 64 << 10);
    }
    for queue in 0..3 {
        complete(&mut driver, queue, 11);
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_secs_f64(16.0 / 16.0), "{took:?}");
}

#[test]
fn flushes_are_not_limited() {
    let image = disk(MIB);
    let daemon = start(&image, &["--num-queues", "2", "--throttle", "iops-total=1"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
    submit(&mut driver, 0, RequestKind::Out, 20, 512);
    for _ in 0..20 {
        assert_eq!(driver.request_on(1, RequestKind::Flush, 0, &[]).unwrap().0, IoStatus::Ok);
    }
    assert!(driver.queues[0].in_flight() > 10);
}

#[test]
fn what_is_held_at_a_stop_is_served() {
    let image = disk(MIB);
    let daemon = start(&image, &["--num-queues", "2", "--throttle", "iops-total=1"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
    for queue in [0, 1] {
        submit(&mut driver, queue, RequestKind::Out, 20, 512);
    }
    // Each of both queues takes its first at once.
    complete(&mut driver, 0, 1);
    wait_until_fetched(&driver, 0, 20);
    assert_eq!(driver.frontend.stop_queue(0).unwrap(), 20);
    complete(&mut driver, 0, 19);
    wait_until_fetched(&driver, 1, 20);
    assert_eq!(driver.frontend.stop_queue(1).unwrap(), 20);
    complete(&mut driver, 1, 20);
}

/// Until the device asks for a kick at the entry behind the `count`-th: it has taken all before.
fn wait_until_fetched(driver: &BlockDriver, queue: usize, count: u16) {
    let queue = &driver.queues[queue];
    let avail_event = queue.used + 4 + 8 * u64::from(queue.size);
    let deadline = Instant::now() + Duration::from_secs(10);
    while driver.ram.read(avail_event, 2).unwrap() != count.to_le_bytes() {
        assert!(Instant::now() < deadline, "the device does not take the requests");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_polling_queue_needs_no_kicks_while_it_is_busy() {
    let image = disk(4 * MIB);
    let daemon = start(&image, &["--poll-us", "1000000"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    // It finds out that looking pays.
    for _ in 0..40 {
        assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
    }
    let load = Load { extent: Extent::Time(Duration::from_millis(500)), ..Load::default() };
    let report = driver.run_load(&load).unwrap();
    assert!(report.kicks * 4 < report.requests, "{} kicks for {} requests", report.kicks, report.requests);
    // And it still notices what comes after a rest.
    for round in 0..3 {
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(driver.write(8, &pattern(round, 4096)).unwrap(), IoStatus::Ok);
    }
    // Everything that stops a queue finds it.
    driver.frontend.stop_queue(0).unwrap();
}

#[test]
fn an_idle_polling_queue_uses_no_cpu() {
    let image = disk(MIB);
    let daemon = start(&image, &["--poll-us", "200"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    for _ in 0..100 {
        assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
    }
    std::thread::sleep(Duration::from_millis(50));
    let before = daemon.process().cpu_time().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(daemon.process().cpu_time().unwrap(), before);
}

#[test]
fn queue_threads_run_where_they_were_put() {
    let allowed = sched_getaffinity(None).unwrap();
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let list: Vec<String> = cpus.iter().map(usize::to_string).collect();
    let image = disk(MIB);
    let daemon = start(&image, &["--num-queues", "3", "--cpus", &list.join(",")]);
    // It serves once its threads are there.
    let _driver = BlockDriver::connect(&daemon.socket, 3).unwrap();
    let mut found = 0;
    for thread in daemon.process().threads().unwrap() {
        let name = fs::read_to_string(format!("/proc/{}/task/{thread}/comm", daemon.pid())).unwrap();
        let Some(index) = name.trim().strip_prefix("queue") else { continue };
        let on = sched_getaffinity(Some(thread)).unwrap();
        assert!(on.count() == 1 && on.is_set(cpus[index.parse::<usize>().unwrap() % cpus.len()]), "{name}");
        found += 1;
    }
    assert_eq!(found, 3);
}

#[test]
fn limits_that_make_no_sense_are_refused() {
    let image = disk(MIB);
    for (args, said) in [
        (["--throttle", "iops-totl=5"], "did you mean 'iops-total'?"),
        (["--throttle", "iops-total=5,iops-read=5"], "iops-total cannot be given together with iops-read"),
        (["--throttle", "bps-read-max=5"], "needs a rate"),
        (["--cpus", "1023"], "may not run on CPU 1023"),
        (["--cpus", "3-1"], "write it as 2,3 or 0-3"),
        (["--poll-us", "1000001"], "1000000"),
        (["--on-full", "panic"], "possible values: error, pause"),
    ] {
        let path = image.path().to_str().unwrap();
        let program = cleave_tests::driver::binary("cleave-block").unwrap();
        let output = std::process::Command::new(program)
            .args(["--blk-file", path, "--socket-path", "/nonexistent/socket"])
            .args(args)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(said), "{stderr}");
    }
}
