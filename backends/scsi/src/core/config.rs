//! What a unit is: its names and its medium, as the caller describes them.

/// Bytes of a block of a CD-ROM or DVD (MMC-6, mode 1 and form 1 user data).
pub(crate) const CD_BLOCK: u32 = 2048;

/// Longest serial number, as others have it as well.
const MAX_SERIAL: usize = 36;

/// A description that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("'{0}' cannot be a SCSI name: use printable ASCII, at most {1} characters")]
    Name(String, usize),
    #[error("blocks of {0} bytes are not possible: use 512, 1024, 2048 or 4096")]
    BlockSize(u32),
    #[error("a physical block of 2^{0} logical blocks is not possible: use at most 2^15")]
    PhysicalBlock(u8),
    #[error("the medium is smaller than one block: it needs at least {0} bytes")]
    Empty(u32),
    #[error("a medium of {0} blocks is too large: at most 2^63 bytes are possible")]
    TooLarge(u64),
    #[error("a disk that is not removable needs its medium from the start")]
    NoMedium,
    #[error("the medium of a fixed disk cannot be changed")]
    Fixed,
}

/// How the unit is called (SPC-4, 6.6.2 and 7.8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub(crate) product: [u8; 16],
    pub(crate) serial: String,
    pub(crate) naa: Option<u64>,
}

pub(crate) const VENDOR: [u8; 8] = *b"CLEAVE  ";
pub(crate) const REVISION: [u8; 4] = *b"0001";

impl Identity {
    /// `product`: at most 16 characters. `serial`: at most 36; none if empty. `naa`: a world wide name, if there is one.
    ///
    /// # Errors
    /// Characters that are not printable ASCII, or too many.
    pub fn new(product: &str, serial: &str, naa: Option<u64>) -> Result<Self, ConfigError> {
        let check = |name: &str, max: usize| {
            let good = name.len() <= max && name.bytes().all(|byte| (0x20..0x7f).contains(&byte));
            if good { Ok(()) } else { Err(ConfigError::Name(name.to_owned(), max)) }
        };
        check(product, 16)?;
        check(serial, MAX_SERIAL)?;
        let mut padded = [b' '; 16];
        padded[..product.len()].copy_from_slice(product.as_bytes());
        Ok(Self { product: padded, serial: serial.to_owned(), naa })
    }
}

/// What is in a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Medium {
    /// Of the unit's block size; at least one.
    pub blocks: u64,
    pub read_only: bool,
}

impl Medium {
    pub(crate) fn check(self, block_size: u32) -> Result<(), ConfigError> {
        let bytes = self.blocks.checked_mul(block_size.into()).filter(|bytes| *bytes <= 1 << 63);
        match bytes {
            None => Err(ConfigError::TooLarge(self.blocks)),
            Some(0) => Err(ConfigError::Empty(block_size)),
            Some(_) => Ok(()),
        }
    }
}

/// The cache that writes go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteCache {
    /// At first: WCE.
    pub enabled: bool,
    /// An initiator may switch it.
    pub switchable: bool,
}

/// Blocks can be given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unmap {
    /// Blocks that are given back together.
    pub granularity: u32,
    /// What was given back reads as zeroes.
    pub reads_zeroes: bool,
}

/// A disk, apart from what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Bytes: 512, 1024, 2048 or 4096.
    pub block_size: u32,
    /// A physical block is `1 << physical_exponent` logical ones.
    pub physical_exponent: u8,
    /// The first logical block at the start of a physical one.
    pub lowest_aligned: u16,
    pub removable: bool,
    /// MEDIUM ROTATION RATE (SBC-3): 1 does not rotate, 0 does not say.
    pub rotation_rate: u16,
    pub write_cache: WriteCache,
    pub unmap: Option<Unmap>,
    /// Blocks of one command at most; 0 for as many as there are.
    pub max_transfer: u32,
    /// Blocks at which transfers are best cut, and the best number of them; 0 does not say.
    pub optimal_granularity: u16,
    pub optimal_transfer: u32,
}

impl Disk {
    /// A disk of memory cells with a write cache, which cannot give blocks back.
    pub fn new(block_size: u32) -> Self {
        Self {
            block_size,
            physical_exponent: 0,
            lowest_aligned: 0,
            removable: false,
            rotation_rate: 1,
            write_cache: WriteCache { enabled: true, switchable: true },
            unmap: None,
            max_transfer: 0,
            optimal_granularity: 0,
            optimal_transfer: 0,
        }
    }

    pub(crate) fn check(&self, medium: Option<Medium>) -> Result<(), ConfigError> {
        if ![512, 1024, 2048, 4096].contains(&self.block_size) {
            return Err(ConfigError::BlockSize(self.block_size));
        }
        if self.physical_exponent > 15 {
            return Err(ConfigError::PhysicalBlock(self.physical_exponent));
        }
        match medium {
            Some(medium) => medium.check(self.block_size),
            None if self.removable => Ok(()),
            None => Err(ConfigError::NoMedium),
        }
    }
}
