//! Payloads: explicit encoding and decoding, exact in length.

use super::{MAX_BODY_LEN, MAX_TABLE_REGIONS};

/// Bytes that are no message of this protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("the message has version {0}, not 1: the other side does not speak vhost-user")]
    Version(u32),
    #[error("request {request} announces a payload of {len} bytes, more than {MAX_BODY_LEN}")]
    BodyTooLong { request: u32, len: u32 },
    #[error("a {what} of {got} bytes, where {expected} are due")]
    Length { what: &'static str, expected: usize, got: usize },
    #[error("a memory table of {0} regions, more than {MAX_TABLE_REGIONS}")]
    TooManyRegions(u32),
    #[error("{got} file descriptors came where {expected} are due")]
    Fds { expected: usize, got: usize },
    #[error(
        "more file descriptors came with one message than it may carry, or than this process may open ('ulimit -n')"
    )]
    TooManyFds,
    #[error("{what}: {value:#x} is not allowed")]
    Value { what: &'static str, value: u64 },
}

/// What can stand behind a header.
pub trait Payload: Sized {
    fn encode_into(&self, out: &mut Vec<u8>);

    /// # Errors
    /// [`Malformed`] unless `body` is exactly one payload of this type.
    fn decode(body: &[u8]) -> Result<Self, Malformed>;

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode_into(&mut out);
        out
    }
}

/// Requests without a payload.
impl Payload for () {
    fn encode_into(&self, _out: &mut Vec<u8>) {}

    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        exact::<0>("payload", body).map(|_| ())
    }
}

impl Payload for u64 {
    fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_le_bytes());
    }

    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        exact("64-bit integer", body).map(u64::from_le_bytes)
    }
}

fn exact<const N: usize>(what: &'static str, body: &[u8]) -> Result<[u8; N], Malformed> {
    body.try_into().map_err(|_| Malformed::Length { what, expected: N, got: body.len() })
}

/// A struct of little-endian integers without gaps.
macro_rules! wire_struct {
    ($(#[$meta:meta])* $name:ident, $what:literal { $($(#[$field_meta:meta])* $field:ident: $int:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $name { $($(#[$field_meta])* pub $field: $int,)* }

        impl $name {
            /// Bytes on the wire.
            pub const LEN: usize = 0 $(+ size_of::<$int>())*;
        }

        impl Payload for $name {
            fn encode_into(&self, out: &mut Vec<u8>) {
                $(out.extend_from_slice(&self.$field.to_le_bytes());)*
            }

            fn decode(body: &[u8]) -> Result<Self, Malformed> {
                let rest: &[u8] = &exact::<{ Self::LEN }>($what, body)?;
                $(let ($field, rest) = rest.split_at(size_of::<$int>());)*
                debug_assert!(rest.is_empty());
                Ok(Self { $($field: <$int>::from_le_bytes(exact($what, $field)?),)* })
            }
        }
    };
}

wire_struct! {
    /// A vring's index and one number about it: SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE.
    VringState, "vring state" {
        index: u32,
        num: u32,
    }
}

wire_struct! {
    /// Where a vring's three parts are, as user addresses of the frontend: SET_VRING_ADDR.
    VringAddr, "vring address" {
        index: u32,
        /// Bit 0: log writes to the used ring.
        flags: u32,
        descriptor: u64,
        used: u64,
        available: u64,
        /// Guest-physical address at which writes to the used ring are logged.
        log: u64,
    }
}

wire_struct! {
    /// One piece of guest memory.
    MemoryRegion, "memory region" {
        /// Guest-physical address of its first byte.
        guest_addr: u64,
        /// Bytes.
        size: u64,
        /// The address by which the frontend names its first byte on the wire.
        user_addr: u64,
        /// Where in the file that comes with it the region starts, in bytes.
        mmap_offset: u64,
    }
}

wire_struct! {
    /// Where the dirty log is in the file that comes with it: SET_LOG_BASE.
    LogBase, "log description" {
        size: u64,
        offset: u64,
    }
}

wire_struct! {
    /// SET_DEVICE_STATE_FD.
    DeviceState, "device state transfer" {
        /// 0 saves, 1 loads.
        direction: u32,
        /// 0: the guest is stopped.
        phase: u32,
    }
}

wire_struct! {
    /// VRING_HOST_NOTIFIER_MSG.
    VringArea, "vring area" {
        index_and_flags: u64,
        size: u64,
        offset: u64,
    }
}

/// GET_INFLIGHT_FD and SET_INFLIGHT_FD.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Inflight {
    /// Bytes of the region, and where in the file that comes with it the region starts.
    pub mmap_size: u64,
    pub mmap_offset: u64,
    pub num_queues: u16,
    pub queue_size: u16,
}

impl Inflight {
    /// Bytes on the wire. The specification names 20; QEMU, libvhost-user and DPDK send the C struct with the 4 bytes of
    /// padding at its end, and refuse anything else.
    pub const LEN: usize = 24;
    const FIELDS: usize = 20;
}

impl Payload for Inflight {
    fn encode_into(&self, out: &mut Vec<u8>) {
        self.mmap_size.encode_into(out);
        self.mmap_offset.encode_into(out);
        out.extend_from_slice(&self.num_queues.to_le_bytes());
        out.extend_from_slice(&self.queue_size.to_le_bytes());
        out.extend_from_slice(&[0; Self::LEN - Self::FIELDS]);
    }

    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        if body.len() != Self::FIELDS {
            exact::<{ Self::LEN }>("inflight description", body)?;
        }
        let fields = &body[..Self::FIELDS];
        let (sizes, counts) = fields.split_at(16);
        Ok(Self {
            mmap_size: u64::decode(&sizes[..8])?,
            mmap_offset: u64::decode(&sizes[8..])?,
            num_queues: u16::from_le_bytes([counts[0], counts[1]]),
            queue_size: u16::from_le_bytes([counts[2], counts[3]]),
        })
    }
}

/// A vring's index and whether a file descriptor comes with it: SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringFd {
    pub index: u8,
    /// The invalid-fd flag (bit 8): no descriptor is attached, and none is to be used.
    pub no_fd: bool,
}

impl VringFd {
    const NO_FD: u64 = 1 << 8;
}

impl Payload for VringFd {
    fn encode_into(&self, out: &mut Vec<u8>) {
        (u64::from(self.index) | if self.no_fd { Self::NO_FD } else { 0 }).encode_into(out);
    }

    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let word = u64::decode(body)?;
        if word & !(Self::NO_FD | 0xff) != 0 {
            return Err(Malformed::Value { what: "vring fd", value: word });
        }
        Ok(Self { index: word as u8, no_fd: word & Self::NO_FD != 0 })
    }
}

/// One region behind 8 bytes of padding: ADD_MEM_REG, REM_MEM_REG.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SingleRegion(pub MemoryRegion);

impl Payload for SingleRegion {
    fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[0; 8]);
        self.0.encode_into(out);
    }

    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let bytes: [u8; MemoryRegion::LEN + 8] = exact("single memory region", body)?;
        MemoryRegion::decode(&bytes[8..]).map(Self)
    }
}

/// The whole guest memory: SET_MEM_TABLE. Region *n* is in the *n*-th file descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryTable {
    /// At most [`MAX_TABLE_REGIONS`].
    pub regions: Vec<MemoryRegion>,
}

impl Payload for MemoryTable {
    fn encode_into(&self, out: &mut Vec<u8>) {
        debug_assert!(self.regions.len() <= MAX_TABLE_REGIONS);
        out.extend_from_slice(&(self.regions.len() as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        for region in &self.regions {
            region.encode_into(out);
        }
    }

    /// Frontends send as many regions as they announce, or all 8 slots with the rest unused.
    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        const WHAT: &str = "memory table";
        let Some((count, rest)) = body.split_first_chunk::<4>() else {
            return Err(Malformed::Length { what: WHAT, expected: 8, got: body.len() });
        };
        let count = u32::from_le_bytes(*count);
        if count as usize > MAX_TABLE_REGIONS {
            return Err(Malformed::TooManyRegions(count));
        }
        let due = count as usize * MemoryRegion::LEN;
        let regions = rest.get(4..).unwrap_or_default();
        if rest.len() < 4 || (regions.len() != due && regions.len() != MAX_TABLE_REGIONS * MemoryRegion::LEN)
        {
            return Err(Malformed::Length { what: WHAT, expected: 8 + due, got: body.len() });
        }
        let regions = regions[..due]
            .chunks_exact(MemoryRegion::LEN)
            .map(MemoryRegion::decode)
            .collect::<Result<_, _>>()?;
        Ok(Self { regions })
    }
}

/// A piece of the device's config space: GET_CONFIG, SET_CONFIG.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// Bytes from the start of config space.
    pub offset: u32,
    /// 0: a guest's write to a writable field; 1: live migration.
    pub flags: u32,
    /// What is read or written. A GET_CONFIG request carries as many bytes as it wants to read; an answer to it
    /// with none means failure.
    pub data: Vec<u8>,
}

impl Config {
    pub const HEADER_LEN: usize = 12;
}

impl Payload for Config {
    fn encode_into(&self, out: &mut Vec<u8>) {
        for word in [self.offset, self.data.len() as u32, self.flags] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.data);
    }

    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        const WHAT: &str = "config space access";
        let Some((header, data)) = body.split_first_chunk::<{ Self::HEADER_LEN }>() else {
            return Err(Malformed::Length { what: WHAT, expected: Self::HEADER_LEN, got: body.len() });
        };
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (offset, size, flags) = (word(0), word(4), word(8));
        if size as usize != data.len() {
            return Err(Malformed::Length { what: WHAT, expected: size as usize, got: data.len() });
        }
        Ok(Self { offset, flags, data: data.to_vec() })
    }
}
