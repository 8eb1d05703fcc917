//! The root bus: bus 0, a host bridge in slot 0 and single-function devices in slots 1 to 31.
//!
//! ```text
//!   vCPU ──ECAM or CF8/CFC──> Root ──slot──> Function { ConfigSpace, where its BARs are mapped }
//!                                               │ command or BAR register written
//!                                               └──> unmap on the bus, tell the device, map at the new address
//! ```
//!
//! Invariants: a BAR is on the MMIO bus exactly where its registers decode, or nowhere if those addresses are
//! another's; the device is told of each change before the guest's write ends.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use super::PciDevice;
use super::config::{ConfigSpace, Identity};
use crate::bus::{Bus, BusDevice, BusError};

/// Bytes of ECAM for one bus: 32 slots of 8 functions of 4 KiB.
pub const ECAM_LEN: u64 = 1 << 20;
/// I/O ports of the address register and the data window after it.
pub const CONFIG_PORTS: u64 = 0xcf8;
pub const CONFIG_PORTS_LEN: u64 = 8;

const SLOTS: usize = 32;
const DATA_WINDOW: u64 = 4;
const ADDRESS_ENABLE: u32 = 1 << 31;

/// The host bridge is a function like any other, so that a kernel that looks for one finds it. The ids are those
/// Red Hat gives to generic host bridges without a driver of their own.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

#[derive(Debug, thiserror::Error)]
pub enum PciError {
    #[error("there is no PCI slot {0}: devices go to slots 1 to 31")]
    NoSlot(u8),
    #[error("PCI slot {0} is taken")]
    SlotTaken(u8),
    #[error("the window for PCI BARs is full: {needed:#x} bytes are needed for the device in slot {slot}")]
    WindowFull { slot: u8, needed: u64 },
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// Held by every device that is still on its way to the state after power-on; when the last is dropped, the reset
/// is complete.
#[derive(Clone)]
pub struct ResetToken {
    _last: Arc<OnLast>,
}

struct OnLast(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl ResetToken {
    pub fn new(complete: impl FnOnce() + Send + 'static) -> Self {
        Self { _last: Arc::new(OnLast(Mutex::new(Some(Box::new(complete))))) }
    }
}

impl Drop for OnLast {
    fn drop(&mut self) {
        if let Some(complete) = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            complete();
        }
    }
}

/// Bus 0 and what is on it.
pub struct Root {
    /// Not owned: the bus owns us, through ECAM.
    mmio: Weak<Bus>,
    slots: [OnceLock<Arc<Function>>; SLOTS],
    window: Mutex<Window>,
    config_address: AtomicU32,
}

impl Root {
    /// A root bus with its host bridge. BARs get addresses from the `window_len` bytes at `window_start`, which are
    /// on `mmio` and above all RAM.
    pub fn new(mmio: &Arc<Bus>, window_start: u64, window_len: u64) -> Arc<Self> {
        let window = Window { next: window_start, end: window_start.saturating_add(window_len) };
        let root = Self {
            mmio: Arc::downgrade(mmio),
            slots: Default::default(),
            window: Mutex::new(window),
            config_address: AtomicU32::new(0),
        };
        let bridge = Function::new(Arc::new(HostBridge), ConfigSpace::new(HOST_BRIDGE));
        let _ = root.slots[0].set(Arc::new(bridge));
        Arc::new(root)
    }

    /// Plugs `device` into `slot` (1 to 31) and gives its BARs addresses.
    ///
    /// # Errors
    /// When there is no such slot, it is taken, or the BARs do not fit the window.
    pub fn add(&self, slot: u8, device: Arc<dyn PciDevice>) -> Result<(), PciError> {
        let place = self.slots.get(usize::from(slot)).filter(|_| slot != 0).ok_or(PciError::NoSlot(slot))?;
        let mut config = device.config_space();
        let bars: Vec<_> = config.bars().collect();
        for (index, size) in bars {
            let address = self.window.lock().unwrap_or_else(PoisonError::into_inner).take(size);
            config.assign_bar(index, address.ok_or(PciError::WindowFull { slot, needed: size })?);
        }
        place.set(Arc::new(Function::new(device, config))).map_err(|_| PciError::SlotTaken(slot))
    }

    /// Puts configuration space on the two address spaces: `ecam` is where its [`ECAM_LEN`] bytes begin.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, pio: &Bus, mmio: &Bus, ecam: u64) -> Result<(), PciError> {
        pio.insert(CONFIG_PORTS, CONFIG_PORTS_LEN, Arc::new(ConfigPorts(Arc::clone(self))))?;
        mmio.insert(ecam, ECAM_LEN, Arc::new(Ecam(Arc::clone(self))))?;
        Ok(())
    }

    /// Resets every function; `complete` is called, on any thread, when all devices are back in the state after
    /// power-on. Until then the guest must not run.
    pub fn reset(&self, complete: impl FnOnce() + Send + 'static) {
        let token = ResetToken::new(complete);
        self.config_address.store(0, Ordering::Relaxed);
        for function in self.slots.iter().filter_map(OnceLock::get) {
            function.reset(self.mmio.upgrade().as_deref(), &token);
        }
    }

    fn read(&self, at: Location, data: &mut [u8]) {
        match self.function(at) {
            Some(function) => function.read(at.register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, at: Location, data: &[u8]) {
        if let Some(function) = self.function(at) {
            function.write(self.mmio.upgrade().as_deref(), at.register, data);
        }
    }

    fn function(&self, at: Location) -> Option<&Arc<Function>> {
        (at.bus == 0 && at.function == 0).then(|| self.slots[at.slot].get())?
    }
}

/// Hands out addresses for BARs, each aligned to its size.
struct Window {
    next: u64,
    end: u64,
}

impl Window {
    fn take(&mut self, size: u64) -> Option<u64> {
        let start = self.next.checked_next_multiple_of(size)?;
        let end = start.checked_add(size).filter(|end| *end <= self.end)?;
        self.next = end;
        Some(start)
    }
}

/// A register of a function, by bus number, slot and function.
#[derive(Clone, Copy)]
struct Location {
    bus: u8,
    slot: usize,
    function: u8,
    register: usize,
}

impl Location {
    /// PCI Express Base Specification, 7.2.2: bus in bits 27:20, slot in 19:15, function in 14:12.
    fn from_ecam(offset: u64) -> Self {
        Self {
            bus: (offset >> 20) as u8,
            slot: (offset >> 15) as usize & (SLOTS - 1),
            function: (offset >> 12) as u8 & 7,
            register: offset as usize & 0xfff,
        }
    }

    /// PCI Local Bus Specification 3.0, 3.2.2.3.2: bus in bits 23:16, slot in 15:11, function in 10:8.
    fn from_config_address(address: u32, byte: u64) -> Self {
        Self {
            bus: (address >> 16) as u8,
            slot: (address >> 11) as usize & (SLOTS - 1),
            function: (address >> 8) as u8 & 7,
            register: (address & 0xfc) as usize | byte as usize & 3,
        }
    }
}

struct Ecam(Arc<Root>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(Location::from_ecam(offset), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(Location::from_ecam(offset), data);
    }
}

struct ConfigPorts(Arc<Root>);

impl ConfigPorts {
    fn location(&self, offset: u64) -> Option<Location> {
        let address = self.0.config_address.load(Ordering::Relaxed);
        let open = offset >= DATA_WINDOW && address & ADDRESS_ENABLE != 0;
        open.then(|| Location::from_config_address(address, offset - DATA_WINDOW))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (self.location(offset), &mut *data) {
            (Some(at), data) => self.0.read(at, data),
            (None, [a, b, c, d]) if offset == 0 => {
                [*a, *b, *c, *d] = self.0.config_address.load(Ordering::Relaxed).to_le_bytes();
            }
            (None, data) => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (self.location(offset), data) {
            (Some(at), data) => self.0.write(at, data),
            // Only a write of all 32 bits is one to the address register.
            (None, &[a, b, c, d]) if offset == 0 => {
                self.0.config_address.store(u32::from_le_bytes([a, b, c, d]) & !0b11, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

struct FunctionState {
    config: ConfigSpace,
    /// Where each BAR is on the bus.
    mapped: Vec<(u8, Option<u64>)>,
}

/// A device with its configuration space.
struct Function {
    device: Arc<dyn PciDevice>,
    /// As it was when the device was plugged in.
    initial: ConfigSpace,
    state: Mutex<FunctionState>,
}

impl Function {
    fn new(device: Arc<dyn PciDevice>, initial: ConfigSpace) -> Self {
        let mapped = initial.bars().map(|(index, _)| (index, None)).collect();
        let state = FunctionState { config: initial.clone(), mapped };
        Self { device, initial, state: Mutex::new(state) }
    }

    fn read(&self, register: usize, data: &mut [u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.device.before_config_read(&mut state.config, register, data.len());
        state.config.read(register, data);
    }

    fn write(self: &Arc<Self>, mmio: Option<&Bus>, register: usize, data: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.config.write(register, data);
        self.device.after_config_write(&mut state.config, register, data.len());
        self.remap(mmio, &mut state);
    }

    fn reset(self: &Arc<Self>, mmio: Option<&Bus>, token: &ResetToken) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.config = self.initial.clone();
        self.remap(mmio, &mut state);
        self.device.reset(token.clone());
    }

    fn remap(self: &Arc<Self>, mmio: Option<&Bus>, state: &mut FunctionState) {
        // Without a bus the machine is on its way out.
        let Some(mmio) = mmio else { return };
        let FunctionState { config, mapped } = state;
        for (index, place) in mapped.iter_mut() {
            let wanted = config.decoded(*index);
            if wanted == *place {
                continue;
            }
            if let Some(old) = place.take() {
                self.device.bar_moved(*index, None);
                mmio.remove(old);
            }
            let Some(address) = wanted else { continue };
            let Some((_, size)) = config.bars().find(|(bar, _)| bar == index) else { continue };
            let window = Arc::new(BarWindow { function: Arc::clone(self), index: *index });
            match mmio.insert(address, size, window) {
                Ok(()) => {
                    *place = Some(address);
                    self.device.bar_moved(*index, Some(address));
                }
                Err(error) => tracing::debug!("a BAR stays unmapped: {error}"),
            }
        }
    }
}

struct BarWindow {
    function: Arc<Function>,
    index: u8,
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.device.read_bar(self.index, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function.device.write_bar(self.index, offset, data);
    }
}

struct HostBridge;

impl PciDevice for HostBridge {
    fn config_space(&self) -> ConfigSpace {
        ConfigSpace::new(HOST_BRIDGE)
    }

    fn read_bar(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&self, _token: ResetToken) {}
}

#[cfg(test)]
mod tests;
