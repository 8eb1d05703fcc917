//! Bytes of a command, wherever they end.

use crate::sense::Sense;

/// Longest CDB that any command here has; virtio-scsi's default size is the same.
pub(crate) const MAX_CDB: usize = 32;

/// A command descriptor block; bytes that the initiator left out read as zero.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cdb {
    bytes: [u8; MAX_CDB],
    len: usize,
}

impl Cdb {
    pub(crate) fn new(from: &[u8]) -> Self {
        let mut bytes = [0; MAX_CDB];
        let len = from.len().min(MAX_CDB);
        bytes[..len].copy_from_slice(&from[..len]);
        Self { bytes, len }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn opcode(&self) -> u8 {
        self.bytes[0]
    }

    /// Where the commands that share an operation code have it (SPC-4, 4.2.5.2).
    pub(crate) fn service_action(&self) -> u8 {
        self.bytes[1] & 0x1f
    }

    pub(crate) fn byte(&self, at: usize) -> u8 {
        self.bytes[at]
    }

    pub(crate) fn bit(&self, at: usize, bit: u8) -> bool {
        self.bytes[at] & (1 << bit) != 0
    }

    pub(crate) fn be16(&self, at: usize) -> u16 {
        be16(&self.bytes, at)
    }

    pub(crate) fn be24(&self, at: usize) -> u32 {
        be32(&self.bytes, at) >> 8
    }

    pub(crate) fn be32(&self, at: usize) -> u32 {
        be32(&self.bytes, at)
    }

    pub(crate) fn be64(&self, at: usize) -> u64 {
        be64(&self.bytes, at)
    }

    /// A bit that asks for what is not there.
    pub(crate) fn refuse_bit(&self, at: usize, bit: u8) -> Result<(), Sense> {
        if self.bit(at, bit) { Err(Sense::cdb_bit(at as u16, bit)) } else { Ok(()) }
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// # Panics
/// When `bytes` end before the value does; as the next ones.
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(bytes, at))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(bytes, at))
}

/// Puts `value` where it belongs.
pub(crate) fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}
