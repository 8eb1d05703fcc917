//! What outlives a connection, and what must not.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use cleave_common::vhost_user::features::protocol;
use cleave_common::vhost_user::{FrontendRequest as Request, MemoryRegion, SingleRegion};

use super::{Check, End, MIB, Outcome, Subject, demand, demand_status, needs};
use crate::driver::{BlockDriver, Buffer, DriverError, Flags, IoStatus, PATIENCE, RequestKind, USER_BASE};

pub(super) const CHECKS: &[Check] = &[
    Check { name: "reconnect", demand: "the next frontend is served with the same disk", run: reconnect },
    Check {
        name: "hang-up",
        demand: "a frontend that goes with requests in flight costs nobody anything",
        run: hang_up,
    },
    Check {
        name: "reset-device",
        demand: "after RESET_DEVICE no ring runs, and rings can be started anew",
        run: reset_device,
    },
    Check {
        name: "memory-slots",
        demand: "memory that is added can be used, and is gone when it is removed",
        run: memory_slots,
    },
    Check {
        name: "bad-chain",
        demand: "a chain that loops ends no service: the next frontend is served",
        run: bad_chain,
    },
    Check { name: "bad-address", demand: "a buffer outside of memory ends no service", run: bad_address },
];

/// Long enough for a backend that would do something to do it.
const A_WHILE: Duration = Duration::from_millis(50);

fn reconnect(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    let (capacity, first) = (driver.config()?.sectors, driver.read(0, 4096)?.1);
    for _ in 0..10 {
        driver.reconnect(&subject.socket)?;
        demand(driver.config()?.sectors == capacity, || "the capacity is another one".into())?;
        let (status, again) = driver.read(0, 4096)?;
        demand_status("a read after a reconnect", status, IoStatus::Ok)?;
        demand(again == first, || "the content is another one".into())?;
    }
    Ok(())
}

fn hang_up(subject: &Subject) -> Outcome {
    for depth in [0, 1, 100] {
        let mut driver = subject.driver()?;
        let data = driver.ram.allocate(100 * 4096, 4096);
        for n in 0..depth {
            driver.submit(0, RequestKind::In, 0, &[Buffer::to_write(data + n * 4096, 4096)])?;
        }
        driver.queues[0].kick_now()?;
    }
    serves(subject)
}

/// A new frontend gets what it asks for.
fn serves(subject: &Subject) -> Outcome {
    let until = Instant::now() + PATIENCE;
    loop {
        // One that is still busy with the last frontend's end may close a connection or two.
        match subject.driver().and_then(|mut driver| Ok(driver.read(0, 512)?.0)) {
            Ok(status) => return demand_status("a read by the next frontend", status, IoStatus::Ok),
            Err(End::Fail(what)) if Instant::now() > until => {
                return Err(End::Fail(format!("the next frontend is not served: {what}")));
            }
            Err(End::Fail(_)) => thread::sleep(A_WHILE),
            Err(other) => return Err(other),
        }
    }
}

fn reset_device(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    let offered = driver.negotiated.protocol_features;
    needs(offered & protocol::RESET_DEVICE != 0, "the protocol feature RESET_DEVICE")?;
    demand_status("a read", driver.read(0, 512)?.0, IoStatus::Ok)?;
    driver.frontend.tell(Request::ResetDevice, &(), &[])?;
    let data = driver.data;
    driver.submit(0, RequestKind::In, 0, &[Buffer::to_write(data, 512)])?;
    driver.queues[0].kick_now()?;
    thread::sleep(A_WHILE);
    let used = driver.queues[0].device_used_idx(&driver.ram)?;
    demand(used == 1, || "the ring runs on after a reset".into())?;
    driver.queues[0].reset(&driver.ram)?;
    driver.frontend.start_queue(0, &driver.queues[0], 0)?;
    demand_status("a read on a ring started anew", driver.read(0, 512)?.0, IoStatus::Ok)
}

fn memory_slots(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    let offered = driver.negotiated.protocol_features;
    needs(offered & protocol::CONFIGURE_MEM_SLOTS != 0, "the protocol feature CONFIGURE_MEM_SLOTS")?;
    let slots = driver.frontend.ask::<u64>(Request::GetMaxMemSlots, &())?;
    demand(slots >= 3, || format!("GET_MAX_MEM_SLOTS says {slots}, and there are two regions"))?;
    let memory = memfd(MIB)?;
    let guest_addr = 0x2_0000_0000;
    let region = MemoryRegion { guest_addr, size: MIB, user_addr: USER_BASE + guest_addr, mmap_offset: 0 };
    let due = driver.read(0, 4096)?.1;
    for _ in 0..3 {
        driver.frontend.add_mem_reg(SingleRegion(region), memory.as_fd())?;
        // A read that is answered: the ring works on after the change, REPLY_ACK or not.
        driver.config()?;
        let (status, _) = driver.request(RequestKind::In, 0, &[Buffer::to_write(guest_addr, 4096)])?;
        demand_status("a read into added memory", status, IoStatus::Ok)?;
        let mut got = vec![0; 4096];
        rustix::io::pread(&memory, &mut got, 0).map_err(|errno| DriverError::io("read")(errno.into()))?;
        demand(got == due, || "the added memory has other content".into())?;
        driver.frontend.tell(Request::RemMemReg, &SingleRegion(region), &[])?;
    }
    Ok(())
}

fn memfd(len: u64) -> Result<std::os::fd::OwnedFd, End> {
    let made = rustix::fs::memfd_create("extra", rustix::fs::MemfdFlags::CLOEXEC)
        .and_then(|fd| rustix::fs::ftruncate(&fd, len).map(|()| fd));
    Ok(made.map_err(|errno| DriverError::io("memfd")(errno.into()))?)
}

/// Waits a little for a completion that may never come, as far as the specification goes.
fn let_it_happen(driver: &mut BlockDriver) -> Outcome {
    driver.queues[0].kick_now()?;
    driver.queues[0].wait_for_call(10 * A_WHILE)?;
    Ok(())
}

fn bad_chain(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    let BlockDriver { queues, ram, data, .. } = &mut driver;
    queues[0].set_descriptor(ram, 0, *data, 16, Flags::NEXT, 1)?;
    queues[0].set_descriptor(ram, 1, *data, 16, Flags::NEXT, 0)?;
    queues[0].expect_raw(0);
    queues[0].make_available(ram, 0)?;
    let_it_happen(&mut driver)?;
    drop(driver);
    serves(subject)
}

fn bad_address(subject: &Subject) -> Outcome {
    for (addr, len) in [(1 << 63, 4096), (u64::MAX - 511, 512), (0, !511)] {
        let mut driver = subject.driver()?;
        driver.submit(0, RequestKind::In, 0, &[Buffer::to_write(addr, len)])?;
        let_it_happen(&mut driver)?;
    }
    serves(subject)
}
