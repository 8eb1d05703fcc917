//! The PCI root bus: configuration space over ECAM and CF8/CFC, memory BARs, MSI-X.

mod config;
mod host;
pub mod msix;
mod root;

pub use config::{ConfigSpace, Identity};
#[cfg(test)]
pub use host::fake;
pub use host::{Doorbells, Interrupts};
pub use root::{ResetToken, Root};

/// One function as its device sees it. The root owns its configuration space and tells the device what happens
/// there; vCPU threads call it at the same time.
pub trait PciDevice: Send + Sync {
    /// The configuration space it starts with.
    fn config_space(&self) -> ConfigSpace;

    /// The guest is about to read `len` bytes at `offset`.
    fn before_config_read(&self, _config: &mut ConfigSpace, _offset: usize, _len: usize) {}

    /// The guest wrote `len` bytes at `offset`.
    fn after_config_write(&self, _config: &mut ConfigSpace, _offset: usize, _len: usize) {}

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]);

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]);

    /// The BAR is now at this guest-physical address, or nowhere.
    fn bar_moved(&self, _bar: u8, _address: Option<u64>) {}

    /// Starts going back to the state after power-on; `token` is dropped when it is there.
    fn reset(&self, token: ResetToken);
}
