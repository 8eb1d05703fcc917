//! The frontend's half of a vhost-user session, one request at a time.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use cleave_common::vhost_user::features::{protocol, virtio};
use cleave_common::vhost_user::{
    Channel, Config, Flags, FrontendRequest as Request, MemoryTable, Message, Payload, SingleRegion,
    VringAddr, VringFd, VringState,
};

use super::{DriverError, GuestRam, PATIENCE, Result, Vring};

/// User addresses are guest-physical ones plus this: never the same, never an address of this process.
pub const USER_BASE: u64 = 0x4000_0000_0000;

/// What a session has agreed on.
#[derive(Debug, Clone, Copy)]
pub struct Negotiated {
    pub offered: u64,
    pub acked: u64,
    pub protocol_features: u64,
    pub num_queues: u64,
}

/// One connection to a backend.
pub struct Frontend {
    pub channel: Channel,
    /// Whether each request waits for its acknowledgement. Negotiated if offered.
    pub reply_ack: bool,
}

impl Frontend {
    pub fn connect(path: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(path).map_err(DriverError::io(format!("connect to {}", path.display())))?;
        Ok(Self::over(stream))
    }

    pub fn over(stream: UnixStream) -> Self {
        Self { channel: Channel::new(stream), reply_ack: false }
    }

    /// Negotiates what is offered out of `wanted`, and all that this frontend uses of the protocol.
    pub fn negotiate(&mut self, wanted: u64) -> Result<Negotiated> {
        let offered: u64 = self.ask(Request::GetFeatures, &())?;
        if offered & virtio::VERSION_1 == 0 {
            return Err(DriverError::Missing("VIRTIO_F_VERSION_1"));
        }
        if offered & virtio::PROTOCOL_FEATURES == 0 {
            return Err(DriverError::Missing("protocol features"));
        }
        let known = protocol::MQ
            | protocol::REPLY_ACK
            | protocol::CONFIG
            | protocol::LOG_SHMFD
            | protocol::BACKEND_REQ
            | protocol::INFLIGHT_SHMFD
            | protocol::RESET_DEVICE
            | protocol::CONFIGURE_MEM_SLOTS;
        let protocol_features = self.ask::<u64>(Request::GetProtocolFeatures, &())? & known;
        self.tell(Request::SetProtocolFeatures, &protocol_features, &[])?;
        self.reply_ack = protocol_features & protocol::REPLY_ACK != 0;
        let num_queues =
            if protocol_features & protocol::MQ != 0 { self.ask(Request::GetQueueNum, &())? } else { 1 };
        self.tell(Request::SetOwner, &(), &[])?;
        // Nothing is logged until a log is there.
        let acked = offered & (wanted | virtio::VERSION_1 | virtio::PROTOCOL_FEATURES) & !virtio::LOG_ALL;
        self.tell(Request::SetFeatures, &acked, &[])?;
        Ok(Negotiated { offered, acked, protocol_features, num_queues })
    }

    pub fn set_mem_table(&mut self, ram: &GuestRam) -> Result<()> {
        let table = MemoryTable { regions: ram.regions().to_vec() };
        let fds = vec![ram.fd(); table.regions.len()];
        self.tell(Request::SetMemTable, &table, &fds)
    }

    pub fn add_mem_reg(&mut self, region: SingleRegion, fd: BorrowedFd<'_>) -> Result<()> {
        self.tell(Request::AddMemReg, &region, &[fd])
    }

    /// Sets up queue `index` from entry `base` on and enables it. It starts with the first kick.
    pub fn start_queue(&mut self, index: u16, queue: &Vring, base: u16) -> Result<()> {
        self.set_vring(index, queue, base)?;
        self.tell(Request::SetVringEnable, &state(index, 1), &[])
    }

    /// Everything but the enabling.
    pub fn set_vring(&mut self, index: u16, queue: &Vring, base: u16) -> Result<()> {
        self.tell(Request::SetVringNum, &state(index, queue.size.into()), &[])?;
        self.tell(Request::SetVringBase, &state(index, base.into()), &[])?;
        let addr = VringAddr {
            index: index.into(),
            flags: 0,
            descriptor: USER_BASE + queue.descriptors,
            used: USER_BASE + queue.used,
            available: USER_BASE + queue.available,
            log: 0,
        };
        self.tell(Request::SetVringAddr, &addr, &[])?;
        let which = VringFd { index: index as u8, no_fd: false };
        self.tell(Request::SetVringCall, &which, &[queue.call_fd()])?;
        self.tell(Request::SetVringKick, &which, &[queue.kick_fd()])
    }

    /// Stops queue `index` and says where it stands.
    pub fn stop_queue(&mut self, index: u16) -> Result<u16> {
        let answer: VringState = self.ask(Request::GetVringBase, &state(index, 0))?;
        Ok(answer.num as u16)
    }

    /// `len` bytes of config space from `offset`.
    pub fn config(&mut self, offset: u32, len: usize) -> Result<Vec<u8>> {
        let answer: Config =
            self.ask(Request::GetConfig, &Config { offset, flags: 0, data: vec![0; len] })?;
        if answer.data.len() != len {
            let what = format!("{} bytes instead of {len}", answer.data.len());
            return Err(DriverError::Answer { request: "GET_CONFIG", what });
        }
        Ok(answer.data)
    }

    pub fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<()> {
        self.tell(Request::SetConfig, &Config { offset, flags: 0, data: data.to_vec() }, &[])
    }

    /// Sends a request that is answered with a payload, and gives that.
    pub fn ask<P: Payload>(&mut self, request: Request, payload: &impl Payload) -> Result<P> {
        let deadline = Some(Instant::now() + PATIENCE);
        self.channel.send(request, Flags::REQUEST, &payload.encode(), &[], deadline)?;
        Ok(self.answer(request)?.payload()?)
    }

    /// Sends a request that is answered with a payload and a descriptor.
    pub fn ask_for_file<P: Payload>(
        &mut self,
        request: Request,
        payload: &impl Payload,
    ) -> Result<(P, OwnedFd)> {
        let deadline = Some(Instant::now() + PATIENCE);
        self.channel.send(request, Flags::REQUEST, &payload.encode(), &[], deadline)?;
        let mut answer = self.answer(request)?;
        Ok((answer.payload()?, answer.single_fd()?))
    }

    /// Sends a request without an answer of its own; once REPLY_ACK is negotiated, learns whether it was done.
    pub fn tell(&mut self, request: Request, payload: &impl Payload, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let deadline = Some(Instant::now() + PATIENCE);
        let flags = if self.reply_ack { Flags::NEED_REPLY } else { Flags::REQUEST };
        self.channel.send(request, flags, &payload.encode(), fds, deadline)?;
        if self.reply_ack && self.answer(request)?.payload::<u64>()? != 0 {
            return Err(DriverError::Refused(request.name()));
        }
        Ok(())
    }

    pub(super) fn answer(&mut self, request: Request) -> Result<Message> {
        let answer = self.channel.recv(Some(Instant::now() + PATIENCE))?;
        let answer =
            answer.ok_or(DriverError::Channel(cleave_common::vhost_user::ChannelError::Disconnected))?;
        if answer.request != u32::from(request) || !answer.flags.is_reply() {
            let what = format!("a message {}", answer.request);
            return Err(DriverError::Answer { request: request.name(), what });
        }
        Ok(answer)
    }

    /// Whether the backend closes the connection, within the usual patience.
    pub fn is_closed(&mut self) -> bool {
        matches!(
            self.channel.recv(Some(Instant::now() + PATIENCE)),
            Ok(None) | Err(cleave_common::vhost_user::ChannelError::Disconnected)
        )
    }
}

impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

fn state(index: u16, num: u32) -> VringState {
    VringState { index: index.into(), num }
}
