//! How rings start, stop, and tell of completions.

use std::thread;
use std::time::Duration;

use cleave_common::vhost_user::features::virtio;

use super::{Check, End, Outcome, Subject, demand, demand_status, needs};
use crate::driver::{BlockDriver, Buffer, IoStatus, PATIENCE, RequestKind};

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "event-idx",
        demand: "an interrupt comes at used_event; kicks are needed as avail_event says",
        run: event_idx,
    },
    Check { name: "no-event-idx", demand: "flags rule where EVENT_IDX is not negotiated", run: no_event_idx },
    Check { name: "wrap", demand: "more than 2^16 requests on one ring", run: wrap },
    Check {
        name: "drain",
        demand: "GET_VRING_BASE completes what was fetched, and nothing comes after it",
        run: drain,
    },
    Check { name: "resume", demand: "a ring goes on where GET_VRING_BASE said", run: resume },
    Check { name: "queues", demand: "each queue of GET_QUEUE_NUM works, all at once", run: queues },
];

/// Long enough for a backend that would do something to do it.
const A_WHILE: Duration = Duration::from_millis(50);

/// `count` reads of 4 KiB at the start of the disk made available, without a kick.
fn submit_reads(driver: &mut BlockDriver, queue: usize, count: u64) -> Outcome {
    let data = driver.ram.allocate(count * 4096, 4096);
    for n in 0..count {
        driver
            .submit(queue, RequestKind::In, 0, &[Buffer::to_write(data + n * 4096, 4096)])?
            .ok_or_else(|| End::Fail("the driver has too few descriptors".into()))?;
    }
    Ok(())
}

fn take(driver: &mut BlockDriver, queue: usize, count: u16) -> Outcome {
    for _ in 0..count {
        let (head, _) = driver.completion(queue)?;
        demand_status("a read", driver.status(queue, head)?, IoStatus::Ok)?;
    }
    Ok(())
}

fn event_idx(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    needs(driver.negotiated.offered & virtio::RING_EVENT_IDX != 0, "VIRTIO_F_EVENT_IDX")?;
    // The driver asks to be told at its last completion only.
    let queue = &driver.queues[0];
    driver.ram.put(queue.available + 4 + 2 * u64::from(queue.size), 31u16)?;
    submit_reads(&mut driver, 0, 32)?;
    driver.kick(0)?;
    while driver.queues[0].device_used_idx(&driver.ram)? != 32 {
        demand(driver.queues[0].wait_for_call(PATIENCE)?, || "no interrupt came at used_event".into())?;
    }
    take(&mut driver, 0, 32)?;
    // Kicks where the device asks for them, interrupts where the driver does.
    for _ in 0..200 {
        demand_status("a read", driver.read(0, 512)?.0, IoStatus::Ok)?;
    }
    Ok(())
}

fn no_event_idx(subject: &Subject) -> Outcome {
    let mut driver = subject.driver_with(!virtio::RING_EVENT_IDX, 1)?;
    for _ in 0..200 {
        demand_status("a read", driver.read(0, 512)?.0, IoStatus::Ok)?;
    }
    // VIRTQ_AVAIL_F_NO_INTERRUPT: a hint, but completions come all the same.
    driver.ram.put(driver.queues[0].available, 1u16)?;
    submit_reads(&mut driver, 0, 8)?;
    driver.kick(0)?;
    take(&mut driver, 0, 8)
}

fn wrap(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    let data = driver.ram.allocate(64 * 512, 4096);
    for round in 0..66_000 / 64 {
        for n in 0..64 {
            driver.submit(0, RequestKind::In, n, &[Buffer::to_write(data + n * 512, 512)])?;
        }
        driver.kick(0)?;
        take(&mut driver, 0, 64).map_err(|end| match end {
            End::Fail(what) => End::Fail(format!("after {} requests: {what}", round * 64)),
            other => other,
        })?;
    }
    Ok(())
}

fn drain(subject: &Subject) -> Outcome {
    for _ in 0..5 {
        let mut driver = subject.driver()?;
        submit_reads(&mut driver, 0, 100)?;
        driver.queues[0].kick_now()?;
        let base = driver.frontend.stop_queue(0)?;
        let used = driver.queues[0].device_used_idx(&driver.ram)?;
        demand(used == base, || format!("{base} requests were fetched, and {used} completed"))?;
        thread::sleep(A_WHILE);
        let later = driver.queues[0].device_used_idx(&driver.ram)?;
        demand(later == used, || format!("{} requests completed on a stopped ring", later - used))?;
        take(&mut driver, 0, base)?;
    }
    Ok(())
}

fn resume(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    submit_reads(&mut driver, 0, 100)?;
    driver.queues[0].kick_now()?;
    let mut base = driver.frontend.stop_queue(0)?;
    take(&mut driver, 0, base)?;
    driver.frontend.start_queue(0, &driver.queues[0], base)?;
    driver.queues[0].kick_now()?;
    take(&mut driver, 0, 100 - base)?;
    for _ in 0..3 {
        base = driver.frontend.stop_queue(0)?;
        demand(base == driver.queues[0].avail_idx(), || {
            format!("GET_VRING_BASE says {base} of an idle ring")
        })?;
        driver.frontend.start_queue(0, &driver.queues[0], base)?;
        demand_status("a read", driver.read(0, 512)?.0, IoStatus::Ok)?;
    }
    Ok(())
}

fn queues(subject: &Subject) -> Outcome {
    let count = subject.frontend()?.negotiate(u64::MAX)?.num_queues.min(16) as u16;
    needs(count > 1, "more than one queue")?;
    let mut driver = subject.driver_with(u64::MAX, count)?;
    for queue in 0..usize::from(count) {
        submit_reads(&mut driver, queue, 32)?;
    }
    (0..usize::from(count)).try_for_each(|queue| driver.kick(queue))?;
    (0..usize::from(count)).try_for_each(|queue| take(&mut driver, queue, 32))
}
