//! The region of requests in flight (vhost-user, "Inflight I/O tracking"), as the next backend finds it.

use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use cleave_common::vhost_user::features::protocol;

use super::{Check, End, Outcome, Subject, demand, demand_status, needs};
use crate::driver::{BlockDriver, Buffer, InflightRegion, IoStatus, RequestKind};

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "inflight-region",
        demand: "the region has the layout of version 1, and an idle one says so",
        run: region,
    },
    Check {
        name: "inflight-replay",
        demand: "what was in flight completes once, with what is new",
        run: replay,
    },
    Check {
        name: "inflight-batch",
        demand: "a completion that was announced, and not yet noted, is not repeated",
        run: batch,
    },
];

const SIZE: u16 = 128;
/// Where the header of a queue's part has the last batch's head and the used index (its version is at 8).
const VERSION: u64 = 8;
const LAST_BATCH_HEAD: u64 = 12;
const USED_IDX: u64 = 14;

fn tracked(subject: &Subject) -> Result<(BlockDriver, InflightRegion), End> {
    let mut driver = BlockDriver::start(subject.frontend()?, u64::MAX, 1, SIZE)?;
    let offered = driver.negotiated.protocol_features;
    needs(offered & protocol::INFLIGHT_SHMFD != 0, "the protocol feature INFLIGHT_SHMFD")?;
    let region = driver.track_inflight()?;
    Ok((driver, region))
}

fn word(region: &InflightRegion, at: u64) -> Result<u16, End> {
    let bytes = region.read(at, 2)?;
    Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
}

fn region(subject: &Subject) -> Outcome {
    let (mut driver, region) = tracked(subject)?;
    let said = region.description;
    demand((said.num_queues, said.queue_size) == (1, SIZE), || {
        format!("1 queue of {SIZE} was asked for, and {} of {} came", said.num_queues, said.queue_size)
    })?;
    demand(said.mmap_size >= 16 + 16 * u64::from(SIZE), || format!("{} bytes are too few", said.mmap_size))?;
    for _ in 0..3 {
        demand_status("a read", driver.read(0, 512)?.0, IoStatus::Ok)?;
    }
    let base = driver.frontend.stop_queue(0)?;
    let (version, entries) = (word(&region, VERSION)?, word(&region, VERSION + 2)?);
    demand((version, entries) == (1, SIZE), || format!("version {version} of {entries} entries"))?;
    let used = word(&region, USED_IDX)?;
    demand(used == base, || format!("the region's used index is {used}, and the ring's {base}"))?;
    let marked = region.marked(0)?;
    demand(marked.is_empty(), || format!("an idle ring has {marked:?} in flight"))
}

/// Hangs up as if the backend had died, and goes on with it as its own successor.
fn succeed(subject: &Subject, driver: &mut BlockDriver, region: &InflightRegion) -> Outcome {
    let _ = driver.frontend.channel.socket().shutdown(Shutdown::Both);
    Ok(driver.resume(&subject.socket, Some(region))?)
}

fn replay(subject: &Subject) -> Outcome {
    let (mut driver, region) = tracked(subject)?;
    for _ in 0..3 {
        demand_status("a read", driver.read(0, 512)?.0, IoStatus::Ok)?;
    }
    driver.frontend.stop_queue(0)?;
    let data = driver.ram.allocate(5 * 4096, 4096);
    let mut heads = Vec::new();
    for n in 0..5 {
        let head = driver.submit(0, RequestKind::In, 0, &[Buffer::to_write(data + n * 4096, 4096)])?;
        heads.extend(head);
    }
    // Three were fetched by one that is dead; two nobody has seen.
    for (head, counter) in heads[..3].iter().zip(100..) {
        region.mark(0, *head, counter)?;
    }
    succeed(subject, &mut driver, &region)?;
    for _ in 0..5 {
        // One that was not outstanding would be an error of the driver.
        let (head, _) = driver.completion(0)?;
        demand_status("a request submitted again", driver.status(0, head)?, IoStatus::Ok)?;
    }
    thread::sleep(Duration::from_millis(50));
    let used = driver.queues[0].device_used_idx(&driver.ram)?;
    demand(used == 8, || format!("of 8 requests {used} have completed"))?;
    let base = driver.frontend.stop_queue(0)?;
    demand(base == 8, || format!("GET_VRING_BASE says {base} after 8 requests"))?;
    let marked = region.marked(0)?;
    demand(marked.is_empty(), || format!("{marked:?} are still marked"))
}

fn batch(subject: &Subject) -> Outcome {
    let (mut driver, region) = tracked(subject)?;
    let data = driver.data;
    let head = driver.submit(0, RequestKind::In, 0, &[Buffer::to_write(data, 512)])?;
    driver.kick(0)?;
    driver.completion(0)?;
    driver.frontend.stop_queue(0)?;
    // As it is between the used ring's index and the region's.
    let head = head.unwrap_or_default();
    region.mark(0, head, 100)?;
    region.write(LAST_BATCH_HEAD, &head.to_le_bytes())?;
    region.write(USED_IDX, &0u16.to_le_bytes())?;
    succeed(subject, &mut driver, &region)?;
    thread::sleep(Duration::from_millis(50));
    let used = driver.queues[0].device_used_idx(&driver.ram)?;
    demand(used == 1, || format!("one request has completed {used} times"))?;
    demand_status("a read after it", driver.read(0, 512)?.0, IoStatus::Ok)
}
