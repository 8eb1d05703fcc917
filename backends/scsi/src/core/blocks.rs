//! Commands on blocks (SBC-3): each is turned into I/O that lies inside of the medium.

pub(crate) mod capacity;
pub(crate) mod flush;
pub(crate) mod provision;
pub(crate) mod transfer;
pub(crate) mod verify;

use crate::config::Medium;
use crate::sense::Sense;
use crate::task::{Cmd, Range, Refusal};
use crate::unit::{Kind, Unit};

/// Blocks that a CDB names.
#[derive(Debug, Clone, Copy)]
struct Extent {
    lba: u64,
    blocks: u64,
    /// Byte of the CDB where their number starts.
    length_at: u16,
}

impl Extent {
    fn of_6(cmd: &Cmd<'_>) -> Self {
        let lba = u64::from(cmd.cdb.be24(1) & 0x1f_ffff);
        // SBC-2, READ (6): none are 256.
        let blocks = match cmd.cdb.byte(4) {
            0 => 256,
            blocks => blocks.into(),
        };
        Self { lba, blocks, length_at: 4 }
    }

    fn of_10(cmd: &Cmd<'_>) -> Self {
        Self { lba: cmd.cdb.be32(2).into(), blocks: cmd.cdb.be16(7).into(), length_at: 7 }
    }

    fn of_12(cmd: &Cmd<'_>) -> Self {
        Self { lba: cmd.cdb.be32(2).into(), blocks: cmd.cdb.be32(6).into(), length_at: 6 }
    }

    fn of_16(cmd: &Cmd<'_>) -> Self {
        Self { lba: cmd.cdb.be64(2), blocks: cmd.cdb.be32(10).into(), length_at: 10 }
    }

    /// Its bytes, if they are there. Blocks that are not are so even if there are none of them (SBC-3, 5.11).
    fn range(self, medium: Medium, block_size: u32) -> Result<Range, Sense> {
        if self.lba >= medium.blocks || self.blocks > medium.blocks - self.lba {
            return Err(Sense::out_of_range(self.lba, medium.blocks));
        }
        // A medium has 2^63 bytes at most.
        let bytes = u64::from(block_size);
        Ok(Range { offset: self.lba * bytes, len: self.blocks * bytes })
    }

    fn at_most(self, blocks: u64) -> Result<(), Sense> {
        if self.blocks > blocks { Err(Sense::cdb(self.length_at)) } else { Ok(()) }
    }

    /// To the end of the medium, if no number is given.
    fn or_rest(self, medium: Medium) -> Self {
        match self.blocks {
            0 => Self { blocks: medium.blocks.saturating_sub(self.lba), ..self },
            _ => self,
        }
    }
}

/// There is no protection information: RDPROTECT, WRPROTECT, VRPROTECT and ORPROTECT are zero.
fn no_protection(cmd: &Cmd<'_>) -> Result<(), Sense> {
    if cmd.cdb.byte(1) >> 5 == 0 { Ok(()) } else { Err(Sense::cdb_bit(1, 7)) }
}

/// Data-out has what the command takes.
fn data_out(cmd: &Cmd<'_>, needed: u64) -> Result<(), Refusal> {
    if needed > cmd.data_out { Err(Refusal::Overrun { needed }) } else { Ok(()) }
}

impl Unit {
    /// The medium, if it can be written.
    fn writable(&self) -> Result<Medium, Sense> {
        let medium = self.ready()?;
        match self.is_write_protected() {
            false => Ok(medium),
            true if self.modes.software_write_protect => Err(Sense::SOFTWARE_WRITE_PROTECTED),
            true => Err(Sense::WRITE_PROTECTED),
        }
    }

    fn range(&self, medium: Medium, extent: Extent) -> Result<Range, Sense> {
        extent.range(medium, self.block_size())
    }

    /// Whether a write with this FUA bit has to be on the medium when it completes.
    fn durable(&self, fua: bool) -> bool {
        fua || !self.modes.write_cache
    }

    fn max_transfer(&self) -> u64 {
        match &self.kind {
            Kind::Disk(disk) if disk.max_transfer != 0 => disk.max_transfer.into(),
            _ => u64::MAX,
        }
    }
}
