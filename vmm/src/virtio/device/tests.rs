//! The device through its PCI function, a scripted daemon behind it.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use cleave_common::vhost_user::FrontendRequest as Request;
use cleave_common::vhost_user::features::{protocol, virtio};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::pwrite;

use super::*;
use crate::bus::Bus;
use crate::pci::Root;
use crate::pci::fake::Host;
use crate::vhost::fake::{Daemon, Fault, Script};
use crate::vhost::{Endpoint, Patience, Region, Target, connect};

const ECAM: u64 = 0xe000_0000;
const WINDOW: u64 = 0x80_0000_0000;
const COMMON: u64 = WINDOW;
const STATUS: u64 = COMMON + 0x14;
const GENERATION: u64 = COMMON + 0x15;
const DEVICE_CONFIG: u64 = WINDOW + 0x2000;
const DRIVER_OK: u8 = 0xf;
const SHORT: Duration = Duration::from_millis(500);

struct Fixture {
    daemon: Daemon,
    device: Arc<Device>,
    host: Arc<Host>,
    mmio: Arc<Bus>,
    root: Arc<Root>,
    events: Receiver<DeviceEvent>,
    memory: Arc<OwnedFd>,
}

fn fixture(script: Script) -> Fixture {
    fixture_within(script, Duration::from_secs(5))
}

fn fixture_within(script: Script, deadline: Duration) -> Fixture {
    let (daemon, socket) = Daemon::pair(script);
    let endpoint = Endpoint::Socket(socket);
    let patience = Patience { deadline, first_answer: deadline, ..Patience::default() };
    let session = connect(Target { device: "disk0".into(), endpoint, queues: None, patience }).unwrap();
    let file: Arc<OwnedFd> = Arc::new(memfd_create("memory", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, 1 << 30).unwrap();
    let region = Region { start: 0, len: 1 << 30, file: Arc::clone(&file), offset: 0 };
    let memory = MemoryTable::new(vec![region]).unwrap();
    let host = Arc::new(Host::default());
    let (sender, events) = channel();
    let parts = Parts {
        name: "disk0".into(),
        device_type: DeviceType::BLOCK,
        queue_size: 256,
        memory: Arc::new(memory),
        interrupts: host.clone(),
        doorbells: host.clone(),
        events: Arc::new(move |event| sender.send(event).unwrap()),
    };
    let device = Device::new(parts, session).unwrap();
    let mmio = Arc::new(Bus::new());
    let root = Root::new(&mmio, WINDOW, 1 << 30);
    root.add(1, Arc::clone(&device) as _).unwrap();
    root.attach(&Bus::new(), &mmio, ECAM).unwrap();
    Fixture { daemon, device, host, mmio, root, events, memory: file }
}

impl Fixture {
    fn get(&self, address: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.mmio.read(address, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn put(&self, address: u64, len: usize, value: u64) {
        self.mmio.write(address, &value.to_le_bytes()[..len]);
    }

    fn config(&self, register: u64, len: usize) -> u64 {
        self.get(ECAM + (1 << 15) + register, len)
    }

    fn put_config(&self, register: u64, len: usize, value: u64) {
        self.put(ECAM + (1 << 15) + register, len, value);
    }

    /// Offset of the capability with this id, and of this virtio kind if it is the vendor's.
    fn capability(&self, id: u64, kind: u64) -> u64 {
        let mut at = self.config(0x34, 1);
        while at != 0 {
            if self.config(at, 1) == id && (id != 9 || self.config(at + 3, 1) == kind) {
                return at;
            }
            at = self.config(at + 1, 1);
        }
        panic!("no capability {id:#x}/{kind}");
    }

    fn enable(&self) {
        self.put_config(4, 2, 0b110);
    }

    /// Brings the device up as a driver does, one queue at `descriptor`.
    fn drive(&self, descriptor: u64) {
        self.enable();
        self.put_config(self.capability(0x11, 0) + 2, 2, 1 << 15);
        self.put(STATUS, 1, 3);
        self.put(COMMON + 0x8, 4, 1);
        self.put(COMMON + 0xc, 4, virtio::VERSION_1 >> 32);
        self.put(STATUS, 1, 0xb);
        self.put(COMMON + 0x10, 2, 0);
        self.put(COMMON + 0x16, 2, 1);
        self.put(COMMON + 0x1a, 2, 2);
        self.put(COMMON + 0x20, 8, descriptor);
        self.put(COMMON + 0x28, 8, 0x2000);
        self.put(COMMON + 0x30, 8, 0x3000);
        self.put(COMMON + 0x1c, 2, 1);
        self.put(STATUS, 1, u64::from(DRIVER_OK));
    }

    fn running(&self) {
        self.drive(0x1000);
        assert_eq!(self.event(), DeviceEvent::Running);
    }

    fn event(&self) -> DeviceEvent {
        self.events.recv_timeout(Duration::from_secs(5)).expect("no event")
    }

    fn wait_for_reset(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.get(STATUS, 1) != 0 {
            assert!(Instant::now() < deadline, "the reset does not end");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn the_function_says_what_it_is() {
    let f = fixture(Script::default());
    assert_eq!(f.config(0, 4), 0x1042_1af4);
    assert_eq!(f.config(8, 4), 0x0180_0001);
    let msix = f.capability(0x11, 0);
    assert_eq!(f.config(msix + 2, 2), 2, "three vectors: two queues and config space");
    for (kind, offset, len) in [(1, 0, 0x38), (2, 0x3000, 8), (3, 0x1000, 1), (4, 0x2000, 60)] {
        let at = f.capability(9, kind);
        assert_eq!((f.config(at + 8, 4), f.config(at + 12, 4)), (offset, len), "{kind}");
    }
    assert_eq!(f.config(f.capability(9, 2) + 16, 4), 4, "notify_off_multiplier");
    let bare = fixture(Script { config: Vec::new(), ..Script::default() });
    let kinds: Vec<u64> = (1..=5).filter(|kind| *kind != 4).map(|kind| bare.capability(9, kind)).collect();
    assert_eq!(kinds.len(), 4);
}

#[test]
fn a_driver_reads_config_space_and_writes_it() {
    let f = fixture(Script::default());
    f.running();
    assert_eq!(f.get(DEVICE_CONFIG + 8, 4), 0x0b0a_0908);
    assert_eq!(f.get(DEVICE_CONFIG + 58, 4), 0x3b3a, "what is beyond reads as zero");
    let generation = f.get(GENERATION, 1);
    f.put(DEVICE_CONFIG + 8, 2, 0x5566);
    assert_eq!(f.get(DEVICE_CONFIG + 8, 4), 0x0b0a_5566);
    f.daemon.wait_for(Request::GetConfig, 2, |_| ());
    f.put(DEVICE_CONFIG + 59, 2, 0x7788);
    f.put(DEVICE_CONFIG + 0xfff, 1, 1);
    assert_eq!(f.get(GENERATION, 1), generation, "the driver knows what it wrote");
    assert_eq!(f.daemon.requests().iter().filter(|request| **request == Request::SetConfig).count(), 1);
}

#[test]
fn a_change_of_config_space_is_a_new_generation_and_an_interrupt() {
    let f = fixture(Script::default());
    f.running();
    f.device.config(&[9; 60]);
    assert_eq!(f.get(GENERATION, 1), 1);
    assert_eq!(f.get(DEVICE_CONFIG, 2), 0x0909);
    assert_eq!(f.get(WINDOW + 0x7000, 8), 1, "vector 0 is masked, so the interrupt is pending");
    assert_eq!((f.get(WINDOW + 0x1000, 1), f.get(WINDOW + 0x1000, 1)), (2, 0), "ISR is taken by reading");
    f.device.config(&[9; 60]);
    assert_eq!(f.get(GENERATION, 1), 1, "no change");
    f.device.config(&[9; 99]);
    assert_eq!(f.get(GENERATION, 1), 1, "the driver knows of 60 bytes");
    f.device.config(&[9; 10]);
    assert_eq!((f.get(GENERATION, 1), f.get(DEVICE_CONFIG + 8, 4)), (2, 0x0909));
    f.device.config(&[]);
    assert_eq!((f.get(GENERATION, 1), f.get(DEVICE_CONFIG, 4)), (3, 0));
}

#[test]
fn a_reset_undoes_what_the_driver_wrote_to_config_space() {
    let f = fixture(Script { slow: Some((Request::SetConfig, SHORT / 5)), ..Script::default() });
    f.enable();
    let resets = || f.daemon.requests().iter().filter(|request| **request == Request::ResetDevice).count();
    f.put(STATUS, 1, 0);
    f.put(DEVICE_CONFIG, 1, 0x55);
    f.daemon.wait_for(Request::SetConfig, 1, |_| ());
    f.put(DEVICE_CONFIG, 1, 0x66);
    f.put(STATUS, 1, 0);
    f.daemon.wait_for(Request::ResetDevice, 1, |_| ());
    f.running();
    f.put(STATUS, 1, 0);
    f.wait_for_reset();
    assert_eq!(resets(), 2, "none for the reset that had nothing to undo");
    let writes = f.daemon.requests().iter().filter(|request| **request == Request::SetConfig).count();
    assert_eq!(writes, 1, "the one that waited is void");
}

/// Ends the daemon of a device that runs, with three requests in the air and no record of them.
fn lose_with_requests_in_flight(f: &Fixture) {
    f.running();
    pwrite(&*f.memory, &3u16.to_le_bytes(), 0x2002).unwrap();
    f.daemon.end();
    assert!(matches!(f.event(), DeviceEvent::Lost { .. }));
}

#[test]
fn a_device_that_cannot_be_resumed_says_so_to_its_driver_and_to_people() {
    let mut f = fixture(Script::default());
    lose_with_requests_in_flight(&f);
    let DeviceEvent::NeedsReset { reason } = f.event() else { panic!() };
    assert!(reason.starts_with("3 requests were with the daemon"), "{reason}");
    assert_eq!(f.get(STATUS, 1), 0x4f, "DEVICE_NEEDS_RESET");
    assert_eq!(f.get(WINDOW + 0x1000, 1), 2, "a configuration interrupt");
    assert_eq!(f.get(WINDOW + 0x7000, 8) & 1, 1);
    f.put(STATUS, 1, 0);
    f.wait_for_reset();
    f.drive(0x1000);
    let (daemon, socket) = Daemon::pair(Script::default());
    f.device.reconnect(Successor { socket, serial: 1 });
    f.daemon = daemon;
    assert!(matches!(f.event(), DeviceEvent::Reset));
    assert!(matches!(f.event(), DeviceEvent::Reconnected { replayed: 0, .. }));
    assert_eq!(f.event(), DeviceEvent::Running);
    assert_eq!(f.get(STATUS, 1), u64::from(DRIVER_OK));
}

#[test]
fn a_device_comes_back_with_its_queues_and_its_own_config_space() {
    let recording = |config| {
        let script = Script { config, ..Script::default() };
        Script { protocol_features: script.protocol_features | protocol::INFLIGHT_SHMFD, ..script }
    };
    let f = fixture(recording(vec![7; 60]));
    lose_with_requests_in_flight(&f);
    let (daemon, socket) = Daemon::pair(Script { queues: 1, ..recording(vec![8; 60]) });
    f.device.reconnect(Successor { socket, serial: 1 });
    let DeviceEvent::AttemptFailed { serial: 1, reason, absent: false } = f.event() else { panic!() };
    assert!(reason.contains("1 queues"), "{reason}");
    drop(daemon);
    let (daemon, socket) = Daemon::pair(recording(vec![8; 64]));
    f.device.reconnect(Successor { socket, serial: 1 });
    assert!(matches!(f.event(), DeviceEvent::Reconnected { .. }));
    assert_eq!(f.get(STATUS, 1), u64::from(DRIVER_OK), "the driver noticed nothing");
    assert_eq!((f.get(DEVICE_CONFIG, 1), f.get(GENERATION, 1)), (8, 1));
    daemon.wait_for(Request::SetVringEnable, 1, |_| ());
}

#[test]
fn each_queue_has_a_doorbell_where_the_bar_is() {
    let f = fixture(Script::default());
    let doorbells = || f.host.doorbells.lock().unwrap().clone();
    assert!(doorbells().is_empty());
    f.enable();
    assert_eq!(doorbells(), [WINDOW + 0x3000, WINDOW + 0x3004].into());
    f.put_config(0x10, 4, 0x4000_0000);
    assert_eq!(doorbells(), [WINDOW + 0x4000_3000, WINDOW + 0x4000_3004].into());
    f.put_config(4, 2, 0);
    assert!(doorbells().is_empty());
}

#[test]
fn a_kick_that_comes_as_a_write_is_passed_on() {
    let f = fixture(Script::default());
    f.enable();
    f.put(WINDOW + 0x3004, 2, 1);
    assert!(f.device.kicks[1].is_signalled() && !f.device.kicks[0].is_signalled());
    f.put(WINDOW + 0x3008, 2, 2);
}

#[test]
fn a_vector_unmasked_is_the_daemons_call() {
    let f = fixture(Script::default());
    f.running();
    let table = WINDOW + 0x4000 + 2 * 16;
    let call = f.device.msix.event(2).unwrap();
    call.signal();
    assert_eq!(f.get(WINDOW + 0x7000, 8), 1 << 2);
    f.put(table, 8, 0xfee0_1000);
    f.put(table + 8, 8, 0x41);
    assert_eq!(f.host.attached.lock().unwrap().len(), 1);
    assert_eq!(f.get(WINDOW + 0x7000, 8), 0);
    f.put(COMMON + 0x1a, 2, 1);
    f.daemon.wait_for(Request::SetVringCall, 2, |seen| assert_eq!(seen.fds.len(), 1));
}

#[test]
fn a_reset_by_the_driver_reads_as_zero_once_the_rings_have_stopped() {
    let f = fixture(Script::default());
    f.running();
    f.put(STATUS, 1, 0);
    f.wait_for_reset();
    assert!(f.daemon.requests().contains(&Request::GetVringBase));
    f.running();
}

#[test]
fn queues_outside_guest_memory_are_refused_and_a_reset_helps() {
    let f = fixture(Script::default());
    for bad in [1 << 30, (1 << 30) - 16, u64::MAX, 0x1001] {
        f.drive(bad);
        assert_eq!(f.get(STATUS, 1), 0x4f, "DEVICE_NEEDS_RESET");
        f.put(STATUS, 1, 0);
        assert_eq!(f.get(STATUS, 1), 0);
    }
    let refused = || {
        let DeviceEvent::Refused { reason } = f.event() else { panic!() };
        assert!(reason.contains("descriptor table of queue 1"), "{reason}");
    };
    refused();
    f.running();
    f.put(STATUS, 1, 0);
    f.wait_for_reset();
    f.drive(0x1001);
    refused();
    f.root.reset(|| ());
    f.drive(0x1001);
    refused();
    assert!(
        f.events.try_recv().is_err(),
        "a refusal is said once until the device runs or the machine is reset"
    );
}

#[test]
fn a_hung_daemon_costs_a_reset_the_deadline_and_no_vcpu_a_wait() {
    let script = Script { fault: Some((Request::SetMemTable, Fault::Mute)), ..Script::default() };
    let f = fixture_within(script, SHORT);
    let started = Instant::now();
    f.drive(0x1000);
    f.put(DEVICE_CONFIG, 1, 1);
    assert!(started.elapsed() < SHORT, "no access waited");
    f.daemon.wait_for(Request::SetMemTable, 1, |_| ());
    f.put(STATUS, 1, 0);
    assert_ne!(f.get(STATUS, 1), 0);
    f.wait_for_reset();
    assert!(
        matches!(f.event(), DeviceEvent::Lost { reason, .. } if reason.contains("did not answer SET_MEM_TABLE"))
    );
    assert!(started.elapsed() < SHORT * 5);
}

#[test]
fn a_device_that_is_lost_answers_from_what_is_cached() {
    let f = fixture(Script { fault: Some((Request::SetFeatures, Fault::Close)), ..Script::default() });
    f.drive(0x1000);
    assert!(matches!(f.event(), DeviceEvent::Lost { .. }));
    assert_eq!(f.get(DEVICE_CONFIG + 8, 1), 8);
    for _ in 0..3 {
        f.put(STATUS, 1, 0);
        f.wait_for_reset();
        f.drive(0x1000);
    }
    assert_eq!(f.events.recv_timeout(SHORT), Err(RecvTimeoutError::Timeout), "it is lost once");
}

#[test]
fn a_reset_of_the_machine_ends_when_the_session_has_stopped() {
    let f = fixture(Script::default());
    f.running();
    let (sender, complete) = channel();
    f.root.reset(move || sender.send(()).unwrap());
    complete.recv_timeout(Duration::from_secs(5)).unwrap();
    assert!(f.host.attached.lock().unwrap().is_empty() && f.host.doorbells.lock().unwrap().is_empty());
    f.enable();
    assert_eq!(f.get(STATUS, 1), 0);
    f.running();
    let (sender, complete) = channel();
    f.put(STATUS, 1, 0);
    f.root.reset(move || sender.send(()).unwrap());
    complete.recv_timeout(Duration::from_secs(5)).unwrap();
}

#[test]
fn a_call_that_comes_late_in_a_reset_of_the_machine_is_forgotten() {
    let script = Script { fault: Some((Request::GetVringBase, Fault::Mute)), ..Script::default() };
    let f = fixture_within(script, SHORT);
    f.running();
    let (sender, complete) = channel();
    f.root.reset(move || sender.send(()).unwrap());
    let call = f.device.msix.event(2).unwrap();
    call.signal();
    complete.recv_timeout(Duration::from_secs(5)).unwrap();
    assert!(!call.is_signalled(), "the next guest would get it");
}

#[test]
fn the_window_capability_reaches_the_bar() {
    let f = fixture(Script::default());
    let window = f.capability(9, 5);
    let select = |offset, len| {
        f.put_config(window + 4, 1, 0);
        f.put_config(window + 8, 4, offset);
        f.put_config(window + 12, 4, len);
    };
    select(0x14, 1);
    f.put_config(window + 16, 1, 3);
    assert_eq!(f.config(window + 16, 4), 3, "device_status");
    select(0x2008, 4);
    assert_eq!(f.config(window + 16, 4), 0x0b0a_0908);
    for (offset, len) in [(0x7fff, 4), (0x8000, 1), (0xffff_ffff, 4), (0, 3), (0, 0xffff_ffff)] {
        select(offset, len);
        f.put_config(window + 16, 4, 0xffff_ffff);
        f.config(window + 16, 4);
    }
    f.enable();
    assert_eq!(f.get(STATUS, 1), 3);
}

#[test]
fn a_dropped_device_closes_its_daemons_socket() {
    let Fixture { daemon, device, root, mmio, .. } = fixture(Script::default());
    drop((device, root, mmio));
    daemon.thread.join().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_accesses_of_a_guest_panic(steps in prop::collection::vec(
        (any::<u8>(), 0u64..0x8000, any::<u64>(), 0usize..4), 0..200)) {
        let f = fixture(Script::default());
        f.enable();
        for (kind, offset, value, len) in steps {
            let len = 1 << len;
            match kind % 8 {
                0 => f.put_config(offset % 256, len, value),
                1 => { f.config(offset, len); }
                2 => { f.enable(); f.drive(value % (1 << 31)) }
                3 => { f.get(WINDOW + offset, len); }
                4 => f.put(COMMON + offset % 0x40, len, value),
                5 => f.put(WINDOW + offset, len, value % 4),
                _ => f.put(WINDOW + offset, len, value),
            }
        }
        f.put_config(0x10, 8, WINDOW);
        f.enable();
        f.put(STATUS, 1, 0);
        f.wait_for_reset();
    }
}
