use std::error::Error;
use std::os::unix::net::UnixStream;

use cleave_common::vhost_user::{BackendRequest, HEADER_LEN, Header};
use cleave_common::virtio::DeviceType;

use super::*;
use crate::vring::{QueueIndex, Vring};

/// A device without queues to speak of, whose config space grows.
#[derive(Default)]
struct Growing {
    config: Vec<u8>,
    broken: bool,
}

impl Device for Growing {
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

    fn start_queue(&mut self, _: Vring) -> Result<(), Box<dyn Error + Send + Sync>> {
        Err("no queue".into())
    }

    fn stop_queue(&mut self, _: QueueIndex) -> Option<Vring> {
        None
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
    let mut device = Growing::default();
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
    let mut device = Growing::default();
    let (mut session, frontend) = with_backend_channel(&mut device, protocol::BACKEND_REQ);
    session.reload();
    assert_eq!(next_message(&frontend), None);
}

#[test]
fn a_device_that_cannot_be_reloaded_stays_as_it_is() {
    let mut device = Growing { broken: true, ..Growing::default() };
    let (mut session, frontend) = with_backend_channel(&mut device, protocol::BACKEND_REQ | protocol::CONFIG);
    session.reload();
    assert_eq!(next_message(&frontend), None);
}

#[test]
fn a_backend_channel_that_nobody_reads_is_not_waited_for() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut channel = BackendChannel::over(theirs.into()).unwrap();
    // Far more than any socket holds.
    for _ in 0..1_000_000 {
        channel.config_changed();
    }
    drop(ours);
    channel.config_changed();
}

#[test]
fn a_backend_channel_is_a_socket() {
    assert!(BackendChannel::over(rustix::pipe::pipe().unwrap().0).is_none());
}
