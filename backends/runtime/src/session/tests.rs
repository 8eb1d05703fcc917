use std::cell::RefCell;
use std::error::Error;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use cleave_common::vhost_user::{BackendRequest, HEADER_LEN, Header, MemoryRegion};
use cleave_common::virtio::DeviceType;

use super::*;
use crate::device::Stop;
use crate::vring::{QueueIndex, Vring};

/// A device that leaves the serving of its queue to the test, and whose config space grows.
#[derive(Default)]
struct TestDevice {
    config: Vec<u8>,
    broken: bool,
    vring: Rc<RefCell<Option<Vring>>>,
}

impl Device for TestDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn features(&self) -> u64 {
        0
    }

    fn num_queues(&self) -> u16 {
        1
    }

    fn max_queue_size(&self) -> u16 {
        16
    }

    fn ack_features(&mut self, _: u64) {}

    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }

    fn write_config(&mut self, _: usize, _: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        Err("not writable".into())
    }

    fn start_queue(&mut self, vring: Vring) -> Result<(), Box<dyn Error + Send + Sync>> {
        *self.vring.borrow_mut() = Some(vring);
        Ok(())
    }

    fn stop_queue(&mut self, _: QueueIndex, _: Stop) -> Option<Vring> {
        self.vring.borrow_mut().take()
    }

    /// Twice it grows, then it stays as it is.
    fn reload(&mut self) -> Result<bool, Box<dyn Error + Send + Sync>> {
        if self.broken {
            return Err("it is gone".into());
        }
        let grows = self.config.len() < 2;
        self.config.resize(2.min(self.config.len() + 1), 7);
        Ok(grows)
    }

    fn report(&self) -> String {
        "fine".to_owned()
    }

    fn reset(&mut self) {}
}

fn tell(session: &mut Session<'_>, request: FrontendRequest, payload: &impl Payload, fds: Vec<OwnedFd>) {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let message = Message { request: request.into(), flags: Flags::REQUEST, body: payload.encode(), fds };
    session.handle(&mut Channel::new(ours), message).unwrap();
}

/// A session with a backend channel, and the frontend's end of that.
fn with_backend_channel(device: &mut dyn Device, features: u64) -> (Session<'_>, UnixStream) {
    let mut session = Session::new(device);
    tell(&mut session, FrontendRequest::SetProtocolFeatures, &features, vec![]);
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    tell(&mut session, FrontendRequest::SetBackendReqFd, &(), vec![theirs.into()]);
    (session, ours)
}

fn next_message(frontend: &UnixStream) -> Option<Header> {
    let mut header = [0; HEADER_LEN];
    let got = std::io::Read::read(&mut &*frontend, &mut header);
    got.is_ok_and(|got| got == HEADER_LEN).then(|| Header::decode(header).unwrap())
}

#[test]
fn the_frontend_learns_of_each_change_of_config_space() {
    let mut device = TestDevice::default();
    let features = protocol::BACKEND_REQ | protocol::CONFIG;
    let (mut session, frontend) = with_backend_channel(&mut device, features);
    assert_eq!(next_message(&frontend), None);
    let change = Header { request: BackendRequest::ConfigChangeMsg.into(), flags: Flags::REQUEST, size: 0 };
    for expected in [Some(change), Some(change), None] {
        session.reload();
        assert_eq!(next_message(&frontend), expected);
    }
}

#[test]
fn a_frontend_that_wants_no_config_space_is_not_told() {
    let mut device = TestDevice::default();
    let (mut session, frontend) = with_backend_channel(&mut device, protocol::BACKEND_REQ);
    session.reload();
    assert_eq!(next_message(&frontend), None);
}

#[test]
fn a_device_that_cannot_be_reloaded_stays_as_it_is() {
    let mut device = TestDevice { broken: true, ..TestDevice::default() };
    let (mut session, frontend) = with_backend_channel(&mut device, protocol::BACKEND_REQ | protocol::CONFIG);
    session.reload();
    assert_eq!(next_message(&frontend), None);
}

#[test]
fn a_backend_channel_that_nobody_reads_is_not_waited_for() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut channel = BackendChannel::over(theirs.into()).unwrap();
    // Far more than any socket holds.
    for _ in 0..100_000 {
        channel.config_changed();
    }
    ours.set_nonblocking(true).unwrap();
    while next_message(&ours).is_some() {}
    channel.config_changed();
    assert!(next_message(&ours).is_some(), "whoever has read what there was is told again");
    drop(ours);
    channel.config_changed();
}

#[test]
fn a_backend_channel_is_a_socket() {
    assert!(BackendChannel::over(rustix::pipe::pipe().unwrap().0).is_none());
}

#[test]
fn what_a_device_leaves_unfinished_comes_again_with_the_next_start() {
    const USER: u64 = 1 << 32;
    let served = Rc::new(RefCell::new(None));
    let mut device = TestDevice { vring: served.clone(), ..TestDevice::default() };
    let mut session = Session::new(&mut device);
    let memory = crate::shared::sealed_memfd("memory", 0x4000).unwrap();
    // The available ring at 0x1000: index 3, then heads 5, 6 and 7.
    rustix::io::pwrite(&memory, &[0, 0, 3, 0, 5, 0, 6, 0, 7, 0], 0x1000).unwrap();
    let region = MemoryRegion { guest_addr: 0, size: 0x4000, user_addr: USER, mmap_offset: 0 };
    let table = MemoryTable { regions: vec![region] };
    tell(&mut session, FrontendRequest::SetMemTable, &table, vec![memory]);
    let wanted = Inflight { num_queues: 1, queue_size: 16, ..Inflight::default() };
    let (made, fd) = InflightArea::create(wanted, 1, 0).unwrap();
    tell(&mut session, FrontendRequest::SetInflightFd, &made, vec![fd]);
    let addr =
        VringAddr { descriptor: USER, available: USER + 0x1000, used: USER + 0x2000, ..VringAddr::default() };
    let state = |num| VringState { index: 0, num };
    tell(&mut session, FrontendRequest::SetVringNum, &state(16), vec![]);
    tell(&mut session, FrontendRequest::SetVringAddr, &addr, vec![]);
    tell(&mut session, FrontendRequest::SetVringEnable, &state(1), vec![]);
    let mut start = || {
        let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        let which = VringFd { index: 0, no_fd: false };
        tell(&mut session, FrontendRequest::GetVringBase, &state(0), vec![]);
        tell(&mut session, FrontendRequest::SetVringKick, &which, vec![kick]);
    };
    let heads = || {
        let mut served = served.borrow_mut();
        let vring = served.as_mut().unwrap();
        assert!(vring.remembers_in_flight());
        std::iter::from_fn(|| vring.next_head().unwrap()).collect::<Vec<u16>>()
    };
    start();
    assert_eq!(heads(), [5, 6, 7]);
    served.borrow_mut().as_mut().unwrap().push_used(6, 0).unwrap();
    // Whether it looked at them or not.
    start();
    start();
    assert_eq!(heads(), [5, 7]);
    for head in [7, 5] {
        served.borrow_mut().as_mut().unwrap().push_used(head, 0).unwrap();
    }
    start();
    assert_eq!(heads(), [0u16; 0]);
}
