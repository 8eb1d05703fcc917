//! The configuration space of one function: a type 0 header, its capabilities and its 64-bit memory BARs
//! (PCI Local Bus Specification 3.0, 6.1 and 6.2.5).
//!
//! Every byte has a mask of the bits that software may write. That alone gives BARs the behaviour by which software
//! finds their size: the bits below the size are not writable and read as zero.

/// Bytes of configuration space. There is no extended part: what lies beyond reads as all ones, which also spares a
/// kernel the search for extended capabilities there.
pub const CONFIG_SPACE_LEN: usize = 256;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_SERR: u16 = 1 << 8;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const FIRST_BAR: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const BAR_MEMORY_64: u32 = 0b100;
const BAR_FLAGS: u64 = 0xf;

/// What the header says of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Class, subclass, programming interface: 0xCCSSPP.
    pub class: u32,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// A 64-bit memory BAR: it takes the registers `index` and `index + 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bar {
    index: u8,
    /// Bytes, a power of two.
    size: u64,
}

/// What is in configuration space and what software may change of it.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SPACE_LEN],
    writable: [u8; CONFIG_SPACE_LEN],
    bars: Vec<Bar>,
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_SPACE_LEN],
            writable: [0; CONFIG_SPACE_LEN],
            bars: Vec::new(),
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        let class_and_revision = identity.class << 8 | u32::from(identity.revision);
        space.set(0x08, &class_and_revision.to_le_bytes());
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_SERR | COMMAND_INTX_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        // Cache line size and interrupt line are scratch registers of the software.
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Adds a 64-bit memory BAR of `size` bytes, a power of two of at least a page.
    ///
    /// # Panics
    /// If the size or the index is none that a BAR can have: the device's own constants are wrong.
    pub fn add_bar(&mut self, index: u8, size: u64) {
        assert!(size.is_power_of_two() && size >= 4096 && index < 5);
        assert!(self.bars.iter().all(|bar| bar.index.abs_diff(index) >= 2));
        let at = FIRST_BAR + 4 * usize::from(index);
        self.set(at, &BAR_MEMORY_64.to_le_bytes());
        self.allow(at, &(!(size - 1) & !BAR_FLAGS).to_le_bytes());
        self.bars.push(Bar { index, size });
    }

    /// Adds a capability and gives the offset at which it starts. `body` is what follows the id and the link.
    ///
    /// # Panics
    /// If capabilities outgrow the space: the device's own constants are wrong.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_capability;
        self.set(self.last_link, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_link = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Lets software write the bits in `mask`, from the byte at `offset` on.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Puts `bytes` at `offset`, whatever software may write there.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// A 16-bit register; `offset` is a constant of the caller within the space.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// A 32-bit register; `offset` is a constant of the caller within the space.
    pub fn dword(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// What software reads.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// What software writes: only the bits it may change do.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..CONFIG_SPACE_LEN).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }

    /// The BARs as (index, size).
    pub fn bars(&self) -> impl Iterator<Item = (u8, u64)> + '_ {
        self.bars.iter().map(|bar| (bar.index, bar.size))
    }

    /// Gives a BAR an address, as firmware does.
    pub fn assign_bar(&mut self, index: u8, address: u64) {
        let at = FIRST_BAR + 4 * usize::from(index);
        self.write(at, &address.to_le_bytes());
    }

    /// Where a BAR decodes addresses: `None` while the command register has memory off, or at an address that no
    /// BAR can have (zero, and what the sizing of a BAR leaves in it).
    pub fn decoded(&self, index: u8) -> Option<u64> {
        let bar = self.bars.iter().find(|bar| bar.index == index)?;
        let at = FIRST_BAR + 4 * usize::from(index);
        let address = (u64::from(self.dword(at)) | u64::from(self.dword(at + 4)) << 32) & !BAR_FLAGS;
        let on = self.word(COMMAND) & COMMAND_MEMORY != 0;
        (on && address != 0 && address < PHYSICAL_LIMIT - bar.size).then_some(address)
    }
}

/// Architectural limit of a physical address: 52 bits.
const PHYSICAL_LIMIT: u64 = 1 << 52;
