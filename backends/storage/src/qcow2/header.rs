//! The header of a qcow2 file, checked before anything acts on it (QEMU's docs/interop/qcow2.txt).
//!
//! imago reads it again and trusts more of it than is good for a daemon that serves images of strangers: what would
//! make it panic, allocate without bound or walk in circles is refused here, with what to do about it.

use std::ops::Range;

pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes of the header of version 2, and the least of version 3.
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;

/// Most bytes of the L1 table and of the refcount table: what QEMU accepts.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFTABLE_BYTES: u64 = 8 << 20;

/// Most bytes of a backing file's name.
const MAX_BACKING_NAME: u32 = 1023;

/// Most header extensions; QEMU writes four.
const MAX_EXTENSIONS: usize = 64;

mod incompatible {
    pub(super) const DIRTY: u64 = 1 << 0;
    pub(super) const CORRUPT: u64 = 1 << 1;
    pub(super) const DATA_FILE: u64 = 1 << 2;
    pub(super) const COMPRESSION_TYPE: u64 = 1 << 3;
    pub(super) const EXTENDED_L2: u64 = 1 << 4;
}

mod extension {
    pub(super) const END: u32 = 0;
    pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Bytes of one entry of the feature name table.
    pub(super) const FEATURE_NAME_LEN: usize = 48;
}

/// What a file is that begins like this, among the formats for disks that this is not.
pub(crate) fn name_of(magic: [u8; 4]) -> Option<&'static str> {
    match &magic {
        b"KDMV" | b"COWD" | b"# Di" => Some("a VMDK image"),
        b"vhdx" => Some("a VHDX image"),
        b"cone" => Some("a VHD image"),
        b"<<< " => Some("a VDI image"),
        b"QED\0" => Some("a QED image"),
        b"LUKS" => Some("a LUKS volume"),
        _ => None,
    }
}

/// Why a header is refused. Each ends a line that begins with the image's name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("is no qcow2 image: it begins with {0:02x?} instead of 'QFI'; is it raw? then use format raw")]
    Magic([u8; 4]),
    #[error("is {0}, and no qcow2 image: convert it with 'qemu-img convert -O qcow2'")]
    Other(&'static str),
    #[error("is an empty file, and no qcow2 image: make one with 'qemu-img create -f qcow2'")]
    Empty,
    #[error(
        "is too short for a qcow2 header: it has {0} bytes; make an image with 'qemu-img create -f qcow2'"
    )]
    Short(usize),
    #[error(
        "is qcow2 of version {0}, of which only 2 and 3 are known: convert it with 'qemu-img convert -O qcow2'"
    )]
    Version(u32),
    #[error("is encrypted, which is not supported: decrypt it with 'qemu-img convert'")]
    Encrypted,
    #[error(
        "was not closed after its last use (dirty bit), its refcounts may be wrong: run 'qemu-img check -r all' on it"
    )]
    Dirty,
    #[error("is marked corrupt: run 'qemu-img check -r all' on it")]
    Corrupt,
    #[error(
        "keeps its data in another file (data_file), which is not supported: convert it with 'qemu-img convert -O qcow2'"
    )]
    DataFile,
    #[error(
        "is compressed with something else than zlib, which is not supported: convert it with 'qemu-img convert -O qcow2 -o compression_type=zlib'"
    )]
    CompressionType,
    #[error(
        "has extended L2 entries (subclusters), which are not supported: convert it with 'qemu-img convert -O qcow2 -o extended_l2=off'"
    )]
    ExtendedL2,
    #[error(
        "needs features nobody here knows (incompatible features {0:#x}): convert it with 'qemu-img convert -O qcow2'"
    )]
    Unknown(u64),
    #[error(
        "has a cluster in use that it counts as free (at {0:#x}), as after a power failure: run 'qemu-img check -r all' on it"
    )]
    Miscounted(u64),
    #[error("is damaged: {0}; 'qemu-img check' may say more")]
    Damaged(String),
}

/// What stands behind an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backing {
    pub(super) name: String,
    pub(super) format: Option<String>,
}

/// What is needed to know about an image, within bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) cluster_bits: u32,
    /// Bytes of the disk.
    pub(super) size: u64,
    pub(super) l1_entries: u32,
    pub(super) l1_offset: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u32,
    /// log2 of a refcount's bits.
    pub(super) refcount_order: u32,
    pub(super) backing: Option<Backing>,
}

impl Header {
    /// Most bytes [`Header::parse`] looks at: the largest cluster.
    pub(super) const MAX_LEN: usize = 2 << 20;

    /// `bytes`: the file's first, up to [`Header::MAX_LEN`]. `file_len`: bytes of all of it.
    pub(super) fn parse(bytes: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        let fields = Fields(bytes);
        if bytes.is_empty() {
            return Err(HeaderError::Empty);
        }
        let magic = [0, 1, 2, 3].map(|at| bytes.get(at).copied().unwrap_or(0));
        if magic != MAGIC {
            return Err(name_of(magic).map_or(HeaderError::Magic(magic), HeaderError::Other));
        }
        let version = fields.u32(4)?;
        let len = match version {
            2 => V2_LEN,
            3 => fields.u32(100)? as usize,
            _ => return Err(HeaderError::Version(version)),
        };
        if version == 3 {
            check_features(fields.u64(72)?)?;
        }
        if fields.u32(32)? != 0 {
            return Err(HeaderError::Encrypted);
        }
        let cluster_bits = fields.u32(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged(format!("clusters of 2^{cluster_bits} bytes")));
        }
        let cluster = 1usize << cluster_bits;
        if (version == 3 && len < V3_LEN) || len > cluster || !len.is_multiple_of(8) {
            return Err(damaged(format!("a header of {len} bytes")));
        }
        let refcount_order = if version == 3 { fields.u32(96)? } else { 4 };
        if refcount_order > 6 {
            return Err(damaged(format!("refcounts of 2^{refcount_order} bits")));
        }
        let (backing_offset, first) = (fields.u64(8)?, &bytes[..bytes.len().min(cluster)]);
        let (format, extensions_end) = parse_extensions(first, len, backing_offset)?;
        let header = Self {
            cluster_bits,
            size: fields.u64(24)?,
            l1_entries: fields.u32(36)?,
            l1_offset: fields.u64(40)?,
            reftable_offset: fields.u64(48)?,
            reftable_clusters: fields.u32(56)?,
            refcount_order,
            backing: parse_backing(&fields, cluster, extensions_end, format)?,
        };
        header.check_tables(file_len)?;
        Ok(header)
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the disk that one L2 table maps.
    fn l2_coverage(&self) -> u64 {
        1 << (2 * self.cluster_bits - 3)
    }

    pub(super) fn l1_range(&self) -> Range<u64> {
        self.l1_offset..self.l1_offset + u64::from(self.l1_entries) * 8
    }

    pub(super) fn reftable_range(&self) -> Range<u64> {
        let len = u64::from(self.reftable_clusters) << self.cluster_bits;
        self.reftable_offset..self.reftable_offset + len
    }

    /// The tables that are held in memory are where they can be, and as large as they may be.
    fn check_tables(&self, file_len: u64) -> Result<(), HeaderError> {
        let needed = self.size.div_ceil(self.l2_coverage());
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if needed * 8 > MAX_L1_BYTES || self.size > i64::MAX as u64 {
            return Err(damaged(format!("a disk of {} bytes", self.size)));
        }
        if l1_bytes > MAX_L1_BYTES || u64::from(self.l1_entries) < needed {
            return Err(damaged(format!(
                "an L1 table of {} entries for a disk of {} bytes, which takes {needed}",
                self.l1_entries, self.size
            )));
        }
        let reftable_bytes = u64::from(self.reftable_clusters) << self.cluster_bits;
        if reftable_bytes == 0 || reftable_bytes > MAX_REFTABLE_BYTES {
            return Err(damaged(format!("a refcount table of {} clusters", self.reftable_clusters)));
        }
        self.check_place("L1 table", self.l1_offset, l1_bytes, file_len)?;
        self.check_place("refcount table", self.reftable_offset, reftable_bytes, file_len)
    }

    fn check_place(&self, what: &str, offset: u64, len: u64, file_len: u64) -> Result<(), HeaderError> {
        if len == 0 {
            return Ok(());
        }
        let fits = offset.checked_add(len).is_some_and(|end| end <= file_len);
        if !fits || !offset.is_multiple_of(self.cluster_size()) || offset == 0 {
            return Err(damaged(format!(
                "its {what} is said to be {len} bytes at {offset:#x}, but the file has {file_len} bytes"
            )));
        }
        Ok(())
    }
}

fn check_features(bits: u64) -> Result<(), HeaderError> {
    let known = [
        (incompatible::CORRUPT, HeaderError::Corrupt),
        (incompatible::DIRTY, HeaderError::Dirty),
        (incompatible::DATA_FILE, HeaderError::DataFile),
        (incompatible::COMPRESSION_TYPE, HeaderError::CompressionType),
        (incompatible::EXTENDED_L2, HeaderError::ExtendedL2),
    ];
    match known.into_iter().find(|(bit, _)| bits & bit != 0) {
        Some((_, error)) => Err(error),
        None if bits != 0 => Err(HeaderError::Unknown(bits)),
        None => Ok(()),
    }
}

/// The backing file's format, and where the extensions end: at an end mark, or at the backing file's name.
fn parse_extensions(
    cluster: &[u8],
    mut at: usize,
    name_offset: u64,
) -> Result<(Option<String>, usize), HeaderError> {
    let fields = Fields(cluster);
    let mut format: Option<String> = None;
    for _ in 0..MAX_EXTENSIONS {
        if at as u64 == name_offset {
            return Ok((format, at));
        }
        let (kind, len) = (fields.u32(at)?, fields.u32(at + 4)? as usize);
        if kind == extension::END {
            return Ok((format, at + 8));
        }
        let data = cluster.get(at + 8..).and_then(|rest| rest.get(..len));
        let data = data.ok_or_else(|| damaged(format!("a header extension of {len} bytes")))?;
        match kind {
            extension::BACKING_FORMAT => {
                let text = text(data, "backing format")?;
                if format.is_some_and(|other| other != text) {
                    return Err(damaged("two different backing formats".to_owned()));
                }
                format = Some(text);
            }
            extension::FEATURE_NAMES if !len.is_multiple_of(extension::FEATURE_NAME_LEN) => {
                return Err(damaged(format!("a feature name table of {len} bytes")));
            }
            _ => {}
        }
        at += 8 + len.next_multiple_of(8);
    }
    Err(damaged(format!("more than {MAX_EXTENSIONS} header extensions")))
}

fn parse_backing(
    fields: &Fields<'_>,
    cluster: usize,
    extensions_end: usize,
    format: Option<String>,
) -> Result<Option<Backing>, HeaderError> {
    let (offset, len) = (fields.u64(8)?, fields.u32(16)?);
    if offset == 0 {
        return Ok(None);
    }
    let at = usize::try_from(offset).unwrap_or(usize::MAX);
    let name =
        at.checked_add(len as usize).filter(|end| *end < cluster).and_then(|end| fields.0.get(at..end));
    let name = name.filter(|name| !name.is_empty() && len <= MAX_BACKING_NAME && at >= extensions_end);
    let name = name.ok_or_else(|| damaged(format!("a backing file's name of {len} bytes at {offset:#x}")))?;
    Ok(Some(Backing { name: text(name, "backing file's name")?, format }))
}

fn text(bytes: &[u8], what: &str) -> Result<String, HeaderError> {
    let text = std::str::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
    text.map(str::to_owned).ok_or_else(|| damaged(format!("the {what} is no text")))
}

fn damaged(what: String) -> HeaderError {
    HeaderError::Damaged(what)
}

/// Big-endian numbers in bytes that may end early.
struct Fields<'b>(&'b [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], HeaderError> {
        let bytes = self.0.get(at..).and_then(|rest| rest.first_chunk::<N>());
        bytes.copied().ok_or(HeaderError::Short(self.0.len()))
    }

    fn u32(&self, at: usize) -> Result<u32, HeaderError> {
        self.array(at).map(u32::from_be_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, HeaderError> {
        self.array(at).map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests;
