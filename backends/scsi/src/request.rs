//! Requests of the request queues, and their responses (virtio 1.2, 5.6.6.1).

use cleave_runtime::{Chain, GuestMemory, Segment};
use cleave_scsi::{Answer, Attribute};
use vm_memory::GuestAddress;

use crate::config_space::{MAX_CDB_SIZE, MAX_SENSE_SIZE, Sizes};

/// Bytes of a request before its CDB, and of a response before its sense data.
const REQUEST_HEAD: usize = 19;
const RESPONSE_HEAD: usize = 12;
const MAX_REQUEST: usize = REQUEST_HEAD + MAX_CDB_SIZE as usize;
const MAX_RESPONSE: usize = RESPONSE_HEAD + MAX_SENSE_SIZE as usize;

/// Bytes of a CDB that anybody looks at.
const CDB: usize = 32;

/// `response` of a request, and of a task management function (virtio 1.2, 5.6.6.1.1 and 5.6.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Response {
    Ok = 0,
    Overrun = 1,
    Aborted = 2,
    BadTarget = 3,
    Reset = 4,
    Failure = 9,
    FunctionSucceeded = 10,
    FunctionRejected = 11,
    IncorrectLun = 12,
}

impl Response {
    pub(crate) const FUNCTION_COMPLETE: Self = Self::Ok;
}

/// Why a chain is no request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("a request of {0} bytes, which end before its CDB does")]
    Short(u64),
    #[error("a request with {0} bytes for its response, of which it takes {1}")]
    NoRoom(u64, usize),
    #[error("a request is outside of guest memory")]
    OutsideMemory(#[from] vm_memory::GuestMemoryError),
}

/// What a request says before its data, and how much data there is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) lun: [u8; 8],
    pub(crate) tag: u64,
    pub(crate) attribute: Attribute,
    cdb: [u8; CDB],
    cdb_len: u8,
    /// Bytes of the device-readable data, and of the device-writable.
    pub(crate) data_out: u64,
    pub(crate) data_in: u64,
    /// Bytes before each.
    pub(crate) request_len: u16,
    pub(crate) response_len: u16,
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

impl Header {
    pub(crate) fn cdb(&self) -> &[u8] {
        &self.cdb[..usize::from(self.cdb_len)]
    }

    /// Reads the request behind `chain`.
    ///
    /// # Errors
    /// It has no room for an answer, or is none.
    pub(crate) fn read(chain: &Chain, memory: &GuestMemory, sizes: &Sizes) -> Result<Self, RequestError> {
        let (cdb_size, sense_size) = (sizes.cdb(), sizes.sense());
        let (request_len, response_len) = (REQUEST_HEAD + cdb_size, RESPONSE_HEAD + sense_size);
        let (out, into) = (total(chain.readable()), total(chain.writable()));
        let data_in =
            into.checked_sub(response_len as u64).ok_or(RequestError::NoRoom(into, response_len))?;
        let data_out = out.checked_sub(request_len as u64).ok_or(RequestError::Short(out))?;
        let mut bytes = [0; MAX_REQUEST];
        let bytes = &mut bytes[..request_len];
        read_all(data(chain.readable(), 0, request_len as u64), memory, bytes)?;
        let (head, from) = bytes.split_at(REQUEST_HEAD);
        let mut cdb = [0; CDB];
        let cdb_len = cdb_size.min(CDB);
        cdb[..cdb_len].copy_from_slice(&from[..cdb_len]);
        let attribute = match head[16] & 7 {
            0 => Attribute::Simple,
            1 => Attribute::Ordered,
            2 => Attribute::HeadOfQueue,
            _ => Attribute::Aca,
        };
        let eight = |at: usize| std::array::from_fn(|byte| head[at + byte]);
        Ok(Self {
            lun: eight(0),
            tag: u64::from_le_bytes(eight(8)),
            attribute,
            cdb,
            cdb_len: cdb_len as u8,
            data_out,
            data_in,
            request_len: request_len as u16,
            response_len: response_len as u16,
        })
    }

    /// The first `len` bytes that the driver has written for the unit, by buffer.
    pub(crate) fn data_out<'c>(&self, chain: &'c Chain, len: u64) -> impl Iterator<Item = Segment> + use<'c> {
        data(chain.readable(), self.request_len.into(), len)
    }

    /// The buffers for the first `len` bytes that the unit writes.
    pub(crate) fn data_in<'c>(&self, chain: &'c Chain, len: u64) -> impl Iterator<Item = Segment> + use<'c> {
        data(chain.writable(), self.response_len.into(), len)
    }

    /// Whether `chain` has as many bytes as it had.
    pub(crate) fn fits(&self, chain: &Chain) -> bool {
        total(chain.readable()) == self.data_out + u64::from(self.request_len)
            && total(chain.writable()) == self.data_in + u64::from(self.response_len)
    }

    /// Where the whole response goes, if it is one piece.
    pub(crate) fn response_at(&self, chain: &Chain) -> Option<GuestAddress> {
        let first = chain.writable().first()?;
        (first.len >= self.response_len.into()).then_some(first.addr)
    }
}

/// `len` bytes of `segments` behind the first `skip`.
pub(crate) fn data(
    segments: &[Segment],
    mut skip: u64,
    mut len: u64,
) -> impl Iterator<Item = Segment> + use<'_> {
    segments.iter().filter_map(move |segment| {
        let skipped = skip.min(segment.len.into());
        skip -= skipped;
        let here = (u64::from(segment.len) - skipped).min(len);
        len -= here;
        let addr = GuestAddress(segment.addr.0.wrapping_add(skipped));
        (here != 0).then_some(Segment { addr, len: here as u32 })
    })
}

/// Fills `bytes` from the start of `segments`, which hold so many.
pub(crate) fn read_all(
    segments: impl Iterator<Item = Segment>,
    memory: &GuestMemory,
    mut bytes: &mut [u8],
) -> Result<(), vm_memory::GuestMemoryError> {
    for segment in segments {
        let (now, later) = bytes.split_at_mut((segment.len as usize).min(bytes.len()));
        memory.read(now, segment.addr)?;
        bytes = later;
    }
    Ok(())
}

/// Writes `bytes` to the start of `segments`, as far as they go.
pub(crate) fn write_all(
    segments: impl Iterator<Item = Segment>,
    memory: &GuestMemory,
    mut bytes: &[u8],
) -> Result<(), vm_memory::GuestMemoryError> {
    use vm_memory::Bytes;
    for segment in segments {
        let (now, later) = bytes.split_at((segment.len as usize).min(bytes.len()));
        memory.map().write_slice(now, segment.addr)?;
        bytes = later;
    }
    Ok(())
}

/// The bytes of a response.
pub(crate) struct ResponseBytes {
    bytes: [u8; MAX_RESPONSE],
    len: usize,
}

impl ResponseBytes {
    pub(crate) fn new(header: &Header, response: Response, answer: Option<&Answer>) -> Self {
        let mut bytes = [0; MAX_RESPONSE];
        let len = usize::from(header.response_len);
        bytes[11] = response as u8;
        if let Some(answer) = answer {
            if let Some(sense) = &answer.sense {
                let sense = sense.as_bytes();
                let fits = sense.len().min(len - RESPONSE_HEAD);
                bytes[RESPONSE_HEAD..RESPONSE_HEAD + fits].copy_from_slice(&sense[..fits]);
                bytes[0..4].copy_from_slice(&(fits as u32).to_le_bytes());
            }
            let residual = u32::try_from(answer.residual).unwrap_or(u32::MAX);
            bytes[4..8].copy_from_slice(&residual.to_le_bytes());
            // 8: status_qualifier, which says nothing.
            bytes[10] = answer.status as u8;
        }
        Self { bytes, len }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
