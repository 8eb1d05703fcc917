//! Requests of both directions, the header, and a whole message.

use std::fmt;
use std::os::fd::OwnedFd;

use super::payload::{Malformed, Payload};
use super::{MAX_BODY_LEN, MAX_FDS};

/// Bytes in a header: request, flags and payload size, 32 bits each.
pub const HEADER_LEN: usize = 12;

const VERSION: u32 = 0x1;
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

macro_rules! requests {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $number:literal $spec:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $name { $(#[doc = $spec] $variant = $number,)* }

        impl $name {
            /// Every request there is, in order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The specification's name without its `VHOST_USER_` prefix.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $spec,)* }
            }
        }

        impl TryFrom<u32> for $name {
            type Error = UnknownRequest;

            fn try_from(number: u32) -> Result<Self, UnknownRequest> {
                match number {
                    $($number => Ok(Self::$variant),)*
                    _ => Err(UnknownRequest(number)),
                }
            }
        }

        impl From<$name> for u32 {
            fn from(request: $name) -> u32 {
                request as u32
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

requests! {
    /// What a frontend asks of a backend (vhost-user, "Front-end message types").
    FrontendRequest {
        GetFeatures = 1 "GET_FEATURES",
        SetFeatures = 2 "SET_FEATURES",
        SetOwner = 3 "SET_OWNER",
        ResetOwner = 4 "RESET_OWNER",
        SetMemTable = 5 "SET_MEM_TABLE",
        SetLogBase = 6 "SET_LOG_BASE",
        SetLogFd = 7 "SET_LOG_FD",
        SetVringNum = 8 "SET_VRING_NUM",
        SetVringAddr = 9 "SET_VRING_ADDR",
        SetVringBase = 10 "SET_VRING_BASE",
        GetVringBase = 11 "GET_VRING_BASE",
        SetVringKick = 12 "SET_VRING_KICK",
        SetVringCall = 13 "SET_VRING_CALL",
        SetVringErr = 14 "SET_VRING_ERR",
        GetProtocolFeatures = 15 "GET_PROTOCOL_FEATURES",
        SetProtocolFeatures = 16 "SET_PROTOCOL_FEATURES",
        GetQueueNum = 17 "GET_QUEUE_NUM",
        SetVringEnable = 18 "SET_VRING_ENABLE",
        SendRarp = 19 "SEND_RARP",
        NetSetMtu = 20 "NET_SET_MTU",
        SetBackendReqFd = 21 "SET_BACKEND_REQ_FD",
        IotlbMsg = 22 "IOTLB_MSG",
        SetVringEndian = 23 "SET_VRING_ENDIAN",
        GetConfig = 24 "GET_CONFIG",
        SetConfig = 25 "SET_CONFIG",
        CreateCryptoSession = 26 "CREATE_CRYPTO_SESSION",
        CloseCryptoSession = 27 "CLOSE_CRYPTO_SESSION",
        PostcopyAdvise = 28 "POSTCOPY_ADVISE",
        PostcopyListen = 29 "POSTCOPY_LISTEN",
        PostcopyEnd = 30 "POSTCOPY_END",
        GetInflightFd = 31 "GET_INFLIGHT_FD",
        SetInflightFd = 32 "SET_INFLIGHT_FD",
        GpuSetSocket = 33 "GPU_SET_SOCKET",
        ResetDevice = 34 "RESET_DEVICE",
        VringKick = 35 "VRING_KICK",
        GetMaxMemSlots = 36 "GET_MAX_MEM_SLOTS",
        AddMemReg = 37 "ADD_MEM_REG",
        RemMemReg = 38 "REM_MEM_REG",
        SetStatus = 39 "SET_STATUS",
        GetStatus = 40 "GET_STATUS",
        GetSharedObject = 41 "GET_SHARED_OBJECT",
        SetDeviceStateFd = 42 "SET_DEVICE_STATE_FD",
        CheckDeviceState = 43 "CHECK_DEVICE_STATE",
    }
}

requests! {
    /// What a backend asks of a frontend (vhost-user, "Back-end message types").
    BackendRequest {
        IotlbMsg = 1 "BACKEND_IOTLB_MSG",
        ConfigChangeMsg = 2 "BACKEND_CONFIG_CHANGE_MSG",
        VringHostNotifierMsg = 3 "BACKEND_VRING_HOST_NOTIFIER_MSG",
        VringCall = 4 "BACKEND_VRING_CALL",
        VringErr = 5 "BACKEND_VRING_ERR",
        SharedObjectAdd = 6 "BACKEND_SHARED_OBJECT_ADD",
        SharedObjectRemove = 7 "BACKEND_SHARED_OBJECT_REMOVE",
        SharedObjectLookup = 8 "BACKEND_SHARED_OBJECT_LOOKUP",
    }
}

/// A request number this codec has no name for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown vhost-user request {0}")]
pub struct UnknownRequest(pub u32);

/// The header's flags: version 1, and the two bits the specification names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flags(u32);

impl Flags {
    /// A request that asks for no acknowledgement.
    pub const REQUEST: Self = Self(VERSION);
    /// A request that wants a REPLY_ACK: the answer is a u64, 0 for success.
    pub const NEED_REPLY: Self = Self(VERSION | NEED_REPLY);
    /// An answer.
    pub const REPLY: Self = Self(VERSION | REPLY);

    pub const fn is_reply(self) -> bool {
        self.0 & REPLY != 0
    }

    pub const fn needs_reply(self) -> bool {
        self.0 & NEED_REPLY != 0
    }
}

/// The 12 bytes before each payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub request: u32,
    pub flags: Flags,
    /// Bytes of payload that follow, at most [`MAX_BODY_LEN`].
    pub size: u32,
}

impl Header {
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&self.request.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.flags.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.size.to_le_bytes());
        bytes
    }

    /// # Errors
    /// A version other than 1, or a payload longer than [`MAX_BODY_LEN`]. An unknown request number is none: the
    /// receiver decides whether it can go on.
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Self, Malformed> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let header = Self { request: word(0), flags: Flags(word(4)), size: word(8) };
        if header.flags.0 & VERSION_MASK != VERSION {
            return Err(Malformed::Version(header.flags.0 & VERSION_MASK));
        }
        if header.size as usize > MAX_BODY_LEN {
            return Err(Malformed::BodyTooLong { request: header.request, len: header.size });
        }
        Ok(header)
    }
}

/// One message as it came: its payload is bounded but not yet understood.
#[derive(Debug)]
pub struct Message {
    /// Compare it through `FrontendRequest::try_from` or `BackendRequest::try_from`; a reply repeats the number
    /// of its request.
    pub request: u32,
    pub flags: Flags,
    pub body: Vec<u8>,
    /// At most [`MAX_FDS`], all close-on-exec.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// Understands the payload as `P`, which must fill it exactly.
    ///
    /// # Errors
    /// [`Malformed`] when the length or a count in it is wrong.
    pub fn payload<P: Payload>(&self) -> Result<P, Malformed> {
        P::decode(&self.body)
    }

    /// Takes the only file descriptor this message should carry.
    ///
    /// # Errors
    /// [`Malformed::Fds`] when there is none or more than one; all are closed then.
    pub fn single_fd(&mut self) -> Result<OwnedFd, Malformed> {
        let mut fds = std::mem::take(&mut self.fds);
        match fds.pop() {
            Some(fd) if fds.is_empty() => Ok(fd),
            first => Err(Malformed::Fds { expected: 1, got: fds.len() + usize::from(first.is_some()) }),
        }
    }
}

const _: () = assert!(MAX_FDS <= 253, "SCM_MAX_FD");
